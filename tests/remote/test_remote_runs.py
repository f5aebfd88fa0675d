"""Runs in a bucket of a local object store: killed and without their folder they go on from there; whole commands."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import launch
from mmfree_jax import api
from mmfree_jax.remote.bucket import Bucket, RemoteError
from mmfree_jax.remote.lease import LEASE, Lease
from mmfree_jax.remote.working import home_of
from tests.conftest import tiny_run
from tests.remote.store import object_store
from tests.test_distributed import BRIEF, finish, group
from tests.training.test_anomalies import outcome, timeless

ROOT = Path(__file__).parents[2]
URL = "s3://bucket/run"


@pytest.fixture(scope="module")
def shared():
    with object_store() as store:
        yield store


@pytest.fixture
def store(shared, tmp_path, monkeypatch):
    """An empty bucket, and a cache of this test."""
    for name, value in shared.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MMFREE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mmfree_jax.remote.lease.SETTLE_SECONDS", 0.1)
    monkeypatch.setattr("mmfree_jax.remote.copy.PERIOD_SECONDS", 0.1)
    shared.trouble.says = lambda method, path: False
    if shared.names(""):
        shared.files.rm("bucket/", recursive=True)
        shared.files.makedirs("bucket", exist_ok=True)
    return shared


KILLED = """
import sys, time
from pathlib import Path
from mmfree_jax import api
from mmfree_jax.remote import copy, working
from mmfree_jax.training import loop
from tests.conftest import tiny_run

copy.PERIOD_SECONDS, working.BEAT_SECONDS, loop.self_check = 0.1, 0.3, lambda *_: None
add = loop.Interval.add

def slow(self, step, *rest):
    add(self, step, *rest)
    time.sleep(0.5 if step > 5 else 0.0)

loop.Interval.add = slow
api.train(tiny_run("matmul-free", Path(sys.argv[1])), sys.argv[2])
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_from_its_bucket_alone_to_the_same_end(store, token_set, tmp_path, monkeypatch):
    """While it lives, a second process is refused."""
    config = tiny_run("matmul-free", token_set.path)
    expected = outcome_of(config, tmp_path / "whole")
    command = [sys.executable, "-c", KILLED, str(token_set.path), URL]
    running = subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, cwd=ROOT)
    try:
        deadline = time.monotonic() + 300
        while "checkpoints/5/checksums-0-of-1.json" not in store.names("run"):
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(RemoteError, match=rf"^{URL}: process {running.pid} on {os.uname().nodename} is working"):
            Lease(Bucket(URL)).take()
    finally:
        running.kill()
        running.wait()
    assert not (home_of(URL) / "run" / "run" / "result.json").exists()
    shutil.rmtree(home_of(URL))
    result = api.train(config, URL)
    assert result["attempts"] == 2
    assert (outcome(home_of(URL) / "run" / "run"), result["loss"]) == (expected, expected[1]["loss"])
    names = store.names("run")
    assert {"checkpoints/12/checksums-0-of-1.json", "result.json", "metrics.jsonl", "log.txt"} <= names
    assert not [name for name in names if name.startswith("checkpoints/5/")]
    shutil.rmtree(home_of(URL))
    assert timeless(api.train(config, URL)) == timeless(result)  # a finished run is not run again


def outcome_of(config, folder):
    api.train(config, folder)
    return outcome(folder)


