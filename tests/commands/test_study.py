"""The main job from end to end, killed in the middle and not."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling.__main__ import main as scaling

ROOT = Path(__file__).parents[2]
NUMBERS = ("run_id", "family", "N", "D", "loss", "loss_se", "bpb", "train_loss", "flops", "cluster", "lr")
RUNS = 16
LONG = 1200  # seconds that a machine under load may need for anything here


def start(out: Path, token_set, cache: Path, verb: str = "study") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "launch.py", verb, "tests/commands/mini_study.py", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "MINI_CORPUS": str(token_set.path), "MMFREE_JAX_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    text, _ = process.communicate(timeout=LONG)
    assert process.returncode == 0, text
    return text


def steps_logged(out: Path) -> dict[str, list[int]]:
    return {
        path.parent.name: [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")]
        for path in out.glob("runs/*/metrics.jsonl")
    }


def wait_until_some_run_is_half_way(out: Path, done: int) -> None:
    """Until so many runs, branches among them, have finished and another has logged a step: amid the middle."""
    deadline = time.monotonic() + LONG
    while time.monotonic() < deadline:
        logged = steps_logged(out)
        finished = len(list(out.glob("runs/*/result.json")))
        if finished >= done and len(logged) > finished:
            return
        time.sleep(0.05)
    raise AssertionError("the study did not get going")


def table(out: Path) -> list[dict]:
    with (out / "runs.csv").open() as file:
        return [{key: row[key] for key in NUMBERS} for row in csv.DictReader(file)]


def fitted(out: Path) -> dict:
    """fit.json but for what depends on the time that training took: costs, and the table that the provenance names."""
    found = json.loads((out / "report" / "fit.json").read_text())
    return {key: value for key, value in found.items() if key not in ("provenance", "measured_costs")}


@pytest.fixture(scope="module")
def whole(token_set, tmp_path_factory):
    """The study run without interruption: its folder, what it printed, the cache that it filled."""
    base = tmp_path_factory.mktemp("study")
    return base / "whole", finish(start(base / "whole", token_set, base / "cache")), base / "cache"


@pytest.mark.slow
def test_the_study_leaves_what_it_promises(whole, capsys):
    out, text, _ = whole
    assert len(list(out.glob("runs/*/result.json"))) == RUNS
    assert len(table(out)) == 12  # the trunks are not comparable end points
    for run in out.glob("runs/*"):
        assert (run / "config.json").exists()
        assert (run / "log.txt").read_text().count("finished") == 1
        assert list((run / "tb").glob("events.*"))
    html = (out / "report" / "report.html").read_text()
    assert "A test" in html
    assert 'src="http' not in html
    fit = json.loads((out / "report" / "fit.json").read_text())
    assert set(fit["families"]) == {"transformer++", "matmul-free"}
    assert set(fit["families"]["matmul-free"]["parameters"]) == {"E", "A", "B", "alpha", "beta"}
    assert list((out / "report").glob("*.png"))
    assert "Not decided" in text
    for row in table(out):
        assert row["run_id"] in (out / "runs.csv").read_text()
    scaling(["fit", str(out), "--draws", "20", "--json"])
    again = json.loads(capsys.readouterr().out)["families"]
    for family, entry in fit["families"].items():
        assert again[family]["parameters"] == entry["parameters"]


@pytest.mark.slow
def test_a_study_interrupted_and_later_killed_ends_with_the_same_numbers(whole, token_set, tmp_path):
    reference, _, cache = whole
    out = tmp_path / "out"
    done: dict[Path, int] = {}
    for number in (signal.SIGINT, signal.SIGKILL):
        process = start(out, token_set, cache)
        wait_until_some_run_is_half_way(out, len(done) + 2)
        process.send_signal(number)
        said, _ = process.communicate(timeout=LONG)
        assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        if number == signal.SIGINT:
            assert re.fullmatch(
                r"interrupted with \d+ of 16 runs done: the same command goes on", said.splitlines()[-1]
            )
        before, done = done, {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
        assert before.items() <= done.items(), "a run was run again"
        assert len(before) < len(done) < RUNS

    finish(start(out, token_set, cache))
    assert table(out) == table(reference)
    assert fitted(out) == fitted(reference)
    for name, steps in steps_logged(out).items():
        assert steps == sorted(set(steps)), f"{name} logged a step twice"
    for path, when in done.items():
        assert path.stat().st_mtime_ns == when, f"{path} was run again"


@pytest.mark.slow
def test_status_tells_where_every_run_stands(whole, token_set):
    out, _, cache = whole
    env = {**os.environ, "MINI_CORPUS": str(token_set.path), "MMFREE_JAX_CACHE": str(cache)}
    command = [sys.executable, "launch.py", "sweep", "tests/commands/mini_study.py", "--out", str(out), "--status"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LONG)
    assert done.returncode == 0
    assert done.stdout.count("done") == RUNS
