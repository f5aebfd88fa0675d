"""Packed rows: documents that share a window train as if each were alone, and padding does not count."""

import dataclasses

import jax
import numpy as np
import pytest

from mmfree_jax.commands.evaluate import evaluate as evaluate_command
from mmfree_jax.config import FAMILIES, ConfigError, RunConfig
from mmfree_jax.data import Mixture, TokenSet, resolve_data
from mmfree_jax.data.building.packing import pack
from mmfree_jax.data.building.token_writer import write_token_set
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer
from mmfree_jax.files import read_json
from mmfree_jax.run_folder import check_data
from mmfree_jax.training.loop import train
from mmfree_jax.training.step import make_program, program_key
from tests.conftest import MAIN_FAMILIES, sentences, tiny_model, tiny_run

END, LENGTH = 0, 33
FIRST, SECOND, THIRD = [7, 8, 9, 9, 8], [20, 21, 22, 23], [40, 41, 40, 42, 43, 44, 45]


def apart(run: RunConfig, **changes) -> RunConfig:
    return dataclasses.replace(run, data=dataclasses.replace(run.data, separate_documents=True), **changes)


def window(*documents: list[int], begin: bool = False) -> np.ndarray:
    """Documents one after another, then padding: int32 [1, LENGTH]. begin: an end of document stands before them."""
    tokens = [END] * begin + [token for document in documents for token in [*document, END]]
    return np.array([tokens + [END] * (LENGTH - len(tokens))], np.int32)


def model(family: str):
    if family in MAIN_FAMILIES:
        return tiny_model(family)
    mixer, linear = FAMILIES[family]
    return dataclasses.replace(tiny_model("transformer++"), mixer=mixer, linear=linear, heads=1)


def nats(program, params, tokens: np.ndarray, targets: int) -> float:
    """Of the first `targets` targets of a window."""
    return float(program.nats(params, tokens)[:, :targets].sum())


@pytest.mark.parametrize("family", [*MAIN_FAMILIES, "matmul-free-rwkv4"])
def test_documents_in_one_row_lose_exactly_what_they_lose_alone(family, tmp_path):
    joined = tiny_run("matmul-free", tmp_path, model=model(family))
    program, unaware = (make_program(program_key(run, END)) for run in (apart(joined), joined))
    params = program.init(jax.random.key(0)).params
    row, targets = window(FIRST, SECOND, THIRD), len(FIRST + SECOND + THIRD) + 2
    alone = nats(program, params, window(FIRST), len(FIRST))  # nothing predicts a row's very first token
    alone += sum(nats(unaware, params, window(d, begin=True), len(d) + 1) for d in (SECOND, THIRD))
    assert nats(program, params, row, targets) == pytest.approx(alone, rel=1e-5)
    assert nats(unaware, params, row, targets) != pytest.approx(alone, rel=1e-5)


def test_a_step_counts_every_target_but_padding_alike_whatever_the_micro_batches(tmp_path):
    run = apart(tiny_run("transformer++", tmp_path))
    halves = dataclasses.replace(run, optim=dataclasses.replace(run.optim, accumulate=2))
    rows = np.concatenate([window(FIRST * 5, SECOND), window(THIRD), window(SECOND), window(FIRST)])
    after = []
    for program in (make_program(program_key(one, END)) for one in (run, halves)):
        state = program.init(jax.random.key(0))
        total = float(program.nats(state.params, rows)[(rows[:, 1:] != END) | (rows[:, :-1] != END)].sum())
        text = (rows != END).sum() + 1  # every token but each row's first, every end: 4 less, 5 more
        state, metrics = program.train_step(state, rows, np.float32(1e-2))
        assert float(metrics["loss"]) == pytest.approx(total / text, rel=1e-5)
        after.append(jax.tree.leaves(state.params))
    for one, other in zip(*after, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_a_packed_set_trains(family, token_set: TokenSet, tmp_path):
    packed = pack(token_set, tmp_path / "packed", 32)
    run = apart(tiny_run(family, packed.path), steps=40)
    result = train(run, tmp_path / "run", packed)
    assert result["loss"] < 4.5  # 5.5 at the start
    assert result["val_tokens"] == len(token_set.split("valid")) - 1
    assert read_json(tmp_path / "run" / "config.json")["data"]["separate_documents"] is True


def test_a_packed_set_is_refused_where_its_rows_would_be_torn_or_joined(token_set: TokenSet, tmp_path):
    packed = pack(token_set, tmp_path / "packed", 32)
    run = apart(tiny_run("matmul-free", packed.path))
    longer = dataclasses.replace(run, data=dataclasses.replace(run.data, sequence=64))
    for wrong in (longer, tiny_run("matmul-free", packed.path)):
        with pytest.raises(ConfigError, match=r"it needs data\.sequence=32 and data\.separate_documents=True"):
            train(wrong, tmp_path / "run", packed)
    assert not (tmp_path / "run").exists()


def test_held_out_text_is_asked_only_of_what_is_evaluated_on(token_set: TokenSet, tmp_path):
    texts = {"train": sentences(50, 5), "valid": []}
    card = {"name": "all", "description": "made up", "sources": []}
    none = write_token_set(tmp_path / "none", texts, byte_tokenizer(), card)
    run = tiny_run("matmul-free", none.path)
    with pytest.raises(ConfigError, match="has no held-out text: build it with some, or train with evaluate=False"):
        check_data(run, none)
    check_data(dataclasses.replace(run, evaluate=False), none)
    check_data(run, Mixture([token_set, none], [1, 1]))
    with pytest.raises(ConfigError, match="has no held-out text"):
        check_data(run, Mixture([none, token_set], [1, 1]))


def test_a_packed_set_is_evaluated_on_as_any_other(token_set: TokenSet, tmp_path, capsys):
    """Its held-out text is not packed."""
    packed = pack(token_set, tmp_path / "packed", 64)
    result = train(tiny_run("matmul-free", token_set.path), tmp_path / "run", token_set)
    assert evaluate_command([str(tmp_path / "run"), "--corpus", str(packed.path)]) == 0
    assert f"loss {result['loss']:.6g}" in capsys.readouterr().out


def test_a_mixture_of_named_corpora_trains(token_set: TokenSet, tmp_path, monkeypatch):
    monkeypatch.setenv("MMFREE_JAX_CACHE", str(tmp_path))
    packed = pack(token_set, tmp_path / "tier-s-257", 32)
    run = apart(tiny_run("matmul-free", packed.path))
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, corpus="s", mixture=("s",), weights=(3.0, 1.0)))
    result = train(run, tmp_path / "run", resolve_data(run.data))
    assert result["val_set"] == f"{packed.fingerprint}:valid"
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(ConfigError, match="name 2 corpora, not 1"):
        train(run, tmp_path / "run", packed)
