"""The library of C++ kernels for CPUs: compiled, refused, missing; and the rate of memory that it measures."""

import ctypes
import subprocess
import sys

import numpy as np
import pytest

from mmfree_jax.ops.fast.cpu import library

COMPILED = pytest.mark.skipif(library.find_compiler() is None, reason="needs a C++ compiler")


def test_without_a_compiler_xla_multiplies(tmp_path):
    code = (
        "import numpy as np, sys; sys.path.insert(0, '.')\n"
        "from mmfree_jax.ops.fast.cpu import half_product, library, ternary_product as cpu\n"
        "assert library.library() is None and list(cpu.variants()) == [] and not half_product.supports(1)\n"
        "weights, q = np.array([[2 | 1 << 2 | 1 << 4]], np.uint8), np.array([[3, 5, 7]], np.int8)\n"
        "print(np.asarray(cpu.ternary_product(weights, q)))"
    )
    environment = {"PATH": "", "MMFREE_JAX_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[3]]"


@COMPILED
def test_what_the_compiler_says_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "SOURCES", (tmp_path / "wrong.cc",))
    library.SOURCES[0].write_text("not C++")
    with pytest.raises(RuntimeError, match=r"not.*C"):
        library.compile_library(library.find_compiler(), tmp_path / "wrong.so")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.cc"]


@COMPILED
def test_read_rate_reads_every_word():
    data = np.ones(1 << 20, np.uint64)
    assert library.read_rate(data, 1) > 1e8
    assert isinstance(library.library(), ctypes.CDLL)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_rate_of_memory_is_measured_without_a_compiler_too(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(library, "library", lambda: None)
    assert 1e8 < library.memory_rate() < 1e13
