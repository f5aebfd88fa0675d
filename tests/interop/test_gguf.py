"""GGUF files: what they hold is the model's own codes and values, and llama.cpp computes the same with them."""

import contextlib
import dataclasses
import json
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmfree_jax.config import ConfigError, ModelConfig
from mmfree_jax.data.tokenizers.tokenizer import train_bpe
from mmfree_jax.interop import gguf as ours
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.presets import model_preset

gguf = pytest.importorskip("gguf")

TEXT = (
    'It\'s 1984, or 2 + 2 = 5: "WAR IS PEACE".\n\n\tdef f(x):\n        return x ** 2  # café, naïve, 日本語 ½ ²\n' * 4
)
TOKENIZER = train_bpe([TEXT], 300)
KINDS = {
    "bitnet": ("tq2_0", "tq1_0", "q2_0", "f16", "f32"),
    "transformer++": ("f16", "f32"),
    "matmul-free": ("tq2_0", "f32"),
}
CASES = [(family, kind) for family, kinds in KINDS.items() for kind in kinds]


def config(family: str, **changes) -> ModelConfig:
    """A small architecture whose rows fill whole blocks, with padding of the vocabulary."""
    sizes = {"vocab": 320, "tokenizer_vocab": TOKENIZER.vocab_size, "width": 256, "glu_width": 512, "depth": 2}
    if family != "matmul-free":
        sizes |= {"heads": 4, "kv_heads": 2}
    tied = {"tie_embeddings": True} if family == "bitnet" else {}
    return dataclasses.replace(model_preset(family, "tiny"), **(sizes | tied | changes))


