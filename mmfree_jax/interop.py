"""Hugging Face checkpoints, both ways, without torch: `hgrn_bit` (the released MatMul-free models) and Llama.

A folder holds `config.json` and `model.safetensors`, or shards with `model.safetensors.index.json`. Matrices lie there
as [out, in], here as [in, out] with layers in front. No value is rounded on the way: bfloat16 and float16 are exact in
float32, so reading a folder and writing it in its own type gives back the same bytes. What a folder holds is what the
headers of its files say; an index that says something else is refused. Needs the package safetensors.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmfree_jax.config import ConfigError, ModelConfig, require
from mmfree_jax.files import read_json
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.sharding import path_name

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
DTYPES = ("float32", "bfloat16", "float16", "float64")
BUFFERS = ("rotary_emb.inv_freq",)  # not parameters: old Llama checkpoints hold them
STORED = ("F32", "BF16", "F16", "F64")  # safetensors' names of the types that can be read
HEAD = "lm_head.weight"
VOCABULARY = ("embedding", "head.kernel")  # parameters that have a row for each token in a checkpoint

# What the official code computes whatever its config says, or only with these values.
HGRN_FIXED = {"num_heads": 1, "expand_ratio": 1, "use_short_conv": False, "hidden_act": "swish"}
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers")  # keys of config.json that no default can stand for
LLAMA_SIZES = ("intermediate_size", "num_attention_heads")
LLAMA_FIXED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}


class InteropError(ValueError):
    """A folder that is not the checkpoint it should be. The message names every tensor or file at fault."""


class Slot(NamedTuple):
    """Where one tensor of a checkpoint lives in our parameters: `parameters[path][at]`, transposed if a matrix."""

    path: str
    at: tuple[int, ...]
    shape: tuple[int, ...]  # in the checkpoint
    matrix: bool = False


class Stored(NamedTuple):
    """A tensor as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class Origin(NamedTuple):
    """What a checkpoint's config.json tells of the text that it was trained on; None: not known."""

    bos: int | None = None  # the token that a text begins with
    eos: int | list[int] | None = None  # those that end it
    pad: int | None = None
    positions: int | None = None  # the longest text trained on, in tokens


UNKNOWN = Origin()


def load_huggingface(path: str | Path, dtype: str = "float32") -> LanguageModel:
    """Read a folder into a model.

    Args:
        path: folder with `config.json` and safetensors files.
        dtype: of activations. Parameters are float32; with "float64" (which needs x64 enabled) both are float64.

    Raises:
        InteropError: naming each missing, extra or misshaped tensor, or the file that is not there.
        ConfigError: for an architecture that the models here do not have.
    """
    require(dtype in DTYPES, f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    doubles = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    require(dtype != "float64" or doubles, "float64 needs jax.config.update('jax_enable_x64', True)")
    folder = Path(path)
    config = read_config(folder)
    param_dtype = jnp.float64 if dtype == "float64" else jnp.float32
    build = lambda: LanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), param_dtype=param_dtype)
    table = slots(config)
    stored = _checked(folder, table, config)  # before anything is built
    graph, shapes = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graph, jax.tree.map(jnp.asarray, _fill(table, stored, shapes)))


def read_parameters(folder: Path, shapes: Any) -> Any:
    """NumPy arrays of a model's parameters, in a tree like `shapes`: that of the model that the folder holds.

    Raises as `load_huggingface`.
    """
    config = read_config(folder)
    table = slots(config)
    return _fill(table, _checked(folder, table, config), shapes)


