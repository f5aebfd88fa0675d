import csv
import dataclasses
import json
import time
from pathlib import Path

import pytest

from mmfree_jax.config import ConfigError
from mmfree_jax.sweep.status import collect, run_folder, status
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


def test_a_sweep_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: no such sweep folder"):
        collect(tmp_path / "nowhere", [])
