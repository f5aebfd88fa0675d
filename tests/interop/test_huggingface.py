"""Hugging Face folders: what comes back is what went in, and what does not fit is named."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import reference
from models.families import CONFIGS, family, logits, model, plain_model, tokens

from mmfree_jax.config import ConfigError
from mmfree_jax.interop.huggingface import (
    Origin,
    load_huggingface,
    read_config,
    read_origin,
    save_huggingface,
    slots,
)
from mmfree_jax.interop.safetensors import INDEX, InteropError
from mmfree_jax.presets import model_preset

safetensors = pytest.importorskip("safetensors.numpy", reason="needs the extra huggingface")
SAVED = ["matmul-free", "transformer++", "tied", "tied-dense", "grouped-queries", "no-floors"]
BOTH = pytest.mark.parametrize("name", ["matmul-free", "transformer++"])


def contents(folder):
    return {name: array for file in folder.glob("*.safetensors") for name, array in safetensors.load_file(file).items()}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_model_is_read_back_exactly(name, tmp_path):
    built = model(CONFIGS[name])
    save_huggingface(built, tmp_path / "hf")
    again = load_huggingface(tmp_path / "hf")
    assert again.config == built.config
    for a, b in zip(*(jax.tree.leaves_with_path(nnx.state(m)) for m in (again, built)), strict=True):
        np.testing.assert_array_equal(a[1], b[1], err_msg=jax.tree_util.keystr(a[0]))


@BOTH
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shard_bytes", [10**9, 4000], ids=["one file", "shards"])
def test_round_trip_is_bit_identical_in_every_type(name, dtype, shard_bytes, tmp_path):
    save_huggingface(model(CONFIGS[name]), tmp_path / "first", dtype, shard_bytes=shard_bytes)
    assert (tmp_path / "first" / "model.safetensors.index.json").exists() == (shard_bytes == 4000)
    save_huggingface(load_huggingface(tmp_path / "first"), tmp_path / "second", dtype)
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert first.keys() == second.keys()
    for key, array in first.items():
        assert array.dtype == jnp.dtype(dtype)
        assert array.tobytes() == second[key].tobytes(), key


@BOTH
def test_tensors_are_those_that_the_second_implementation_reads(name, tmp_path):
    built = model(CONFIGS[name])
    save_huggingface(built, tmp_path / "hf")
    expected = reference.state_dict(built)
    found = contents(tmp_path / "hf")
    assert found.keys() == expected.keys()
    for key, array in found.items():
        np.testing.assert_array_equal(array, expected[key].astype(np.float32), err_msg=key)


def test_float64_logits_of_a_checkpoint_are_the_references(tmp_path):
    save_huggingface(model(family("matmul-free", width=64, glu_width=192, depth=6)), tmp_path / "hf")
    ids = tokens(CONFIGS["matmul-free"], time=33)
    weights = {k: v.astype(np.float64) for k, v in contents(tmp_path / "hf").items()}
    with jax.enable_x64(True):
        built = load_huggingface(tmp_path / "hf", dtype="float64")
        np.testing.assert_allclose(logits(built, ids), reference.matmul_free(weights, np.asarray(ids), 6), atol=1e-9)


@pytest.mark.parametrize(("size", "count"), [("370m", 365), ("1.3b", 365), ("2.7b", 485)])
def test_released_sizes_have_the_official_keys(size, count):
    table = slots(model_preset("matmul-free", size))
    assert len(table) == count
    assert table["model.layers.3.mlp.gate_proj.weight"].shape[0] == 2 * model_preset("matmul-free", size).glu_width
    kinds = {key.split(".", 3)[-1] for key in table if key.startswith("model.layers.")}
    assert kinds == {
        *(f"attn.{p}_proj.{w}" for p in "ifgo" for w in ("weight", "norm.weight")),
        *(f"mlp.{p}_proj.{w}" for p in ("gate", "down") for w in ("weight", "norm.weight")),
        *("attn.g_norm.weight", "attn_norm.weight", "mlp_norm.weight"),
    }


def test_every_wrong_tensor_is_named(tmp_path):
    folder = tmp_path / "hf"
    save_huggingface(model(CONFIGS["matmul-free"]), folder)
    found = contents(folder)
    found["model.layers.0.attn.i_proj.weight"] = np.zeros((16, 15), np.float32)
    found["model.layers.7.attn.i_proj.weight"] = np.zeros((16, 16), np.float32)
    del found["model.norm.weight"]
    safetensors.save_file(found, folder / "model.safetensors")
    with pytest.raises(InteropError) as error:
        load_huggingface(folder)
    assert "missing model.norm.weight [16]" in str(error.value)
    assert "extra model.layers.7.attn.i_proj.weight" in str(error.value)
    assert "misshaped model.layers.0.attn.i_proj.weight: [16, 15], expected [16, 16]" in str(error.value)


def sharded(folder, name="transformer++"):
    """A saved model in several files, and its index."""
    save_huggingface(model(CONFIGS[name]), folder, shard_bytes=4000)
    return json.loads((folder / INDEX).read_text())["weight_map"]


def rewritten(file, change):
    """Apply `change` to the tensors of a file."""
    tensors = safetensors.load_file(file)
    change(tensors)
    safetensors.save_file(tensors, file)


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_tensor_that_the_index_promises_and_its_shard_lacks_is_named(place, tmp_path):
    weight_map = sharded(tmp_path / "hf")
    name = list(weight_map)[0 if place == "first" else -1]
    rewritten(tmp_path / "hf" / weight_map[name], lambda tensors: tensors.pop(name))
    with pytest.raises(InteropError, match=f"absent {re.escape(name)}: .* promises it in {weight_map[name]}"):
        load_huggingface(tmp_path / "hf")


def test_an_index_that_names_the_wrong_shard_is_refused(tmp_path):
    weight_map = sharded(tmp_path / "hf")
    name, other = "model.norm.weight", next(f for f in weight_map.values() if f != weight_map["model.norm.weight"])
    write_index(tmp_path / "hf", weight_map | {name: other})
    with pytest.raises(InteropError, match=f"absent {name}: .* promises it in {other}"):
        load_huggingface(tmp_path / "hf")


def test_an_index_that_promises_too_little_is_refused(tmp_path):
    weight_map = sharded(tmp_path / "hf")
    del weight_map["model.norm.weight"]
    write_index(tmp_path / "hf", weight_map)
    with pytest.raises(InteropError, match=r"unlisted model\.norm\.weight: model-0.* does not list it"):
        load_huggingface(tmp_path / "hf")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    weight_map = sharded(tmp_path / "hf")
    name, files = "model.norm.weight", sorted(set(weight_map.values()))
    other = next(file for file in files if file != weight_map[name])
    rewritten(tmp_path / "hf" / other, lambda tensors: tensors.update({name: np.zeros(16, np.float32)}))
    with pytest.raises(InteropError, match=f"doubled {name}: in {' and '.join(sorted({other, weight_map[name]}))}"):
        load_huggingface(tmp_path / "hf")


def test_a_folder_with_an_index_and_another_file_is_ambiguous(tmp_path):
    sharded(tmp_path / "hf")
    save_huggingface(model(CONFIGS["transformer++"]), tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "hf" / "model.safetensors")
    with pytest.raises(InteropError, match="remove what is stale"):
        load_huggingface(tmp_path / "hf")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_an_index_that_is_none_is_named(text, tmp_path):
    sharded(tmp_path / "hf")
    (tmp_path / "hf" / INDEX).write_text(text)
    with pytest.raises(InteropError, match=r"safetensors\.index\.json has no weight_map"):
        load_huggingface(tmp_path / "hf")


@pytest.mark.parametrize("kept", [0, 5, 60, -1])
def test_a_damaged_file_is_named(kept, tmp_path):
    save_huggingface(model(CONFIGS["transformer++"]), tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InteropError, match=r"model\.safetensors is cut off or damaged"):
        load_huggingface(tmp_path / "hf")


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "int8", "uint8", "int64"])
def test_codes_are_not_taken_for_weights(kind, tmp_path):
    """As fp8 checkpoints and BitNet's hold them, with or without scales beside them."""
    save_huggingface(model(CONFIGS["transformer++"]), tmp_path / "hf")
    name = "model.layers.1.mlp.down_proj.weight"
    file, stored = tmp_path / "hf" / "model.safetensors", np.dtype(jnp.dtype(kind))
    tensors = safetensors.load_file(file)
    tensors[name] = np.ones(tensors[name].shape, np.uint8 if stored.kind == "V" else stored)
    safetensors.save_file(tensors, file)
    if kind.startswith("float8"):  # the library writes no such type from NumPy: change it in the header
        written = file.read_bytes()
        header = json.loads(written[8 : 8 + int.from_bytes(written[:8], "little")])
        header[name]["dtype"] = "F8_E4M3"
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + written[8 + int.from_bytes(written[:8], "little") :])
    with pytest.raises(InteropError, match=rf"quantised {re.escape(name)}: of type \w+ in model\.safetensors"):
        load_huggingface(tmp_path / "hf")


