"""`python -m scaling` as a user runs it."""

import json
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from conftest import DATA, ROOT, ladder_rows, write_csv

from scaling.__main__ import main
from tests.in_process import called

WIDE = {"sizes": tuple(np.geomspace(1e6, 2.5e8, 7)), "ratios": (5, 10, 20, 80), "noise": 0.002}

WIDE_ROWS = ladder_rows(**WIDE)


def process(*arguments):
    command = [sys.executable, "-m", "scaling", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


call = partial(called, main)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables")
    small = write_csv(folder / "small.csv", ladder_rows(noise=0.003))
    (folder / "nothing.csv").touch()
    return small, write_csv(folder / "wide.csv", ladder_rows(**WIDE)), folder


def test_importing_scaling_never_imports_jax():
    code = "import sys, scaling, scaling.__main__, scaling.report.write; "
    code += "print([m for m in sys.modules if m.split('.')[0] in ('jax', 'jaxlib', 'flax', 'mmfree_jax')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_reader_that_stops_early_is_no_error(tables):
    command = f"{sys.executable} -m scaling lint {tables[0]} | true"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.stderr == ""


def test_fit_passes_on_a_wide_ladder_and_gates_on_a_small_one(tables):
    good = call("fit", tables[1], "--draws", 100, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["families"]["matmul-free"]["parameters"]["alpha"] == pytest.approx(0.36, rel=0.1)
    bad = call("fit", tables[0], "--draws", 100)
    assert bad.returncode == 2
    assert "GATE ladder" in bad.stdout


def test_compare_prints_its_verdict(tables):
    done = call("compare", tables[0], "--a", "transformer++", "--b", "matmul-free", "--draws", 100)
    assert done.returncode == 2
    assert done.stdout.startswith("The crossing is not determined")


@pytest.fixture(scope="module")
def reported(tables):
    """The folder of a report on the small table, and what the command printed."""
    out = tables[2] / "out"
    done = call("report", tables[0], "--out", out, "--draws", 100)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_report_then_predict(reported):
    out, said = reported
    assert "VERDICT" in said
    assert (out / "report.html").is_file()
    guess = call("predict", out, "--N", "2e6", "--D", "4e7", "--family", "matmul-free", "--json")
    assert guess.returncode == 0, guess.stderr
    entry = json.loads(guess.stdout)["matmul-free"]
    assert entry["low"] < entry["loss"] < entry["high"]
    assert entry["extrapolation"] > 1


def test_a_report_on_unfinished_runs_can_be_used_and_renewed(tmp_path, capsys, brief_reports):
    rows = [row | {"ended": "false"} for row in ladder_rows(noise=0.003) if row["family"] == "matmul-free"]
    for part in (rows[:-1], rows):
        table = write_csv(tmp_path / "table.csv", part)
        asked = ["report", str(table), "--allow-midrun", "--draws", "20", "--out", str(tmp_path / "out")]
        assert main(asked) == 0, capsys.readouterr().err
    assert main(["predict", str(tmp_path / "out"), "--N", "2e6", "--D", "4e7"]) == 0, capsys.readouterr().err


def test_one_table_gives_one_answer_by_every_route(tables, reported, capsys):
    """Wherever no threshold is given it is that of the noise; `study` writes its report as `report` does."""
    out, said = reported
    report = json.loads((out / "fit.json").read_text())
    delta = report["families"]["matmul-free"]["objective"]["delta"]
    assert delta > 1e-3
    assert f"huber, delta {delta:.3g} from the noise" in said
    main(["fit", str(tables[0]), "--draws", "60", "--json"])
    found = json.loads(capsys.readouterr().out)["families"]
    assert {f: e["parameters"] for f, e in found.items()} == {f: e["parameters"] for f, e in report["families"].items()}
    main(["compare", str(tables[0]), "--draws", "100", "--json"])
    assert json.loads(capsys.readouterr().out)["difference"] == report["comparisons"][0]["difference"]


def test_a_table_of_three_families_has_one_threshold_by_every_route(tables, tmp_path, capsys, brief_reports):
    """The third family is far noisier: a threshold of those two alone would be another."""
    noisy = {"third": (1.8, 200.0, 420.0, 0.34, 0.37)}
    rows = [*ladder_rows(noise=0.003), *ladder_rows(noise=0.03, truth=noisy, seed=3)]
    table = str(write_csv(tmp_path / "three.csv", rows))
    said = []
    for verb in ("fit", "compare", "crossover", "backtest"):
        main([verb, table, "--draws", "20"])
        said.append(re.search(r"delta ([\d.]+) from the noise", capsys.readouterr().out).group(1))
    assert main(["report", table, "--draws", "20", "--out", str(tmp_path / "out")]) == 0
    said.append(re.search(r"delta ([\d.]+) from the noise", capsys.readouterr().out).group(1))
    assert len(set(said)) == 1, said
    main(["compare", str(tables[0]), "--draws", "20"])
    assert f"delta {said[0]} " not in capsys.readouterr().out


def test_a_threshold_that_is_given_is_the_one_used(tables, capsys):
    main(["fit", str(tables[0]), "--draws", "20", "--delta", "1e-3"])
    assert "huber, delta 0.001 as given" in capsys.readouterr().out
    main(["fit", str(tables[0]), "--draws", "20", "--objective", "lad"])
    assert "chinchilla, lad, 12 rows" in capsys.readouterr().out


def test_a_family_that_cannot_be_fitted_does_not_keep_two_others_from_being_compared(tables, tmp_path, capsys):
    lone = ladder_rows(noise=0.003)[0] | {"run_id": "lone", "family": "other"}
    table = write_csv(tmp_path / "three.csv", [*ladder_rows(noise=0.003), lone])
    answers = []
    for path in (tables[0], table):
        main(["compare", str(path), "--a", "transformer++", "--b", "matmul-free", "--draws", "20"])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


def test_fit_prints_both_intervals_and_reports_them_in_json(tables, capsys):
    assert main(["fit", str(tables[1]), "--draws", "60"]) == 0
    assert "95 % by profile likelihood" in capsys.readouterr().out
    assert main(["fit", str(tables[1]), "--draws", "60", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["families"]["matmul-free"]
    low, high = entry["profile_intervals"]["alpha"]
    assert low < entry["parameters"]["alpha"] < high
    assert entry["lack_of_fit"] is None
    assert len(entry["certificate"]["gaps"]) == entry["certificate"]["starts"]


def test_fit_selects_anew_in_every_draw(tables, tmp_path, capsys):
    rows = [
        r | {"run_id": f"{r['run_id']}-{k}", "loss": r["loss"] + k, "cluster": ""} for r in WIDE_ROWS for k in (0, 1)
    ]
    table = str(write_csv(tmp_path / "sweep.csv", rows))
    assert main(["fit", table, "--select", "best", "--draws", "60"]) == 0
    assert "28 rows" in capsys.readouterr().out
    assert main(["fit", table, "--select", "best", "--out", str(tmp_path / "out")]) == 1
    assert "--select" in capsys.readouterr().err


def test_backtest_prints_what_each_distance_earned(tables, capsys):
    assert main(["backtest", str(tables[1]), "--q", "4,10", "--draws", "60"]) == 0
    out = capsys.readouterr().out
    assert "Back-test of the loss" in out
    assert "Back-test of the difference" in out
    assert "half-widths times" in out


def test_allocation_spends_the_budget_and_names_the_extrapolation(tables, capsys):
    assert main(["allocate", str(tables[1]), "--C", "1e18", "--C", "1e22", "--draws", "60", "--json"]) == 0
    for found in json.loads(capsys.readouterr().out)["matmul-free"]:
        assert 6 * found["N"] * found["D"] == pytest.approx(found["flops"], rel=1e-6)
        assert found["N_interval"][0] < found["N"] < found["N_interval"][1]
    assert found["extrapolation"] == pytest.approx(1e22 / (6 * 80 * 2.5e8**2), rel=1e-6)
    assert main(["allocate", str(tables[1]), "--C", "1e18", "--law", "power"]) == 1
    assert "not a function of N and D" in capsys.readouterr().err


def test_an_exponent_that_the_design_cannot_give_is_a_dash(tables, tmp_path, capsys):
    main(["allocate", str(tables[0]), "--C", "1e15", "--draws", "60"])
    out = capsys.readouterr().out
    assert "nan" not in out
    assert out.count("IsoFLOP –\n") == 2
    assert out.count("IsoFLOP two budgets") == 1
    grid = [(n, c / (6 * n)) for c in (1e16, 1e17) for n in np.geomspace(1e6, 1e8, 5)]
    rows = [
        r | {"run_id": i, "N": n, "D": d, "flops": 6 * n * d, "cluster": i}
        for i, (n, d) in enumerate(grid)
        for r in WIDE_ROWS[:1]
    ]
    law = lambda r: r | {"loss": 1.8 + 180 / r["N"] ** 0.34 + 420 / r["D"] ** 0.37}
    main(["allocate", str(write_csv(tmp_path / "iso.csv", [law(r) for r in rows])), "--C", "1e18", "--draws", "60"])
    out = capsys.readouterr().out
    assert "IsoFLOP 0." in out
    assert "IsoFLOP two budgets" not in out


def test_compare_writes_the_report_of_the_pair_that_is_asked_for(tables, tmp_path, capsys, brief_reports):
    extra = [r | {"family": "third", "run_id": f"third-{r['run_id']}"} for r in ladder_rows(noise=0.003, seed=1)[:12]]
    table = str(write_csv(tmp_path / "three.csv", [*ladder_rows(noise=0.003), *extra]))
    asked = ["compare", table, "--a", "third", "--b", "matmul-free", "--draws", "20", "--out", str(tmp_path / "out")]
    assert main(asked) == 2
    found = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert list(found["families"]) == ["third", "matmul-free"]
    assert (found["comparisons"][0]["a"], found["comparisons"][0]["b"]) == ("third", "matmul-free")
    capsys.readouterr()
    for flag in (["--axis", "flops-6nd"], ["--along", "ratio=20"], ["--horizon", "1e25"]):
        assert main([*asked, *flag]) == 1
        assert f"{flag[0]} answers on the terminal or as --json" in capsys.readouterr().err


def test_laws_without_a_floor_are_compared_without_further_flags(tables, capsys):
    assert main(["compare", str(tables[1]), "--law", "kaplan", "--draws", "20", "--json"]) in (0, 2)
    assert json.loads(capsys.readouterr().out)["share"] == []


def test_predictions_and_plans_name_the_unit_of_the_losses(tmp_path, capsys, brief_reports):
    table = write_csv(tmp_path / "runs.csv", [r | {"loss_unit": "bits per byte"} for r in ladder_rows(noise=0.003)])
    assert main(["report", str(table), "--draws", "20", "--out", str(tmp_path / "out")]) == 0
    assert main(["predict", str(tmp_path / "out"), "--N", "2e6", "--D", "4e7"]) == 0
    said = capsys.readouterr().out
    assert " bits per byte, 95 %" in said
    main(["plan", str(table), "--budget", "1e17", "--target", "1e16", "--ladders", "2", "--draws", "20"])
    said += capsys.readouterr().out
    assert "(bits per byte)" in said
    assert "nats" not in said + (tmp_path / "out" / "report.md").read_text()


def test_an_interrupted_verb_says_so(tables, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("scaling.commands.lint.lint", stopped)
    assert main(["lint", str(tables[0])]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_plot_and_lint(tables):
    picture = tables[2] / "curves.png"
    assert call("plot", tables[0], "--x", "flops", "--out", picture).returncode == 0
    assert picture.stat().st_size > 5_000
    done = call("plot", tables[0], "--x", "N", "--out", picture, "--json")
    assert json.loads(done.stdout) == {"file": str(picture), "x": "N", "runs": {"transformer++": 12, "matmul-free": 12}}
    linted = call("lint", tables[0])
    assert linted.returncode == 0
    assert "ladder too small" in linted.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "absent.csv"], "no such file"),
        (["fit", "{folder}/nothing.csv"], "nothing.csv is empty"),
        (["fit", "{small}", "--where", "family=nobody"], "no rows"),
        (["fit", "{small}", "--column", "N=parms"], "no column 'parms'"),
        (["compare", "{small}", "--b", "matmul"], "did you mean 'matmul-free'"),
        (["fit", "{small}", "--draws", "0"], "not a positive count"),
        (["nonsense"], "invalid choice"),
        (["report", "{small}"], "--out"),
        (["predict", "{folder}", "--N", "1e6", "--D", "1e7"], "no fit.json"),
        (["backtest", "{small}", "--q", "0.5"], "must be above 1"),
        (["allocate", "{small}"], "--C"),
    ],
)
def test_bad_input_is_one_line_and_exit_one(tables, arguments, said):
    done = call(*(a.format(small=tables[0], folder=tables[2]) for a in arguments))
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_process_ends_with_the_status_and_the_line():
    done = process("fit", "absent.csv")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no such file" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_debug_shows_the_traceback():
    assert "Traceback" in process("fit", "absent.csv", "--debug").stderr


@pytest.mark.skipif(not DATA.is_dir(), reason="the public tables are not at ../shared/data")
def test_verify_agrees_with_the_published_numbers():
    done = call("verify", "--data", DATA)
    assert done.returncode == 0, done.stdout
    assert "FAIL" not in done.stdout
    assert done.stdout.count("published") >= 14
