"""The axes of every plot, as numbers worked out by hand: D, U, N, FLOPs by class, tokens and mfu.

Models have two layers (L) of width 8 (D), GLU width 16 (F), two heads and a vocabulary of 257. By hand:

    matrices of a layer  mixer 4 D D = 256 (attention: as many keys as queries), GLU 3 D F = 384
    N_nonemb             2 x (256 + 384) = 1280         N = 1280 + 257 x 8 = 1280 + 2056 = 3336
    products             forward and backward, of a position 6 x 1280 = 7680 (blocks), 6 x 2056 = 12336 (head);
                         of a pair that attention sees 3 x 4 L D = 192

Windows have 8 positions, there are 16 of them, and a step takes 8, so that two steps are an epoch and the six of a run
three; a dot is an end of document:

    a b c d . a . .   joined: 8 targets, 1 + 2 + ... + 8 = 36 pairs
    a b c d . a . .   apart: 7 targets (no dot after a dot); documents `a b c d`, `. a`, `.`, `.`: 15 pairs
                      (10 + 3 + 1 + 1)
    a b c d . . . .   packed: 5 targets, 10 + 4 x 1 = 14 pairs; after the last window stands a dot: it has 4 targets
"""

import itertools
import json

import pytest

from tests import axes_program, simulated
from tests.axes_program import Case

# Every pair of values of two axes but packed and joined, which is refused (tests/training/test_documents.py).
CASES = [
    Case("transformer++", "loose", "joined", 2, 1, "fresh"),
    Case("transformer++", "packed", "apart", 1, 1, "resumed"),
    Case("transformer++", "packed", "apart", 1, 8, "branched"),
    Case("bitnet", "packed", "apart", 1, 1, "branched"),
    Case("bitnet", "loose", "apart", 2, 1, "resumed"),
    Case("bitnet", "loose", "joined", 1, 8, "fresh"),
    Case("matmul-free", "loose", "joined", 1, 1, "resumed"),
    Case("matmul-free", "loose", "apart", 1, 1, "branched"),
    Case("matmul-free", "packed", "apart", 2, 8, "fresh"),
    Case("matmul-free-rwkv4", "packed", "apart", 2, 1, "resumed"),
    Case("matmul-free-rwkv4", "loose", "apart", 2, 1, "fresh"),
    Case("matmul-free-rwkv4", "loose", "joined", 1, 8, "branched"),
    Case("hgrn", "packed", "apart", 2, 1, "branched"),
    Case("hgrn", "loose", "joined", 2, 1, "fresh"),
    Case("hgrn", "loose", "apart", 1, 8, "resumed"),
]
AXES = {
    "family": ("transformer++", "bitnet", "matmul-free", "matmul-free-rwkv4", "hgrn"),
    "text": ("loose", "packed"),
    "documents": ("joined", "apart"),
    "accumulate": (1, 2),
    "devices": (1, 8),
    "history": ("fresh", "resumed", "branched"),
}
# U, the targets of an epoch: 16 x 8; 16 x 7; 15 x 5 + 4. D, those of three epochs. Pairs: 3 x 16 x (36; 15; 14).
U = {"joined": 128, "apart": 112, "packed": 79}
D = {"joined": 384, "apart": 336, "packed": 237}
# 192 a pair: 1728, 720 and 672 pairs.
ATTENTION = {"joined": 331_776, "apart": 138_240, "packed": 129_024}
BLOCKS = 2_949_120  # 6 steps x 64 positions = 384, x 7680
HEAD = 4_737_024  # 384 x 12336
# Element-wise, forward, of a position: softmax of the head 5 x 257 = 1285; of a layer SiLU, product and two residuals
# 5 F + 2 D = 96, with attention 96 + 3 x 16 (rotary) = 144, with MLGRU 96 + 19 D = 248 (gates 12, recurrence 2,
# output 5), with RWKV-4 96 + 35 D = 376 (mixes 9, WKV 22, gate 4). Of a pair 5 (softmax) x 2 layers x 2 heads = 20. All
# times three.
ELEMENTWISE = {  # 384 x 3 x (1285 + 2 x layer)
    "transformer++": 1_812_096,  # 1573
    "bitnet": 1_812_096,
    "matmul-free": 2_051_712,  # 1781
    "matmul-free-rwkv4": 2_346_624,  # 2037
    "hgrn": 2_051_712,
}
SOFTMAX = {"joined": 103_680, "apart": 43_200, "packed": 40_320}  # 60 a pair
# Norms and quantisers: 4 a gain, 5 a quantised input. Gains of a layer: 2 D, with MLGRU D more, ternary 5 D + F more;
# inputs of a ternary one 3 D + D + D + F = 56. Of the head 4 D = 32, ternary 4 x 2 D + 5 D = 104.
NORM_QUANT = {  # 384 x 3 x (head + 2 x layer)
    "transformer++": 184_320,  # 32 + 2 x 64 = 160
    "bitnet": 1_428_480,  # 104 + 2 x (288 + 280) = 1240
    "matmul-free": 1_502_208,  # 104 + 2 x (320 + 280) = 1304
    "matmul-free-rwkv4": 1_428_480,
    "hgrn": 258_048,  # 32 + 2 x 96 = 224
}
# A step takes half a second: 64 positions, 64 x (7680 + 12336) = 1,281,024 products, and 8 x (36; 15; 14) x 192 of
# attention. Twice that a second, of the 1e7 of each device.
MFU = {"joined": 0.267264, "apart": 0.2608128, "packed": 0.2605056, "no attention": 0.2562048}


