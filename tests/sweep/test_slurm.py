"""The SLURM executor against a real SLURM of this machine, without accounting."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmfree_jax.config import ConfigError, MeshConfig
from mmfree_jax.files import read_json
from mmfree_jax.run_folder import claim
from mmfree_jax.sweep.slurm import Driver, Place, Slurm, SlurmExecutor, Ticket, Tracked
from mmfree_jax.sweep.status import run_folder, status
from tests.conftest import tiny_run
from tests.sweep.one_host_slurm import missing, one_host_slurm

ROOT = Path(__file__).parents[2]
FLAGS = ["--executor", "slurm", "--slurm.gpus-per-node", "0", "--slurm.cpus", "1", "--slurm.poll-seconds", "0.5"]


# Of runs that are to be under way while something happens to them: they are never waited for.
ENDLESS = 10**6
LONG = 600  # seconds that a machine under load may need for anything here


@pytest.fixture(scope="module")
def cluster(programs, tmp_path_factory):
    if why := missing():
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(f"REQUIRE_SLURM is set, but {why}")
        pytest.skip(why)
    with one_host_slurm(tmp_path_factory.mktemp("slurm")) as env:
        yield {**env, "MMFREE_JAX_CACHE": str(programs)}


@pytest.fixture
def slurm(cluster):
    """An empty SLURM, which is left empty."""
    yield cluster
    subprocess.run(["scancel", "--me"], env=cluster, check=True)
    wait_until(lambda: not queue(cluster), "the queue to be empty")


def queue(env: dict[str, str], *options: str) -> list[str]:
    command = ["squeue", "--noheader", "--array", "--format=%i", *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()


def wait_until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LONG
    while not holds():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.05)


class Sweep:
    """`launch.py sweep --executor slurm` on slurm_study.py, in one folder."""

    def __init__(self, folder: Path, env: dict[str, str], corpus: Path, runs: str, steps: int = 12):
        self.out, self.said = folder / "out", folder / "said.txt"
        self.env = {**env, "JAX_PLATFORMS": "cpu", "SLURM_STUDY_CORPUS": str(corpus), "SLURM_STUDY_RUNS": runs}
        self.env |= {"SLURM_STUDY_STEPS": str(steps)}

    def start(self, *more: str) -> subprocess.Popen:
        """A driver; what it says is in `said`."""
        command = [sys.executable, "launch.py", "sweep", "tests/sweep/slurm_study.py", "--out", str(self.out)]
        with self.said.open("w") as said:
            return subprocess.Popen([*command, *FLAGS, *more], cwd=ROOT, env=self.env, stdout=said, stderr=said)

    def run(self, *more: str) -> tuple[int, str]:
        code = self.start(*more).wait(timeout=LONG)
        return code, self.said.read_text()

    def stop(self, driver: subprocess.Popen) -> str:
        """Ctrl-C; what the driver has said."""
        driver.send_signal(signal.SIGINT)
        assert driver.wait(timeout=LONG) == 130
        return self.said.read_text()

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=True).stdout

    def wait_for(self, driver: subprocess.Popen, words: str) -> None:
        wait_until(lambda: words in self.said.read_text() or driver.poll() is not None, f"the driver to say: {words}")
        assert words in self.said.read_text(), self.said.read_text()

    def wait_for_start(self, name: str, number: int = 1) -> None:
        """Until a run has been begun for the `number`th time and has logged a step since."""
        log, metrics = (self.out / "runs" / name / file for file in ("log.txt", "metrics.jsonl"))
        wait_until(lambda: log.exists() and self.attempts(name) == number, f"{name} to begin")
        before = metrics.stat().st_size if metrics.exists() else 0
        wait_until(lambda: metrics.exists() and metrics.stat().st_size > before, f"{name} to go on")

    def attempts(self, name: str) -> int:
        return (self.out / "runs" / name / "log.txt").read_text().count(f" {name} at step")

    def logs(self) -> str:
        return "".join(path.read_text() for path in (self.out / "slurm").glob("*_log.out"))


@pytest.mark.slow
def test_an_array_two_at_a_time_and_a_trunk_with_its_decays(slurm, token_set, tmp_path):
    sweep = Sweep(tmp_path, slurm, token_set.path, "r0 r1 t")
    driver = sweep.start("--slurm.parallel", "2")
    most = 0
    while driver.poll() is None:
        most = max(most, len(queue(slurm, "--states=RUNNING")))
        time.sleep(0.2)
    text = sweep.said.read_text()
    assert driver.returncode == 0, text + sweep.logs()
    assert most == 2
    assert "submitted 3 jobs" in text
    assert len(list(sweep.out.glob("runs/*/result.json"))) == 5
    code, text = sweep.run("--status")
    assert code == 0
    assert text.count("   done  ") == 5
    assert sweep.run()[1].count("submitted") == 0


@pytest.mark.slow
def test_a_cancelled_job_is_submitted_again_and_a_preempted_one_of_two_processes_queues_itself(
    slurm, token_set, tmp_path
):
    """Neither needs accounting; the cancelled one is noticed by its absence from squeue."""
    sweep = Sweep(tmp_path, slurm, token_set.path, "r0 wide", steps=ENDLESS)
    driver = sweep.start()
    for name in ("r0", "wide"):
        sweep.wait_for_start(name)
    jobs = {name: read_json(sweep.out / "runs" / name / "heartbeat.json")["job"] for name in ("r0", "wide")}
    assert sorted(queue(slurm)) == sorted(jobs.values())
    sweep.ask("scancel", jobs["r0"])
    sweep.ask("scancel", "--signal=USR2", jobs["wide"])
    for name in ("r0", "wide"):
        sweep.wait_for_start(name, 2)
    text = sweep.stop(driver)
    assert f"r0: job {jobs['r0']} is gone; submitted again" in text, text
    assert text.count("submitted 1 jobs") == 3  # the preempted one is SLURM's own to start again
    assert jobs["wide"] in queue(slurm)
    for name in ("r0", "wide"):  # SIGTERM and SIGUSR2 alike: what was done is not done again
        assert f"resume {name} at step " in (sweep.out / "runs" / name / "log.txt").read_text()


@pytest.mark.slow
def test_a_driver_that_is_killed_finds_its_jobs_again(slurm, token_set, tmp_path):
    sweep = Sweep(tmp_path, slurm, token_set.path, "r0 r1", steps=ENDLESS)
    driver = sweep.start()
    sweep.wait_for_start("r0")
    sweep.wait_for_start("r1")
    driver.kill()
    driver.wait()
    first, second = sorted(queue(slurm))
    status = sweep.run("--status")[1]
    assert re.search(rf"running  r0  step \d+/1000000 loss .* tokens/s, [\d:]+ left  job {first} on ", status), status
    driver = sweep.start()
    sweep.wait_for(driver, f"2 jobs are there already: {first} to {second}")
    text = sweep.stop(driver)
    assert "jobs go on, and the same command finds them again" in text
    assert "submitted" not in text
    assert sorted(queue(slurm)) == [first, second]
    assert sweep.attempts("r0") == sweep.attempts("r1") == 1


REFUSING = """#!/bin/sh
echo x >> {count}
if [ $(wc -l < {count}) -le 2 ]; then
    echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2
    exit 1
