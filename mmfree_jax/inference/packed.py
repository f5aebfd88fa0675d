"""Packed models on disk: a folder that holds the codes of the ternary weights, and nothing to quantise again.

    model.safetensors   codes in 2 or 1.6 bits (`ops.packed`) and their float32 scales, gains in float32, embedding and
                        dense matrices in bfloat16 or float32
    packed.json         the architecture, the layout of the codes, and a SHA-256 of each other file
    tokenizer.json      the tokenizer, if it is known

Matrices lie as [out, in] with layers and groups in front. The large tensors begin at multiples of 64 bytes, so that a
CPU computes with the mapped file itself: a model is there as soon as its pages are read, and processes share them.
"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmfree_jax.config import ModelConfig, from_json, to_json
from mmfree_jax.files import new_folder, read_object, sha256, write_json
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.models.layers import Projection
from mmfree_jax.models.mlgru import floors
from mmfree_jax.ops.packed import CODES_IN_A_BYTE, Layout, pack
from mmfree_jax.ops.ternary import Quantised
from mmfree_jax.sharding import path_name

PACKED = "packed.json"
TENSORS = "model.safetensors"
TOKENIZER = "tokenizer.json"
VERSION = 1
ALIGNMENT = 64  # bytes: what XLA asks of an array that it takes as it lies
NAMES = {"float32": "F32", "bfloat16": "BF16", "uint8": "U8"}  # safetensors' names of types
TYPES = {name: np.dtype(jnp.dtype(dtype)) for dtype, name in NAMES.items()}

Stored = Literal["bfloat16", "float32"]


class PackedError(ValueError):
    """A folder that is not the packed model that it should be. The message names file and fault."""


class Tensor(NamedTuple):
    """A tensor of a model, which is only made when it is needed."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], Any]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def packed_tensors(model: LanguageModel, stored: Stored = "bfloat16", layout: Layout = "planes") -> Iterator[Tensor]:
    """Yield the tensors of a model as a packed folder holds them, without the padding of its vocabulary.

    stored: the type of embedding and dense matrices. layout: of the ternary codes.
    """
    config, dense = model.config, np.dtype(jnp.dtype(stored))
    vocab = config.tokenizer_vocab or config.vocab
    modules = {".".join(["blocks", *map(str, path)]): module for path, module in nnx.iter_modules(model.blocks)}
    for path, array in jax.tree.leaves_with_path(nnx.state(model, nnx.Param)):
        name = path_name(path)
        module = modules.get(name.removesuffix(".kernel"))
        if name == "lower_bounds":
            yield _tensor("floors", array.shape, np.float32, partial(floors, array))
        elif name == "embedding":
            yield _tensor(name, (vocab, config.width), dense, partial(_rows, array, vocab))
        elif name == "head.kernel" and not model.head.recipe.ternary:
            yield _tensor(name, (vocab, config.width), dense, partial(_rows, array.T, vocab))
        elif isinstance(module, Projection) and name.endswith(".kernel"):
            yield from _projection_tensors(module, name.removesuffix(".kernel"), dense, layout)
        elif name != "head.kernel":
            yield _tensor(name, array.shape, np.float32, partial(np.asarray, array))
    if model.head.recipe.ternary:
        codes = model.head.make_codes(model.embedding[...])
        assert codes is not None
        assert codes.scale is not None
        scale = codes.scale[..., :vocab]
        yield from _code_tensors("head", (Quantised(codes.codes[None, :, :vocab], scale[None]),), layout)


@cache
def abstract_tensors(config: ModelConfig, stored: Stored = "bfloat16", layout: Layout = "planes") -> tuple[Tensor, ...]:
    """Return the tensors of a packed folder of an architecture by name, shape and type; none of them can be made."""
    found: list[Tensor] = []

    def trace() -> tuple[()]:
        found.extend(packed_tensors(LanguageModel(config, rngs=nnx.Rngs(0)), stored, layout))
        return ()

    jax.eval_shape(trace)
    return tuple(found)


def _rows(array: jax.Array, count: int) -> jax.Array:
    return array[:count]


def _projection_tensors(module: Projection, name: str, dense: np.dtype, layout: Layout) -> Iterator[Tensor]:
    codes = module.stacked_codes()
    if codes is not None:
        yield from _code_tensors(name, codes, layout)
        return
    matrix = module.kernel[...].swapaxes(-1, -2)
    yield _tensor(f"{name}.kernel", matrix.shape, dense, partial(np.asarray, matrix))


def _tensor(name: str, shape: tuple[int, ...], dtype: Any, make: Callable[[], Any]) -> Tensor:
    return Tensor(name, tuple(shape), np.dtype(dtype), make)


