"""GGUF, the file format of llama.cpp and of what is built on it: models written straight from their codes.

A `bitnet` model with a tied head is llama.cpp's architecture of that name, and `transformer++` is its `llama`. Ternary
weights are stored as codes with block scales of 1 and their exact scale in a tensor beside (`.scale`), so nothing is
rounded or quantised again. llama.cpp quantises activations in blocks of 256 and not per token, so its logits differ a
little from ours.

llama.cpp has no architecture for `matmul-free`; docs/llama-cpp.md says what it would need. The file that such an
architecture would read is written too.
"""

import functools
import json
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from mmfree_jax.config import ModelConfig, require
from mmfree_jax.errors import need
from mmfree_jax.files import new_file
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.models.layers import Projection
from mmfree_jax.models.mlgru import floors
from mmfree_jax.sharding import path_name

Kind = Literal["auto", "tq2_0", "tq1_0", "q2_0", "f16", "f32"]
TERNARY = {"tq2_0": 256, "tq1_0": 256, "q2_0": 64}  # types of ternary weights, and the codes in a block
STORED = {"f16": np.float16, "f32": np.float32}  # types of what is not in blocks
Q2_0 = 42  # ggml's number of a type that the package gguf does not know
ARCHITECTURES = {"bitnet": "bitnet", "transformer++": "llama", "matmul-free": "matmul-free"}
# What splits a text into words, as our tokenizers' JSON says it, and llama.cpp's name for the same rule.
WORD_RULES = {
    '[{"type": "Digits"}, {"type": "ByteLevel"}]': "smollm",
    '[{"type": "ByteLevel"}]': "gpt-2",
}
NEEDED = "a GGUF file", "'mmfree-jax[gguf]'"
NORMAL, CONTROL = 1, 3  # llama.cpp's kinds of tokens


class Matrix(NamedTuple):
    """A matrix of a model: ternary codes [F, D] with their scale, or plain values without one."""

    values: np.ndarray
    scale: float | None


class Tensor(NamedTuple):
    """A tensor of a file, which is only made when it is written."""

    name: str
    shape: tuple[int, ...]
    kind: str  # a key of TERNARY, "f16" or "f32"
    make: Callable[[], np.ndarray]


def save_gguf(
    model: LanguageModel, path: Path, tokenizer_json: str, *, kind: Kind = "auto", end: int = 0, context: int = 2048
) -> None:
    """Write a model as one GGUF file, which appears complete or not at all.

    kind: type of the layers' matrices; "auto" is `default_kind`. Embedding and head
    are f16, with kind f32 f32. tokenizer_json: the tokenizer as the library `tokenizers` writes it. end: the token that
    separates documents. context: the longest text in tokens that the file promises.

    Raises ConfigError for an architecture or a tokenizer that llama.cpp does not have, for rows that its blocks do not
    divide, and if the package gguf is not installed; FileExistsError if the file exists.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another")
    config = model.config
    check_expressible(config)
    kind = default_kind(config) if kind == "auto" else kind
    check_kind(config, kind)
    gguf = need("gguf", *NEEDED)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial:
        writer = gguf.GGUFWriter(partial, ARCHITECTURES[config.family])
        write_metadata(writer, config, kind, context)
        write_tokenizer(writer, tokenizer_json, config, end)
        # The header comes first and says where everything lies, so each tensor is announced before any is made.
        tensors = list(model_tensors(model, kind))
        for tensor in tensors:
            _announce(writer, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            dtype = STORED.get(tensor.kind, np.uint8)
            writer.write_tensor_data(np.ascontiguousarray(tensor.make().astype(dtype, copy=False)))
        writer.close()


def check_expressible(config: ModelConfig) -> None:
    """Raise ConfigError, naming the field, for an architecture that the format does not have."""
    require(
        config.family in ARCHITECTURES,
        f"family {config.family} has no GGUF architecture: only {', '.join(ARCHITECTURES)} can be exported",
    )
    fixed: dict[str, Any] = {"parametrisation": "standard"}
    if config.linear == "ternary":
        require(config.weight_scale != "channel", "model.weight_scale='channel' cannot be exported: one scale a matrix")
        fixed |= {"activation_bits": 8}
    if config.family == "bitnet":
        fixed |= {"tie_embeddings": True, "dense_head": True, "linear_norm": False, "sublayer_norm": True}
    if config.family == "matmul-free":
        fixed |= {"tie_embeddings": False, "dense_head": False, "linear_norm": True, "sublayer_norm": False}
        fixed |= {"output_gate": "official", "joint_glu": True, "activation": "silu"}
    if config.family == "transformer++":
        fixed |= {"sublayer_norm": False, "activation": "silu"}
    for name, only in fixed.items():
        value = getattr(config, name)
        hint = ": take a preset bitnet-tied-*" if config.family == "bitnet" and name == "tie_embeddings" else ""
        require(value == only, f"model.{name}={value!r} cannot be exported: GGUF has only {only!r} here{hint}")


def default_kind(config: ModelConfig) -> Kind:
    """Return the type of a model's matrices: f16 for dense ones, else tq2_0, or q2_0 where its blocks do not fit."""
    if config.linear == "dense":
        return "f16"
    return "tq2_0" if config.width % 256 == config.glu_width % 256 == 0 else "q2_0"