fi
exec {sbatch} "$@"
"""


@pytest.mark.slow
def test_a_full_queue_is_tried_again_with_smaller_arrays(slurm, token_set, tmp_path):
    sweep = Sweep(tmp_path, slurm, token_set.path, "r0 r1")
    real = sweep.ask("which", "sbatch").strip()
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(REFUSING.format(count=tmp_path / "count", sbatch=real))
    fake.chmod(0o755)
    sweep.env["PATH"] = f"{fake.parent}:{sweep.env['PATH']}"
    code, text = sweep.run()
    assert code == 0, text + sweep.logs()
    assert "the queue takes no array of 2 now, tried again with 1: " in text
    assert text.count("submitted 1 jobs") == 2
    assert text.count("the queue takes no array") == 2


def test_what_sbatch_will_never_take_is_an_error(slurm, token_set, tmp_path):
    sweep = Sweep(tmp_path, slurm, token_set.path, "r0")
    code, text = sweep.run("--slurm.partition", "nowhere")
    assert code == 1
    assert "launch.py sweep: sbatch refuses: " in text
    assert "invalid partition" in text
    assert list((sweep.out / "slurm").glob("*.json")) == []


@pytest.mark.slow
def test_a_job_that_falls_silent_is_cancelled_and_submitted_again(slurm, token_set, tmp_path):
    """As on a node that is lost before SLURM knows; here its worker is stopped."""
    sweep = Sweep(tmp_path, slurm, token_set.path, "r0", steps=ENDLESS)
    patient = sweep.start()
    sweep.wait_for_start("r0")
    sweep.stop(patient)
    worker = read_json(sweep.out / "runs" / "r0" / "heartbeat.json")["pid"]
    os.kill(worker, signal.SIGSTOP)
    # Shorter than a worker takes to begin, so the driver is stopped as soon as it has acted.
    driver = sweep.start("--slurm.silent-minutes", "0.05")
    sweep.wait_for(driver, "submitted 1 jobs")
    text = sweep.stop(driver)
    assert "r0: job" in text
    assert "had no heartbeat for 0.05 min" in text
    assert "is gone; submitted again" in text


class Clock:
    """`time`, for a driver; moved by hand."""

    def __init__(self):
        self.now = 1.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
def test_a_running_job_that_never_gives_a_sign_of_life_is_cancelled_and_a_waiting_one_is_not(
    tmp_path, monkeypatch, state
):
    clock, commands = Clock(), []
    monkeypatch.setattr("mmfree_jax.sweep.slurm.time", clock)
    monkeypatch.setattr("mmfree_jax.sweep.slurm.subprocess.run", lambda command, **_: commands.append(command))
    executor = SlurmExecutor(Slurm(silent_minutes=10), say=lambda line: None)
    one = Tracked([tiny_run("transformer++", Path("c"))], job="7_0")
    driver = Driver(executor, tmp_path, [one], lambda: None)
    for clock.now in (1.0, 300.0, 600.0):
        driver._check_heartbeat(one, Place("7_0", state))
    assert commands == []
    clock.now = 602.0
    driver._check_heartbeat(one, Place("7_0", state))
    assert commands == ([["scancel", "7_0"]] if state == "RUNNING" else [])


def test_a_run_whose_job_is_lost_twice_without_a_step_is_given_up(tmp_path):
    run, said = tiny_run("transformer++", Path("c")), []
    claim(run, run_folder(tmp_path, run))
    one = Tracked([run])
    driver = Driver(SlurmExecutor(Slurm(), say=said.append), tmp_path, [one], lambda: None)
    for job in ("7_0", "8_0"):
        assert driver.tracked == [one]
        one.ticket, one.job = Ticket("sweep", 0), job
        driver._update({})  # squeue knows of no job
    assert said == [f"{run.name}: job 7_0 is gone; submitted again (its last words: nothing)"]
    assert driver.tracked == []
    assert status(run_folder(tmp_path, run), run).error.startswith("its job 8_0 is gone, like the one before")


@pytest.mark.parametrize(
    "wrong", [{"hours": 0}, {"parallel": 0}, {"gpus_per_node": -1}, {"poll_seconds": 0}, {"silent_minutes": -1}]
)
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"slurm.{next(iter(wrong))}="):
        Slurm(**wrong)


def test_a_mesh_becomes_nodes_and_processes():
    run = tiny_run("transformer++", Path("c"))
    run = dataclasses.replace(run, mesh=MeshConfig(fsdp=16), data=dataclasses.replace(run.data, batch=16))
    asked = Slurm(extra=("constraint=h100", "exclusive"), hours=0.5).parameters([run])
    assert (asked["nodes"], asked["ntasks_per_node"], asked["gpus_per_node"], asked["time"]) == (2, 8, 8, 30)
    assert asked["additional_parameters"] == {"requeue": True, "constraint": "h100", "exclusive": True}
    asked = Slurm(gpus_per_node=0).parameters([run])
    assert (asked["nodes"], asked["ntasks_per_node"]) == (1, 16)
    with pytest.raises(ConfigError, match="16 devices do not fill nodes of 6"):
        Slurm(gpus_per_node=6).parameters([run])


def test_without_slurm_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch and squeue here"):
        SlurmExecutor(Slurm()).execute(tmp_path, [], lambda: None)