def test_a_bucket_that_fails_for_a_while_stops_nothing_and_gets_everything(
    store, token_set, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    monkeypatch.setattr("mmfree_jax.remote.copy.LONGEST_PAUSE_SECONDS", 0.2)
    config = tiny_run("matmul-free", token_set.path)
    expected = outcome_of(config, tmp_path / "whole")
    store.trouble.refused = 0
    store.trouble.says = lambda method, path: (
        method in ("PUT", "POST") and LEASE not in path and store.trouble.refused < 6
    )
    api.train(config, URL)
    assert store.trouble.refused == 6
    assert outcome(home_of(URL) / "run" / "run") == expected
    said = capsys.readouterr().err
    assert said.count(": the run goes on, and what is missing there is tried again") == 1
    assert "everything is there again" in said
    shutil.rmtree(home_of(URL))
    api.train(config, URL)
    assert outcome(home_of(URL) / "run" / "run") == expected


TOGETHER = "; ".join(
    (
        "import sys, launch, mmfree_jax.distributed as d, mmfree_jax.remote.lease as l",
        "d.SHUTDOWN_SECONDS, l.SETTLE_SECONDS = 1, 0.1",
        "sys.exit(launch.main(sys.argv[1:]))",
    )
)


@pytest.mark.slow
def test_two_processes_of_a_run_end_when_everything_is_there(store, token_set, monkeypatch):
    """Although the bucket takes the result only some time after JAX would have given up waiting."""
    monkeypatch.setattr("tests.test_distributed.LAUNCH", TOGETHER)
    first: list[float] = []

    def late(method: str, path: str) -> bool:
        if method == "PUT" and path.endswith("/result.json"):
            first.append(time.monotonic())
        return bool(first) and time.monotonic() - first[0] < 6

    store.trouble.says = late
    with group(2, "matmul-free", token_set.path, Path(URL), *BRIEF, "--no-self-check") as processes:
        ended = finish(processes)
    assert [status for status, *_ in ended] == [0, 0], ended
    assert first
    assert {"result.json", "checkpoints/6/checksums-0-of-2.json", "checkpoints/6/checksums-1-of-2.json"} <= store.names(
        "run"
    )


STUDY = """
import dataclasses
from mmfree_jax.presets import run_preset
from mmfree_jax.sweep.experiment import Study
def study():
    preset = run_preset("matmul-free-tiny")
    optim = dataclasses.replace(preset.optim, warmup_steps=2, decay_steps=0)
    return Study("t", "t", (dataclasses.replace(preset, steps=4, optim=optim),), preset.model.family)
"""


def test_commands_at_a_url(store, token_set, tmp_path, monkeypatch, capsys):
    """Trained there by the command, a run is evaluated, exported, and read by `scaling` there."""
    run = "--model.width 16 --model.depth 2 --model.glu-width 32 --model.vocab 257 --data.vocab 257 --data.sequence 32"
    run += " --data.batch 8 --steps 4 --log-every 1 --optim.warmup-steps 2 --optim.decay-steps 0"
    command = ["train", "matmul-free-tiny", "--no-self-check", *run.split(), "--data.corpus", str(token_set.path)]
    assert launch.main([*command, "--out", "s3://bucket/sweep/runs/matmul-free-tiny"]) == 0
    said = capsys.readouterr()
    assert re.search(r"held-out loss .* · s3://bucket/sweep/runs/matmul-free-tiny$", said.out, re.MULTILINE), said
    loss = re.search(r"held-out loss (\S+) nats", said.out)[1]
    assert launch.main(["evaluate", "s3://bucket/sweep/runs/matmul-free-tiny"]) == 0
    assert float(re.search(r"^loss (\S+)$", capsys.readouterr().out, re.MULTILINE)[1]) == pytest.approx(
        float(loss), abs=1e-3
    )
    packed = [
        "export",
        "s3://bucket/sweep/runs/matmul-free-tiny",
        "--format",
        "packed",
        "--out",
        str(tmp_path / "packed"),
    ]
    assert launch.main(packed) == 0
    assert launch.main(["generate", str(tmp_path / "packed"), "--prompt", "the", "--max-tokens", "2"]) == 0
    declared = tmp_path / "declared.py"
    declared.write_text(STUDY)
    assert launch.main(["sweep", str(declared), "--out", "s3://bucket/sweep", "--status"]) == 0
    assert re.search(rf"^   done  matmul-free-tiny  step 4/4 loss {loss}", capsys.readouterr().out, re.MULTILINE)
    assert launch.main(["sweep", str(declared), "--out", "s3://bucket/sweep", "--collect"]) == 0
    assert "runs.csv" in store.names("sweep")
    assert launch.main(["plot", "s3://bucket/sweep", "--out", str(tmp_path / "plot.svg")]) == 0
    assert "</svg>" in (tmp_path / "plot.svg").read_text()
    with pytest.raises(SystemExit):
        launch.main(["lint", "s3://bucket/nothing"])
    assert "argument runs: s3://bucket/nothing holds no table and no folder of runs" in capsys.readouterr().err


def test_what_cannot_be_is_said_in_one_line(store, monkeypatch, capsys):
    def said(*arguments: str) -> str:
        assert launch.main([*arguments]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "s3://nobody/run: FileNotFoundError: The specified bucket does not exist" in said(
        "train", "matmul-free-tiny", "--out", "s3://nobody/run"
    )
    assert "s3://nobody/run" in said("evaluate", "s3://nobody/run")
    assert "s3://bucket/run holds nothing" in said("evaluate", URL)
    assert "jobs of a cluster work in a folder that they share" in said(
        "sweep", "experiments/quickstart.py", "--out", URL, "--executor", "slurm"
    )
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert re.search(r"gs://b/r: .*gcsfs.* \(pip install 'mmfree-jax\[remote\]'", said("evaluate", "gs://b/r"))


def test_a_run_that_could_not_be_copied_ends_with_75(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MMFREE_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr("mmfree_jax.remote.lease.SETTLE_SECONDS", 0.0)
    monkeypatch.setattr("mmfree_jax.remote.copy.Copy.finish", lambda self: "memory://x/y: out of order")
    monkeypatch.setattr("mmfree_jax.commands.train._train", lambda *_: 0)
    assert launch.main(["train", "matmul-free-tiny", "--out", "memory://x/y"]) == 75
    assert capsys.readouterr().err == (
        "memory://x/y: out of order: not everything is there, and the same command goes on\n"
    )


@pytest.mark.parametrize(
    "command",
    [
        ("export", "run", "--out", "s3://b/r"),
        ("import", "s3://b/r", "--out", "model"),
        ("evaluate", "run", "--tasks", "x", "--data", "s3://b/r"),
        ("hardware", "build", "s3://b/r", "--out", "core"),
        ("corpus", "build", "text.txt", "--out", "s3://b/r"),
        ("corpus", "verify", "s3://b/r"),
        ("report", "runs.csv", "--out", "s3://b/r"),
        ("fit", "runs.csv", "--out", "s3://b/r"),
    ],
)
def test_where_a_url_means_nothing_it_makes_no_folder_of_that_name(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = launch.main([*command])
    except SystemExit as end:
        status = end.code
    assert status == 1
    assert "s3://b/r is a URL: give a path of this machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
