"""`python -m scaling` as a user runs it."""

import json
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from conftest import DATA, ROOT, ladder_rows, write_csv

from scaling import Runs, analyse
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
    assert done.stdout.startswith("Not decided, as the ladder is too small (4 sizes over ")


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
    assert entry["decades"] > 0
    assert entry["run_low"] < entry["low"] < entry["high"] < entry["run_high"]


def test_a_report_on_unfinished_runs_can_be_used_and_renewed(tmp_path, capsys, brief_reports):
    rows = [row | {"ended": "false"} for row in ladder_rows(noise=0.003) if row["family"] == "matmul-free"]
    for part in (rows[:-1], rows):
        table = write_csv(tmp_path / "table.csv", part)
        asked = ["report", str(table), "--allow-midrun", "--draws", "20", "--out", str(tmp_path / "out")]
        assert main(asked) == 0, capsys.readouterr().err
    assert main(["predict", str(tmp_path / "out"), "--N", "2e6", "--D", "4e7"]) == 0, capsys.readouterr().err


def test_one_table_gives_one_answer_by_every_route(tables, reported, capsys):
    """`study` writes its report as `report` does; verbs and Python have the same defaults."""
    report = json.loads((reported[0] / "fit.json").read_text())
    assert report["families"]["matmul-free"]["objective"]["delta"] > 1e-3
    main(["fit", str(tables[0]), "--draws", "100", "--json"])
    found = json.loads(capsys.readouterr().out)["families"]
    assert {f: e["parameters"] for f, e in found.items()} == {f: e["parameters"] for f, e in report["families"].items()}
    assert {f: e["intervals"] for f, e in found.items()} == {f: e["intervals"] for f, e in report["families"].items()}
    main(["compare", str(tables[0]), "--draws", "100", "--json"])
    compared = json.loads(capsys.readouterr().out)
    assert compared["difference"] == report["comparisons"][0]["difference"]
    main(["crossover", str(tables[0]), "--draws", "100", "--json"])
    assert json.loads(capsys.readouterr().out)["tied"] == compared["crossing"]["tied"]
    python = analyse(Runs.read(tables[0]), draws=100)
    assert [row["difference"] for row in python.table()] == [row["difference"] for row in compared["difference"]]


def test_every_route_answers_with_the_same_gates(tables, tmp_path, capsys, brief_reports):
    """Printed, as JSON and with a report: one list, one status."""
    table, seen = str(tables[0]), []
    for flags in ([], ["--json"], ["--out", str(tmp_path / "out")]):
        status = main(["fit", table, "--draws", "50", *flags])
        out = capsys.readouterr().out
        if flags == ["--json"]:
            names = [g["name"] for g in json.loads(out)["gates"] if not g["passed"]]
        elif flags:
            gates = json.loads((tmp_path / "out" / "fit.json").read_text())["gates"]
            names = [g["name"] for g in gates if not g["passed"]]
        else:
            names = re.findall(r"^GATE (.*?): ", out, flags=re.M)
        seen.append((status, names))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0] == 2


def test_a_threshold_that_is_given_is_the_one_used(tables, capsys):
    main(["fit", str(tables[0]), "--draws", "20", "--delta", "1e-3"])
    assert "huber, delta 0.001 as given" in capsys.readouterr().out
    main(["fit", str(tables[0]), "--draws", "20", "--objective", "lad"])
    assert "12 rows; best single fit by lad" in capsys.readouterr().out


def test_a_family_that_cannot_be_fitted_does_not_keep_two_others_from_being_compared(tables, tmp_path, capsys):
    lone = ladder_rows(noise=0.003)[0] | {"run_id": "lone", "family": "other"}
    table = write_csv(tmp_path / "three.csv", [*ladder_rows(noise=0.003), lone])
    answers = []
    for path in (tables[0], table):
        main(["compare", str(path), "--a", "transformer++", "--b", "matmul-free", "--draws", "20"])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


