"""The library of C++ kernels for CPUs.

It is compiled at its first use, against the headers of the jaxlib that is installed, and kept in the cache folder.
"""

import ctypes
import functools
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from mmfree_jax.files import cache_folder, sha256

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "ternary_product.cc", FOLDER / "half_product.cc")
HEADERS = (FOLDER / "blocks.h",)
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-w")  # -w: the headers of jaxlib warn
BY_XLA = 16  # from this many rows on XLA's products of matrices are faster


@functools.cache
def registered() -> bool:
    """Whether XLA can call the library. Compiles, loads and registers it the first time."""
    found = library()
    if found is None:
        return False
    for name in ("ternary_product", "half_product"):
        jax.ffi.register_ffi_target(target(name), jax.ffi.pycapsule(getattr(found, name)), platform="cpu")
    return True


def target(name: str) -> str:
    """Return the name under which XLA knows a function of the library."""
    return f"mmfree_{name}"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, which is kept in the cache folder; None where there is no C++ compiler.

    Raises RuntimeError where the compiler refuses a source.
    """
    path = cache_folder() / "cpu" / f"kernels-{_version()}.so"
    if not path.exists():
        compiler = find_compiler()
        if compiler is None:
            return None
        compile_library(compiler, path)
    loaded = ctypes.CDLL(str(path))
    loaded.variant_name.restype = loaded.half_variant_name.restype = ctypes.c_char_p
    loaded.read_rate.restype = ctypes.c_double
    return loaded


def find_compiler() -> str | None:
    """The C++ compiler: `$CXX`, or the first of c++, g++ and clang++ that is installed."""
    return next(filter(shutil.which, [os.environ.get("CXX", ""), "c++", "g++", "clang++"]), None)


def compile_library(compiler: str, path: Path, *options: str) -> None:
    """Compile the sources into a shared library. Raises RuntimeError, with what the compiler said, if that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name  # renamed when it is whole: another process may compile it as well
        command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", *options, *map(str, SOURCES), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[:2000]}")
        made.replace(path)


def _version() -> str:
    """Names what the library depends on: its sources, and the jaxlib whose headers it is compiled with."""
    import jaxlib

    return f"{platform.machine()}-{jaxlib.__version__}-{sha256([*SOURCES, *HEADERS])[:16]}"


def variant_names(prefix: str = "") -> Iterator[tuple[int, str]]:
    """Number and name of the variants of a function that this CPU runs, the fastest first."""
    found, index = library(), 0
    name, runs = (getattr(found, f"{prefix}variant_{part}", None) for part in ("name", "runs_here"))
    while name is not None and runs is not None and (own := name(index)) is not None:
        if runs(index):
            yield index, own.decode()
        index += 1


def run_variant(prefix: str, variant: str, sizes: tuple[int, int, int], *arrays: np.ndarray) -> None:
    """Multiply by one variant in one thread, without XLA, into the last array: for tests.

    sizes: M, N, K. Raises KeyError if this CPU does not run the variant.
    """
    number = {name: number for number, name in variant_names(prefix)}[variant]
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in map(np.ascontiguousarray, arrays)]
    getattr(library(), f"{prefix}variant_product")(number, *pointers, *map(ctypes.c_int64, sizes))


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
