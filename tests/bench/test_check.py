"""The suite of checks: what it draws, how it resumes, and that a fault makes it fail."""

import json
import os
from collections import Counter

import jax
import pytest

from mmfree_jax.bench import check
from mmfree_jax.bench import cli as bench
from mmfree_jax.config import FAMILIES, ConfigError
from mmfree_jax.devices import traced_for
from mmfree_jax.ops.fast import checks, products, verification
from mmfree_jax.ops.fast.kernels import kernels
from tests.in_process import called

GPU = pytest.mark.skipif(not verification.is_hopper(), reason="needs a Hopper GPU")
LAYERS = [use for use in check.uses(64, 0) if use.kernel == "layer" and max(use.sizes) < 600][:3]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("use", check.uses(6, 1), ids=str)
def test_kernels_layers_and_models_on_a_gpu(use):
    row = check.run_check(use)
    assert row.passed, row.worst


def test_every_kernel_is_drawn_and_every_residue_of_what_takes_any_width():
    uses = check.uses(256, 0)
    assert len(uses) == len(set(uses))
    assert Counter(use.kernel for use in uses) == dict.fromkeys(kernels(), 256) | {"layer": 64, "model": 32}
    assert {use.options[0] for use in uses if use.kernel == "model"} == set(FAMILIES)
    widths = [use.sizes[2] for use in uses if use.kernel == "recurrence"]
    assert {width % 256 for width in widths} == set(range(256))
    assert min(widths) >= 16
    assert max(widths) <= 8192
    codes = {use.sizes[1] // 128 for use in uses if use.kernel in ("normed_codes", "row_codes")}
    assert codes == set(range(1, 65))
    assert {use.sizes[1] for use in uses if use.kernel == "recurrence"} >= {1, 77, 1000, 8193}


def test_on_a_tpu_its_own_kernels_are_drawn():
    with traced_for("tpu"):
        uses = check.uses(64, 0)
    assert {use.kernel for use in uses} == {"normed_codes", "recurrence", "attention", "layer", "model"}
    assert {use.kernel for use in uses} | {use.kernel for use in check.uses(8, 0)} >= checks.CHECKS.keys()
    assert not any(use.options[-1] for use in uses if use.kernel == "normed_codes")  # no codes of gradients
    assert {use.options[-1] for use in uses if use.kernel == "attention"} == {1, 2, 4}


def test_shards_share_the_uses_out():
    whole = set(check.uses(20, 0))
    parts = [check.uses_of_shard(f"{i}/3", 0, 20, "") for i in range(3)]
    assert set().union(*parts) == whole
    assert sum(map(len, parts)) == len(whole)
    for wrong in ("3/3", "1", "a/b", "-1/2"):
        with pytest.raises(ConfigError, match="shard"):
            check.uses_of_shard(wrong, 0, 20, "")


@pytest.mark.parametrize("use", LAYERS, ids=str)
def test_a_layer_passes_and_one_with_a_wrong_gradient_does_not(use, monkeypatch):
    """In place of a GPU: the type differs from the reference's, and the fault is in that type's path alone."""
    assert check.run_check(use).passed
    right = products.outer
    monkeypatch.setattr(products, "outer", lambda x, dy, *a: right(x, dy, *a) * (1.5 if seen(x) else 1))
    calls = []
    seen = lambda x: calls.append(x) or len(calls) <= 3  # the first program's, not the reference's
    jax.clear_caches()
    row = check.run_check(use)
    assert not row.passed
    assert "gradient to" in row.worst


def test_an_exception_is_a_row_that_fails(monkeypatch):
    monkeypatch.setattr(check, "_layer", lambda use: 1 / 0)
    row = check.run_check(LAYERS[0])
    assert not row.passed
    assert row.deviation is None
    assert row.worst.startswith("ZeroDivisionError")


def test_the_suite_resumes_and_says_what_is_wrong(tmp_path, monkeypatch):
    table, asked = tmp_path / "check.json", []

    def beside(uses):
        for use in list(uses)[:2]:  # then time is over
            asked.append(use)
            yield check.CheckRow(str(use), str(use) != str(bad), 0.5, "codes deviates by 3 times the tolerance", 0.1)

    monkeypatch.setattr(check, "_beside", beside)
    uses = check.uses_of_shard("0/1", 0, 2, "row_codes|int8")
    bad = uses[-1]
    command = ("--suite", "check", "--shapes", "2", "--only", "row_codes|int8", "--json", str(table))
    first = called(bench.main, *command)
    assert first.returncode == 75, first.stderr
    assert "2 left" in first.stdout
    second = called(bench.main, *command)
    assert second.returncode == 2
    assert f"{bad}: codes deviates by 3 times" in second.stdout
    assert sorted(map(str, asked)) == sorted(map(str, uses)), "something was checked twice"
    assert len(json.loads(table.read_text())["check"]) == 4


def dies_at_three(use):
    """Stands in for a check; in a process of the suite."""
    if use.sizes == (3,):
        os._exit(1)
    return check.CheckRow(str(use), True, 0.1, "all", 0.0)


def test_a_process_that_dies_fails_its_use_alone(monkeypatch):
    monkeypatch.setattr(check, "run_check", dies_at_three)
    monkeypatch.setattr(check, "PROCESSES", 2)
    uses = [checks.Use("layer", (n,)) for n in range(1, 6)]
    rows = {row.use: row for row in check._beside(iter(uses))}
    assert rows.keys() == set(map(str, uses))
    assert [str(use) for use in uses if not rows[str(use)].passed] == ["layer 3"]
    assert rows["layer 3"].worst == "the process that checked it died"
