"""Products of packed weights on a CPU: every variant of the C++ code gives the integers of int64 arithmetic."""

import jax
import numpy as np
import pytest

from mmfree_jax.ops import packed
from mmfree_jax.ops.fast.cpu import library
from mmfree_jax.ops.fast.cpu import ternary_product as cpu
from tests.ops.fast.emulated import arm_program

COMPILED = pytest.mark.skipif(library.find_compiler() is None, reason="needs a C++ compiler")
# Vectors, outputs, width: below a tile and beyond it, below a vector of 16, 32 or 64 bytes and beyond, odd, empty.
SIZES = [
    (1, 1, 1),
    (1, 5, 7),
    (2, 9, 64),
    (3, 33, 257),
    (4, 4, 256),
    (5, 130, 1024),
    (9, 17, 1021),
    (1, 3000, 2816),
    (1, 1, 0),
    (0, 4, 8),
    (2, 0, 8),
]


def drawn(M, N, K, seed=0):
    rng = np.random.default_rng(seed)
    codes_NK = rng.integers(-1, 2, (N, K)).astype(np.int8)
    q_MK = rng.integers(-127, 128, (M, K)).astype(np.int8)
    return packed.pack_planes(codes_NK), q_MK, q_MK.astype(np.int64) @ codes_NK.T.astype(np.int64)


@COMPILED
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_variants_equal_int64(size):
    bytes_NI, q_MK, expected = drawn(*size)
    names = list(cpu.variants())
    assert names[-1] == "scalar"
    for name in names:
        np.testing.assert_array_equal(cpu.product_by_variant(name, bytes_NI, q_MK), expected, err_msg=name)


@COMPILED
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_product_in_a_program_equals_int64_and_xla(size):
    bytes_NI, q_MK, expected = drawn(*size)
    for product in (cpu.ternary_product, cpu.product_by_xla):
        np.testing.assert_array_equal(jax.jit(product)(bytes_NI, q_MK), expected)


@COMPILED
def test_the_largest_sums_do_not_overflow():
    """All codes and activations at their largest: no sum of 16 bits on the way may wrap."""
    K = 8192
    for code, q in ((1, 127), (1, -127), (-1, 127), (1, -128)):
        bytes_NI, q_MK = packed.pack_planes(np.full((5, K), code)), np.full((2, K), q, np.int8)
        for name in cpu.variants():
            assert set(cpu.product_by_variant(name, bytes_NI, q_MK).flat) == {code * q * K}, name


@COMPILED
def test_many_products_at_once_do_not_wait_for_each_other():
    """More products in flight than the pool has threads, each shared out among them."""
    bytes_NI, q_MK, expected = drawn(1, 4096, 512)
    program = jax.jit(lambda b, q: [cpu.ternary_product(b, q + 0 * i) for i in range(50)])
    for y in program(bytes_NI, q_MK):
        np.testing.assert_array_equal(y, expected)


HARNESS = """
#include "{source}"
#include <cstdio>
int main() {{  // reads M N K, weights and activations; writes the products of each variant that runs
  int64_t s[3];
  if (fread(s, 8, 3, stdin) != 3) return 1;
  std::vector<uint8_t> w(s[1] * s[2] / 4);
  std::vector<int8_t> q(s[0] * s[2]);
  if (fread(w.data(), 1, w.size(), stdin) != w.size() || fread(q.data(), 1, q.size(), stdin) != q.size()) return 1;
  for (int i = 0; variant_name(i); i++) {{
    std::vector<int32_t> y(s[0] * s[1]);
    if (!variant_runs_here(i)) continue;
    variant_product(i, w.data(), q.data(), y.data(), s[0], s[1], s[2]);
    fwrite(y.data(), 4, y.size(), stdout);
    fprintf(stderr, "%s\\n", variant_name(i));
  }}
}}
"""


def test_arm_variants_equal_int64_in_an_emulator(tmp_path):
    run = arm_program(tmp_path, HARNESS.format(source=library.SOURCES[0]))
    for size in [(1, 5, 28), (3, 33, 256), (5, 18, 1028)]:
        bytes_NI, q_MK, expected = drawn(*size)
        for cpu_model, names in (("max", ["dotprod", "neon", "scalar"]), ("cortex-a53", ["neon", "scalar"])):
            ran, written = run(cpu_model, np.int64(size), bytes_NI, q_MK)
            assert ran == names
            for y in np.split(np.frombuffer(written, np.int32), len(names)):
                np.testing.assert_array_equal(y.reshape(expected.shape), expected)
