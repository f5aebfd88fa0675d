"""One dial: what a size implies, against the formulas' own numbers."""

import math

import pytest

from experiments import ladder as experiment
from mmfree_jax import flops
from mmfree_jax.config import ConfigError, DataConfig
from mmfree_jax.sweep.ladder import Base, batch_sequences, rate_of_batch, rungs, weight_decay
from mmfree_jax.training.optim import rate_factor

BASE = Base(lr=4e-3, width=64, depth=2, batch_tokens=4096)
DATA = DataConfig(corpus="embedded", vocab=2048, sequence=128)


def test_the_formulas_at_points_worked_out_by_hand():
    assert batch_sequences(1e17, 1024) == 128  # 0.292 * 1e17^0.3271 = 106 thousand tokens
    assert batch_sequences(1e20, 4096) == 256  # 1.02 million
    assert rate_of_batch(4 * 4096, 4096) == 2
    assert weight_decay(1e-3, 10_000, 20) == pytest.approx(0.447, rel=0.01)  # tau = 0.2236


@pytest.mark.parametrize("family", ["transformer++", "matmul-free"])
def test_every_rung_has_its_size_horizons_and_a_trunk(family):
    runs = rungs(family, BASE, (2e5, 1e6), (20, 5), DATA)
    trunks = [run for run in runs if run.branch is None]
    assert len(runs) == 2 * 3
    for trunk, size in zip(trunks, (2e5, 1e6), strict=True):
        N = flops.parameters(trunk.model).N
        ends = [run for run in runs if run.branch and run.branch.run == trunk.name]
        assert size / 1.3 < N < 1.3 * size
        assert [run.positions / N for run in ends] == pytest.approx([5, 20], rel=0.05)
        assert all(run.model == trunk.model and run.optim.lr == trunk.optim.lr for run in ends)
        assert 1 / (trunk.optim.lr * trunk.optim.weight_decay) == pytest.approx(
            1.084 * 20**-0.527 * ends[-1].steps, rel=1e-6
        )
        assert rate_factor(trunk.model, "matrix") == 64 / trunk.model.width
    small, large = trunks
    assert large.data.batch >= small.data.batch
    assert large.optim.lr / small.optim.lr == pytest.approx(math.sqrt(large.data.batch / small.data.batch))


def test_a_ladder_without_sizes_is_refused():
    with pytest.raises(ConfigError, match="at least one size"):
        rungs("hgrn", BASE, (), (20,), DATA)


def test_the_experiment_fits_its_corpus_and_treats_both_families_alike():
    runs = experiment.study().runs
    assert max(run.positions for run in runs) <= 67e6  # tier M, in one epoch
    halves = [[run for run in runs if run.model.family == family] for family in experiment.BASES]
    for a, b in zip(*halves, strict=True):
        assert (a.data, a.steps, a.branch is None) == (b.data, b.steps, b.branch is None)
