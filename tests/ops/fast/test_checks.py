"""The checks themselves, with the kernels interpreted: right kernels pass, and known faults are seen."""

import jax.numpy as jnp
import pytest

from mmfree_jax.ops.fast.checks import Use, check
from mmfree_jax.ops.fast.hopper import normed_codes, recurrence
from tests.ops.fast.hopper.test_kernels import interpreted, pretended_gpu

USES = [
    Use("normed_codes", (6, 128), ("gated", 1, 1, "float32", 8, False, False)),
    Use("normed_codes", (6, 256), ("norm", 2, 2, "bfloat16", 0, True, False)),
    Use("normed_codes", (6, 256), ("swiglu", 1, 1, "bfloat16", 8, False, True)),
    Use("row_codes", (14, 128), ("float32", True)),
    Use("recurrence", (2, 40, 100), ("float32", True, False)),
]


@interpreted
@pytest.mark.parametrize("use", USES, ids=str)
def test_kernels_pass(monkeypatch, use):
    monkeypatch.setattr(normed_codes, "BLOCKS", {"forward": 2, "backward": 2})
    with pretended_gpu():
        outcome = check(use)
    assert outcome.passed, outcome.worst


@interpreted
def test_codes_that_are_all_minus_one_are_seen(monkeypatch):
    """What CUDA 13.0's assembler made of single bytes."""
    monkeypatch.setattr(normed_codes, "BLOCKS", {"forward": 2, "backward": 2})
    monkeypatch.setattr(normed_codes, "nearest_integer", lambda x: (x, jnp.full(x.shape, -1, jnp.int8)))
    with pretended_gpu():
        assert check(Use("row_codes", (6, 128), ("bfloat16", False))).deviations["codes"] > 10


@pytest.mark.parametrize("arrays", [2, 3, 4])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_stages_of_the_recurrence_fit_shared_memory(arrays, itemsize):
    dtype = {2: jnp.dtype("bfloat16"), 4: jnp.dtype("float32")}[itemsize]
    tile = recurrence.ROWS * recurrence.LANES * itemsize
    stages = recurrence.copied_ahead(arrays, dtype)
    assert stages >= 2
    assert (stages * arrays + 4) * tile <= 227 * 1024


def test_widths_that_do_not_fit_shared_memory_are_left_to_xla():
    gated_unit = {"inputs": 3, "outputs": 3}
    assert normed_codes.supports(5632, 1, jnp.float32, **gated_unit)
    assert not normed_codes.supports(6528, 1, jnp.float32, **gated_unit)
    assert normed_codes.supports(8192, 1, jnp.bfloat16, **gated_unit)