def model(family: str, **changes) -> LanguageModel:
    """A model with gains that differ from one and weights that are not small, so that logits tell tokens apart."""
    made = LanguageModel(config(family, **changes), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for path, leaf in nnx.to_flat_state(nnx.state(made, nnx.Param)):
        if "gain" in path:
            leaf[...] = jnp.asarray(1 + rng.standard_normal(leaf.shape) / 8, jnp.float32)
        elif "embedding" in path or "lower_bounds" in path:
            # Files hold the embedding in float16: values that it holds exactly.
            leaf[...] = jnp.asarray((rng.standard_normal(leaf.shape) / 8).astype(np.float16), jnp.float32)
    return made


def written(tmp_path, made: LanguageModel, kind: str):
    path = tmp_path / "model.gguf"
    ours.save_gguf(made, path, TOKENIZER.backend.to_str(), kind=kind, end=TOKENIZER.end_of_document, context=96)
    return path


def held(path) -> dict[str, np.ndarray]:
    """All tensors of a file as values; those of a type that the package does not know as bytes."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        known = tensor.tensor_type in gguf.quants._type_traits or tensor.tensor_type.name in ("F16", "F32")
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type) if known else tensor.data
        found[tensor.name] = np.asarray(data, np.float32).reshape(tuple(reversed(tensor.shape.tolist())))
    return found


@pytest.mark.parametrize(("family", "kind"), [case for case in CASES if case[1] != "q2_0"])
def test_a_file_holds_codes_and_scales_or_values(tmp_path, family, kind):
    made = model(family)
    tensors = held(written(tmp_path, made, kind))
    gate_up, name = made.blocks.glu.gate_up, "blk.1.ffn_up"
    if made.config.linear == "ternary":
        q = gate_up.stacked_codes()[1]
        codes, scale = np.asarray(q.codes[1]).T, np.float32(np.asarray(q.scale[1]).item())
    else:
        codes, scale = np.asarray(gate_up.kernel[...][1, 1]).T, np.float32(1)
    if kind in ours.TERNARY:
        np.testing.assert_array_equal(tensors[f"{name}.weight"], codes)
        assert tensors[f"{name}.scale"].tolist() == [scale]
        assert np.asarray(gate_up.stacked_codes()[0].scale[1]).item() == scale  # gate and up share theirs
    else:
        kept = np.float16 if kind == "f16" else np.float32
        np.testing.assert_array_equal(tensors[f"{name}.weight"], (codes * scale).astype(kept).astype(np.float32))
        assert f"{name}.scale" not in tensors
    np.testing.assert_array_equal(tensors["output_norm.weight"], made.norm.gain[...])
    assert tensors["token_embd.weight"].shape == (TOKENIZER.vocab_size, 256)  # without padding
    assert ("output.weight" in tensors) == (family != "bitnet")


def test_q2_0_blocks_are_a_scale_and_then_four_codes_a_byte():
    codes = np.resize([-1, 0, 1, 1, 0, 0], (1, 128)).astype(np.int8)
    block = ours.encode(codes, "q2_0")
    assert block.shape == (1, 36)
    assert block[0, :4].tolist() == [0x00, 0x3C, 0 | 1 << 2 | 2 << 4 | 2 << 6, 1 | 1 << 2 | 0 << 4 | 1 << 6]
    assert block[0, 18:20].tolist() == [0x00, 0x3C]


def test_queries_of_a_llama_are_reordered_for_its_rotation(tmp_path):
    """llama.cpp turns channel 2i with 2i + 1 of a head; ours turn i with i + K/2. Heads of 64 channels."""
    made = model("transformer++")
    tensors = held(written(tmp_path, made, "f32"))
    mixer = made.blocks.mixer
    q, k = np.asarray(mixer.query.kernel[...][0]).T, np.asarray(mixer.key_value.kernel[...][0, 0]).T
    for name, kernel, head in (("attn_q", q, 3), ("attn_k", k, 1)):
        rows = tensors[f"blk.0.{name}.weight"]
        np.testing.assert_array_equal(rows[64 * head + 10], kernel[64 * head + 5])
        np.testing.assert_array_equal(rows[64 * head + 11], kernel[64 * head + 37])
    v = np.asarray(mixer.key_value.kernel[...][0, 1]).T
    np.testing.assert_array_equal(tensors["blk.0.attn_v.weight"], v)


@pytest.mark.parametrize("weight_scale", ["tensor", "optimal"])
def test_the_file_of_a_matmul_free_model_is_enough_to_compute_its_logits(tmp_path, weight_scale):
    """Read back and computed in NumPy by the equations of docs/llama-cpp.md."""
    made = model("matmul-free", weight_scale=weight_scale)
    t, tokens = held(written(tmp_path, made, "tq2_0")), np.array([5, 7, 11, 250])
    eps = made.config.norm_eps
    rms = lambda x, gain: x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain
    sigmoid = lambda x: 1 / (1 + np.exp(-x))

    def linear(x, norm, name):
        x = rms(x, t[f"{norm}.weight"])
        largest = np.abs(x).max(-1, keepdims=True)
        codes = np.round(x * (127 / largest))
        return codes @ t[f"{name}.weight"].T * (largest / 127) * t[f"{name}.scale"]

    x = t["token_embd.weight"][tokens].astype(np.float64)
    for layer in range(2):
        b = f"blk.{layer}."
        u = rms(x, t[b + "attn_norm.weight"])
        i, f, g = (linear(u, f"{b}mixer_{gate}_norm", f"{b}mixer_{gate}") for gate in ("in", "forget", "gate"))
        floor = t[b + "mixer_floor.weight"]
        f, h, states = floor + (1 - floor) * sigmoid(f), np.zeros(256), []
        for f_t, i_t in zip(f, i, strict=True):
            h = f_t * h + (1 - f_t) * i_t * sigmoid(i_t)
            states.append(h)
        h = np.stack(states)
        y = rms(g, t[b + "mixer_gated_norm.weight"]) * h * sigmoid(h)
        x = x + linear(y, b + "mixer_output_norm", b + "mixer_output")
        u = rms(x, t[b + "ffn_norm.weight"])
        gate, up = (linear(u, b + "ffn_gate_up_norm", b + name) for name in ("ffn_gate", "ffn_up"))
        x = x + linear(gate * sigmoid(gate) * up, b + "ffn_down_norm", b + "ffn_down")
    logits = linear(rms(x, t["output_norm.weight"]), "output_sub_norm", "output")
    expected = np.asarray(made(tokens[None]))[0, :, : TOKENIZER.vocab_size]
    # float32 rounds a code now and then to another side than float64.
    assert np.linalg.norm(logits - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("bitnet", {"tie_embeddings": False}, "tie_embeddings"),
        ("bitnet", {"linear_norm": True}, "linear_norm"),
        ("bitnet", {"activation_bits": 4}, "activation_bits"),
        ("bitnet", {"weight_scale": "channel"}, "weight_scale"),
        ("bitnet", {"glu_width": 320}, "glu_width=320"),
        ("matmul-free", {"output_gate": "paper"}, "output_gate"),
        ("matmul-free", {"activation": "relu2"}, "activation"),
        ("hgrn", {}, "hgrn"),
    ],
)
def test_what_the_format_cannot_say_is_refused(tmp_path, family, changes, named):
    sizes = {"vocab": 320, "width": 256, "glu_width": 512, "depth": 1}
    tied = {"tie_embeddings": True} if family == "bitnet" else {}
    config = dataclasses.replace(model_preset(family, "tiny"), **(sizes | tied | changes))
    made = LanguageModel(config, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=named):
        ours.save_gguf(made, tmp_path / "model.gguf", TOKENIZER.backend.to_str(), kind="tq2_0")
    assert not list(tmp_path.iterdir())


def test_dense_models_have_no_ternary_types_and_files_are_not_replaced(tmp_path):
    made = model("transformer++")
    with pytest.raises(ConfigError, match="f16 or f32"):
        ours.save_gguf(made, tmp_path / "model.gguf", TOKENIZER.backend.to_str(), kind="tq2_0")
    path = written(tmp_path, made, "f16")
    with pytest.raises(FileExistsError):
        written(tmp_path, made, "f16")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("change", [{"normalizer": {"type": "NFC"}}, {"pre_tokenizer": {"type": "Metaspace"}}])
def test_tokenizers_that_llama_cpp_does_not_have_are_refused(tmp_path, change):
    text = json.dumps(json.loads(TOKENIZER.backend.to_str()) | change)
    with pytest.raises(ConfigError, match="tokenizer"):
        ours.save_gguf(model("bitnet"), tmp_path / "model.gguf", text)
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def served(path):
    """llama.cpp's server on a file, as a function from a route and a question to the answer."""
    client = pytest.importorskip("xllamacpp")
    settings = client.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(path), 96, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 2
    server = client.Server(settings)

    def ask(route: str, **question):
        body, kind = json.dumps(question).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + route, body, kind)
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    yield ask


