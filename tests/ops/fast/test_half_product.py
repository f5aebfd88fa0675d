"""Products of bfloat16 matrices with few vectors on a CPU, by every variant of the C++ code, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.ops.fast import choice
from mmfree_jax.ops.fast.cpu import half_product as cpu
from mmfree_jax.ops.fast.cpu import library
from mmfree_jax.ops.served_linear import RowWeights, row_product
from tests.ops.fast.emulated import arm_program
from tests.ops.fast.test_ternary_product import COMPILED, SIZES

HARNESS = """
#include "{source}"
#include <cstdio>
#include <vector>
int main() {{  // reads M N K, weights and activations; writes the products of each variant that runs
  int64_t s[3];
  if (fread(s, 8, 3, stdin) != 3) return 1;
  std::vector<uint16_t> w(s[1] * s[2]);
  std::vector<float> x(s[0] * s[2]);
  if (fread(w.data(), 2, w.size(), stdin) != w.size() || fread(x.data(), 4, x.size(), stdin) != x.size()) return 1;
  for (int i = 0; half_variant_name(i); i++) {{
    std::vector<float> y(s[0] * s[1]);
    if (!half_variant_runs_here(i)) continue;
    half_variant_product(i, w.data(), x.data(), y.data(), s[0], s[1], s[2]);
    fwrite(y.data(), 4, y.size(), stdout);
    fprintf(stderr, "%s\\n", half_variant_name(i));
  }}
}}
"""


def drawn(M, N, K, seed=0):
    """Weights, activations, their product in float64, and how far sums in float32 may be off: 2^-24 an addition."""
    rng = np.random.default_rng(seed)
    w_NK = rng.standard_normal((N, K)).astype(jnp.bfloat16)
    x_MK = rng.standard_normal((M, K)).astype(np.float32)
    exact = lambda x, w: x.astype(np.float64) @ w.astype(np.float64).T
    return w_NK, x_MK, exact(x_MK, w_NK), 2.0**-24 * (K + 1) * exact(np.abs(x_MK), np.abs(w_NK))


@COMPILED
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_variants_are_float64_to_rounding(size):
    w_NK, x_MK, expected, off = drawn(*size)
    names = list(cpu.variants())
    assert names[-1] == "scalar"
    assert cpu.supports(1)
    for name in names:
        assert (np.abs(cpu.product_by_variant(name, w_NK, x_MK) - expected) <= off).all(), name
    assert (np.abs(np.asarray(jax.jit(cpu.half_product)(w_NK, x_MK)) - expected) <= off).all()


@COMPILED
@pytest.mark.parametrize("rows", [1, 3, library.BY_XLA - 1, library.BY_XLA])
def test_a_served_layer_reads_bfloat16_as_it_lies_in_memory(rows):
    w_NK, x_MK, expected, off = drawn(rows, 33, 70)
    served = choice.forward_only()(lambda x, w: row_product(x[:, None], w)[:, 0])
    program = jax.jit(served).trace(x_MK, w_NK)
    assert ("mmfree_half_product" in str(program.jaxpr)) == (rows < library.BY_XLA)
    assert (np.abs(np.asarray(jax.jit(served)(x_MK, w_NK)) - expected) <= off).all()
    layers = choice.forward_only()(lambda x, w: RowWeights((w, w)).linear(None, x))
    assert str(jax.jit(layers).trace(x_MK, w_NK).jaxpr).count("mmfree_half_product") == 2 * (rows < library.BY_XLA)


@COMPILED
@pytest.mark.parametrize("shape", [(0, 1, 70), (1, 0, 70), (2, 3, 70)])
def test_a_batch_may_be_empty(shape):
    served = choice.forward_only()(lambda x, w: row_product(x, w))
    y = jax.jit(served)(jnp.ones(shape), jnp.ones((5, 70), jnp.bfloat16))
    np.testing.assert_array_equal(y, np.full((*shape[:2], 5), 70))


@COMPILED
@pytest.mark.parametrize(
    ("x", "w", "context"),
    [
        (jnp.float32, jnp.bfloat16, lambda f: f),  # may be differentiated
        (jnp.bfloat16, jnp.bfloat16, choice.forward_only()),
        (jnp.float32, jnp.float32, choice.forward_only()),
        (jnp.float32, jnp.bfloat16, lambda f: choice.forward_only()(choice.kernels_allowed(False)(f))),
    ],
)
def test_xla_multiplies_what_the_kernel_does_not_take(x, w, context):
    shapes = jax.ShapeDtypeStruct((2, 8), x), jax.ShapeDtypeStruct((5, 8), w)
    assert "mmfree_half_product" not in str(jax.jit(context(lambda x, w: row_product(x, w))).trace(*shapes).jaxpr)


def test_arm_variants_are_float64_to_rounding_in_an_emulator(tmp_path):
    run = arm_program(tmp_path, HARNESS.format(source=library.SOURCES[1]))
    for size in [(1, 5, 28), (3, 33, 257), (5, 18, 1028)]:
        w_NK, x_MK, expected, off = drawn(*size)
        ran, written = run("cortex-a53", np.int64(size), w_NK, x_MK)
        assert ran == ["neon", "scalar"]
        for y in np.split(np.frombuffer(written, np.float32), 2):
            assert (np.abs(y.reshape(expected.shape) - expected) <= off).all()