def test_fit_prints_the_best_fit_and_the_ensembles_interval(tables, capsys):
    assert main(["fit", str(tables[1]), "--draws", "60"]) == 0
    assert "best fit     ensemble, 95 %" in capsys.readouterr().out
    assert main(["fit", str(tables[1]), "--draws", "60", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)["families"]["matmul-free"]
    low, high = entry["intervals"]["alpha"]
    assert low < entry["parameters"]["alpha"] < high
    assert entry["lack_of_fit"] is None
    assert len(entry["certificate"]["gaps"]) == entry["certificate"]["starts"]


@pytest.mark.parametrize("verb", [["fit"], ["compare"], ["allocate", "--C", "1e18"], ["report", "--out", "{out}"]])
def test_every_verb_selects(tables, tmp_path, capsys, brief_reports, verb):
    rows = [
        r | {"run_id": f"{r['run_id']}-{k}", "loss": r["loss"] + k, "lr": 1e-3 * 2**k, "cluster": ""}
        for r in WIDE_ROWS
        for k in (0, 1)
    ]
    table = str(write_csv(tmp_path / "sweep.csv", rows))
    name, *flags = (f.format(out=tmp_path / "out") for f in verb)
    assert main([name, table, "--select", "best", "--draws", "60", *flags]) == 0, capsys.readouterr().err
    if name == "fit":
        assert "28 rows" in capsys.readouterr().out


def test_backtest_prints_what_each_distance_earned(tables, capsys):
    assert main(["backtest", str(tables[1]), "--draws", "60"]) == 0
    out = capsys.readouterr().out
    assert "left-out losses and differences lay in their 95 % intervals" in out
    assert "difference, 0.25 to 0.5 decades beyond: " in out
    assert "that validates" in out


def test_allocation_spends_the_budget_and_names_the_extrapolation(tables, capsys):
    assert main(["allocate", str(tables[1]), "--C", "1e18", "--C", "1e22", "--draws", "60", "--json"]) == 0
    for found in json.loads(capsys.readouterr().out)["matmul-free"]:
        assert 6 * found["N"] * found["D"] == pytest.approx(found["flops"], rel=1e-6)
        assert found["N_interval"][0] < found["N"] < found["N_interval"][1]
    assert found["decades"] == pytest.approx(np.log10(1e22 / (6 * 80 * 2.5e8**2)))
    assert not found["validated"]
    assert main(["allocate", str(tables[1]), "--C", "1e18", "--law", "power"]) == 1
    assert "not a function of N and D" in capsys.readouterr().err


def test_an_exponent_that_the_design_cannot_give_is_a_dash(tables, tmp_path, capsys):
    main(["allocate", str(tables[0]), "--C", "1e15", "--draws", "60"])
    out = capsys.readouterr().out
    assert "nan" not in out
    assert out.count("IsoFLOP –\n") == 2
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


def test_compare_writes_the_report_of_the_pair_that_is_asked_for(tables, tmp_path, capsys, brief_reports):
    extra = [r | {"family": "third", "run_id": f"third-{r['run_id']}"} for r in ladder_rows(noise=0.003, seed=1)[:12]]
    table = str(write_csv(tmp_path / "three.csv", [*ladder_rows(noise=0.003), *extra]))
    asked = ["compare", table, "--a", "third", "--b", "matmul-free", "--draws", "20", "--out", str(tmp_path / "out")]
    assert main(asked) == 2
    found = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert list(found["families"]) == ["third", "matmul-free"]
    assert (found["comparisons"][0]["a"], found["comparisons"][0]["b"]) == ("third", "matmul-free")


def test_laws_without_a_floor_are_compared_without_further_flags(tables, capsys):
    assert main(["compare", str(tables[1]), "--law", "kaplan", "--draws", "20", "--json"]) in (0, 2)
    assert list(json.loads(capsys.readouterr().out)["ties"]) == ["nothing"]


def test_predictions_and_plans_name_the_unit_of_the_losses(tmp_path, capsys, brief_reports):
    table = write_csv(tmp_path / "runs.csv", [r | {"loss_unit": "bits per byte"} for r in ladder_rows(noise=0.003)])
    assert main(["report", str(table), "--draws", "20", "--out", str(tmp_path / "out")]) == 0
    assert main(["predict", str(tmp_path / "out"), "--N", "2e6", "--D", "4e7"]) == 0
    said = capsys.readouterr().out
    assert " bits per byte (95 %)" in said
    main(["plan", str(table), "--budget", "1e17", "--target", "1e16", "--draws", "20", "--simulations", "2"])
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