def save_huggingface(
    model: LanguageModel,
    path: str | Path,
    dtype: str = "float32",
    *,
    origin: Origin = UNKNOWN,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model as a folder that the official code (matmul-free) or transformers (transformer++) loads.

    The folder appears complete or not at all. `dtype` is the type on disk; files hold at most `shard_bytes` each,
    unless one tensor is larger. `origin` goes into config.json, as null what it does not know. Padding of the
    vocabulary is left out: the formats have none. The tokenizer's files are not part of a model: copy them beside it.

    Raises:
        ConfigError: for an architecture that neither format can express.
        FileExistsError: when the folder exists and is not empty.
    """
    require(dtype in DTYPES, f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty folder: choose another")
    text = write_config(model.config, dtype, origin)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        _write_tensors(partial, tensors(model, dtype), shard_bytes)
        (partial / "config.json").write_text(text, encoding="utf-8")
        os.chmod(partial, 0o755)  # mkdtemp makes folders that only their owner can read
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def tensors(model: LanguageModel, dtype: str = "float32") -> Iterator[tuple[str, np.ndarray]]:
    """The model's parameters under their names, and in the layout, of the checkpoint format."""
    arrays = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(nnx.state(model))}
    for name, slot in slots(model.config).items():
        array = np.asarray(arrays[slot.path][slot.at])
        array = array.swapaxes(-1, -2) if slot.matrix else array
        if slot.path in VOCABULARY:
            array = array[: slot.shape[0]]
        yield name, np.ascontiguousarray(array.reshape(slot.shape).astype(jnp.dtype(dtype)))


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor of the format that a config is stored in. Raises ConfigError when there is none.

    The formats know no padding of the vocabulary: it is not stored.
    """
    V, D = config.tokenizer_vocab or config.vocab, config.width
    hgrn = _format(config) == "hgrn_bit"
    table = {
        "model.embeddings.weight" if hgrn else "model.embed_tokens.weight": Slot("embedding", (), (V, D)),
        "model.norm.weight": Slot("norm.gain", (), (D,)),
    }
    if not config.tie_embeddings:
        table[HEAD] = Slot("head.kernel", (), (V, D), matrix=True)
    if hgrn:
        table["lm_head.norm.weight"] = Slot("head.gain", (), (D,))
        if config.lower_bounds:
            table["model.lower_bounds"] = Slot("lower_bounds", (), (config.depth, D))
    for layer in range(config.depth):
        for name, slot in (_hgrn_layer if hgrn else _llama_layer)(config):
            table[f"model.layers.{layer}.{name}"] = slot._replace(path=f"blocks.{slot.path}", at=(layer, *slot.at))
    return table


def read_config(folder: Path) -> ModelConfig:
    """The architecture that a folder's config.json describes.

    Raises InteropError without a config.json, ConfigError that names file and key for what it lacks or the models here
    cannot express.
    """
    values, file = _read_values(folder), folder / "config.json"
    kind = values.get("model_type")
    require(kind in ("hgrn_bit", "llama"), f"{file}: model_type={kind!r}; only hgrn_bit and llama can be read")
    quantised = values.get("quantization_config")
    require(
        not quantised,
        f"{file}: quantization_config={quantised!r} says that weights are codes, which cannot be read: take the "
        "checkpoint in float32, bfloat16 or float16",
    )
    for name in SIZES if kind == "hgrn_bit" else (*SIZES, *LLAMA_SIZES):
        size = values.get(name)
        require(type(size) is int, f"{file}: {name} is {'missing' if size is None else f'{size!r}, not a number'}")
    fixed = HGRN_FIXED if kind == "hgrn_bit" else LLAMA_FIXED
    for name, only in fixed.items():
        found = values.get(name, only)
        require(found == only, f"{file}: {name}={found!r} is not supported, only {only!r}")
    return _from_hgrn(values) if kind == "hgrn_bit" else _from_llama(values, file)


def read_origin(folder: Path) -> Origin:
    """What a folder's config.json tells of the text that the model was trained on. Raises as `read_config`."""
    values = _read_values(folder)
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    return Origin(*(values.get(key) for key in keys))


