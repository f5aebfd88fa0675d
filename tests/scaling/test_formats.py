"""What formats of weights are worth on normally distributed numbers."""

import numpy as np
import pytest

from scaling import ScalingError
from scaling.laws.formats import ABSMEAN, bits_of, gaussian_error


@pytest.mark.parametrize(("bits", "error"), [("binary", 0.3634), ("2", 0.1188), ("3", 0.03744), ("4", 0.01154)])
def test_integers_err_as_the_best_uniform_quantisers(bits, error):
    """Max 1960, Quantizing for minimum distortion, table II."""
    assert gaussian_error(bits) == pytest.approx(error, rel=3e-3)


def test_ternary_at_its_best_scale_and_as_bitnet_scales_it():
    """Three levels at best leave 0.1902 (Max 1960, table I); with mean |w| as the scale they err more."""
    assert gaussian_error("ternary") == pytest.approx(0.1902, rel=3e-3)
    scale = np.sqrt(2 / np.pi)
    x = np.random.default_rng(0).normal(size=400_000)
    sampled = np.mean((x - scale * np.clip(np.round(x / scale), -1, 1)) ** 2)
    assert gaussian_error(ABSMEAN) == pytest.approx(sampled, rel=0.01)
    assert gaussian_error(ABSMEAN) > 1.3 * gaussian_error("ternary")
    assert bits_of(ABSMEAN) == bits_of("ternary")


def test_floating_point_loses_what_the_mantissa_rounds():
    """A rounding error is uniform over a step, 2^-m of the number's power of two."""
    assert gaussian_error("bf16") == pytest.approx(4.0 * gaussian_error("e5m8"), rel=0.05)
    assert gaussian_error("e4m3") < gaussian_error("e5m2") < gaussian_error("4")
    assert gaussian_error("fp32") < 1e-14


def test_a_fraction_of_a_bit_has_no_levels():
    with pytest.raises(ScalingError, match="no whole number of levels"):
        gaussian_error("6.5")
