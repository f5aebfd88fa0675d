"""Hugging Face checkpoints, read and written without torch: `hgrn_bit` (the released MatMul-free models) and Llama.

A folder holds `config.json` and safetensors files. Matrices lie there as [out, in]; ours are [in, out] with a leading
layer axis. No value is rounded: bfloat16 and float16 are exact in float32, so reading a folder and writing it in its
own type gives back the same bytes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmfree_jax.architecture import LARGEST, ONLY_TERNARY
from mmfree_jax.config import ModelConfig, require
from mmfree_jax.files import new_folder, read_json
from mmfree_jax.interop import bitnet, hgrn, llama
from mmfree_jax.interop.safetensors import Header, InteropError, Slot, check, open_file, write
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.sharding import path_name

FORMATS: dict[str, ModuleType] = {"hgrn_bit": hgrn, "llama": llama, "bitnet": bitnet}  # by model_type in config.json
FORMAT_OF_FAMILY = {"matmul-free": "hgrn_bit", "transformer++": "llama", "bitnet": "bitnet"}
SHARD_BYTES = 5 * 10**9
DTYPES = ("float32", "bfloat16", "float16", "float64")
HEAD = "lm_head.weight"
MOST_LAYERS = 4096  # of a folder that somebody else wrote
# Types of what may be left out, or null.
OPTIONAL: dict[tuple[type, ...], tuple[str, ...]] = {
    (int,): ("intermediate_size", "num_key_value_heads", "head_dim"),
    (int, float): ("hidden_ratio", "rms_norm_eps", "initializer_range", "rope_theta", "partial_rotary_factor"),
    (bool,): ("use_lower_bound", "tie_word_embeddings"),
    (dict,): ("rope_parameters", "rope_scaling"),
}
VOCABULARY = ("embedding", "head.kernel")  # parameters that have a row for each token in a checkpoint


class Origin(NamedTuple):
    """What a checkpoint's config.json says about the text that it was trained on; None: not known."""

    bos: int | None = None  # the token that a text begins with
    eos: int | list[int] | None = None  # the tokens that end it
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
    table, headers = _checked(folder, config)  # before anything is built
    graph, shapes = nnx.split(nnx.eval_shape(build))
    return nnx.merge(graph, jax.tree.map(jnp.asarray, _fill(table, headers, shapes)))


def read_parameters(folder: Path, shapes: Any) -> Any:
    """Read the parameters of a model as NumPy arrays, in a tree like `shapes`, which is that of the folder's model.

    Raises as `load_huggingface`.
    """
    return _fill(*_checked(folder, read_config(folder)), shapes)


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
    unless one tensor is larger. `origin` goes into config.json; what it does not know is null there. Padding of the
    vocabulary is left out, because the formats have none. The tokenizer's files are not part of a model: copy them too.

    Raises:
        ConfigError: for an architecture that neither format can express.
        FileExistsError: when the folder exists and is not empty.
    """
    require(dtype in DTYPES, f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}")
    text = write_config(model.config, dtype, origin)
    with new_folder(Path(path)) as folder:
        write(folder, tensors(model, dtype), shard_bytes)
        (folder / "config.json").write_text(text, encoding="utf-8")


def tensors(model: LanguageModel, dtype: str = "float32") -> Iterator[tuple[str, np.ndarray]]:
    """Yield the model's parameters under the names, and in the layout, of the checkpoint format."""
    arrays = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(nnx.state(model))}
    for name, slot in slots(model.config).items():
        array = np.asarray(arrays[slot.path][slot.at])
        array = array.swapaxes(-1, -2) if slot.matrix else array
        if slot.path in VOCABULARY:
            array = array[: slot.shape[0]]
        yield name, np.ascontiguousarray(array.reshape(slot.shape).astype(jnp.dtype(dtype)))


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Return every tensor of the format that a config is stored in; padding of the vocabulary is not stored.

    Raises ConfigError when no format can express the architecture.
    """
    # A table of names and places is both the reader and the writer: they cannot disagree.
    vocab, form = config.tokenizer_vocab or config.vocab, FORMATS[_format(config)]
    table = {"model.norm.weight": Slot("norm.gain", (), (config.width,)), **dict(form.tensors(config, vocab))}
    if not config.tie_embeddings:
        table[HEAD] = Slot("head.kernel", (), (vocab, config.width), matrix=True)
    for layer in range(config.depth):
        for name, slot in form.block_tensors(config):
            table[f"model.layers.{layer}.{name}"] = slot._replace(path=f"blocks.{slot.path}", at=(layer, *slot.at))
    return table


def read_config(folder: Path) -> ModelConfig:
    """Return the architecture that a folder's config.json describes.

    Raises InteropError without a config.json, and ConfigError, naming file and key, for what it lacks or the models
    here do not have.
    """
    values, file = _read_values(folder), folder / "config.json"
    kind = values.get("model_type")
    known = isinstance(kind, str) and kind in FORMATS
    require(known, f"{file}: model_type={kind!r:.80}; only {', '.join(FORMATS)} can be read")
    quantised = values.get("quantization_config")
    require(
        not quantised or kind == "bitnet",
        f"{file}: quantization_config={quantised!r} says that weights are codes, which cannot be read: take the "
        "checkpoint in float32, bfloat16 or float16",
    )
    form, optional = FORMATS[str(kind)], {name for names in OPTIONAL.values() for name in names}
    values = {name: value for name, value in values.items() if value is not None or name not in optional}
    for name in form.SIZES:
        size: Any = values.get(name)
        require(type(size) is int, f"{file}: {name} is {'missing' if size is None else f'{size!r:.80}, not a number'}")
        most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
        require(1 <= size <= most, f"{file}: {name}={size:.6g} is not from 1 to {most}")
    for kinds, names in OPTIONAL.items():
        for name in names:
            value = values.get(name)
            right = value is None or (type(value) in kinds and (dict in kinds or abs(value) < 1e12))
            require(right, f"{file}: {name}={value!r:.80} is not of type {' or '.join(one.__name__ for one in kinds)}")
    for name, only in form.FIXED.items():
        found = values.get(name, only)
        require(found == only, f"{file}: {name}={found!r} is not supported, only {only!r}")
    return form.model_config(values, file)


def read_origin(folder: Path) -> Origin:
    """Return what a folder's config.json says about the text that the model was trained on. Raises as `read_config`."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
    values = _read_values(folder)
    return Origin(*(values.get(key) for key in keys))


