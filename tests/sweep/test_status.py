import csv
import dataclasses
import json
import time
from pathlib import Path

import pytest

from mmfree_jax.config import ConfigError
from mmfree_jax.sweep.experiment import Study, trunk_and_decays
from mmfree_jax.sweep.status import collect, fail, run_folder, status
from mmfree_jax.sweep.study import status_lines
from scaling import Runs, ScalingError
from tests.conftest import tiny_run


def test_two_thousand_runs_are_listed_and_collected_in_seconds(tmp_path):
    base = tiny_run("matmul-free", Path("c"))
    runs = [dataclasses.replace(base, name=f"r{i}") for i in range(2000)]
    row = '{"step": 3, "loss": 2.0, "tokens_per_s": 10.0}\n'
    for i, run in enumerate(runs):
        folder = run_folder(tmp_path, run)
        folder.mkdir(parents=True)
        (folder / ".lock").touch()
        (folder / "metrics.jsonl").write_text(row * 50)
        if i % 2:
            values = {"run_id": run.name, "loss": 2.0, "train_loss": 2.1, **{f"column{j}": j for j in range(45)}}
            (folder / "result.json").write_text(json.dumps(values))
    began = time.perf_counter()
    states = [status(run_folder(tmp_path, run), run).state for run in runs]
    table = collect(tmp_path, runs)
    assert time.perf_counter() - began < 10
    assert states == ["stopped", "done"] * 1000
    with table.open() as file:
        assert [row["run_id"] for row in csv.DictReader(file)] == [run.name for run in runs[1::2]]


def test_rows_of_two_versions_make_one_table(tmp_path):
    runs = [tiny_run("matmul-free", Path("c"), name=name) for name in ("old", "new")]
    for run, more in zip(runs, ({}, {"added": 7}), strict=True):
        folder = run_folder(tmp_path, run)
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"run_id": run.name, "loss": 2.0, "train_loss": 2.1, **more}))
    with collect(tmp_path, runs).open() as file:
        assert [(row["run_id"], row["added"]) for row in csv.DictReader(file)] == [("old", ""), ("new", "7")]


def test_a_table_without_a_run_is_a_header(tmp_path):
    table = collect(tmp_path, [tiny_run("matmul-free", Path("c"))])
    assert table.read_text() == "run_id,family,N,D,loss\n"
    with pytest.raises(ScalingError, match="has no rows"):
        Runs.read(table)


def test_runs_that_have_not_begun_are_at_step_0_wherever_they_branch_off(tmp_path):
    runs = trunk_and_decays(tiny_run("matmul-free", Path("c")), (20, 40))
    study = Study("s", "t", tuple(runs), "a")
    ends = [run.steps for run in runs]
    for run in runs:
        run_folder(tmp_path, run).mkdir(parents=True)
    assert [line.split(maxsplit=2)[2] for line in status_lines(study, tmp_path)] == [f"step 0/{n}" for n in ends]
    fail(run_folder(tmp_path, runs[1]), "not started: its trunk failed")
    found = status(run_folder(tmp_path, runs[1]), runs[1])
    assert (found.state, found.step) == ("failed", 0)
    (run_folder(tmp_path, runs[2]) / "metrics.jsonl").write_text('{"step": 36, "loss": 2.0}\n')
    assert status_lines(study, tmp_path)[2].split()[2:4] == ["step", "36/40"]


def test_a_sweep_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such sweep folder"):
        collect(tmp_path / "nowhere", [])
