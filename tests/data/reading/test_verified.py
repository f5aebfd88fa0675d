"""Damaged data is found before the first step, and what was found good is not read again."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from mmfree_jax.data import TokenSet
from mmfree_jax.data.corpora import resolve_data
from mmfree_jax.data.reading import verified
from mmfree_jax.data.reading.token_set import TokenSetError
from mmfree_jax.data.reading.verified import verify_once
from mmfree_jax.training.loop import train
from tests.conftest import tiny_run


@pytest.fixture
def copy(token_set, tmp_path, monkeypatch) -> Path:
    """A copy of the tokens that this test may damage, and a cache without notes."""
    monkeypatch.setenv("MMFREE_JAX_CACHE", str(tmp_path / "cache"))
    shutil.copytree(token_set.path, tmp_path / "set")
    return tmp_path / "set"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def no_step(*_):
    raise AssertionError("a step was taken")


@pytest.mark.parametrize("file", ["train-00000.bin", "train-00000.docs", "valid-00000.bin"])
def test_a_flipped_bit_is_named_before_anything_is_compiled_or_written(file, copy, tmp_path, monkeypatch):
    verify_once(TokenSet.open(copy))
    flip(copy / file)
    monkeypatch.setattr("mmfree_jax.training.loop.make_program", no_step)
    with pytest.raises(TokenSetError, match=rf"set/{file} is damaged \(wrong SHA-256\)"):
        train(tiny_run("matmul-free", copy), tmp_path / "run", TokenSet.open(copy))
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_is_not_that_of_the_tokens_is_named(copy):
    tokenizer = copy / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(TokenSetError, match=r"tokenizer\.json is not the tokenizer that made these tokens"):
        verify_once(TokenSet.open(copy))


def test_what_was_verified_is_read_again_only_if_it_has_changed(copy, monkeypatch):
    read = []
    monkeypatch.setattr(TokenSet, "verify", lambda one: read.append(one.path))
    for _ in range(2):
        verify_once(TokenSet.open(copy))
    assert len(read) == 1
    os.utime(copy / "train-00000.bin")
    verify_once(TokenSet.open(copy))
    assert len(read) == 2
    moved = copy.rename(copy.with_name("moved"))
    verify_once(TokenSet.open(moved))
    assert read[2:] == [moved]
    note = next((verified.cache_folder() / "verified").iterdir())
    note.write_text("torn {")
    verify_once(TokenSet.open(moved))
    assert len(read) == 4


def test_all_sets_of_a_mixture_are_verified(token_set, copy, tmp_path):
    flip(copy / "train-00000.bin")
    run = tiny_run("matmul-free", token_set.path)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, mixture=(str(copy),)))
    with pytest.raises(TokenSetError, match="is damaged"):
        train(run, tmp_path / "run", resolve_data(run.data))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float64"},
        {"dtype": ["uint16"]},
        {"vocab_size": -1},
        {"vocab_size": True},
        {"end_of_document": 257},
        {"fingerprint": "../../x"},
        {"packed_sequence": 1},
        {"splits": []},
        {"splits": {"train": {"shards": [], "text_bytes": -1}}},
        {"splits": {"train": {"shards": {}, "text_bytes": 1}}},
    ],
)
def test_an_index_with_impossible_values_is_refused(change, copy):
    index = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(TokenSetError, match=r"index\.json (has|describes) "):
        TokenSet.open(copy)


@pytest.mark.parametrize(
    "name", ["../set/train-00000.bin", "/etc/passwd", "a/b.bin", ".hidden.bin", "x.txt", "a\0.bin", 3]
)
def test_an_index_does_not_lead_out_of_its_folder(name, copy):
    index = json.loads((copy / "index.json").read_text())
    index["splits"]["train"]["shards"][0]["file"] = name
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(TokenSetError, match=r"has a shard in the split 'train' that is none"):
        TokenSet.open(copy)
