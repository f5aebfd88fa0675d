"""Packed layouts: the bytes are those that the module describes, and unpacking gives the codes back."""

import jax
import numpy as np
import pytest

from mmfree_jax.ops import packed

SIZES = [(1, 1), (3, 4), (2, 5), (4, 20), (3, 257), (2, 1021), (5, 2816), (2, 0)]
PACKINGS = [(packed.pack_planes, packed.unpack_planes, 4), (packed.pack_trits, packed.unpack_trits, 5)]


def test_planes_are_the_bits_that_the_layout_names():
    codes = np.array([[-1, 0, 1, 1, 0, -1, 1, 0]])  # two bytes: codes 0, 2, 4, 6 and 1, 3, 5, 7
    assert packed.pack_planes(codes).tolist() == [[0 | 2 << 2 | 1 << 4 | 2 << 6, 1 | 2 << 2 | 0 << 4 | 1 << 6]]


def test_trits_are_digits_of_a_fraction_of_256():
    codes = np.array([[1, 0, -1, 1, 1]])  # digits 2 1 0 2 2 in base 3: 2 * 81 + 27 + 0 + 6 + 2 = 197
    assert packed.pack_trits(codes).tolist() == [[-(-197 * 256 // 243)]]


def test_every_byte_of_five_trits_is_unpacked():
    codes = np.stack(np.meshgrid(*[[-1, 0, 1]] * 5, indexing="ij"), axis=-1).reshape(-1, 5)
    bytes_NI = packed.pack_trits(codes)
    assert len(np.unique(bytes_NI)) == 243
    np.testing.assert_array_equal(packed.unpack_trits(bytes_NI, 5), codes)


@pytest.mark.parametrize(("pack", "unpack", "codes_in_a_byte"), PACKINGS)
@pytest.mark.parametrize("shape", SIZES)
def test_unpacking_gives_the_codes_back(pack, unpack, codes_in_a_byte, shape):
    codes = np.random.default_rng(0).integers(-1, 2, (2, *shape)).astype(np.int8)
    bytes_NI = pack(codes)
    assert bytes_NI.dtype == np.uint8
    assert bytes_NI.shape == (2, shape[0], -(-shape[1] // codes_in_a_byte))
    found = jax.jit(unpack, static_argnums=1)(bytes_NI, shape[1])
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, codes)


@pytest.mark.parametrize("pack", [packed.pack_planes, packed.pack_trits])
@pytest.mark.parametrize("wrong", [2, -2, 0.5, np.nan])
def test_what_is_no_ternary_code_is_refused(pack, wrong):
    with pytest.raises(ValueError, match="codes"):
        pack(np.array([[1, 0, wrong]]))