def _read_values(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise InteropError(f"{folder} has no config.json: not a Hugging Face model folder")
    values = read_json(file)
    require(isinstance(values, dict), f"{file} is not a JSON object")
    return values


def write_config(config: ModelConfig, dtype: str, origin: Origin = UNKNOWN) -> str:
    """The text of config.json. Raises ConfigError when no format can express the architecture."""
    values = {
        "vocab_size": config.tokenizer_vocab or config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "intermediate_size": config.glu_width,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": origin.bos,
        "eos_token_id": origin.eos,
        "torch_dtype": dtype,
    }
    if origin.pad is not None:
        values["pad_token_id"] = origin.pad
    if origin.positions is not None:  # without it the official code takes its own default
        values["max_position_embeddings"] = origin.positions
    special = _hgrn_values(config) if _format(config) == "hgrn_bit" else _llama_values(config)
    return json.dumps(values | special, indent=2, sort_keys=True) + "\n"


def _format(config: ModelConfig) -> str:
    """hgrn_bit or llama; the switches that change the computation must be those of the official code."""
    formats = {"matmul-free": "hgrn_bit", "transformer++": "llama"}
    require(
        config.family in formats,
        f"family {config.family} has no Hugging Face format: only {' and '.join(formats)} can be exported",
    )
    plain = ModelConfig()
    for name in (
        "dense_head", "linear_norm", "sublayer_norm", "output_gate", "activation_bits", "weight_scale",
        "parametrisation",
    ):  # fmt: skip
        value, official = getattr(config, name), getattr(plain, name)
        require(value == official, f"model.{name}={value!r} cannot be exported: the format has only {official!r}")
    return formats[config.family]


def _from_hgrn(values: dict[str, Any]) -> ModelConfig:
    width = values["hidden_size"]
    rounded = -(-int(width * values.get("hidden_ratio", 4) * 2 / 3) // 256) * 256
    return ModelConfig(
        mixer="mlgru",
        linear="ternary",
        vocab=values["vocab_size"],
        width=width,
        depth=values["num_hidden_layers"],
        glu_width=values.get("intermediate_size") or rounded,
        lower_bounds=values.get("use_lower_bound", True),
        tie_embeddings=values.get("tie_word_embeddings", False),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        init_std=values.get("initializer_range", 0.02),
    )


def _hgrn_values(config: ModelConfig) -> dict[str, Any]:
    return {
        **HGRN_FIXED,
        "model_type": "hgrn_bit",
        "architectures": ["HGRNBitForCausalLM"],
        "attn_mode": "fused_recurrent",
        "conv_size": 4,
        "share_conv_kernel": True,
        "use_lower_bound": config.lower_bounds,
        "hidden_ratio": 4,
        "fuse_cross_entropy": True,
        "use_cache": True,
    }


def _from_llama(values: dict[str, Any], file: Path) -> ModelConfig:
    width, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads") or heads
    head_dim = values.get("head_dim") or width // heads
    require(head_dim * heads == width, f"{file}: head_dim={head_dim} is not supported, only hidden_size / heads")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    part = rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1
    require(part == 1, f"{file}: partial_rotary_factor={part} is not supported, only 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind == "default", f"{file}: rotary embeddings of type {kind!r} are not supported, only 'default'")
    return ModelConfig(
        mixer="attention",
        linear="dense",
        vocab=values["vocab_size"],
        width=width,
        depth=values["num_hidden_layers"],
        glu_width=values["intermediate_size"],
        heads=heads,
        kv_heads=0 if kv_heads == heads else kv_heads,
        tie_embeddings=values.get("tie_word_embeddings", False),
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10_000.0))),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        init_std=values.get("initializer_range", 0.02),
    )


