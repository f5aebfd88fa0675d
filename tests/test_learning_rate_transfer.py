"""The search over rates, the verdict, and the whole experiment as a command, interrupted."""

import math

import pytest

from experiments import learning_rate_picture, learning_rate_transfer
from experiments.learning_rate_picture import curves, optimum, verdict_lines
from experiments.learning_rate_transfer import next_place, place, rate, read
from tests.in_process import called


def searched(loss, start, around=2):
    losses: dict[int, float] = {}
    while (index := next_place(losses, start, around)) is not None:
        assert index not in losses
        losses[index] = loss(index)
    return losses


@pytest.mark.parametrize("start", [-6, 0, 3])
def test_the_search_brackets_the_best_wherever_it_begins(start):
    losses = searched(lambda i: (i + 1.3) ** 2, start)
    assert min(losses, key=lambda i: losses[i]) == -1
    assert {-3, -2, -1, 0, 1} <= set(losses)


def test_nothing_is_tried_above_a_rate_that_diverged():
    losses = searched(lambda i: math.inf if i > 0 else -i + 0.0, start=3)
    assert {0, 1} <= set(losses)
    assert -1 in losses
    assert sorted(i for i in losses if i > 0) == [1, 2, 3]  # downwards from the start, and none of them again
    assert searched(lambda i: math.inf if i > 0 else -i + 0.0, start=0).keys() == {-2, -1, 0, 1}


def test_the_parabola_finds_the_lowest_point_between_the_rates():
    losses = {2.0**i: (i - 0.4) ** 2 for i in range(-3, 4)}
    assert optimum(losses) == pytest.approx(2**0.4)
    assert optimum({1.0: 3.0, 2.0: 1.0, 4.0: math.inf}) == 2.0


def made_up(family, parametrisation, width, centre):
    lrs = [rate(family, i) for i in range(-4, 5)]
    row = {"family": family, "parametrisation": parametrisation, "width": width, "seed": 0, "diverged": False}
    return [row | {"lr": lr, "loss": (place(family, lr) - centre) ** 2} for lr in lrs]


def test_the_verdict_counts_grid_steps_from_the_narrowest_width():
    rows = made_up("hgrn", "standard", 64, 1.0)
    rows += made_up("hgrn", "standard", 128, -1.0) + made_up("hgrn", "mup", 128, 0.7)
    standard, mup = verdict_lines(rows)
    assert "-2.00 steps of x2 · moves by more than one grid step" in standard
    assert "-0.30 steps of x2 · within one grid step" in mup
    assert set(curves(rows)[("hgrn", "mup")]) == {64, 128}


def test_the_experiment_runs_resumes_and_is_drawn(token_set, tmp_path):
    table, picture = tmp_path / "t.csv", tmp_path / "t.png"
    small = ["--widths", 16, 32, "--depth", 2, "--tokens", 2560, "--sequence", 32, "--batch", 8, "--around", 1]
    arguments = ["--out", table, "--corpus", token_set.path, "--vocab", 257, "--families", "transformer++", *small]
    done = called(learning_rate_transfer.main, *arguments)
    assert done.returncode == 0, done.stderr
    rows, text = read(table), table.read_text()
    assert {(row["parametrisation"], row["width"]) for row in rows} == {("standard", 16), ("standard", 32), ("mup", 32)}
    assert all(math.isfinite(row["loss"]) for row in rows)
    table.write_text("\n".join(text.splitlines()[:-1]) + "\n")  # as if stopped before the last run
    again = called(learning_rate_transfer.main, *arguments)
    assert again.returncode == 0, again.stderr
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert strip(read(table)) == strip(rows)
    drawn = called(learning_rate_picture.main, table, "--out", picture)
    assert drawn.returncode == 0, drawn.stderr
    assert len(drawn.stdout.strip().splitlines()) == 2
    assert picture.stat().st_size > 10_000
    wrong = called(learning_rate_transfer.main, *arguments[:-1], 0)
    assert (wrong.returncode, wrong.stderr.strip().count("\n")) == (1, 0)
    assert "around and seeds must be at least 1" in wrong.stderr
