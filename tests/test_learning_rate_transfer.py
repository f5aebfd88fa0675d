"""The runs that the experiment declares, the verdict on their table, and the picture as a command."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from experiments import learning_rate_picture
from experiments.learning_rate_picture import curves, optimum, read, verdict_lines
from experiments.learning_rate_transfer import STEP, TOKENS, study
from mmfree_jax.config import ConfigError
from tests.in_process import called

COMMITTED = Path(__file__).parents[1] / "experiments" / "results" / "learning_rate_transfer.csv"


def test_every_cell_has_the_same_seven_rates_and_the_committed_table_lies_on_them():
    runs = study().runs
    cells = Counter((run.model.family, run.model.parametrisation, run.model.width) for run in runs)
    assert len(cells) == 14
    assert set(cells.values()) == {7}
    assert all(0.99 * TOKENS < run.positions <= TOKENS for run in runs)
    tried = {(run.model.family, run.model.parametrisation, run.model.width, f"{run.optim.lr:.6g}") for run in runs}
    done = {(r["family"], r["parametrisation"], r["width"], f"{r['lr']:.6g}") for r in read(COMMITTED)}
    assert len(done) > 40
    assert done <= tried


def test_the_parabola_finds_the_lowest_point_between_the_rates():
    losses = {2.0**i: (i - 0.4) ** 2 for i in range(-3, 4)}
    assert optimum(losses) == pytest.approx(2**0.4)
    assert optimum({1.0: 3.0, 2.0: 1.0, 4.0: float("inf")}) == 2.0


def made_up(family, parametrisation, width, centre):
    row = {"family": family, "parametrisation": parametrisation, "width": width, "diverged": False}
    return [row | {"lr": 4e-3 * STEP**i, "loss": (i - centre) ** 2} for i in range(-4, 5)]


def test_the_verdict_counts_grid_steps_from_the_narrowest_width():
    rows = made_up("hgrn", "standard", 64, 1.0)
    rows += made_up("hgrn", "standard", 128, -1.0) + made_up("hgrn", "mup", 128, 0.7)
    standard, mup = verdict_lines(rows)
    assert "-2.00 steps of x2 · moves by more than one grid step" in standard
    assert "-0.30 steps of x2 · within one grid step" in mup
    assert set(curves(rows)[("hgrn", "mup")]) == {64, 128}


def test_a_runs_table_of_the_sweep_is_drawn_and_its_worst_runs_count_as_diverged(tmp_path):
    rows = made_up("transformer++", "standard", 256, 0.0) + made_up("transformer++", "mup", 512, 0.0)
    with (tmp_path / "runs.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["run_id", *rows[0]], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "run_id": str(i)} for i, row in enumerate(rows))
    losses = curves(read(tmp_path / "runs.csv"))["transformer++", "mup"][512]
    assert losses[4e-3 * STEP**-4] == float("inf")  # 16 nats: more than ln 4096
    picture = tmp_path / "t.png"
    drawn = called(learning_rate_picture.main, tmp_path / "runs.csv", "--out", picture)
    assert drawn.returncode == 0, drawn.stderr
    assert len(drawn.stdout.strip().splitlines()) == 2
    assert picture.stat().st_size > 10_000
    (tmp_path / "other.csv").write_text("run_id,loss\na,1\n")
    with pytest.raises(ConfigError, match="it has no family, lr, parametrisation, width"):
        read(tmp_path / "other.csv")
