"""Instructions as bits, and the sizes of cores."""

import pytest

from mmfree_jax.config import ConfigError
from mmfree_jax.hardware.arithmetic import constant
from mmfree_jax.hardware.instructions import (
    NORM_FIELDS,
    VECTOR_FIELDS,
    WIDTH,
    A,
    B,
    C,
    CoreShape,
    D,
    Load,
    Norm,
    Op,
    Program,
    Slot,
    Sum,
    Vector,
    encode,
    reads,
)

CORE = CoreShape(24, 3, 40, 60)


def decode(word: int, fields: dict[str, int]) -> dict[str, int]:
    found = {}
    for name, bits in fields.items():
        value, word = word & (1 << abs(bits)) - 1, word >> abs(bits)
        found[name] = value - (1 << -bits) if bits < 0 and value >> -bits - 1 else value
    return found


def test_instructions_fit_their_words():
    for fields in (VECTOR_FIELDS, NORM_FIELDS):
        assert sum(abs(bits) for bits in fields.values()) <= WIDTH
        assert next(iter(fields)) == "op"


def test_every_field_of_a_product_is_encoded():
    i = Vector(
        Op.TERNARY, A.ACCUMULATORS, B.SCALE, C.SLOT, D.SLOT, Sum.OUTER, True,
        Slot.UP, Slot.GATE, Slot.STATE, Slot.OUTPUT, -20, -14, count=50, depth=37, address=0,
    )  # fmt: skip
    assert decode(encode(i, CORE), VECTOR_FIELDS) == {
        "op": 1, "a": 3, "b": 7, "c": 1, "d": 0, "sum": 2, "floating": 1,
        "a_slot": 8, "b_slot": 7, "c_slot": 6, "d_slot": 5, "exponent": -20, "stream_exponent": -14,
        "beats": 17, "groups": 5, "depth": 37, "address": 0,
    }  # fmt: skip


def test_logits_carry_the_number_of_tokens():
    i = Vector(Op.TERNARY, A.ACCUMULATORS, B.SCALE, d=D.LOGITS, count=101, depth=37)
    assert decode(encode(i, CORE), VECTOR_FIELDS)["address"] == 101


def test_a_norm_is_encoded():
    i = Norm(True, constant(1e-6), constant(2.0**-30), constant(0.25))
    assert decode(encode(i, CORE), NORM_FIELDS) == {
        "op": 2, "inner": 1, "eps": round(1e-6 * 2**36), "eps_exponent": -36, "floor": 2**16, "floor_exponent": -46,
        "weight": 2**16, "weight_exponent": -18,
    }  # fmt: skip


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="depth = 65536 does not fit"):
        encode(Vector(depth=2**16), CORE)
    with pytest.raises(ConfigError, match="exponent = -129 does not fit"):
        encode(Vector(exponent=-129), CORE)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((12, 1), "memory bits 12"),
        ((8, 3), "3 lanes do not fit 8 bits"),
        ((64, 2), "2 lanes do not fit 64 bits"),
        ((8, 0), "0 lanes"),
        ((8, 1, 0), "width 0"),
        ((8, 1, 2**15 + 1), "width 32769"),
        ((8, 1, 8, 2**16 + 1), "glu_width 65537"),
    ],
)
def test_impossible_cores_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        CoreShape(*sizes)


def test_slots_hold_whole_groups_of_rows():
    # 40 elements are 4 groups of 12, 16 beats; 60 are 5 groups, 20 beats.
    assert CORE.bases() == [0, 16, 32, 48, 64, 80, 96, 32, 52, 112]
    assert CoreShape(24, 3, 40, 500).bases()[-3:] == [32, 32 + 168, 32 + 2 * 168]


def test_loads_are_given_out_in_the_order_of_instructions():
    stream = lambda count: Vector(a=A.STREAM, count=count)
    program = lambda *loads: Program(CORE, (stream(3), Vector(), stream(7)), loads, 1, 1, 1)
    found = reads(program(Load(100, 2, 9), Load(7, 6)))
    assert [tuple(read) for read in found] == [(100, 2, 9), (102, 0, 9), (7, 6, 0)]
    with pytest.raises(ConfigError, match="needs 6 words"):
        reads(program(Load(0, 2), Load(5, 4)))
    with pytest.raises(ConfigError, match="more than"):
        reads(program(Load(0, 2), Load(5, 7)))
