"""Trunks and decays, the checks of a study, and loading one from a file."""

import dataclasses

import pytest

from mmfree_jax.config import Branch, ConfigError, RunConfig
from mmfree_jax.sweep.experiment import Study, chains, load_study, run_flops, trunk_and_decays
from mmfree_jax.training.optim import learning_rate
from tests.conftest import MAIN_FAMILIES, tiny_run

BASE = tiny_run("matmul-free", "corpus", steps=100)


def study(*runs, **changes) -> Study:
    return Study(**{"name": "s", "title": "t", "runs": runs, "baseline": "a", **changes})


def test_one_trunk_carries_every_budget():
    trunk, *branches = trunk_and_decays(BASE, (100, 25, 50), decay=0.2)
    assert [branch.steps for branch in branches] == [25, 50, 100]
    assert [branch.branch for branch in branches] == [Branch(trunk.name, step) for step in (20, 40, 80)]
    assert trunk.steps == 80
    assert trunk.milestones == (20, 40, 80)
    assert not trunk.evaluate
    study(trunk, *branches)  # is a valid study


def test_every_branch_follows_its_trunk_until_its_decay_and_ends_near_zero():
    trunk, *branches = trunk_and_decays(BASE, (25, 50, 100))
    for run in branches:
        for step in range(run.branch.step):
            assert learning_rate(run.optim, run.steps, step) == learning_rate(trunk.optim, trunk.steps, step)
        last = [learning_rate(run.optim, run.steps, step) for step in range(run.branch.step, run.steps)]
        assert last == sorted(last, reverse=True)
        assert last[-1] == pytest.approx(run.optim.lr / len(last))


def test_decays_to_another_rate_than_none_leave_the_same_trunk():
    ending = optim(BASE, final_lr=0.1)
    (trunk, *_), (other, *branches) = trunk_and_decays(BASE, (50, 100)), trunk_and_decays(ending, (50, 100))
    assert other == trunk
    assert learning_rate(branches[-1].optim, 100, 100) == pytest.approx(0.1 * BASE.optim.lr)
    study(other, *branches)


def test_branches_cost_their_decays_only():
    trunk, *branches = trunk_and_decays(BASE, (25, 50, 100))
    whole = run_flops(dataclasses.replace(BASE, steps=100, branch=None))
    assert run_flops(trunk) == pytest.approx(0.8 * whole)
    assert sum(map(run_flops, branches)) == pytest.approx(0.2 * 1.75 * whole)
    assert [r.positions for r in branches] == [steps * 4 * 32 for steps in (25, 50, 100)]


def test_chains_keep_a_trunk_with_its_branches():
    runs = [run for family in MAIN_FAMILIES for run in trunk_and_decays(tiny_run(family, "c", steps=100), (50, 100))]
    assert [[run.name for run in chain] for chain in chains(runs)] == [
        [r.name for r in runs[:3]],
        [r.name for r in runs[3:]],
    ]


def test_a_branch_of_a_branch_is_in_the_chain_of_the_trunk_of_both():
    """Its checkpoint is there only when the branch has been trained."""
    trunk, whole = trunk_and_decays(BASE, (100,))
    steady = dataclasses.replace(trunk, name="longer", steps=120, milestones=(100,), branch=Branch(trunk.name, 80))
    end = dataclasses.replace(whole, name="end", steps=120, branch=Branch("longer", 100))
    runs = study(trunk, whole, steady, end).runs
    assert chains(runs) == [[trunk, whole, steady, end]]
    assert chains((steady, end)) == [[steady, end]]  # what is left when the trunk is done
    assert chains((end,)) == [[end]]


def test_a_branch_may_be_computed_in_other_micro_batches_than_its_trunk():
    assert study(TRUNK, optim(SHORT, accumulate=2)).runs[1].optim.accumulate == 2


TRUNK, SHORT, LONG = trunk_and_decays(BASE, (50, 100))


def optim(run: RunConfig, **changes) -> RunConfig:
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, **changes))


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ((), "has no runs"),
        ((TRUNK, TRUNK), f"used twice: {TRUNK.name}"),
        ((SHORT, TRUNK), "is not listed before it"),
        (
            (TRUNK, dataclasses.replace(SHORT, branch=Branch(TRUNK.name, 7))),
            "step 7, which is not among the milestones",
        ),
        ((TRUNK, dataclasses.replace(SHORT, seed=3)), "its seed differs from its trunk's"),
        ((TRUNK, optim(SHORT, lr=0.5)), r"its optim.lr=0.5 differs from its trunk's, 0.01"),
        ((TRUNK, optim(SHORT, optimizer="muon")), "its optim.optimizer=muon differs"),
        ((TRUNK, optim(SHORT, schedule="cosine", decay_steps=0)), "schedule=cosine has no constant rate to branch off"),
        ((optim(TRUNK, decay_steps=10), LONG), f"branches inside the decay of {TRUNK.name}, which begins at step 70"),
        ((TRUNK, dataclasses.replace(BASE, data=dataclasses.replace(BASE.data, corpus="x"))), "several corpora"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused(runs, says):
    with pytest.raises(ConfigError, match=says):
        study(*runs)


LISTED = """
from mmfree_jax.presets import run_preset
from mmfree_jax.sweep.experiment import Study
from mmfree_jax.sweep.grids import grid
families = ("transformer++", "hgrn")
runs = [run for name in families for run in grid(run_preset(f"{name}-tiny"), {"optim.lr": (1e-3, 2e-3)})]
"""


def test_a_list_of_runs_is_an_experiment_too(tmp_path):
    path = tmp_path / "rates.py"
    path.write_text(LISTED + "def study(): return runs\n")
    found = load_study(path)
    assert (found.name, found.baseline) == ("rates", "transformer++")
    assert [run.optim.lr for run in found.runs] == [1e-3, 2e-3] * 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1\n", r"defines no function study\(\)"),
        ("def study(): return 3\n", "returned int, not a Study or a list"),
        ("def study(): return []\n", "not a list of run configs"),
        ("def study(): return [3]\n", "not a list of run configs"),
        (LISTED + "def study(): return Study('s', 't', tuple(runs), 'bitnet')\n", "its baseline is 'bitnet', but"),
    ],
)
def test_a_file_that_declares_no_study_is_named(tmp_path, text, says):
    path = tmp_path / "e.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_study(path)
    with pytest.raises(ConfigError, match="no such experiment file"):
        load_study(tmp_path / "none.py")
