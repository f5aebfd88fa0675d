"""What the assembler makes of packed folders: the image, the program, and its refusals."""

import dataclasses
import itertools

import numpy as np
import pytest

from mmfree_jax.config import ConfigError
from mmfree_jax.hardware.assembler import assemble, exponent_of, matrix_bytes, skeleton, to_integers
from mmfree_jax.hardware.instructions import CoreShape, Norm, Op, Vector, reads
from mmfree_jax.inference.packed import PackedError, save_packed
from mmfree_jax.presets import model_preset
from tests.hardware.small import CORES, ODD, compiled, odd_model
from tests.inference.small import made

THREE = CORES["three lanes"]


def test_a_matrix_lies_in_words_of_one_column_each():
    codes = np.array([[1, 0], [-1, 1], [0, -1], [1, 1], [-1, 0]], np.int8)
    # Four rows a word: column 0 of rows 0 to 3 is 1, -1, 0, 1, from the lowest bits up 01 11 00 01.
    assert list(matrix_bytes(codes, 4)) == [0b01_00_11_01, 0b01_11_01_00, 0b00_00_00_11, 0b00_00_00_00]


def test_vectors_become_16_bit_integers_without_overflow():
    for largest in (1.0, 0.5, 32767 / 2**15, 32767.5, 3e-9):
        values = np.array([largest, -largest / 3, 0.0])
        exponent = exponent_of(values)
        integers = to_integers(values, exponent)
        assert 2**14 - 1 <= integers.max() < 2**15
        np.testing.assert_allclose(integers * 2.0**exponent, values, atol=2.0**exponent / 2)
    assert exponent_of(np.zeros(3)) == 0


def test_the_image_holds_what_the_model_holds(tmp_path):
    model, program, image = compiled(tmp_path / "packed")
    data = np.frombuffer(image, np.uint8)
    first = next(read for i, read in zip(program.instructions, reads(program), strict=True) if i.op == Op.TERNARY)
    begin, size = first.address * 3, first.words * 3
    pairs = (data[begin : begin + size, None] >> np.arange(0, 8, 2, np.uint8)) & 3
    codes = np.array([0, 1, 9, -1])[pairs].reshape(4, 37, 12).swapaxes(1, 2).reshape(48, 37)
    expected = np.asarray(model.blocks.mixer.gates.stacked_codes()[0].codes[0]).T
    assert np.array_equal(codes[:37], expected)
    assert not codes[37:].any()
    # Two layers of states come first; then a row of the embedding is 13 beats of three 16-bit integers.
    table = data[2 * 13 * 12 :][: 101 * 13 * 6].view("<i2").reshape(101, 39)
    embedding = np.asarray(model.embedding[...])
    np.testing.assert_allclose(table[:, :37] * 2.0 ** exponent_of(embedding), embedding, atol=2.0**-15)
    assert not table[:, 37:].any()


def test_the_image_is_read_from_its_embedding_to_its_end(tmp_path):
    _, program, image = compiled(tmp_path / "packed")
    assert len(image) % 3 == 0
    covered = sorted((load.address, load.address + load.words) for load in program.loads if not load.stride)
    states, embedding, rest = 2 * 13 * 4, 101 * 13 * 2, covered[2:]
    assert covered[:2] == [(0, 52), (52, 104)]
    assert rest[0][0] == states + embedding
    assert all(a[1] == b[0] for a, b in itertools.pairwise(rest))
    assert rest[-1][1] == len(image) // 3


def test_both_layouts_of_codes_give_the_same_image(tmp_path):
    assert compiled(tmp_path / "planes")[2] == compiled(tmp_path / "trits", layout="trits")[2]


def test_a_program_without_weights_has_the_same_instructions(tmp_path):
    model, program, _ = compiled(tmp_path / "packed")
    bare = skeleton(model.config, THREE)
    strip = lambda i: i.inner if isinstance(i, Norm) else dataclasses.replace(i, stream_exponent=0)
    assert list(map(strip, bare.instructions)) == list(map(strip, program.instructions))
    assert bare.loads == program.loads


def test_a_program_can_be_read(tmp_path):
    lines = str(compiled(tmp_path / "packed")[1]).splitlines()
    assert lines[0] == "LOAD              26  words at 104 + 26 * token"
    assert "VECTOR            37  NORMED = RESIDUAL * STREAM, INNER = |RESIDUAL|^2  (own exponent)" in lines
    assert "TERNARY      37 x 50  RESIDUAL = RESIDUAL + ACCUMULATORS * SCALE  (2^-16)" in lines
    assert "VECTOR            37  STATE, MEMORY[52] = STATE + SCALED * FORGET  (2^-20)" in lines
    assert lines[-1].split()[0] == "END"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": "channel"}, "weight_scale=tensor; this one has channel"),
        ({"activation_bits": 4}, "activation_bits=8; this one has 4"),
        ({"activation": "relu2"}, "activation=silu"),
        ({"dense_head": True}, "dense_head=False"),
        ({"linear_norm": False}, "linear_norm=True"),
        ({"joint_glu": False}, "joint_glu=True"),
        ({"glu_width": 1111}, "widths 37 and 1111 are above the core's 40 and 1110"),
        ({"depth": 3}, "118 instructions, the core 100"),
    ],
)
def test_models_that_the_core_does_not_compute_are_refused(changes, message, tmp_path):
    _, folder = odd_model(tmp_path / "packed", **changes)
    with pytest.raises(ConfigError, match=message):
        assemble(folder, THREE)


def test_gains_that_lead_beyond_a_products_exponent_are_refused(tmp_path):
    model = made("matmul-free", **ODD)
    gates = model.blocks.mixer.gates
    gates.gain[...] = 1e5 * gates.gain[...]
    save_packed(model, tmp_path / "packed", stored="float32")
    with pytest.raises(ConfigError, match=r"a product's scale may reach .* computes it right below 0\.125"):
        assemble(tmp_path / "packed", THREE)


def test_other_families_and_folders_are_refused(tmp_path):
    save_packed(made("bitnet"), tmp_path / "bitnet")
    with pytest.raises(ConfigError, match="family matmul-free; this one is bitnet"):
        assemble(tmp_path / "bitnet", CoreShape(8, 1, 512, 1536))
    with pytest.raises(PackedError, match="not a packed model"):
        assemble(tmp_path, THREE)
    with pytest.raises(ConfigError, match="this model has 70,000 channels or tokens"):
        skeleton(dataclasses.replace(model_preset("matmul-free", "tiny"), vocab=70_000), THREE)
    with pytest.raises(ConfigError, match="this one is transformer"):
        skeleton(model_preset("transformer++", "tiny"), THREE)


def test_layers_are_told_apart_by_their_loads(tmp_path):
    _, program, _ = compiled(tmp_path / "packed")
    stores = [i.address for i in program.instructions if isinstance(i, Vector) and i.d.name == "MEMORY"]
    assert stores == [0, 52]
