"""Products of 2-bit ternary weights with int8 activations on a CPU: JAX's side of `ternary_product.cc`.

The C++ source is compiled at its first use, against the headers of the jaxlib that is installed, and kept in the cache
folder. Without a compiler XLA multiplies (`product_by_xla`), with the same integers as a result.
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.files import cache_folder, sha256
from mmfree_jax.ops.packed import PLANES, unpack_planes

SOURCE = Path(__file__).with_suffix(".cc")
TARGET = "mmfree_ternary_product"  # the name under which XLA knows the function
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-w")  # -w: the headers of jaxlib warn
BY_XLA = 16  # from this many rows on XLA's product of int8 matrices is faster


def ternary_product(bytes_NI: jax.Array, q_MK: jax.Array) -> jax.Array:
    """Multiply int8 activations q_MK with ternary weights: int32 [M, N], exact.

    bytes_NI: weights of N outputs as `packed.pack_planes` packs them, I = ceil(K / 4).
    """
    if q_MK.shape[0] >= BY_XLA or not _registered():
        return product_by_xla(bytes_NI, q_MK)
    q_MK = jnp.pad(q_MK, [(0, 0), (0, PLANES * bytes_NI.shape[1] - q_MK.shape[1])])
    shape = jax.ShapeDtypeStruct((q_MK.shape[0], bytes_NI.shape[0]), jnp.int32)
    return jax.ffi.ffi_call(TARGET, shape)(bytes_NI, q_MK)


def product_by_xla(bytes_NI: jax.Array, q_MK: jax.Array) -> jax.Array:
    """`ternary_product` by XLA, which unpacks the weights."""
    codes_NK = unpack_planes(bytes_NI, q_MK.shape[1])
    return jax.lax.dot_general(q_MK, codes_NK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


@functools.cache
def _registered() -> bool:
    """Whether XLA can call the library. Compiles, loads and registers it the first time."""
    found = library()
    if found is None:
        return False
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(found.ternary_product), platform="cpu")
    return True


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, which is kept in the cache folder; None where there is no C++ compiler.

    Raises RuntimeError where the compiler refuses the source.
    """
    path = cache_folder() / "cpu" / f"ternary_product-{_version()}.so"
    if not path.exists():
        compiler = find_compiler()
        if compiler is None:
            return None
        compile_library(compiler, path)
    loaded = ctypes.CDLL(str(path))
    loaded.variant_name.restype = ctypes.c_char_p
    loaded.read_rate.restype = ctypes.c_double
    return loaded


def find_compiler() -> str | None:
    """The C++ compiler: `$CXX`, or the first of c++, g++ and clang++ that is installed."""
    return next(filter(shutil.which, [os.environ.get("CXX", ""), "c++", "g++", "clang++"]), None)


def compile_library(compiler: str, path: Path, *options: str) -> None:
    """Compile the source into a shared library. Raises RuntimeError, with what the compiler said, if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name  # renamed when it is whole: another process may compile it as well
        command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", *options, str(SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[:2000]}")
        made.replace(path)


def _version() -> str:
    """Names what the library depends on: its source, and the jaxlib whose headers it is compiled with."""
    import jaxlib

    return f"{jaxlib.__version__}-{sha256([SOURCE])[:16]}"


def variants() -> Iterator[str]:
    """Names of the variants that this CPU runs, the fastest first."""
    found, index = library(), 0
    while found is not None and (name := found.variant_name(index)) is not None:
        if found.variant_runs_here(index):
            yield name.decode()
        index += 1


def product_by_variant(variant: str, bytes_NI: np.ndarray, q_MK: np.ndarray) -> np.ndarray:
    """Multiply by one variant in one thread, without XLA: for tests. Raises ValueError if it is unknown."""
    found = library()
    names: list[str] = []
    while found is not None and (name := found.variant_name(len(names))) is not None:
        names.append(name.decode())
    if found is None or variant not in names:
        raise ValueError(f"no variant {variant!r}: there are {', '.join(names) or 'none'}")
    M, N, K = q_MK.shape[0], bytes_NI.shape[0], PLANES * bytes_NI.shape[1]
    q_MK = np.ascontiguousarray(np.pad(q_MK, [(0, 0), (0, K - q_MK.shape[1])]))
    y_MN = np.empty((M, N), np.int32)
    arrays = [a.ctypes.data_as(ctypes.c_void_p) for a in (np.ascontiguousarray(bytes_NI), q_MK, y_MN)]
    found.variant_product(names.index(variant), *arrays, *map(ctypes.c_int64, (M, N, K)))
    return y_MN


def read_rate(array: np.ndarray, threads: int) -> float:
    """Read an array of 8-byte words once and return bytes a second: the rate that no product can exceed."""
    found = library()
    if found is None:
        raise RuntimeError("there is no C++ compiler")
    return found.read_rate(array.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(array.nbytes), threads)


def memory_rate() -> float:
    """Measure how many bytes a second all cores read: the best of five reads of 256 MB, more than caches hold.

    Without a C++ compiler NumPy reads, in one thread.
    """
    array, rates = np.ones(2**25, np.uint64), []
    for _ in range(5):
        if library() is not None:
            rates.append(read_rate(array, os.cpu_count() or 1))
            continue
        began = time.perf_counter()
        array.max()
        rates.append(array.nbytes / (time.perf_counter() - began))
    return max(rates)
