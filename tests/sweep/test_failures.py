"""What goes wrong in a run, and what the sweep makes of it."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from rich.console import Console

from mmfree_jax.config import Branch, ConfigError
from mmfree_jax.data.building.token_writer import write_token_set
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer
from mmfree_jax.files import LockedError
from mmfree_jax.run_folder import claim
from mmfree_jax.sweep import worker
from mmfree_jax.sweep.executor import Pending, open_chains, remaining
from mmfree_jax.sweep.experiment import Study, trunk_and_decays
from mmfree_jax.sweep.heartbeat import STALE_SECONDS, file_clock, heartbeat, holder, last_beat, wait_until_free
from mmfree_jax.sweep.status import fail, run_folder, status
from mmfree_jax.sweep.study import prepare, provenance
from mmfree_jax.training.metrics import Diverged
from tests.conftest import sentences, tiny_model, tiny_run


@pytest.fixture(autouse=True)
def cache(programs, monkeypatch):
    monkeypatch.setenv("MMFREE_JAX_CACHE", str(programs))


def test_a_run_that_takes_too_long_is_saved_and_called_failed_and_goes_on_later(token_set, tmp_path):
    run = tiny_run("transformer++", token_set.path, steps=100_000, evaluate=False)
    folder = run_folder(tmp_path, run)
    claim(run, folder)
    assert worker.main(tmp_path, [run.name], limit_hours=4 / 3600) == 1
    found = status(folder, run)
    assert found.state == "failed"
    assert found.error.startswith("TimedOut: transformer++-tiny: stopped after step ")
    assert "raise --limit-hours" in found.error
    assert any((folder / "checkpoints").iterdir())
    assert last_beat(folder) is None
    assert open_chains(tmp_path, [run]) == [[run]]
    assert status(folder, run).state == "stopped"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes."),
            "out of memory: lower data.batch, raise optim.accumulate",
        ),
        (
            ValueError("RESOURCE_EXHAUSTED: Failed writing 17 bytes to file 27: No space left on device"),
            "disk full: make room there and run the same command again",
        ),
    ],
)
def test_a_run_that_needs_too_much_says_what_to_change_and_the_next_one_is_trained(error, says, tmp_path, monkeypatch):
    runs = [tiny_run("transformer++", Path("c"), name=name) for name in ("large", "small")]
    for run in runs:
        claim(run, run_folder(tmp_path, run))

    def train(config, folder, token_set):
        if config.name == "large":
            raise error
        (folder / "result.json").write_text('{"loss": 1.0, "train_loss": 1.0}')

    monkeypatch.setattr(worker, "train", train)
    monkeypatch.setattr(worker, "resolve_data", lambda data, **_: None)
    assert worker.main(tmp_path, ["large", "small"]) == 1
    assert [status(run_folder(tmp_path, run), run).state for run in runs] == ["failed", "done"]
    assert status(run_folder(tmp_path, runs[0]), runs[0]).error.startswith(says)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGALRM, 0)])
def test_a_worker_told_to_stop_while_it_evaluates_does_not_begin_the_next_run(
    number, code, token_set, tmp_path, monkeypatch
):
    """But for the notice that the time of a run is over, which then is no matter of the next."""
    runs = [tiny_run("matmul-free", token_set.path, name=name, steps=6) for name in ("first", "second")]
    for run in runs:
        claim(run, run_folder(tmp_path, run))
    told = []

    def evaluate(*arguments):
        if not told:
            told.append(number)
            os.kill(os.getpid(), number)
        return {"loss": 1.0}

    monkeypatch.setattr("mmfree_jax.training.loop.evaluate", evaluate)
    assert worker.main(tmp_path, [run.name for run in runs]) == code
    later = "waiting" if code else "done"
    assert [status(run_folder(tmp_path, run), run).state for run in runs] == ["done", later]


@pytest.mark.slow
def test_a_run_that_really_runs_out_of_memory_is_told_so(token_set, tmp_path):
    """In a process that may have 32 GB, and a model of which one matrix takes 256."""
    wide = tiny_model("transformer++", width=65536, glu_width=4 * 65536, heads=1024)
    run = tiny_run("transformer++", token_set.path, model=wide, evaluate=False)
    claim(run, run_folder(tmp_path, run))
    command = [sys.executable, "-m", "mmfree_jax.sweep.worker", str(tmp_path), run.name]
    limited = ["prlimit", f"--as={32 * 2**30}", *command]
    done = subprocess.run(limited, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, timeout=600)
    assert done.returncode == 1
    assert status(run_folder(tmp_path, run), run).error.startswith("out of memory: lower data.batch, raise")


def test_what_diverged_is_left_alone_with_its_branches_and_other_failures_are_tried_again(tmp_path):
    runs = trunk_and_decays(tiny_run("transformer++", Path("c"), name="bad"), (6, 12))
    other = tiny_run("transformer++", Path("c"), name="other")
    for run in (*runs, other):
        claim(run, run_folder(tmp_path, run))
    fail(run_folder(tmp_path, runs[0]), "Diverged: bad-trunk: loss nan")
    fail(run_folder(tmp_path, other), "its worker was killed by SIGKILL")
    assert open_chains(tmp_path, [*runs, other]) == [[other]]
    assert status(run_folder(tmp_path, runs[0]), runs[0]).diverged
    longer = dataclasses.replace(runs[0], name="longer", steps=14, branch=Branch(runs[0].name, 10), milestones=(12,))
    end = dataclasses.replace(runs[2], name="end", steps=14, branch=Branch("longer", 12))
    assert open_chains(tmp_path, [*runs, longer, end, other]) == [[other]]
    assert sorted(map(len, open_chains(tmp_path, [*runs, other], again=True))) == [1, 3]


def test_branches_that_a_trunk_got_to_before_it_diverged_are_trained(token_set, tmp_path, monkeypatch):
    """They are valid end points; what comes after the divergence is not begun. So also when the trunk is given up."""
    runs = trunk_and_decays(tiny_run("transformer++", token_set.path, name="late", evaluate=False), (6, 12))
    trunk, early, late = runs
    assert trunk.milestones == (early.branch.step, late.branch.step) == (5, 10)
    for run in runs:
        claim(run, run_folder(tmp_path, run))
    real = worker.train

    def train(config, folder, token_set):
        if config.name != trunk.name:
            return real(config, folder, token_set)
        half = dataclasses.replace(trunk, steps=5, milestones=(5,))
        real(half, tmp_path / "half", token_set)
        shutil.copytree(tmp_path / "half" / "checkpoints", folder / "checkpoints")
        raise Diverged(f"{config.name}: loss nan at step 7")

    monkeypatch.setattr(worker, "train", train)
    assert worker.main(tmp_path, [run.name for run in runs]) == 1
    found = [status(run_folder(tmp_path, run), run) for run in runs]
    assert [one.state for one in found] == ["failed", "done", "failed"]
    assert found[2].error == "not started: its trunk late-trunk failed"
    assert open_chains(tmp_path, runs) == []

    (run_folder(tmp_path, early) / "result.json").unlink()
    assert open_chains(tmp_path, runs) == [[early]]
    for run in runs:
        (run_folder(tmp_path, run) / "error.txt").unlink(missing_ok=True)
    Pending(runs).abandon(tmp_path, "its worker was killed by SIGKILL")
    assert remaining(tmp_path, runs) == [early]


def elsewhere(folder: Path) -> None:
    folder.mkdir()
    (folder / "heartbeat.json").write_text('{"host": "elsewhere", "pid": 1, "job": "7"}')


def test_another_machine_is_judged_by_its_sign_of_life_alone(tmp_path):
    """By the file system's clock: what this machine's own clock says plays no part."""
    folder = tmp_path / "run"
    elsewhere(folder)
    assert str(holder(folder)) == "job 7 on elsewhere"
    old = file_clock(tmp_path) - STALE_SECONDS - 1
    os.utime(folder / "heartbeat.json", (old, old))
    assert holder(folder) is None
    assert holder(folder, now=old + 1) is not None


def test_a_run_that_another_machine_goes_on_with_is_not_taken(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    elsewhere(folder)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.1):
            os.utime(folder / "heartbeat.json")

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(LockedError, match="job 7 on elsewhere is working here"):
            wait_until_free(folder)
    finally:
        ended.set()
        beating.join()
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # the same job, queued again and begun on another node
    wait_until_free(folder)


def test_a_heartbeat_beats_and_is_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("mmfree_jax.sweep.heartbeat.BEAT_SECONDS", 0.05)
    called = threading.Event()
    with heartbeat(tmp_path / "run", called.set):
        first = last_beat(tmp_path / "run")
        assert called.wait(60)
        assert last_beat(tmp_path / "run").at > first.at
        (tmp_path / "run").rename(tmp_path / "away")  # as when a file server does not answer
        called.clear()
        assert called.wait(60)
        (tmp_path / "away").rename(tmp_path / "run")
        gone = last_beat(tmp_path / "run").at
        for _ in range(2):  # the first may have been under way
            called.clear()
            assert called.wait(60)
        assert last_beat(tmp_path / "run").at > gone
    assert last_beat(tmp_path / "run") is None


def test_changed_runs_are_all_named_before_anything_is_written(token_set, tmp_path):
    runs = [tiny_run("transformer++", token_set.path, name=f"r{i}") for i in range(3)]
    console = Console(quiet=True)
    prepare(Study("s", "t", tuple(runs), "a"), tmp_path, console)
    edited = [
        runs[0],
        *(dataclasses.replace(run, seed=1) for run in runs[1:]),
        dataclasses.replace(runs[0], name="new"),
    ]
    with pytest.raises(ConfigError, match=r"r1 \(seed is 0, not 1\); r2 \(seed is 0, not 1\). Rename them"):
        prepare(Study("s", "t", tuple(edited), "a"), tmp_path, console)
    assert not (tmp_path / "runs" / "new").exists()
    prepare(Study("s", "t", (*runs, edited[-1]), "a"), tmp_path, console)
    assert (tmp_path / "runs" / "new").exists()


def test_every_mixture_of_a_study_is_looked_at_before_anything_is_written(token_set, tmp_path):
    run = tiny_run("transformer++", token_set.path)
    texts = {"train": sentences(50, 5), "valid": []}
    card = {"name": "more", "description": "made up", "sources": []}
    more = write_token_set(tmp_path / "more", texts, byte_tokenizer(), card)
    mixed = dataclasses.replace(run, name="mixed", data=dataclasses.replace(run.data, mixture=(str(more.path),)))
    lost = dataclasses.replace(run, name="lost", data=dataclasses.replace(run.data, mixture=("nowhere",)))
    console, out = Console(quiet=True), tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="no corpus 'nowhere'"):
        prepare(Study("s", "t", (run, mixed, lost), "a"), out, console)
    assert not (out / "runs").exists()
    study = Study("s", "t", (run, mixed), "a")
    assert prepare(study, out, console).path == token_set.path
    assert json.loads((out / "data_card.json").read_text())["name"] == "tiny"
    assert json.loads((out / "data_card-2.json").read_text())["name"] == "more"
    said = provenance(study)
    assert said["corpus"] == f"{token_set.path} or {token_set.path} + {more.path}, vocabulary 257"


def test_a_ladder_says_the_batches_of_all_its_rungs():
    small = tiny_run("transformer++", Path("c"))
    large = dataclasses.replace(small, name="large", data=dataclasses.replace(small.data, batch=32))
    assert provenance(Study("s", "t", (small, large), "a"))["batch"] == "128 to 1024 tokens a step"
    assert provenance(Study("s", "t", (small,), "a"))["batch"] == "128 tokens a step"


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_the_status_of_a_sweep_on_a_disk_that_cannot_be_written_takes_this_machines_time(tmp_path, monkeypatch, reason):
    def refuse(**_):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    assert abs(file_clock(tmp_path) - time.time()) < 60