def _llama_values(config: ModelConfig) -> dict[str, Any]:
    return {
        **LLAMA_FIXED,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.width // config.heads,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def _hgrn_layer(config: ModelConfig) -> Iterable[tuple[str, Slot]]:
    """One block of the official code: gate_proj packs the gate's rows before the up projection's."""
    D, F = config.width, config.glu_width
    for g, name in enumerate("ifg"):
        yield f"attn.{name}_proj.weight", Slot("mixer.gates.kernel", (g,), (D, D), matrix=True)
        yield f"attn.{name}_proj.norm.weight", Slot("mixer.gates.gain", (g,), (D,))
    yield "attn.o_proj.weight", Slot("mixer.out.kernel", (), (D, D), matrix=True)
    yield "attn.o_proj.norm.weight", Slot("mixer.out.gain", (), (D,))
    yield "attn.g_norm.weight", Slot("mixer.gate_norm.gain", (), (D,))
    yield "attn_norm.weight", Slot("mixer_norm.gain", (), (D,))
    yield "mlp_norm.weight", Slot("glu_norm.gain", (), (D,))
    yield "mlp.gate_proj.weight", Slot("glu.gate_up.kernel", (), (2 * F, D), matrix=True)
    yield "mlp.gate_proj.norm.weight", Slot("glu.gate_up.gain", (), (D,))
    yield "mlp.down_proj.weight", Slot("glu.down.kernel", (), (D, F), matrix=True)
    yield "mlp.down_proj.norm.weight", Slot("glu.down.gain", (), (F,))


def _llama_layer(config: ModelConfig) -> Iterable[tuple[str, Slot]]:
    """One block of LlamaForCausalLM."""
    D, F = config.width, config.glu_width
    kv_width = D // config.heads * (config.kv_heads or config.heads)
    yield "self_attn.q_proj.weight", Slot("mixer.query.kernel", (), (D, D), matrix=True)
    for g, name in enumerate("kv"):
        yield f"self_attn.{name}_proj.weight", Slot("mixer.key_value.kernel", (g,), (kv_width, D), matrix=True)
    yield "self_attn.o_proj.weight", Slot("mixer.out.kernel", (), (D, D), matrix=True)
    for g, name in enumerate(("gate", "up")):
        yield f"mlp.{name}_proj.weight", Slot("glu.gate_up.kernel", (g,), (F, D), matrix=True)
    yield "mlp.down_proj.weight", Slot("glu.down.kernel", (), (D, F), matrix=True)
    yield "input_layernorm.weight", Slot("mixer_norm.gain", (), (D,))
    yield "post_attention_layernorm.weight", Slot("glu_norm.gain", (), (D,))


def _fill(table: dict[str, Slot], stored: dict[str, Stored], shapes: Any) -> Any:
    """Our parameters in a tree like `shapes`, read tensor by tensor."""
    named = {path_name(path): a for path, a in jax.tree.leaves_with_path(shapes)}
    arrays = {name: np.full(a.shape, np.nan, a.dtype) for name, a in named.items()}  # a gap would show
    for file in sorted({stored[name].file for name in table}):
        with _open(file) as opened:
            for name in (name for name in table if stored[name].file == file):
                _put(arrays[table[name].path], table[name], opened.get_tensor(name))
    if HEAD in stored and HEAD not in table:
        _check_tied(arrays["embedding"], stored[HEAD])
    return jax.tree.map_with_path(lambda path, _: arrays[path_name(path)], shapes)


def _put(array: np.ndarray, slot: Slot, tensor: np.ndarray) -> None:
    """Copy one tensor of the checkpoint to its place."""
    place = array[slot.at]
    if not slot.matrix:
        place[...] = tensor
        return
    *groups, into, out = place.shape
    place[...] = tensor.reshape(*groups, out, into).swapaxes(-1, -2)


def _check_tied(embedding_VD: np.ndarray, head: Stored) -> None:
    """A head that is stored beside the embedding which the config ties it to must be that embedding."""
    with _open(head.file) as opened:
        same = np.array_equal(embedding_VD, opened.get_tensor(HEAD).astype(embedding_VD.dtype))
    if not same:
        raise InteropError(
            f"{head.file}: {HEAD} is not the embedding, to which tie_word_embeddings in config.json ties it"
        )


def _checked(folder: Path, table: dict[str, Slot], config: ModelConfig) -> dict[str, Stored]:
    """Where each tensor of the folder lies: every one of the table, once, of the right shape and a type that is read.

    Raises InteropError naming every tensor at fault.
    """
    promised = _promised(folder)
    held = _headers(promised.values())
    spare = {HEAD} if config.tie_embeddings else set()
    wrong = [f"missing {name} {list(table[name].shape)}" for name in table if name not in held and name not in promised]
    wrong += [
        f"absent {name}: {INDEX} promises it in {file.name}"
        for name, file in promised.items()
        if file not in {one.file for one in held.get(name, ())} and not name.endswith(BUFFERS)
    ]
    for name, found in held.items():
        if name in table or name in spare:
            wrong += _faults(name, found, table.get(name, Slot("", (), (config.vocab, config.width))), name in promised)
        elif not name.endswith(BUFFERS):
            wrong.append(f"extra {name} in {found[0].file.name}")
    if wrong:
        raise InteropError(f"{folder}: {len(wrong)} tensors do not fit its config.json:\n  " + "\n  ".join(wrong))
    return {name: found[0] for name, found in held.items()}


def _faults(name: str, found: list[Stored], slot: Slot, listed: bool) -> Iterator[str]:
    """What is wrong with a tensor that should be there."""
    one = found[0]
    if len(found) > 1:
        yield f"doubled {name}: in {' and '.join(other.file.name for other in found)}"
    if not listed:
        yield f"unlisted {name}: {one.file.name} holds it, but {INDEX} does not list it"
    if one.shape != slot.shape:
        yield f"misshaped {name}: {list(one.shape)}, expected {list(slot.shape)}"
    if one.dtype not in STORED:
        yield f"quantised {name}: of type {one.dtype} in {one.file.name}; only {', '.join(STORED)} can be read"


def _headers(files: Iterable[Path]) -> dict[str, list[Stored]]:
    """Every tensor that the files really hold, in each file that holds it."""
    held: dict[str, list[Stored]] = {}
    for file in sorted(set(files)):
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                header = opened.get_slice(name)
                held.setdefault(name, []).append(Stored(file, tuple(header.get_shape()), header.get_dtype()))
    return held


def _promised(folder: Path) -> dict[str, Path]:
    """Which file should hold each tensor, by the index; of a folder without one, by the only file itself."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise InteropError(f"{folder} has neither {single.name} nor {INDEX}: convert its weights to safetensors")
        return dict.fromkeys(_headers([single]), single)
    try:
        files = {str(tensor): folder / str(file) for tensor, file in dict(read_json(index)["weight_map"]).items()}
    except (KeyError, TypeError, ValueError) as error:
        raise InteropError(f"{index} has no weight_map of tensors to files ({error})") from None
    absent = sorted({str(file) for file in files.values() if not file.is_file()})
    if absent:
        raise InteropError(f"{index} names files that are not there: {', '.join(absent)}")
    if single.is_file() and single not in files.values():
        raise InteropError(f"{folder} holds {single.name} and {INDEX}, which does not name it: remove what is stale")
    return files


def _open(file: Path) -> Any:
    module = _safetensors("safetensors")
    try:
        return module.safe_open(str(file), framework="numpy")
    except module.SafetensorError as error:
        raise InteropError(f"{file} is cut off or damaged: {error}") from None


def _safetensors(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError("Hugging Face files need safetensors: pip install 'mmfree-jax[huggingface]'") from None


def _write_tensors(folder: Path, named: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """Write shards as they fill up; a single one gets no index."""
    save = _safetensors("safetensors.numpy").save_file
    weight_map: dict[str, int] = {}
    shard: dict[str, np.ndarray] = {}
    size, total, count = 0, 0, 1
    for name, array in named:
        if shard and size + array.nbytes > shard_bytes:
            save(shard, str(folder / f"{count}.part"), metadata={"format": "pt"})
            shard, size, count = {}, 0, count + 1
        shard[name], weight_map[name] = array, count
        size, total = size + array.nbytes, total + array.nbytes
    save(shard, str(folder / f"{count}.part"), metadata={"format": "pt"})
    files = {n: f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
    files = files if count > 1 else {1: "model.safetensors"}
    for n, file in files.items():
        os.replace(folder / f"{n}.part", folder / file)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {k: files[n] for k, n in weight_map.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