def test_a_tied_head_must_be_the_embedding(tmp_path):
    built = model(CONFIGS["tied-dense"])
    save_huggingface(built, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    rewritten(file, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    np.testing.assert_array_equal(load_huggingface(tmp_path / "hf").embedding[...], built.embedding[...])
    rewritten(file, lambda t: t.update({"lm_head.weight": 2 * t["model.embed_tokens.weight"]}))
    with pytest.raises(InteropError, match=r"lm_head\.weight is not the embedding"):
        load_huggingface(tmp_path / "hf")


@BOTH
def test_what_a_config_lacks_is_named(name, tmp_path):
    save_huggingface(model(CONFIGS[name]), tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    whole = json.loads(file.read_text())
    needed = ["vocab_size", "hidden_size", "num_hidden_layers"]
    needed += ["intermediate_size", "num_attention_heads"] if name == "transformer++" else []
    for key in needed:
        file.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        with pytest.raises(ConfigError, match=rf"config\.json: {key} is missing"):
            load_huggingface(tmp_path / "hf")
        file.write_text(json.dumps(whole | {key: "64"}))
        with pytest.raises(ConfigError, match=rf"config\.json: {key} is '64', not a number"):
            load_huggingface(tmp_path / "hf")
    file.write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json is not a JSON object"):
        load_huggingface(tmp_path / "hf")


@BOTH
def test_what_is_known_of_the_text_is_exported_and_nothing_else_is_claimed(name, tmp_path):
    origin = Origin(bos=7, eos=[8, 9], pad=0, positions=8192)
    save_huggingface(model(CONFIGS[name]), tmp_path / "known", origin=origin)
    assert read_origin(tmp_path / "known") == origin
    save_huggingface(model(CONFIGS[name]), tmp_path / "unknown")
    values = json.loads((tmp_path / "unknown" / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (None, None)
    assert "max_position_embeddings" not in values


def test_absent_files_are_named(tmp_path):
    with pytest.raises(InteropError, match=r"no config\.json"):
        load_huggingface(tmp_path)
    save_huggingface(model(CONFIGS["matmul-free"]), tmp_path / "hf", shard_bytes=4000)
    sorted((tmp_path / "hf").glob("model-*"))[1].unlink()
    with pytest.raises(InteropError, match="model-00002-of-"):
        load_huggingface(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba'"),
        ({"use_short_conv": True}, "use_short_conv=True is not supported"),
        ({"expand_ratio": 2}, "expand_ratio=2 is not supported"),
        ({"quantization_config": {"quant_method": "bitnet"}}, r"config\.json: quantization_config=.*bitnet"),
    ],
)
def test_architectures_that_are_not_ours_are_refused(change, message, tmp_path):
    save_huggingface(model(CONFIGS["matmul-free"]), tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path / "hf")


@pytest.mark.parametrize("name", ["hgrn", "bitnet", "matmul-free-rwkv4", "paper-gate", "dense-head", "4-bit"])
def test_what_no_format_can_express_is_not_exported(name, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be exported|has no Hugging Face format"):
        save_huggingface(plain_model(CONFIGS[name]), tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmfree_jax.interop.huggingface.write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_huggingface(model(CONFIGS["matmul-free"]), tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_an_export_replaces_nothing(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another"):
        save_huggingface(model(CONFIGS["matmul-free"]), tmp_path)


def test_the_width_of_the_glu_follows_from_the_ratio_where_it_is_not_given(tmp_path):
    values = {"model_type": "hgrn_bit", "hidden_size": 1024, "num_hidden_layers": 24, "vocab_size": 32000}
    (tmp_path / "config.json").write_text(json.dumps(values | {"intermediate_size": None, "hidden_ratio": 4}))
    assert read_config(tmp_path) == model_preset("matmul-free", "370m")


@pytest.mark.parametrize("name", ["transformer++", "grouped-queries", "tied-dense"])
def test_llama_logits_are_those_of_transformers(name, tmp_path):
    torch = pytest.importorskip("torch", reason="needs CPU torch: pip install torch transformers")
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install torch transformers")
    built = model(CONFIGS[name])
    save_huggingface(built, tmp_path / "hf")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = tokens(built.config)
    with torch.no_grad():
        expected = theirs(torch.tensor(np.asarray(ids), dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits(built, ids), expected, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    np.testing.assert_allclose(logits(load_huggingface(tmp_path / "theirs"), ids), expected, atol=1e-5)


def test_a_model_with_factors_in_its_forward_pass_is_not_exported(tmp_path):
    config = dataclasses.replace(CONFIGS["matmul-free"], parametrisation="mup", base_width=8, base_depth=2)
    with pytest.raises(ConfigError, match=r"model\.parametrisation='mup' cannot be exported"):
        save_huggingface(plain_model(config), tmp_path / "hf")
