"""Packed folders: exact, small, mapped, whole or not there, and never a damaged one unnoticed."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.config import FAMILIES, ConfigError
from mmfree_jax.inference import packed
from mmfree_jax.inference.generate import decode, start
from mmfree_jax.inference.model import load_packed, serve_model
from mmfree_jax.inference.sampling import GREEDY, stacked
from tests.inference.small import logits, made

safetensors = pytest.importorskip("safetensors.numpy")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["planes", "trits"])
def test_a_packed_model_computes_what_the_model_computes(tmp_path, family, layout):
    if layout == "trits" and FAMILIES[family][1] == "dense":
        pytest.skip("dense weights have one layout")
    model = made(family)
    packed.save_packed(model, tmp_path / "packed", stored="float32", layout=layout)
    expected, found = logits(model), logits(load_packed(tmp_path / "packed"))
    assert found.shape == (2, 12, 300)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("matmul-free", {"weight_scale": "channel"}),
        ("matmul-free", {"weight_scale": "optimal"}),
        ("matmul-free", {"activation_bits": 4}),
        ("matmul-free", {"activation_bits": 0}),
        ("matmul-free", {"output_gate": "paper"}),
        ("matmul-free", {"lower_bounds": False}),
        ("matmul-free", {"tie_embeddings": True}),
        ("matmul-free", {"parametrisation": "mup", "base_width": 32, "base_depth": 1}),
        ("bitnet", {"tie_embeddings": True, "activation": "relu2", "joint_glu": False}),
        ("matmul-free", {"joint_glu": False}),
        ("transformer++", {"tie_embeddings": True}),
    ],
)
def test_every_switch_of_the_architecture_is_served(family, changes):
    model = made(family, **changes)
    expected = logits(model)
    np.testing.assert_allclose(logits(serve_model(model)), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_on_the_host_gives_the_same_tokens(tmp_path, family):
    packed.save_packed(made(family), tmp_path / "packed")
    generated, sizes = [], []
    for place in ("device", "host"):
        model = load_packed(tmp_path / "packed", embedding=place)
        progress, chosen = decode(model, start(model, 2, 12), stacked([GREEDY] * 2), 12, greedy=True)
        generated.append((chosen.tokens, chosen.logprobs, progress.logits_BV))
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(model)))
    for on_device, on_host in zip(*generated, strict=True):
        np.testing.assert_array_equal(on_device, on_host)
    assert sizes[0] - sizes[1] == model.embedding.rows_VD.nbytes


def test_an_embedding_that_is_the_head_stays_with_the_device():
    with pytest.raises(ConfigError, match="is its head too"):
        serve_model(made("matmul-free", tie_embeddings=True), embedding="host")


def test_codes_and_scales_are_stored_and_never_quantised_again(tmp_path):
    model = made("matmul-free")
    packed.save_packed(model, tmp_path / "packed")
    _, arrays = packed.read_packed(tmp_path / "packed")
    for group, q in enumerate(model.blocks.mixer.gates.stacked_codes()):
        stored = arrays["blocks.mixer.gates.codes"][:, group]
        assert stored.shape == (2, 96, 24)
        np.testing.assert_array_equal(stored, packed.pack(np.asarray(q.codes).swapaxes(1, 2), "planes"))
        np.testing.assert_array_equal(arrays["blocks.mixer.gates.scale"][:, group, 0], np.asarray(q.scale)[:, 0, 0])


def test_other_programs_read_the_file_and_its_size_is_that_of_the_codes(tmp_path):
    packed.save_packed(made("matmul-free"), tmp_path / "packed", tokenizer_json="{}", end=3)
    path = tmp_path / "packed" / packed.TENSORS
    arrays, ours = safetensors.load_file(path), packed.map_tensors(path)
    assert arrays.keys() == ours.keys()
    assert all(np.array_equal(arrays[name].view(np.uint8), ours[name].view(np.uint8)) for name in arrays)
    D, F, L, V = 96, 200, 2, 300
    assert (
        sum(a.nbytes for n, a in ours.items() if n.endswith(".codes")) == L * (4 * D * D + 3 * D * F) // 4 + V * D // 4
    )
    assert all((a.ctypes.data % packed.ALIGNMENT) == 0 for n, a in ours.items() if n == "blocks.glu.down.codes")
    facts = json.loads((tmp_path / "packed" / packed.PACKED).read_text())
    assert facts["end_of_document"] == 3
    assert facts["model"]["vocab"] == 300


def test_a_mapped_model_takes_no_memory_of_its_own(tmp_path):
    """Loading 48 MB of codes adds less than a quarter of that to what the process holds."""
    sizes = {"width": 2048, "glu_width": 4096, "depth": 4}
    packed.save_packed(made("matmul-free", **sizes), tmp_path / "packed")
    code = (  # of pages that are in memory
        "import jax, sys, resource; from pathlib import Path\n"
        "from mmfree_jax.inference.model import load_packed\n"
        "held = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "load_packed(Path(sys.argv[1]).parent / 'small'); before = held()\n"
        "model = load_packed(Path(sys.argv[1])); print(held() - before)"
    )
    packed.save_packed(made("matmul-free"), tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "packed")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 12e6


def test_decoding_makes_no_copy_of_the_embedding(tmp_path):
    """As XLA would of a bfloat16 table on a CPU."""
    packed.save_packed(made("matmul-free", vocab=20_000, tokenizer_vocab=0), tmp_path / "packed")
    model = load_packed(tmp_path / "packed")
    arguments = model, start(model, 1, 0), stacked([GREEDY]), 4
    found = decode.lower(*arguments, greedy=True).compile().memory_analysis()
    assert found.temp_size_in_bytes < 20_000 * 96


@pytest.mark.parametrize("fault", ["cut", "flipped", "header", "version", "missing", "nothing"])
def test_a_damaged_folder_is_named(tmp_path, fault):
    folder = tmp_path / "packed"
    packed.save_packed(made("matmul-free"), folder)
    file = folder / packed.TENSORS
    content = bytearray(file.read_bytes())
    if fault == "cut":
        file.write_bytes(content[:-1])
    elif fault == "flipped":
        content[-100] ^= 1
        file.write_bytes(content)
    elif fault == "header":
        file.write_bytes(b"\xff" * 64)
    elif fault == "version":
        facts = json.loads((folder / packed.PACKED).read_text())
        (folder / packed.PACKED).write_text(json.dumps(facts | {"version": 2}))
    elif fault == "missing":
        file.unlink()
    else:
        folder = tmp_path

    def open_and_verify():
        load_packed(folder)
        packed.verify_packed(folder)

    with pytest.raises(packed.PackedError, match=r"packed|model\.safetensors"):
        open_and_verify()


def test_a_folder_is_whole_or_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "write_json", lambda *a: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        packed.save_packed(made("hgrn"), tmp_path / "packed")
    assert os.listdir(tmp_path) == []


def test_a_folder_with_files_is_not_replaced(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        packed.save_packed(made("hgrn"), tmp_path)


def test_bfloat16_rounds_the_embedding_and_nothing_else():
    model = made("matmul-free")
    rounded = model.embedding[...].astype(jnp.bfloat16).astype(jnp.float32)
    found = logits(serve_model(model, stored="bfloat16"))
    model.embedding[...] = rounded
    expected = logits(model)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