def _read_values(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise InteropError(f"{folder} has no config.json: not a Hugging Face model folder")
    values = read_json(file)
    require(isinstance(values, dict), f"{file} is not a JSON object")
    return values


def write_config(config: ModelConfig, dtype: str, origin: Origin = UNKNOWN) -> str:
    """Return the text of config.json. Raises ConfigError when no format can express the architecture."""
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
    return json.dumps(values | FORMATS[_format(config)].config_values(config), indent=2, sort_keys=True) + "\n"


def _format(config: ModelConfig) -> str:
    """The format of a family. Switches that change the computation must have the values that it stands for."""
    require(
        config.family in FORMAT_OF_FAMILY,
        f"family {config.family} has no Hugging Face format: only {' and '.join(FORMAT_OF_FAMILY)} can be exported",
    )
    name = FORMAT_OF_FAMILY[config.family]
    if name == "llama" and config.sublayer_norm:  # a BitNet whose layers are dense
        name = "bitnet"
    for field, only in FORMATS[name].ARCHITECTURE.items():
        value = getattr(config, field)
        here = config.linear == "ternary" or field not in ONLY_TERNARY
        require(not here or value == only, f"model.{field}={value!r} cannot be exported: the format has only {only!r}")
    return name


def _checked(folder: Path, config: ModelConfig) -> tuple[dict[str, Slot], dict[str, Header]]:
    """The tensors that a folder should hold, and where it holds each of them."""
    values = _read_values(folder)
    form, table = FORMATS[values["model_type"]], slots(config)
    table = form.coded(values, table) if form is bitnet else table
    head = {HEAD: Slot("", (), (config.vocab, config.width))}
    return table, check(folder, table, head if config.tie_embeddings else {})


def _fill(table: dict[str, Slot], headers: dict[str, Header], shapes: Any) -> Any:
    """Our parameters in a tree like `shapes`, read tensor by tensor."""
    named = {path_name(path): a for path, a in jax.tree.leaves_with_path(shapes)}
    arrays = {name: np.full(a.shape, np.nan, a.dtype) for name, a in named.items()}  # a gap would show
    # File by file: a shard is opened once, and never more than one tensor is in memory besides the result.
    scales = {slot.scale: _read(headers, slot.scale).item() for slot in table.values() if slot.scale}
    for file in sorted({headers[name].file for name in table}):
        with open_file(file) as reader:
            for name in (name for name in table if headers[name].file == file and table[name].path):
                slot, tensor = table[name], reader.get_tensor(name)
                place = arrays[slot.path][slot.at]
                if slot.scale:
                    scale = 1 / scales[slot.scale] if slot.divides else scales[slot.scale]
                    tensor = bitnet.latent(tensor, scale, slot.shape[0])
                # A matrix may pack several of ours, such as gate and up: [G * out, in] becomes [G, in, out].
                if slot.matrix:
                    *groups, rows, columns = place.shape
                    tensor = tensor.reshape(*groups, columns, rows).swapaxes(-1, -2)
                place[...] = tensor
    if HEAD in headers and HEAD not in table:  # stored although it is tied: then it must be the embedding
        same = np.array_equal(arrays["embedding"], _read(headers, HEAD).astype(arrays["embedding"].dtype))
        if not same:
            raise InteropError(
                f"{headers[HEAD].file}: {HEAD} is not the embedding, although config.json says so (tie_word_embeddings)"
            )
    return jax.tree.map_with_path(lambda path, _: arrays[path_name(path)], shapes)


def _read(headers: dict[str, Header], name: str) -> np.ndarray:
    with open_file(headers[name].file) as reader:
        return reader.get_tensor(name)
