"""The tensor files of a checkpoint: one `model.safetensors`, or shards with an index. Needs the package safetensors.

What a folder holds is what the headers of its files say; an index that says something else is refused.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmfree_jax.errors import need
from mmfree_jax.files import read_json

INDEX = "model.safetensors.index.json"
NEEDED = "a Hugging Face folder", "'mmfree-jax[huggingface]'"
BUFFERS = ("rotary_emb.inv_freq",)  # not parameters: old Llama checkpoints hold them
READABLE = ("F32", "BF16", "F16", "F64")  # safetensors' names of the types that can be read


class InteropError(ValueError):
    """A folder that is not the checkpoint it should be. The message names every tensor or file that is wrong."""


class Slot(NamedTuple):
    """The place of one tensor in our parameters: `parameters[path][at]`, transposed if it is a matrix; none without a
    path."""

    path: str
    at: tuple[int, ...]
    shape: tuple[int, ...]  # in the checkpoint
    matrix: bool = False
    packed: tuple[int, ...] | None = None  # the shape of codes four in a byte, where the tensor may hold them
    scale: str = ""  # the tensor with the scale of codes
    divides: bool = False  # whether codes are divided by it


class Header(NamedTuple):
    """A tensor as the header of its file describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def check(folder: Path, table: dict[str, Slot], optional: dict[str, Slot]) -> dict[str, Header]:
    """Find each tensor of a folder: every one of the table, once, of the right shape and a type that can be read.

    `optional` tensors are checked like the others, but may be missing. Raises InteropError naming every wrong tensor.
    """
    index = read_index(folder)
    held = read_headers(index.values())
    wrong = [f"missing {name} {list(table[name].shape)}" for name in table if name not in held and name not in index]
    for name, file in index.items():
        if file not in {header.file for header in held.get(name, ())} and not name.endswith(BUFFERS):
            wrong.append(f"absent {name}: {INDEX} promises it in {file.name}")
    for name, headers in held.items():
        slot, header = table.get(name) or optional.get(name), headers[0]
        if slot is None:
            wrong += [] if name.endswith(BUFFERS) else [f"extra {name} in {header.file.name}"]
            continue
        if len(headers) > 1:
            wrong.append(f"doubled {name}: in {' and '.join(one.file.name for one in headers)}")
        if name not in index:
            wrong.append(f"unlisted {name}: {header.file.name} holds it, but {INDEX} does not list it")
        packed = header.dtype == "U8" and slot.packed is not None
        if header.shape != (slot.packed if packed else slot.shape) and not (header.shape == () and slot.shape == (1,)):
            wrong.append(f"misshaped {name}: {list(header.shape)}, expected {list(slot.shape)}")
        if header.dtype not in READABLE and not packed:
            types = ", ".join(READABLE)
            wrong.append(f"quantised {name}: of type {header.dtype} in {header.file.name}; only {types} can be read")
    if wrong:
        raise InteropError(f"{folder}: {len(wrong)} tensors do not fit its config.json:\n  " + "\n  ".join(wrong))
    return {name: headers[0] for name, headers in held.items()}


def read_headers(files: Iterable[Path]) -> dict[str, list[Header]]:
    """Return every tensor that the files really hold, with each file that holds it."""
    # Headers only: a checkpoint of a hundred gigabytes is checked before the first byte of a tensor is read.
    held: dict[str, list[Header]] = {}
    for file in sorted(set(files)):
        with open_file(file) as reader:
            for name in reader.keys():  # noqa: SIM118 (not a dict)
                part = reader.get_slice(name)
                held.setdefault(name, []).append(Header(file, tuple(part.get_shape()), part.get_dtype()))
    return held


def read_index(folder: Path) -> dict[str, Path]:
    """Return the file that should hold each tensor: from the index, or of a folder without one, from its only file."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise InteropError(f"{folder} has neither {single.name} nor {INDEX}: convert its weights to safetensors")
        return dict.fromkeys(read_headers([single]), single)
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


def open_file(file: Path) -> Any:
    """Open one file for reading. Raises InteropError if it is damaged."""
    module = need("safetensors", *NEEDED)
    try:
        return module.safe_open(str(file), framework="numpy")
    except module.SafetensorError as error:
        raise InteropError(f"{file} is cut off or damaged: {error}") from None


def write(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    """Write shards as they fill up. A single one gets no index."""
    # Parts are numbered before anybody knows how many there are, and named when the last one is written.
    save = need("safetensors.numpy", *NEEDED).save_file
    weight_map: dict[str, int] = {}
    shard: dict[str, np.ndarray] = {}
    size, total, count = 0, 0, 1
    for name, array in tensors:
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
