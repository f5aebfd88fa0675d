"""The one command of every executor, given nothing but an experiment file and a shared folder."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmfree_jax.config import ConfigError, RunConfig, from_json
from mmfree_jax.files import locked, read_json
from mmfree_jax.run_folder import claim
from mmfree_jax.sweep import worker
from mmfree_jax.sweep.heartbeat import wait_until_free
from mmfree_jax.training.metrics import Diverged
from tests.conftest import tiny_run
from tests.sweep.ports import free_port

ROOT = Path(__file__).parents[2]
EXPERIMENT = """
import dataclasses
from pathlib import Path
from mmfree_jax.config import MeshConfig
from mmfree_jax.sweep.experiment import Study, trunk_and_decays
from tests.conftest import tiny_run

def study():
    base = tiny_run("transformer++", Path({corpus!r}), name="two", mesh=MeshConfig(data={devices}))
    return Study("s", "t", tuple(trunk_and_decays(base, (6, 10))), "transformer++")
"""


def experiment(folder: Path, corpus: Path, devices: int = 1) -> Path:
    path = folder / "experiment.py"
    path.write_text(EXPERIMENT.format(corpus=str(corpus), devices=devices))
    return path


@pytest.mark.slow
def test_two_processes_named_by_jax_variables_train_a_chain_from_an_experiment_file(token_set, programs, tmp_path):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "MMFREE_JAX_CACHE": str(programs), "JAX_NUM_PROCESSES": "2"}
    env["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "mmfree_jax.sweep.worker", "--experiment"]
    command += [str(experiment(tmp_path, token_set.path, devices=2)), str(tmp_path / "out"), "two-trunk", "two-1.28k"]
    workers = [
        subprocess.Popen(command, cwd=ROOT, env={**env, "JAX_PROCESS_ID": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = [one.communicate(timeout=600)[1] for one in workers]
    assert [one.returncode for one in workers] == [0, 0], said
    for name in ("two-trunk", "two-1.28k"):
        folder = tmp_path / "out" / "runs" / name
        assert from_json(RunConfig, (folder / "config.json").read_text()).mesh.data == 2
        assert read_json(folder / "result.json")["devices"] == 2


def test_processes_that_do_not_come_end_it_with_a_line_and_a_status_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    assert worker.start([str(tmp_path), "run"]) == 70
    assert "of 2 processes, 1 did not come within 0.5 s" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [(Diverged("loss nan"), 1), (OSError("disk"), 70)])
def test_one_of_several_processes_that_fails_for_itself_ends_and_does_not_go_on(tmp_path, monkeypatch, error, code):
    """Of a loss that diverged all processes know: they go on with the next run together."""
    runs = [tiny_run("transformer++", Path("c"), name=name) for name in ("first", "second")]
    for run in runs:
        claim(run, tmp_path / "runs" / run.name)
    tried = []

    def train(config, folder, token_set):
        tried.append(config.name)
        raise error

    monkeypatch.setattr(worker, "train", train)
    monkeypatch.setattr(worker, "resolve_data", lambda data, **_: None)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    assert worker.main(tmp_path, ["first", "second"]) == code
    assert tried == (["first", "second"] if code == 1 else ["first"])


def test_a_worker_that_finds_another_process_at_work_leaves_nothing_in_its_folder(tmp_path, monkeypatch, capsys):
    run = tiny_run("transformer++", Path("c"))
    folder = tmp_path / "runs" / run.name
    claim(run, folder)
    monkeypatch.setattr(worker, "wait_until_free", functools.partial(wait_until_free, patience_s=0.3))
    with locked(folder):
        before = sorted(folder.iterdir())
        assert worker.main(tmp_path, [run.name]) == 1
        assert sorted(folder.iterdir()) == before
    assert "is working here" in capsys.readouterr().err


def test_a_run_that_the_experiment_file_does_not_have_is_refused(token_set, tmp_path, monkeypatch):
    monkeypatch.setenv("MMFREE_JAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"has no run named three"):
        worker.main(tmp_path / "out", ["two-trunk", "three"], experiment(tmp_path, token_set.path))