def test_squared_relu_is_said_in_the_file(tmp_path):
    """llama.cpp reads this key from October 2026 on; older ones compute silu whatever it says."""
    for activation in ("silu", "relu2"):
        path = written(tmp_path / activation, model("bitnet", activation=activation), "tq2_0")
        field = gguf.GGUFReader(path).fields.get("bitnet.hidden_activation")
        assert (field and field.contents()) == (None if activation == "silu" else "relu2")


@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [(*case, {}) for case in CASES if case[0] != "matmul-free"] + [("bitnet", "tq2_0", {"joint_glu": False})],
)
def test_llama_cpp_predicts_the_same(tmp_path, family, kind, changes):
    """Its logits, position by position, and its tokens of texts. It quantises bitnet's activations in other blocks."""
    made, tokens = model(family, **changes), TOKENIZER.encode(TEXT)[:40].astype(np.int32)
    logits = np.asarray(made(tokens[None]), np.float64)[0, :, : TOKENIZER.vocab_size]
    expected = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    with served(written(tmp_path, made, kind)) as ask:
        differences = []
        for count in (1, 2, 9, 25, 40):
            answer = ask("/completion", prompt=tokens[:count].tolist(), n_predict=1, n_probs=400, temperature=0)
            if "completion_probabilities" not in answer:  # it tells none for a token that ends within a character
                continue
            found = {one["id"]: one["logprob"] for one in answer["completion_probabilities"][0]["top_logprobs"]}
            differences += [abs(found[n] - expected[count - 1, n]) for n in found if expected[count - 1, n] > -12]
        assert len(differences) > 100
        limit = 0.002 if family == "transformer++" else 0.4
        assert max(differences) < limit
        assert np.mean(differences) < limit / 4
        for text in (TEXT, "", "  a\n\n b\t", "1234 x² ½", "don't WE'LL", "<|endoftext|>"):
            assert ask("/tokenize", content=text, parse_special=False)["tokens"] == TOKENIZER.encode(text).tolist()
