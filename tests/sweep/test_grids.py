from pathlib import Path

import pytest

from mmfree_jax.config import ConfigError
from mmfree_jax.sweep.grids import grid, repeats, zipped
from tests.conftest import MAIN_FAMILIES, tiny_run


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_a_grid_has_every_combination_and_names_it(family):
    runs = grid(tiny_run(family, Path("c")), {"optim.lr": (1e-3, 2e-3), "seed": (0, 1, 2)})
    assert [(run.optim.lr, run.seed) for run in runs] == [(lr, seed) for lr in (1e-3, 2e-3) for seed in (0, 1, 2)]
    assert runs[0].name == f"{family}-tiny-lr0.001-seed0"
    assert len({run.fingerprint() for run in runs}) == 6


def test_zipped_takes_values_together():
    base = tiny_run("matmul-free", Path("c"))
    runs = zipped(base, {"model.width": (16, 32), "optim.lr": (1e-2, 5e-3)})
    assert [(run.model.width, run.optim.lr) for run in runs] == [(16, 1e-2), (32, 5e-3)]
    with pytest.raises(ConfigError, match="different numbers of values"):
        zipped(base, {"seed": (1, 2), "steps": (30,)})


def test_repeats_differ_in_weights_and_in_the_order_of_the_data():
    runs = repeats(tiny_run("matmul-free", Path("c")), (0, 7))
    assert [(run.name, run.seed, run.data.seed) for run in runs] == [
        ("matmul-free-tiny-seed0", 0, 0),
        ("matmul-free-tiny-seed7", 7, 7),
    ]


def test_values_that_are_possible_together_need_not_be_one_by_one():
    base = tiny_run("transformer++", Path("c"), steps=12)  # warms up for 2 steps and decays for 4
    (run,) = zipped(base, {"steps": (4,), "optim.warmup_steps": (1,), "optim.decay_steps": (2,)})
    assert (run.steps, run.optim.warmup_steps, run.optim.decay_steps) == (4, 1, 2)
    (run,) = grid(base, {"model.heads": (3,), "model.width": (48,)})
    assert (run.model.heads, run.model.width) == (3, 48)


def test_a_grid_over_mixtures_names_its_runs_after_their_last_folders():
    base = tiny_run("matmul-free", Path("c"))
    runs = grid(base, {"data.mixture": ((), ("corpora/code",), ("corpora/code", "corpora/books/"))})
    assert [run.name.rpartition("-")[2] for run in runs] == ["mixturenone", "mixturecode", "mixturecode+books"]
    assert runs[2].data.mixture == ("corpora/code", "corpora/books/")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"optim.learning_rate": (1e-3,)}, "optim.learning_rate: no such field"),
        ({"optim.bta1": (0.9,)}, "beta1"),
        ({"optim": (1,)}, "names a group of fields"),
        ({"seed.x": (1,)}, "goes past a field"),
        ({"seed": ("one",)}, "must be of type int"),
        ({"seed": (True,)}, "must be of type int"),
        ({"data.batch": (0,)}, "data.batch=0"),
    ],
)
def test_a_wrong_field_or_value_is_named(values, says):
    with pytest.raises(ConfigError, match=says):
        grid(tiny_run("transformer++", Path("c")), values)
