"""Ternary codes in 2 or 1.6 bits: the layouts in which models are stored and served.

Two bits ("planes"): byte i of a row of K codes holds the codes i + p * ceil(K / 4) for p = 0..3 in the bits 2p and
2p + 1, as code + 1. A shift and a mask of consecutive bytes give consecutive codes, so every target reads the same
bytes (CPU vectors, GPU words, XLA's slices). The 2-bit kernels of BitNet (Wang et al. 2025, arXiv 2502.11880) use the
same idea in blocks.

Base 3 ("trits"): byte i holds the codes i + p * ceil(K / 5) for p = 0..4 as digits of a fraction v / 243, rounded up to
ceil(256 v / 243): multiplied by 3, its integer part is the next digit (as llama.cpp's TQ1_0 does in blocks of 256).

Rows that do not fill their last bytes are filled up with zeros.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.ops.ternary import Quantised

Layout = Literal["planes", "trits"]
PLANES, TRITS = 4, 5  # codes in a byte
CODES_IN_A_BYTE: dict[Layout, int] = {"planes": PLANES, "trits": TRITS}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A ternary matrix [D, F], stored by columns: `bytes_FI` holds the D codes of each output.

    scale: float32, [1, 1] or one an output, [1, F].
    """

    bytes_FI: jax.Array
    scale: jax.Array
    layout: Layout = dataclasses.field(default="planes", metadata={"static": True})

    def unpacked(self, width: int) -> Quantised:
        """Return the matrix as codes [D, F] and their scale; `width` is D."""
        unpack = unpack_planes if self.layout == "planes" else unpack_trits
        return Quantised(unpack(self.bytes_FI, width).swapaxes(-1, -2), self.scale)


class PackedWeights(NamedTuple):
    """The arrays of G BitLinears with one input in a model that only has their codes: for inference.

    gain: of the RMSNorm before the quantiser, [D] shared by the products, [G, D] one each, None for no norm.
    """

    codes: tuple[Packed, ...]
    gain: jax.Array | None = None


def pack(codes_NK: np.ndarray, layout: Layout) -> np.ndarray:
    """Pack codes by rows, [..., N, K], in a layout: uint8 [..., N, I]."""
    return pack_planes(codes_NK) if layout == "planes" else pack_trits(codes_NK)


def pack_planes(codes_NK: np.ndarray) -> np.ndarray:
    """Pack codes in {-1, 0, 1}, [..., N, K], into 2 bits each: uint8 [..., N, ceil(K / 4)]."""
    planes = _split(codes_NK, PLANES)
    return np.bitwise_or.reduce([planes[p] << 2 * p for p in range(PLANES)])


def unpack_planes(bytes_NI: jax.Array, width: int) -> jax.Array:
    """Unpack `width` codes of each row: int8 [..., N, width]. The inverse of `pack_planes`, for traced programs."""
    planes = [(bytes_NI >> jnp.uint8(2 * p)) & jnp.uint8(3) for p in range(PLANES)]
    return (jnp.concatenate(planes, axis=-1)[..., :width].astype(jnp.int8)) - jnp.int8(1)


def pack_trits(codes_NK: np.ndarray) -> np.ndarray:
    """Pack codes in {-1, 0, 1}, [..., N, K], five to a byte: uint8 [..., N, ceil(K / 5)]."""
    digits = _split(codes_NK, TRITS).astype(np.uint16)
    fraction = sum(digits[p] * 3 ** (TRITS - 1 - p) for p in range(TRITS))
    return ((fraction * 256 + 242) // 243).astype(np.uint8)


def unpack_trits(bytes_NI: jax.Array, width: int) -> jax.Array:
    """Unpack `width` codes of each row: int8 [..., N, width]. The inverse of `pack_trits`, for traced programs.

    Rows may be longer (`aligned`).
    """
    bytes_NI = bytes_NI[..., : -(-width // TRITS)]
    # The remaining fraction is the byte modulo 256 after each multiplication; uint8 products wrap by themselves.
    fractions = [bytes_NI * jnp.uint8(3**p) for p in range(TRITS)]
    digits = [((f.astype(jnp.uint16) * 3) >> 8).astype(jnp.int8) for f in fractions]
    return jnp.concatenate(digits, axis=-1)[..., :width] - jnp.int8(1)


def aligned(bytes_NI: np.ndarray) -> np.ndarray:
    """Fill up rows of bytes with zeros to whole 16 bytes, which a GPU loads at a time."""
    return np.pad(bytes_NI, [(0, 0)] * (bytes_NI.ndim - 1) + [(0, -bytes_NI.shape[-1] % 16)])


def _split(codes_NK: np.ndarray, parts: int) -> np.ndarray:
    """Cut rows into `parts` equal pieces, filled up with zeros: code + 1 as uint8 [parts, ..., N, ceil(K / parts)].

    Raises ValueError for values that are no ternary codes.
    """
    codes_NK = np.asarray(codes_NK)
    if codes_NK.size and not np.isin(codes_NK, (-1, 0, 1)).all():
        raise ValueError("only the codes -1, 0 and 1 can be packed")
    width = codes_NK.shape[-1]
    piece = -(-width // parts)
    filled = np.pad(codes_NK.astype(np.int8), [(0, 0)] * (codes_NK.ndim - 1) + [(0, parts * piece - width)])
    return np.moveaxis((filled + 1).astype(np.uint8).reshape(*codes_NK.shape[:-1], parts, piece), -2, 0)
