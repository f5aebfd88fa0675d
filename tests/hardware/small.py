"""What tests of the hardware share: cores, and small packed models that fill none of them evenly."""

from pathlib import Path

import numpy as np

from mmfree_jax.hardware.assembler import assemble
from mmfree_jax.hardware.instructions import CoreShape, Program
from mmfree_jax.inference.packed import save_packed
from mmfree_jax.models.language_model import LanguageModel
from tests.inference.small import made

# Larger than the models that they run: three lanes and twelve rows, which divide no size here; two lanes, whose beats
# are one word of memory.
CORES = {
    "three lanes": CoreShape(24, 3, width=40, glu_width=1110, instructions=100, loads=9, queue=40),
    "two lanes": CoreShape(32, 2, width=37, glu_width=50, instructions=100, loads=9),
}
ODD = {"width": 37, "glu_width": 50, "vocab": 101, "tokenizer_vocab": 0}


def odd_model(folder: Path, layout: str = "planes", **changes) -> tuple[LanguageModel, Path]:
    """A model of odd sizes, with gains that differ from one, and its packed folder."""
    model = made("matmul-free", **(ODD | changes))
    save_packed(model, folder, stored="float32", layout=layout)
    return model, folder


def compiled(folder: Path, shape: CoreShape = CORES["three lanes"], **changes) -> tuple[LanguageModel, Program, bytes]:
    """The same, compiled for a core."""
    model, packed = odd_model(folder, **changes)
    return model, *assemble(packed, shape)


def integers(rng: np.random.Generator, bits: int, count: int) -> np.ndarray:
    """Signed integers of all magnitudes, the extreme ones among them."""
    top = 2 ** (bits - 1) - 1
    drawn = rng.integers(-top, top + 1, count) >> rng.integers(0, bits, count)
    drawn[: min(count, 5)] = [0, top, -top, 1, -1][: min(count, 5)]
    return drawn