def check_kind(config: ModelConfig, kind: str) -> None:
    """Raise ConfigError where a type cannot hold a model's matrices."""
    if kind not in TERNARY:
        return
    require(config.linear == "ternary", f"type={kind} holds ternary weights only: take f16 or f32")
    for name in ("width", "glu_width"):
        size = getattr(config, name)
        require(
            size % TERNARY[kind] == 0,
            f"model.{name}={size} is no multiple of {TERNARY[kind]}, the block of type {kind}: take f16 or f32",
        )


def write_metadata(writer: Any, config: ModelConfig, kind: str, context: int) -> None:
    """Write the sizes of the architecture, under llama.cpp's keys."""
    # The writer's methods add the name of the architecture to their keys, as in llama.block_count.
    file_types = {"f32": 0, "f16": 1, "tq1_0": 36, "tq2_0": 37}
    if kind in file_types:
        writer.add_file_type(file_types[kind])
    writer.add_context_length(context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.depth)
    writer.add_feed_forward_length(config.glu_width)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.tokenizer_vocab or config.vocab)
    if config.activation == "relu2":  # of `bitnet` only; it is silu where the key is missing
        writer.add_string("bitnet.hidden_activation", "relu2")
    if config.mixer == "attention":
        writer.add_head_count(config.heads)
        writer.add_head_count_kv(config.kv_heads or config.heads)
        writer.add_rope_freq_base(config.rope_theta)
        writer.add_rope_dimension_count(config.width // config.heads)


def write_tokenizer(writer: Any, tokenizer_json: str, config: ModelConfig, end: int) -> None:
    """Write the vocabulary of a byte-level BPE tokenizer. Tokens that a model has beyond it are marked as unused."""
    whole = json.loads(tokenizer_json)
    words = {**whole["model"]["vocab"], **{one["content"]: one["id"] for one in whole.get("added_tokens", [])}}
    control = {one["id"] for one in whole.get("added_tokens", []) if one.get("special")}
    named = {number: word for word, number in words.items()}
    count = config.tokenizer_vocab or config.vocab
    require(max(named) < count, f"the tokenizer has {max(named) + 1} tokens, the model {count}")
    tokens = [named.get(n, f"<unused{n}>") for n in range(count)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(word_rule(whole))
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if n in control or n not in named else NORMAL for n in range(count)])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"].get("merges", [])]
    writer.add_token_merges(merges or [""])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


