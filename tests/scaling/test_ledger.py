"""The forecast ledger: what is recorded, when it is scored, and how."""

import json

import numpy as np
import pytest
from conftest import TRUTH, ladder_rows

from scaling import Runs, ScalingError
from scaling.__main__ import main
from scaling.report.ledger import (
    FILE,
    Forecast,
    digest_of,
    ledger_sentence,
    next_cells,
    read_ledger,
    record,
    score,
    write_ledger,
)
from scaling.report.write import write_report
from tests.in_process import called

LONE = {"matmul-free": TRUTH["matmul-free"]}
SIZES = tuple(np.geomspace(1e6, 3.2e7, 6))


def forecast(**changes):
    values = {"made": "2026-01-01T00:00:00+00:00", "table": "t", "family": "f", "N": 1e6, "D": 2e7, "sd": 0.01}
    return Forecast(**values | {"loss": 3.0, "low": 2.9, "high": 3.1} | changes)


def lone_ladder(sizes, ratios=(5, 10, 20, 40)):
    return Runs.from_rows(ladder_rows(sizes=sizes, ratios=ratios, noise=0.002, truth=LONE))


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A report on five sizes, then one into the same folder with a sixth size, one budget of which nobody asked for."""
    folder = tmp_path_factory.mktemp("grown")
    write_report(lone_ladder(SIZES[:5]), folder, draws=100)
    before = read_ledger(folder)
    done = called(main, "predict", folder, "--N", "6.4e7", "--D", "1.28e9")
    assert done.returncode == 0, done.stderr
    rows = ladder_rows(sizes=SIZES, ratios=(5, 10, 20, 40), noise=0.002, truth=LONE)
    extra = ladder_rows(sizes=SIZES[5:], ratios=(80,), noise=0.002, truth=LONE)
    report = write_report(Runs.from_rows(rows + [row | {"run_id": "unasked"} for row in extra]), folder, draws=100)
    return before, done.stdout, report, folder


def test_a_report_forecasts_the_next_size_of_its_own_ladder(grown):
    before, _, _, _ = grown
    assert [f.N for f in before] == pytest.approx([SIZES[5]] * 4, rel=0.005)
    assert [f.D / f.N for f in before] == pytest.approx([5, 10, 20, 40], rel=0.01)
    assert not any(f.scored for f in before)
    assert all(f.low < f.loss < f.high for f in before)


def test_forecasts_are_scored_when_their_runs_arrive(grown):
    before, said, report, folder = grown
    assert "recorded in" in said
    scored = [f for f in report.ledger if f.scored]
    assert [f.D / f.N for f in scored] == pytest.approx([5, 10, 20, 40, 80], rel=0.01)
    assert scored[-1].run_id == "unasked"
    assert {f.made for f in scored} == {f.made for f in before}
    assert np.mean([f.covered for f in scored]) >= 0.8
    assert max(abs(f.error) for f in scored) < 0.02
    waiting = [f for f in report.ledger if not f.scored]
    assert any((f.N, f.D) == (6.4e7, 1.28e9) for f in waiting)
    assert {f.table for f in waiting} == {f.table for f in before} | {digest_of(report.found.runs)}
    assert "5 of 5 scored" in report.terminal_summary() or "4 of 5 scored" in report.terminal_summary()
    for name in ("report.md", "report.html"):
        assert "unasked" in (folder / name).read_text()
    assert len(json.loads((folder / "fit.json").read_text())["forecasts_scored"]) == 5


def test_a_table_is_not_scored_against_itself(grown):
    """A cell asked about after its run was in the table is no forecast, and open forecasts stay open."""
    _, _, report, folder = grown
    runs, ledger = report.found.runs, read_ledger(folder)
    cell = ["--N", repr(float(runs["N"][0])), "--D", repr(float(runs["D"][0]))]
    done = called(main, "predict", folder, *cell)
    assert done.returncode == 0, done.stderr
    assert "recorded" not in done.stdout
    assert read_ledger(folder) == ledger
    assert score(ledger, runs, digest_of(runs)) == ledger


def test_scores_are_the_textbook_ones():
    inside, outside = forecast(run_id="r", observed=3.03), forecast(run_id="r", observed=3.2)
    assert inside.covered
    assert not outside.covered
    assert inside.error == pytest.approx(np.log(3.03 / 3.0))
    z = inside.error / 0.01
    assert inside.log_score == pytest.approx(-0.5 * z**2 - np.log(0.01 * np.sqrt(2 * np.pi)))
    assert inside.interval_score == pytest.approx(0.2)
    assert outside.interval_score == pytest.approx(0.2 + 40 * 0.1)
    assert 0.5 < inside.pit < outside.pit < 1
    assert "1 of 2 scored forecasts" in ledger_sentence([inside, outside])


def test_a_cell_is_forecast_once_per_table_and_scored_once():
    ledger = record([forecast()], [forecast(loss=2.0), forecast(table="u"), forecast(D=4e7)])
    assert len(ledger) == 3
    runs = Runs.from_rows([{"run_id": "r", "family": "f", "N": 1e6, "D": 2e7, "loss": 3.05}])
    done = score(ledger, runs, table="u")
    assert [f.run_id for f in done] == ["r", "", ""]
    assert score(done, runs, table="v")[0] == done[0]


def test_a_damaged_ledger_is_named_with_its_line(tmp_path):
    write_ledger(tmp_path, [forecast(), forecast(D=4e7)])
    assert read_ledger(tmp_path) == [forecast(), forecast(D=4e7)]
    path = tmp_path / FILE
    path.write_text(path.read_text() + '{"made": "x"}\n')
    with pytest.raises(ScalingError, match="line 3 is not a forecast"):
        read_ledger(tmp_path)
    path.write_text('{"made":')
    with pytest.raises(ScalingError, match="line 1"):
        read_ledger(tmp_path)


def test_digest_sees_losses_but_not_the_order():
    rows = ladder_rows(noise=0.01)
    assert digest_of(Runs.from_rows(rows)) == digest_of(Runs.from_rows(rows[::-1]))
    changed = [rows[0] | {"loss": rows[0]["loss"] + 1e-6}, *rows[1:]]
    assert digest_of(Runs.from_rows(rows)) != digest_of(Runs.from_rows(changed))


def test_one_size_has_no_next():
    assert next_cells(lone_ladder(SIZES[:1])) == []
