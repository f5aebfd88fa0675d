"""Kernels serve only where they have been checked. Here stand-ins made of XLA operations play the kernels, so that a
process without a GPU goes through every step of the verification."""

import json
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.devices import use_compile_cache
from mmfree_jax.ops.bit_linear import Recipe, Weights, bit_linear
from mmfree_jax.ops.fast import checks, verification
from mmfree_jax.ops.fast.checks import Use
from mmfree_jax.ops.fast.hopper import int8_matmul, transposed_codes
from mmfree_jax.ops.fast.ternary import column_scale, dither_phases, round_with_dither

X = np.random.default_rng(0).standard_normal((256, 128)).astype(jnp.bfloat16)
W = np.random.default_rng(1).standard_normal((1, 128, 128)).astype(np.float32)
PRODUCT, TURN = Use("int8_matmul", (256, 128, 128), (False,)), Use("transposed_codes", (128, 128), (False,))


def product(x, w, x_scale, w_scale):
    sums = jnp.matmul(x.astype(jnp.int32), w.astype(jnp.int32).T)
    return (sums.astype(jnp.float32) * x_scale[:, None] * w_scale).astype(jnp.bfloat16)


def turned(codes, by=None, scale=None):
    if by is None:
        return codes.T
    rows, columns = dither_phases(*codes.shape)
    return round_with_dither(codes * by[:, None] / scale, rows[:, None] + columns).T


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A process that believes in a Hopper GPU, with stand-ins for two kernels, and a folder that keeps outcomes."""
    monkeypatch.setattr(verification, "is_hopper", lambda: True)
    monkeypatch.setattr(verification, "_outcomes", {})
    monkeypatch.setattr(verification, "_refused_elsewhere", set())
    monkeypatch.setattr(int8_matmul, "int8_matmul", product)
    monkeypatch.setattr(transposed_codes, "transpose", turned)
    before = jax.config.jax_compilation_cache_dir
    use_compile_cache(tmp_path)
    jax.clear_caches()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    jax.clear_caches()


def layer():
    (y,) = jax.jit(lambda x, w: bit_linear(Recipe(), x, Weights(w)))(X, W)
    return np.asarray(y, np.float32)


def wrong_in_a_column(*arguments):
    return product(*arguments).at[:, 77].multiply(1.5)


def test_a_kernel_that_is_right_serves_and_is_checked_once(gpu, monkeypatch):
    expected = layer()
    assert verification.record() == {"served": sorted(map(str, (PRODUCT, TURN))), "refused": []}
    kept = [json.loads(path.read_text()) for path in (gpu / "kernels").iterdir()]
    assert sorted(row["use"] for row in kept) == sorted(map(str, (PRODUCT, TURN)))
    # Another process finds the outcomes there and checks nothing.
    monkeypatch.setattr(verification, "_outcomes", {})
    monkeypatch.setattr(checks, "check", lambda use: pytest.fail("checked again"))
    jax.clear_caches()
    np.testing.assert_array_equal(layer(), expected)


def test_a_kernel_with_one_wrong_column_is_refused_and_xla_serves(gpu, monkeypatch):
    expected = layer()
    monkeypatch.setattr(int8_matmul, "int8_matmul", wrong_in_a_column)
    monkeypatch.setattr(verification, "_outcomes", {})
    monkeypatch.setattr(verification, "_sources", lambda: "changed")  # or the outcome of before would stand
    jax.clear_caches()
    with pytest.warns(UserWarning, match=r"int8_matmul 256x128x128 False: product deviates by \d+"):
        found = layer()
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)
    (refused,) = verification.record()["refused"]
    assert refused.startswith(str(PRODUCT))


def no_number(*arguments):
    return product(*arguments).at[0, 0].set(jnp.nan)


def no_product(*arguments):
    raise NotImplementedError("a layout that this compiler does not know")


@pytest.mark.parametrize(
    ("fault", "reason", "kept"),
    [(no_number, "product deviates by inf", 2), (no_product, "NotImplementedError: a layout that", 1)],
)
def test_a_kernel_without_a_number_or_that_fails_is_refused_and_only_failures_are_tried_again(
    gpu, monkeypatch, fault, reason, kept
):
    monkeypatch.setattr(int8_matmul, "int8_matmul", fault)
    for _ in range(2):  # the second process reads what the first one kept
        monkeypatch.setattr(verification, "_outcomes", {})
        jax.clear_caches()
        with pytest.warns(UserWarning, match=reason):
            assert np.isfinite(layer()).all()
        assert len(list((gpu / "kernels").iterdir())) == kept
    assert reason in verification.record()["refused"][0]


def test_a_check_that_fails_beside_others_is_made_again_alone(gpu, monkeypatch):
    """Checks at the same time need memory at the same time."""
    calls = []

    def scarce(use):
        calls.append(use)
        if calls.count(PRODUCT) == 1 and use == PRODUCT:
            raise MemoryError("out of memory")
        return checks.Outcome({"product": 0.5})

    monkeypatch.setattr(checks, "check", scarce)
    layer()
    assert sorted(calls) == sorted([TURN, PRODUCT, PRODUCT])
    assert verification.record()["refused"] == []


def test_a_folder_that_cannot_be_written_costs_the_next_process_a_check(gpu, monkeypatch):
    (gpu / "kernels").touch()  # a file where the folder should be: an OSError, as on a read-only disk
    layer()
    assert verification.record()["refused"] == []
    assert len(verification.record()["served"]) == 2


def test_uses_of_a_program_are_checked_before_it_is_traced_for_good(gpu, monkeypatch):
    traced = []

    @jax.jit
    def program(x, w):
        traced.append(x)
        return bit_linear(Recipe(), x, Weights(w))[0]

    verification.prepare(lambda: jax.eval_shape(program, X, W))
    assert len(traced) == 1
    assert set(verification._outcomes) == {PRODUCT, TURN}
    program(X, W)
    assert len(traced) == 1, "the second trace is not free"

    monkeypatch.setattr(int8_matmul, "int8_matmul", wrong_in_a_column)
    monkeypatch.setattr(verification, "_outcomes", {})
    monkeypatch.setattr(verification, "_sources", lambda: "changed")
    jax.clear_caches()
    with pytest.warns(UserWarning, match="refused"):
        verification.prepare(lambda: jax.eval_shape(program, X, W))
    monkeypatch.setattr(int8_matmul, "int8_matmul", lambda *a: pytest.fail("a refused kernel was traced"))
    program(X, W)


def test_what_another_process_refuses_is_refused_here(gpu, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gathered = lambda mine: np.stack([mine, np.ones_like(mine)])
    monkeypatch.setattr(verification.multihost_utils, "process_allgather", gathered)
    program = jax.jit(lambda x, w: bit_linear(Recipe(), x, Weights(w))[0])
    verification.prepare(lambda: jax.eval_shape(program, X, W))
    assert verification.record()["served"] == []
    assert all("another process" in line for line in verification.record()["refused"])
    # A use that was not prepared cannot be agreed on.
    with pytest.warns(UserWarning, match="not checked before"):
        assert not verification.serves(Use("int8_matmul", (512, 128, 128), (False,)))


def test_the_outcome_depends_on_compiler_device_and_sources(gpu, monkeypatch):
    layer()
    for number, (name, value) in enumerate(
        (("environment", ["jax 1", "jaxlib 1", "H200", "cuda 13"]), ("_sources", "other"), ("_sources", "other"))
    ):
        monkeypatch.setattr(verification, name, lambda value=value: value)
        monkeypatch.setattr(verification, "_outcomes", {})  # as in a new process
        jax.clear_caches()
        layer()
        assert len(list((gpu / "kernels").iterdir())) == (4, 6, 6)[number]  # two uses; known the third time


def test_a_result_that_is_no_number_does_not_pass():
    assert not checks.Outcome({"a": 0.1, "b": float("nan")}).passed
    assert checks.Outcome({"a": 0.1, "b": float("nan")}).worst.startswith("b ")


@pytest.mark.parametrize("use", [PRODUCT, Use("int8_matmul", (512, 384, 128), (True,)), TURN])
@pytest.mark.parametrize("fault", ["a row", "a column", "transposed rows", "none"])
def test_checks_see_a_fault_anywhere(gpu, monkeypatch, use, fault):
    def faulty(result):
        result = result.astype(jnp.float32)
        spoiled = {
            "a row": lambda: result.at[-1].add(1 + result.std()),
            "a column": lambda: result.at[:, 5].add(1 + result.std()),
            "transposed rows": lambda: result.at[jnp.array([3, 4])].set(result[jnp.array([4, 3])]),
            "none": lambda: result,
        }[fault]()
        return spoiled

    monkeypatch.setattr(int8_matmul, "int8_matmul", lambda *a: faulty(product(*a)).astype(jnp.bfloat16))
    monkeypatch.setattr(transposed_codes, "transpose", lambda *a: faulty(turned(*a)).astype(jnp.int8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert checks.check(use).passed == (fault == "none")


def test_scaled_transposed_codes_have_a_rounding_for_each_place(gpu, monkeypatch):
    use = Use("transposed_codes", (640, 128), (True,))  # more rows than are distinct
    assert checks.check(use).passed
    rows = lambda codes, by, scale: turned(codes, by, scale).at[:, -1].add(3)
    monkeypatch.setattr(transposed_codes, "transpose", rows)
    assert not checks.check(use).passed
    assert column_scale(jnp.float32(127)) == 1


def test_an_outcome_is_void_when_checks_or_what_they_are_made_of_change():
    fast = Path(verification.__file__).parent
    names = {path.relative_to(fast).as_posix() for name in verification.CHECKED_SOURCES for path in fast.glob(name)}
    assert names >= {path.relative_to(fast).as_posix() for path in (fast / "checks").glob("*.py")}
    own = re.compile(r"from mmfree_jax\.ops\.fast(?:\.(\w+) import| import (\w+))")
    used = {a or b for name in names if name.startswith("checks/") for a, b in own.findall((fast / name).read_text())}
    assert used - {"checks", "kernels", "hopper"} <= {Path(name).stem for name in names}
    assert "attention.py" in names  # the kernel for documents is made of the library's call in it