def _code_tensors(name: str, groups: tuple[Quantised, ...], layout: Layout) -> Iterator[Tensor]:
    """Codes [L, G, F, I] of G matrices and their scales [L, G, 1 or F], both of stacked layers."""
    L, D, F = groups[0].codes.shape
    assert groups[0].scale is not None
    shape = L, len(groups), F, -(-D // CODES_IN_A_BYTE[layout])
    yield _tensor(f"{name}.codes", shape, np.uint8, partial(_packed, groups, layout))
    yield _tensor(f"{name}.scale", (L, len(groups), groups[0].scale.shape[-1]), np.float32, partial(_scales, groups))


def _packed(groups: tuple[Quantised, ...], layout: Layout) -> np.ndarray:
    return np.stack([pack(np.asarray(q.codes).swapaxes(-1, -2), layout) for q in groups], axis=1)


def _scales(groups: tuple[Quantised, ...]) -> np.ndarray:
    return np.stack([np.asarray(q.scale)[..., 0, :] for q in groups], axis=1)


def save_packed(
    model: LanguageModel,
    out: Path,
    *,
    stored: Stored = "bfloat16",
    layout: Layout = "planes",
    tokenizer_json: str = "",
    end: int | Sequence[int] | None = None,
    beside: Iterable[Path] = (),
) -> None:
    """Write a model as a packed folder, which appears complete or not at all.

    stored, layout: as `packed_tensors`. end: the token, or tokens, that end a document, where they are known. beside:
    files to copy, such as a chat template.
    Raises FileExistsError if the folder exists and is not empty.
    """
    with new_folder(out) as folder:
        write_tensors(folder / TENSORS, list(packed_tensors(model, stored, layout)))
        if tokenizer_json:
            (folder / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
        for file in beside:
            shutil.copyfile(file, folder / file.name)
        facts = {
            "version": VERSION,
            "model": json.loads(to_json(served_config(model.config))),
            "layout": layout,
            "end_of_document": end,
            "sha256": {file.name: sha256([file]) for file in sorted(folder.iterdir())},
        }
        write_json(folder / PACKED, facts)


def served_config(config: ModelConfig) -> ModelConfig:
    """Return the architecture of a model without the padding of its vocabulary."""
    return dataclasses.replace(config, vocab=config.tokenizer_vocab or config.vocab, tokenizer_vocab=0)


def write_tensors(path: Path, tensors: list[Tensor]) -> None:
    """Write a safetensors file, one tensor after the other in memory: small types last, and those aligned."""
    tensors = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header, offset = {}, 0
    for tensor in tensors:
        places = [offset, offset := offset + tensor.size]
        header[tensor.name] = {"dtype": NAMES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": places}
    text = json.dumps(header).encode()
    before = sum(tensor.size for tensor in tensors if tensor.dtype != np.uint8)
    text += b" " * (-(8 + len(text) + before) % ALIGNMENT)  # the format allows blanks behind its header
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = np.ascontiguousarray(np.asarray(tensor.make()).astype(tensor.dtype, copy=False))
            assert array.shape == tensor.shape, tensor.name
            file.write(array.tobytes())


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed model."""
    return (folder / PACKED).is_file()


def read_packed(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Map a packed folder: what packed.json says, with "model" as a ModelConfig, and its tensors, not read yet.

    Raises PackedError for a folder of another kind or version, and for a file that is cut off.
    """
    if not is_packed(folder):
        raise PackedError(f"{folder} has no {PACKED}: not a packed model")
    facts = read_object(folder / PACKED)
    if facts.get("version") != VERSION:
        raise PackedError(f"{folder / PACKED} is of version {facts.get('version')}; this one reads version {VERSION}")
    facts["model"] = from_json(ModelConfig, json.dumps(facts.get("model")), str(folder / PACKED))
    return facts, map_tensors(folder / TENSORS)


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """Map the tensors of a safetensors file. Raises PackedError if it is cut off or no such file."""
    try:
        whole = np.memmap(path, np.uint8, mode="r")
    except (FileNotFoundError, ValueError) as error:  # of an empty file
        raise PackedError(f"{path} cannot be read: {error}") from None
    size = int.from_bytes(whole[:8].tobytes(), "little")
    try:
        header = json.loads(whole[8 : 8 + size].tobytes())
        parts = {name: _part(entry) for name, entry in header.items()}
        end = max(part.stop for part, _, _ in parts.values())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise PackedError(f"{path} is no safetensors file: {error}") from None
    if 8 + size + end != whole.size:
        raise PackedError(f"{path} has {whole.size} bytes, but its header promises {8 + size + end}: it is cut off")
    data = whole[8 + size :]
    return {name: data[part].view(dtype).reshape(shape) for name, (part, dtype, shape) in parts.items()}


def _part(entry: Any) -> tuple[slice, np.dtype, tuple[int, ...]]:
    """Place, type and shape of a tensor. Raises ValueError for a place of another size than they have."""
    (start, stop), dtype, shape = entry["data_offsets"], TYPES[entry["dtype"]], tuple(entry["shape"])
    counts = all(type(number) is int and 0 <= number < 1 << 60 for number in (start, stop, *shape))
    if not counts or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor of shape {shape!s:.80} cannot be in bytes {start!s:.20} to {stop!s:.20}")
    return slice(start, stop), dtype, shape


def verify_packed(folder: Path) -> None:
    """Read every byte and compare with the checksums. Raises PackedError naming the first file that differs."""
    sums = read_object(folder / PACKED).get("sha256")
    if not isinstance(sums, dict) or any(Path(name).name != name for name in sums):
        raise PackedError(f"{folder / PACKED} has no checksums of the files beside it")
    for name, expected in sums.items():
        if not (folder / name).is_file():
            raise PackedError(f"{folder / name} is missing")
        if sha256([folder / name]) != expected:
            raise PackedError(f"{folder / name} has been changed or damaged: its SHA-256 is not that of {PACKED}")
