"""The SLURM executor against a real SLURM of this machine, without accounting."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmfree_jax.config import ConfigError, MeshConfig
from mmfree_jax.sweep.slurm import Slurm, SlurmExecutor
from tests.conftest import tiny_run
from tests.sweep.one_host_slurm import missing, one_host_slurm

ROOT = Path(__file__).parents[2]
FLAGS = ["--executor", "slurm", "--slurm.gpus-per-node", "0", "--slurm.cpus", "1", "--slurm.poll-seconds", "0.5"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if why := missing():
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(f"REQUIRE_SLURM is set, but {why}")
        pytest.skip(why)
    with one_host_slurm(tmp_path_factory.mktemp("slurm")) as env:
        yield env


class Sweep:
    """`launch.py sweep --executor slurm` on slurm_study.py, in one folder."""

    def __init__(self, out: Path, env: dict[str, str], corpus: Path, runs: str, steps: int = 12):
        self.out = out
        self.env = {**env, "JAX_PLATFORMS": "cpu", "SLURM_STUDY_CORPUS": str(corpus), "SLURM_STUDY_RUNS": runs}
        self.env |= {"SLURM_STUDY_STEPS": str(steps), "MMFREE_JAX_CACHE": str(out.parent / "cache")}

    def start(self, *more: str) -> subprocess.Popen:
        command = [sys.executable, "launch.py", "sweep", "tests/sweep/slurm_study.py", "--out", str(self.out)]
        return subprocess.Popen(
            [*command, *FLAGS, *more],
            cwd=ROOT,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *more: str) -> tuple[int, str]:
        process = self.start(*more)
        text = process.communicate(timeout=180)[0]
        return process.returncode, text

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=True).stdout

    def wait_for_step(self, name: str) -> None:
        path = self.out / "runs" / name / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (path.exists() and path.stat().st_size):
            assert time.monotonic() < deadline, f"{name} did not begin"
            time.sleep(0.05)

    def attempts(self, name: str) -> int:
        return (self.out / "runs" / name / "log.txt").read_text().count(f" {name} at step")

    def logs(self) -> str:
        return "".join(path.read_text() for path in (self.out / "slurm").glob("*_log.out"))


@pytest.mark.slow
def test_an_array_two_at_a_time_and_a_trunk_with_its_decays(slurm, token_set, tmp_path):
    sweep = Sweep(tmp_path / "out", slurm, token_set.path, "r0 r1 r2 r3 t")
    process = sweep.start("--slurm.parallel", "2")
    most, text = 0, ""
    while process.poll() is None:
        most = max(most, sweep.ask("squeue", "-h", "-r", "-t", "RUNNING").count("\n"))
        time.sleep(0.2)
    text = process.communicate()[0]
    assert process.returncode == 0, text + sweep.logs()
    assert most == 2
    assert "submitted 5 jobs" in text
    assert len(list(sweep.out.glob("runs/*/result.json"))) == 7
    code, text = sweep.run("--status")
    assert code == 0
    assert text.count("   done  ") == 7
    assert sweep.run()[1].count("submitted") == 0


@pytest.mark.slow
def test_a_cancelled_job_is_submitted_again_and_a_preempted_one_queues_itself(slurm, token_set, tmp_path):
    """Neither needs accounting; the cancelled one is noticed by its absence from squeue."""
    sweep = Sweep(tmp_path / "out", slurm, token_set.path, "r0 r1", steps=600)
    process = sweep.start()
    sweep.wait_for_step("r0")
    sweep.wait_for_step("r1")
    (array,) = set(re.findall(r"(\d+)_", sweep.ask("squeue", "-h", "-r", "-o", "%i")))
    status = sweep.run("--status")[1]
    assert re.search(rf"running  r0  step \d+/\d+ loss .* tokens/s, [\d:]+ left  job {array}_0 on ", status), status
    sweep.ask("scancel", f"{array}_0")
    sweep.ask("scancel", "--signal=USR2", f"{array}_1")
    text = process.communicate(timeout=180)[0]
    assert process.returncode == 0, text + sweep.logs()
    assert f"r0: job {array}_0 is gone; submitted again" in text, text
    assert text.count("submitted 1 jobs") == 1  # the preempted one is SLURM's own to start again
    assert sweep.attempts("r0") == sweep.attempts("r1") == 2
    assert "resume r1 at step " in (sweep.out / "runs" / "r1" / "log.txt").read_text()


@pytest.mark.slow
def test_a_driver_that_is_killed_finds_its_jobs_again(slurm, token_set, tmp_path):
    sweep = Sweep(tmp_path / "out", slurm, token_set.path, "r0 r1", steps=600)
    process = sweep.start()
    sweep.wait_for_step("r0")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "running  r0" in sweep.run("--status")[1]
    process = sweep.start()
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=30)[0]
    assert process.returncode == 130
    assert "jobs go on, and the same command finds them again" in text
    code, text = sweep.run()
    assert code == 0, text + sweep.logs()
    assert "submitted" not in text
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
    sweep = Sweep(tmp_path / "out", slurm, token_set.path, "r0 r1 r2 r3")
    real = sweep.ask("which", "sbatch").strip()
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(REFUSING.format(count=tmp_path / "count", sbatch=real))
    fake.chmod(0o755)
    sweep.env["PATH"] = f"{fake.parent}:{sweep.env['PATH']}"
    code, text = sweep.run()
    assert code == 0, text + sweep.logs()
    assert "the queue takes no array of 4 now, tried again with 2: " in text
    assert text.count("submitted 1 jobs") == 4
    assert text.count("the queue takes no array") == 2


def test_what_sbatch_will_never_take_is_an_error(slurm, token_set, tmp_path):
    sweep = Sweep(tmp_path / "out", slurm, token_set.path, "r0")
    code, text = sweep.run("--slurm.partition", "nowhere")
    assert code == 1
    assert "launch.py sweep: sbatch refuses: " in text
    assert "invalid partition" in text
    assert list((sweep.out / "slurm").glob("*.json")) == []


@pytest.mark.slow
def test_a_job_that_falls_silent_is_cancelled_and_submitted_again(slurm, token_set, tmp_path):
    """As on a node that is lost before SLURM knows; here its worker is stopped."""
    sweep = Sweep(tmp_path / "out", slurm, token_set.path, "r0", steps=600)
    process = sweep.start("--slurm.silent-minutes", "0.12")
    sweep.wait_for_step("r0")
    worker = int((sweep.out / "runs" / "r0" / "heartbeat.json").read_text().split('"pid": ')[1].split(",")[0])
    os.kill(worker, signal.SIGSTOP)
    text = process.communicate(timeout=180)[0]
    assert process.returncode == 0, text + sweep.logs()
    assert "gave no sign of life for 0.12 min" in text
    assert "is gone; submitted again" in text
    assert sweep.attempts("r0") == 2


def test_a_mesh_becomes_nodes_and_processes():
    run = tiny_run("transformer++", Path("c"))
    run = dataclasses.replace(run, mesh=MeshConfig(fsdp=16), data=dataclasses.replace(run.data, batch=16))
    asked = Slurm(extra=("constraint=h100", "exclusive"), hours=0.5).parameters([run])
    assert (asked["nodes"], asked["ntasks_per_node"], asked["gpus_per_node"], asked["time"]) == (2, 8, 8, 30)
    assert asked["additional_parameters"] == {"requeue": True, "constraint": "h100", "exclusive": True}
    assert Slurm(gpus_per_node=0).shape([run]) == (1, 16)
    with pytest.raises(ConfigError, match="16 devices do not fill nodes of 6"):
        Slurm(gpus_per_node=6).shape([run])


def test_without_slurm_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch and squeue here"):
        SlurmExecutor(Slurm()).execute(tmp_path, [], lambda: None)