def word_rule(tokenizer: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule by which a tokenizer splits a text into words.

    Raises ConfigError for tokenizers other than byte-level BPE, and for rules that have no name here.
    """
    kind, normaliser = tokenizer["model"].get("type", "BPE"), tokenizer.get("normalizer")
    require(kind == "BPE" and not normaliser, "only byte-level BPE tokenizers can be exported to GGUF")
    rule = tokenizer.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    found = WORD_RULES.get(json.dumps([{"type": step.get("type")} for step in steps]))
    require(found is not None, f"llama.cpp has no rule like the tokenizer's ({[s.get('type') for s in steps]})")
    return str(found)


def model_tensors(model: LanguageModel, kind: str) -> Iterator[Tensor]:
    """Yield all tensors of a model, in the order in which they are written."""
    config, leaves = model.config, jax.tree.leaves_with_path(nnx.state(model, nnx.Param))
    arrays = {path_name(path): np.asarray(leaf) for path, leaf in leaves}
    matrices = functools.cache(lambda path: _matrices(attrgetter(path)(model.blocks)))  # of all layers, quantised once
    vocab, plain = config.tokenizer_vocab or config.vocab, "f32" if kind == "f32" else "f16"
    D = config.width
    yield Tensor("token_embd.weight", (vocab, D), plain, lambda: arrays["embedding"][:vocab])
    yield Tensor("output_norm.weight", (D,), "f32", lambda: arrays["norm.gain"])
    if config.family == "matmul-free":
        head = model.head.make_codes(model.embedding[...])
        assert head is not None
        assert head.scale is not None
        matrix = Matrix(np.asarray(head.codes).T[:vocab], float(head.scale.item()))
        yield Tensor("output_sub_norm.weight", (D,), "f32", lambda: arrays["head.gain"])
        yield from _matrix_tensors("output", (vocab, D), kind, lambda: matrix)
    elif not config.tie_embeddings:
        yield Tensor("output.weight", (vocab, D), plain, lambda: arrays["head.kernel"].T[:vocab])
    for layer in range(config.depth):
        yield from _block_tensors(model, arrays, matrices, layer, kind)


def _block_tensors(
    model: LanguageModel,
    arrays: dict[str, np.ndarray],
    matrices: Callable[[str], list[list[Matrix]]],
    layer: int,
    kind: str,
) -> Iterator[Tensor]:
    config = model.config
    for name, (path, *groups) in block_vectors(config).items():
        vector = arrays[f"blocks.{path}"][layer]
        vector = vector[groups[0]] if groups else vector
        yield Tensor(f"blk.{layer}.{name}.weight", vector.shape, "f32", functools.partial(np.asarray, vector))
    if config.family == "matmul-free":
        bounds = model.lower_bounds
        floor = np.zeros(config.width, np.float32) if bounds is None else np.asarray(floors(bounds[...]))[layer]
        yield Tensor(f"blk.{layer}.mixer_floor.weight", floor.shape, "f32", lambda: floor)
    for name, (path, group) in block_matrices(config).items():
        inputs, outputs = attrgetter(path)(model.blocks).kernel.shape[-2:]
        make = lambda name=name, path=path, group=group: _permuted(matrices(path)[group][layer], name, config)
        yield from _matrix_tensors(f"blk.{layer}.{name}", (outputs, inputs), kind, make)


def block_vectors(config: ModelConfig) -> dict[str, tuple]:
    """Return where the gains of a block lie in our parameters, by their name in the file: a path, and maybe a group."""
    shared = {"attn_norm": ("mixer_norm.gain",), "ffn_norm": ("glu_norm.gain",)}
    if config.family == "bitnet":
        return shared | {"attn_sub_norm": ("mixer.norm.gain",), "ffn_sub_norm": ("glu.norm.gain",)}
    if config.family == "transformer++":
        return shared
    gates = {f"mixer_{name}_norm": ("mixer.gates.gain", group) for group, name in enumerate(("in", "forget", "gate"))}
    others = {"mixer_output_norm": ("mixer.out.gain",), "mixer_gated_norm": ("mixer.gate_norm.gain",)}
    glu = {"ffn_gate_up_norm": ("glu.gate_up.gain",), "ffn_down_norm": ("glu.down.gain",)}
    return shared | gates | others | glu


def block_matrices(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Return where the matrices of a block lie in our parameters, by their name in the file: a layer and its group."""
    glu = {"ffn_gate": ("glu.gate_up", 0), "ffn_up": ("glu.gate_up", 1), "ffn_down": ("glu.down", 0)}
    if config.family == "matmul-free":
        gates = {f"mixer_{name}": ("mixer.gates", group) for group, name in enumerate(("in", "forget", "gate"))}
        return gates | {"mixer_output": ("mixer.out", 0)} | glu
    keys = {"attn_k": ("mixer.key_value", 0), "attn_v": ("mixer.key_value", 1)}
    return {"attn_q": ("mixer.query", 0)} | keys | {"attn_output": ("mixer.out", 0)} | glu


def _matrices(module: Projection) -> list[list[Matrix]]:
    """The matrices of a projection as [F, D], by group and layer."""
    quantised = module.stacked_codes()
    if quantised is None:
        kernel = np.asarray(module.kernel[...], np.float32)
        kernel_LGDF = kernel if module.groups else kernel[:, None]
        return [[Matrix(w_DF.T, None) for w_DF in kernel_LGDF[:, g]] for g in range(kernel_LGDF.shape[1])]
    layers = [zip(np.asarray(q.codes), np.asarray(q.scale), strict=True) for q in quantised]
    return [[Matrix(codes.T, float(scale.item())) for codes, scale in group] for group in layers]


def _permuted(matrix: Matrix, name: str, config: ModelConfig) -> Matrix:
    """The rows of queries and keys in the order of llama.cpp's `llama`, which rotates channels 2i and 2i + 1."""
    if config.family != "transformer++" or name not in ("attn_q", "attn_k"):
        return matrix
    heads = config.heads if name == "attn_q" else config.kv_heads or config.heads
    rows, columns = matrix.values.shape
    values = matrix.values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return matrix._replace(values=values)


def _matrix_tensors(name: str, shape: tuple[int, int], kind: str, make: Callable[[], Matrix]) -> Iterator[Tensor]:
    """A matrix and, where it is stored as codes, its scale."""
    if kind in TERNARY:
        yield Tensor(f"{name}.weight", shape, kind, lambda: encode(make().values, kind))
        yield Tensor(f"{name}.scale", (1,), "f32", lambda: np.array([make().scale], np.float32))
        return
    values = lambda q: q.values if q.scale is None else q.values.astype(np.float32) * np.float32(q.scale)
    yield Tensor(f"{name}.weight", shape, kind, lambda: values(make()))


def encode(codes: np.ndarray, kind: str) -> np.ndarray:
    """Encode ternary codes [F, D] in a type of blocks, whose scales are 1: uint8 [F, bytes of a row]."""
    if kind == "q2_0":
        return _q2_0(codes)
    gguf = need("gguf", *NEEDED)
    return gguf.quants.quantize(codes.astype(np.float32), gguf.GGMLQuantizationType[kind.upper()])


def _q2_0(codes: np.ndarray) -> np.ndarray:
    """Blocks of 64: a float16 scale, then 2 bits a code, code + 1, four consecutive ones in a byte."""
    rows, columns = codes.shape
    # Codes are stored plus 1, as two bits have no sign.
    fields = (codes.reshape(rows, columns // 64, 16, 4) + 1).astype(np.uint8)
    packed = np.bitwise_or.reduce([fields[..., i] << 2 * i for i in range(4)])
    scales = np.broadcast_to(np.frombuffer(np.float16(1).tobytes(), np.uint8), (rows, columns // 64, 2))
    return np.concatenate([scales, packed], axis=-1).reshape(rows, -1)


def _announce(writer: Any, tensor: Tensor) -> None:
    """Tell the writer name, shape and type of a tensor, whose content comes later."""
    rows, columns = (1, *tensor.shape)[-2:]
    if tensor.kind in TERNARY:
        gguf = need("gguf", *NEEDED)
        number = Q2_0 if tensor.kind == "q2_0" else gguf.GGMLQuantizationType[tensor.kind.upper()]
        size = {"tq2_0": 66 / 256, "tq1_0": 54 / 256, "q2_0": 18 / 64}[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), int(rows * columns * size), number)
        return
    dtype = np.dtype(STORED[tensor.kind])
    writer.add_tensor_info(tensor.name, tensor.shape, dtype, rows * columns * dtype.itemsize)
