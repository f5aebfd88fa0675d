"""BitNet folders of transformers: the logits of its own class (bitnet/make.py), and what such a model is good for."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from mmfree_jax import api, commands
from mmfree_jax.config import ConfigError
from mmfree_jax.inference.model import serve_model
from mmfree_jax.inference.serving.chat import find_chat_template
from mmfree_jax.interop.bitnet import latent
from mmfree_jax.interop.huggingface import load_huggingface, read_config, save_huggingface
from mmfree_jax.interop.safetensors import InteropError
from mmfree_jax.ops.ternary import quantise_weights
from mmfree_jax.presets import model_preset
from tests.models.families import model

safetensors = pytest.importorskip("safetensors.numpy")
FOLDERS = Path(__file__).parent / "bitnet"
IDS = np.array([[1, 5, 17, 60, 33, 2, 9, 9, 41, 12, 0, 58]])
KINDS = ("online", "offline", "codes", "reciprocal", "dense")


@jax.jit
def logits(model, ids):
    return model(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind):
    expected = np.load(FOLDERS / kind / "logits.npy")
    found = logits(load_huggingface(FOLDERS / kind), IDS)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    others = [np.load(FOLDERS / other / "logits.npy") for other in ("online", "reciprocal", "dense") if other != kind]
    assert min(float(np.abs(found - other).max()) for other in others) > 1e-3


@pytest.mark.parametrize("kind", ["online", "offline", "dense"])
def test_the_served_model_has_the_same_logits(kind):
    served = serve_model(load_huggingface(FOLDERS / kind))
    found = jax.jit(lambda m, ids: m.extend(ids, m.start(1, 16))[0])(served, IDS)[0]
    np.testing.assert_allclose(found, np.load(FOLDERS / kind / "logits.npy"), rtol=0, atol=2e-5)


def test_the_weights_of_codes_are_quantised_to_these_codes_and_their_scale():
    rng = np.random.default_rng(0)
    for zeros in (0.0, 0.3, 0.7, 0.99):
        codes = rng.choice([-1, 0, 1], (64, 48), p=[(1 - zeros) / 2, zeros, (1 - zeros) / 2]).astype(np.float32)
        found = quantise_weights(jnp.asarray(latent(codes, 0.037, 64)), (-2, -1))
        np.testing.assert_array_equal(found.codes, codes)
        np.testing.assert_allclose(found.scale, 0.037, rtol=1e-5)
        packed = sum((codes[16 * p : 16 * p + 16] + 1).astype(np.uint8) << 2 * p for p in range(4))
        np.testing.assert_array_equal(latent(packed, 0.037, 64), latent(codes, 0.037, 64))
    assert not latent(np.zeros((4, 4), np.float32), 0.5, 4).any()


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(FOLDERS / "offline", tmp_path / "hf"))


def with_text(folder: Path) -> Path:
    """As published folders are: a tokenizer that begins texts with a token, ends, and a template of chats."""
    words = {"<s>": 1, "</s>": 0, "<|end|>": 3, "hi": 4, "there": 5, "[UNK]": 2}
    backend = tokenizers.Tokenizer(models.WordLevel(words, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>", "</s>", "<|end|>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_text("{{ bos_token }} {{ messages[0].content }} <|end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
    return folder


def test_texts_begin_and_end_as_the_folder_says_and_chats_follow_its_template(folder, tmp_path):
    with_text(folder)
    api.export(folder, tmp_path / "packed", format="packed")
    assert commands.main(["import", str(folder), "--out", str(tmp_path / "imported")]) == 0
    for path in (folder, tmp_path / "packed", tmp_path / "imported"):
        found = api.load(path)
        assert found.encode("hi there") == [1, 4, 5]
        assert found.ends == (0, 3)
        assert find_chat_template(path, found.tokenizer).prompt([{"role": "user", "content": "there"}]) == [1, 5, 3]


def test_where_no_file_says_how_texts_end_the_config_does(folder):
    assert api.load(folder).ends == (2, 3)


def test_it_generates_and_is_exported_and_imported(folder, tmp_path):
    tokens = api.load(folder).generate(IDS[0].tolist(), max_tokens=5, temperature=0)[0].tokens
    api.export(folder, tmp_path / "packed", "float32", format="packed")
    assert api.load(tmp_path / "packed").generate(IDS[0].tolist(), max_tokens=5, temperature=0)[0].tokens == tokens
    api.export(folder, tmp_path / "again")
    found = logits(load_huggingface(tmp_path / "again"), IDS)[0]
    np.testing.assert_allclose(found, np.load(FOLDERS / "offline" / "logits.npy"), rtol=0, atol=2e-5)
    assert commands.main(["import", str(folder), "--out", str(tmp_path / "imported")]) == 0
    loaded = api.load(tmp_path / "imported")
    assert loaded.generate(IDS[0].tolist(), max_tokens=5, temperature=0)[0].tokens == tokens


def test_training_goes_on_from_it(tmp_path, token_set):
    save_huggingface(model(dataclasses.replace(read_config(FOLDERS / "offline"), vocab=257)), tmp_path / "hf")
    changes = ["--steps", "2", "--data.corpus", str(token_set.path), "--data.sequence", "16", "--data.batch", "2"]
    changes += ["--optim.warmup-steps", "0", "--optim.decay-steps", "0", "--no-evaluate"]
    arguments = ["train", "bitnet-b1.58-tiny", "--init", str(tmp_path / "hf"), "--out", str(tmp_path / "run"), *changes]
    assert commands.main(arguments) == 0
    trained = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert (trained["activation"], trained["joint_glu"], trained["kv_heads"]) == ("relu2", False, 2)
    assert len(api.load(tmp_path / "run").generate([1, 2], max_tokens=3)[0].tokens) > 0


def test_the_published_size_is_a_preset(tmp_path):
    values = {
        "model_type": "bitnet", "hidden_act": "relu2", "hidden_size": 2560, "intermediate_size": 6912,
        "num_hidden_layers": 30, "num_attention_heads": 20, "num_key_value_heads": 5, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_config(tmp_path) == model_preset("bitnet-b1.58", "2b4t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config\.quant_method='gptq'"),
        ({"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}}, "use_rms_norm=True"),
        ({"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["q_proj"]}}, "q_proj"),
        ({"quantization_config": "bitnet"}, "is not an object"),
    ],
)
def test_what_our_models_cannot_do_is_named(folder, change, message):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        load_huggingface(folder)


def test_codes_without_their_scale_are_named(folder):
    file = folder / "model.safetensors"
    arrays = safetensors.load_file(file)
    arrays.pop("model.layers.1.mlp.up_proj.weight_scale")
    safetensors.save_file(arrays, file)
    with pytest.raises(InteropError, match=r"missing model\.layers\.1\.mlp\.up_proj\.weight_scale"):
        load_huggingface(folder)


def test_codes_in_a_folder_of_latent_weights_are_named(folder):
    """The other way round: its config.json says that weights are quantised at each use."""
    file = folder / "config.json"
    values = json.loads(file.read_text())
    values["quantization_config"]["quantization_mode"] = "online"
    file.write_text(json.dumps(values))
    with pytest.raises(InteropError, match=r"quantised model\.layers\.0.*of type U8"):
        load_huggingface(folder)