def kind(case: Case) -> str:
    return "packed" if case.text == "packed" else case.documents


@pytest.fixture(scope="module")
def on_eight_devices(tmp_path_factory) -> dict:
    cases = [case for case in CASES if case.devices == 8]
    found = json.loads(simulated.run_once(tmp_path_factory, "axes", "-m", "tests.axes_program", json.dumps(cases))[0])
    return {"runs": dict(zip(cases, found["runs"], strict=True)), "held out": found["held out"]}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict:
    return axes_program.corpora(tmp_path_factory.mktemp("axes"))


@pytest.fixture
def found(request, sets, tmp_path) -> dict:
    """Of the case that a test is given."""
    case = request.getfixturevalue("case")
    if case.devices == 8:
        return request.getfixturevalue("on_eight_devices")["runs"][case]
    return axes_program.numbers(case, sets[case.text], tmp_path)


def test_the_cases_cover_every_pair_of_values():
    def covered(cases):
        return {
            (one, other, case[one], case[other])
            for case in cases
            for one, other in itertools.combinations(range(len(AXES)), 2)
        }

    possible = itertools.starmap(Case, itertools.product(*AXES.values()))
    assert Case._fields == tuple(AXES)
    assert covered(CASES) == covered(case for case in possible if (case.text, case.documents) != ("packed", "joined"))
    assert len(CASES) <= 30


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_axes_of_a_run_are_those_worked_out_by_hand(case: Case, found: dict):
    what, family = kind(case), case.family
    attends = family in ("transformer++", "bitnet")
    ternary = family not in ("transformer++", "hgrn")
    expected = {
        "N": 3336,
        "N_nonemb": 1280,
        "D": D[what],
        "U": U[what],
        "D_rule": "targets",
        "flops_dense": 0 if ternary else BLOCKS,
        "flops_ternary": BLOCKS if ternary else 0,
        "flops_attention": ATTENTION[what] if attends else 0,
        "flops_head": HEAD,
        "flops_elementwise": ELEMENTWISE[family] + (SOFTMAX[what] if attends else 0),
        "flops_norm_quant": NORM_QUANT[family],
        "flops": BLOCKS + HEAD + (ATTENTION[what] if attends else 0),
        "flops_rule": "exact products" if what == "joined" else "exact products, attention within documents",
        "batch_tokens": 64,
        "warmup_tokens": 64,
    }
    assert {name: found["result"][name] for name in expected} == expected

    # Rows at steps 2, 4 and 6, the ends of epochs. The first step of a process, which compiles, is not timed: the row
    # of a resumed run and of a branch at step 4 has no other.
    rows = {row["step"]: row for row in found["metrics"]}
    steps = (4, 6) if case.history == "branched" else (2, 4, 6)
    assert tuple(rows) == steps
    for step in steps:
        row, timed = rows[step], case.history == "fresh" or step != 4
        assert row["tokens"] == D[what] * step / 6
        assert row["flops"] == expected["flops"] * step / 6
        assert row["tokens_per_s"] == (128 if timed else None)
        mfu = MFU[what if attends else "no attention"] / case.devices
        assert row["mfu"] == (pytest.approx(mfu, rel=1e-12) if timed else None)


def test_held_out_loss_and_its_standard_error_do_not_depend_on_the_mesh(on_eight_devices):
    one, *others = on_eight_devices["held out"].values()
    assert len(others) == 2
    assert 5 < one["loss"] < 6.5  # ln 257 = 5.55, untrained
    for other in others:
        assert other["tokens"] == one["tokens"]
        for name in ("loss", "bpb"):
            assert other[name] == pytest.approx(one[name], rel=1e-5)
        assert other["loss_se"] == pytest.approx(one["loss_se"], rel=1e-3)
