"""Several processes as one run: real ones on this machine, four simulated devices each, over loopback."""

import concurrent.futures
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from mmfree_jax.config import ConfigError
from mmfree_jax.distributed import Group, call_roll, counted_rows, find_group, first_host, sum_integers
from mmfree_jax.files import read_json
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.weights import save_model
from tests.compiling import xla_flags
from tests.conftest import read_metrics, tiny_model
from tests.simulated import PATIENCE_SECONDS

ROOT = Path(__file__).parents[1]
SHAPE = "--model.width 16 --model.depth 2 --model.glu-width 32 --model.vocab 257 --data.vocab 257"
RUN = f"{SHAPE} --data.sequence 32 --data.batch 8 --steps 6 --log-every 1 --checkpoint-every 0 --diagnose-every 4"
RUN += " --optim.warmup-steps 2 --optim.decay-steps 0"
# launch.py with less patience: processes that wait for a dead one spin until they call it dead.
LAUNCH = "import sys, launch, mmfree_jax.distributed as d; d.HEARTBEAT_SECONDS = 8; sys.exit(launch.main(sys.argv[1:]))"
BRIEF = ("--no-evaluate", "--diagnose-every", "0")


@pytest.fixture(autouse=True)
def cache(programs, monkeypatch):
    monkeypatch.setenv("MMFREE_JAX_CACHE", str(programs))


def free_port() -> int:
    """Below those that the system hands out, lest it does so before the process that this is for takes it."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def launch(devices: int, *arguments: object) -> subprocess.Popen:
    """`launch.py ARGUMENTS` on that many simulated devices."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}
    command = [sys.executable, "-c", LAUNCH, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def start(family: str, corpus: Path, out: Path, devices: int, *more: str) -> subprocess.Popen:
    """`launch.py train` on that many simulated devices."""
    heads = ["--model.heads", "2"] if family == "transformer++" else []
    run = ["train", f"{family}-tiny", *RUN.split(), *heads, "--data.corpus", corpus, "--out", out]
    return launch(devices, *run, "--mesh.data", 2, "--mesh.fsdp", 4, *more)


def group(
    count: int, family: str, corpus: Path, out: Path, *more: str
) -> contextlib.AbstractContextManager[list[subprocess.Popen]]:
    """`count` processes of one run; none outlives the block."""
    return together(count, lambda *flags: start(family, corpus, out, 8 // count, *flags, *more))


@contextlib.contextmanager
def together(count: int, begin: Callable[..., subprocess.Popen]) -> Iterator[list[subprocess.Popen]]:
    """`count` processes begun with the flags that make them one; none outlives the block."""
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(count)]
    running = [begin(*flags, "--process", str(index)) for index in range(count)]
    try:
        yield running
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    outputs = [process.communicate(timeout=max(1, deadline - time.monotonic())) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def losses(folder: Path) -> dict[int, float]:
    """Loss by step."""
    return {row["step"]: row["loss"] for row in read_metrics(folder)}


def axes(folder: Path) -> list:
    """What was counted: by step, and in the end. Each process counts the rows that it holds."""
    result = read_json(folder / "result.json")
    return [(row["tokens"], row["flops"]) for row in read_metrics(folder)] + [result[n] for n in ("D", "U", "flops")]


def wait_for_steps(folder: Path, steps: int, processes: list[subprocess.Popen]) -> None:
    """Until the run of these processes has logged that many steps."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


def stranger(address: str, while_running: concurrent.futures.Future) -> bool:
    """Whether somebody who is no process of the run got to speak to process 0."""
    while not while_running.done():
        host, port = address.split(":")
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET / HTTP/1.1")
            return True
    return False


@pytest.mark.slow
def test_two_processes_train_what_one_does(token_set, tmp_path):
    with group(2, "matmul-free", token_set.path, tmp_path / "two") as processes:
        (status, first, errors), (other_status, second, other_errors) = finish(processes)
    assert (status, other_status) == (0, 0), errors + other_errors
    assert "process  devices\n      0  4 x cpu" in first
    assert "held-out loss" in first
    assert "held-out loss" not in second  # the first process alone speaks and writes
    assert len(list((tmp_path / "two" / "tb").iterdir())) == 1
    assert finish([start("matmul-free", token_set.path, tmp_path / "one", 8)])[0][0] == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(one) == list(two) == [1, 2, 3, 4, 5, 6]
    # int8 codes that a rounding error tips over are the only difference there can be
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-4)
    one, two = (read_json(tmp_path / name / "result.json") for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert axes(tmp_path / "two") == axes(tmp_path / "one")


@pytest.mark.slow
def test_a_run_stopped_in_two_processes_goes_on_in_one_and_in_four(token_set, tmp_path):
    """The signal reaches the second process alone; both stop after the same step and save it."""
    folder, family, more = tmp_path / "two", "transformer++", ["--steps", "4000", *BRIEF]
    with group(2, family, token_set.path, folder, *more) as processes:
        wait_for_steps(folder, 2, processes)
        os.kill(processes[1].pid, signal.SIGTERM)
        ended = finish(processes)
    assert [status for status, *_ in ended] == [75, 75], ended
    (saved,) = (folder / "checkpoints").iterdir()
    stopped = int(saved.name)
    shortened = (folder / "config.json").read_text().replace('"steps": 4000', f'"steps": {stopped + 3}')
    (folder / "config.json").write_text(shortened)
    shutil.copytree(folder, tmp_path / "four")
    more = ["--steps", str(stopped + 3), *BRIEF]
    assert finish([start(family, token_set.path, folder, 8, *more)])[0][0] == 0
    with group(4, family, token_set.path, tmp_path / "four", *more) as processes:
        ended = finish(processes)
    assert [status for status, *_ in ended] == [0] * 4, ended
    assert finish([start(family, token_set.path, tmp_path / "whole", 8, *more)])[0][0] == 0
    expected = losses(tmp_path / "whole")
    assert list(expected) == list(range(1, stopped + 4))
    for name in ("two", "four"):
        found = losses(tmp_path / name)
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5, err_msg=name)
        assert axes(tmp_path / name) == axes(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_start_from_a_model_and_evaluate_it(token_set, tmp_path):
    """With a rate of almost nothing: what is evaluated in the end are the weights that training began with."""
    model = LanguageModel(tiny_model("matmul-free"), rngs=nnx.Rngs(3))
    save_model(model, tmp_path / "model")
    place = ["--mesh.data", 2, "--mesh.fsdp", 4]
    more = ["--init", str(tmp_path / "model"), "--optim.lr", "1e-12", "--diagnose-every", "0", "--steps", "2"]
    with group(2, "matmul-free", token_set.path, tmp_path / "run", *more) as processes:
        ended = finish(processes)
    assert [status for status, *_ in ended] == [0, 0], ended
    asked = ["--corpus", token_set.path, "--sequence", 32]
    one = launch(1, "evaluate", tmp_path / "model", *asked)
    begin = lambda *flags: launch(4, "evaluate", tmp_path / "run", *asked, *place, *flags)
    with together(2, begin) as processes:
        ended = [*finish([one]), *finish(processes)]
    assert [status for status, *_ in ended] == [0, 0, 0], ended
    alone, first, second = (said for _, said, _ in ended)
    assert "loss" not in second  # the first process alone speaks
    loss = [float(re.search(r"^loss (\S+)$", said, re.MULTILINE)[1]) for said in (alone, first)]
    assert loss[1] == pytest.approx(loss[0], rel=1e-4)
    assert read_json(tmp_path / "run" / "result.json")["loss"] == pytest.approx(loss[0], rel=1e-4)


@pytest.mark.slow
def test_where_one_process_dies_the_other_ends_with_an_error(token_set, tmp_path):
    with group(2, "matmul-free", token_set.path, tmp_path / "run", "--steps", "100000", *BRIEF) as processes:
        wait_for_steps(tmp_path / "run", 2, processes)
        os.kill(processes[1].pid, signal.SIGKILL)
        _, errors = processes[0].communicate(timeout=PATIENCE_SECONDS)
    assert processes[0].returncode not in (0, 75)
    # The broken connection, or by the newest JAX the silent process, is what it names.
    assert re.search(r"^launch.py train: .*Gloo|stopped sending heartbeats", errors, re.MULTILINE)


@pytest.mark.slow
def test_where_one_process_hangs_the_other_says_so_and_ends_to_be_started_again(token_set, tmp_path, monkeypatch):
    """Stopped in the midst of a step, as by a debugger or a machine that swaps: its connections stay open."""
    # It must be the watchdog that ends the wait, and not the heartbeat that is missing.
    monkeypatch.setattr(
        sys.modules[__name__], "LAUNCH", LAUNCH.replace("HEARTBEAT_SECONDS = 8", "HEARTBEAT_SECONDS = 300")
    )
    more = ["--steps", "100000", "--stall-minutes", "0.15", *BRIEF]
    with group(2, "matmul-free", token_set.path, tmp_path / "run", *more) as processes:
        wait_for_steps(tmp_path / "run", 2, processes)
        os.kill(processes[1].pid, signal.SIGSTOP)
        _, errors = processes[0].communicate(timeout=PATIENCE_SECONDS)
    assert processes[0].returncode == 75, errors
    says = (
        r"matmul-free-tiny: no progress for 9 s, waiting for a step: a device or a collective operation hangs; stacks"
    )
    assert re.search(rf"^{says} are in .*stacks.txt; the same command goes on from the last checkpoint$", errors, re.M)
    assert re.search(r"waiting for a step.*\n(.*\n)* +File .*loop\.py", (tmp_path / "run" / "stacks.txt").read_text())
    assert re.search(says, (tmp_path / "run" / "log.txt").read_text())


def test_several_processes_with_a_mesh_of_some_of_their_devices_are_refused(token_set, tmp_path):
    """As `srun -n 2` with the default mesh: the second process would have nothing to compute."""
    begin = lambda *flags: launch(1, "train", "matmul-free-tiny", "--out", tmp_path / "run", *flags)
    with together(2, begin) as processes:
        ended = finish(processes)
    for status, _, errors in ended:
        assert status == 1
        assert "is 1 of the 2 devices that 2 processes bring: use all of them" in errors
    assert not (tmp_path / "run").exists()


def test_a_process_that_does_not_come_is_named(token_set, tmp_path):
    """Three of four come: each of them names the fourth, the address and what to check."""
    address = f"127.0.0.1:{free_port()}"
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(call_roll, Group(address, 4, index), 3.0) for index in (0, 1, 3)]
        assert stranger(address, while_running=calls[0])
        errors = [str(call.exception()) for call in calls]
    for error in errors:
        assert re.search(rf"coordinator {address}: .* 2 did not come within 3 s; check that every process", error)
    flags = ["--coordinator", address, "--processes", "2", "--process", "1", "--patience", "0.5"]
    status, _, errors = finish([start("matmul-free", token_set.path, tmp_path / "run", 1, *flags)])[0]
    assert status == 1
    assert errors.startswith(f"launch.py train: coordinator {address}: nobody answers there within 0.5 s; check")
    assert errors.count("\n") == 1


SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NODELIST": "gpu[007-009,012],cpu1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def test_several_processes_only_where_they_are_meant():
    alone = lambda **environment: find_group("", 0, -1, environment)
    assert alone() is None
    assert alone(SLURM_JOB_ID="1", SLURM_NTASKS="4", SLURM_JOB_NODELIST="a[1-4]") is None  # the shell of salloc
    assert alone(SLURM_JOB_ID="1", SLURM_NTASKS="4", SLURM_PROCID="0") is None  # the script of sbatch
    assert alone(**{**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert alone(**SLURM) == Group("gpu007:61443", 8, 5)
    assert alone(**SLURM, CUDA_VISIBLE_DEVICES="0,1") == Group("gpu007:61443", 8, 5, [1])  # one GPU a task
    many = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "10(x4)", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert alone(**many) == Group("gpu007:61443", 8, 5, [1])
    assert alone(**SLURM, CUDA_VISIBLE_DEVICES="3") == Group("gpu007:61443", 8, 5)  # SLURM has divided them
    assert alone(**{**SLURM, "SLURM_STEP_NODELIST": "a-1,b"}) == Group("a-1:61443", 8, 5)
    assert alone(JAX_NUM_PROCESSES="", SLURM_STEP_NUM_TASKS="", TPU_WORKER_HOSTNAMES="", TPU_WORKER_ID="") is None
    assert alone(TPU_WORKER_HOSTNAMES="t0", TPU_WORKER_ID="0") is None
    assert alone(TPU_WORKER_HOSTNAMES="t0,t1", TPU_WORKER_ID="1") == Group("", 2, 1)
    assert find_group("h:1", 2, 0, SLURM) == Group("h:1", 2, 0)  # flags win
    variables = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_PROCESS_ID": "1"}
    assert alone(**variables, JAX_NUM_PROCESSES="1") is None
    assert alone(**variables, JAX_NUM_PROCESSES="2") == Group("h:1", 2, 1)
    for flags in (("h:1", 2, -1), ("h:1", 2, 2), ("h", 2, 0), ("", 2, 0), ("", 0, 0)):
        with pytest.raises(ConfigError, match="give all three"):
            find_group(*flags, {})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("gpu[007-009,012],cpu1", "gpu007"),
        ("gpu[01-02]-ib", "gpu01-ib"),
        ("gpu[3,5-7]-ib.cluster.net,x", "gpu3-ib.cluster.net"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("rack[01-02]-node[003,7]-ib,login[1-2]", "rack01-node003-ib"),
        ("n-1,n-2", "n-1"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
    ],
)
def test_the_first_host_of_any_list_that_slurm_writes(nodes, first):
    assert first_host(nodes) == first
    if shutil.which("scontrol"):
        said = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
        assert said.returncode != 0 or said.stdout.splitlines()[0] == first


@pytest.mark.parametrize("nodes", ["gpu[01-", "[", "gpu[a-b]", ""])
def test_what_is_no_list_of_hosts_is_refused(nodes):
    with pytest.raises(ConfigError, match=r"no list of hosts|not on which nodes"):
        find_group("", 0, -1, {**SLURM, "SLURM_STEP_NODELIST": nodes})


@pytest.mark.parametrize("owners", [[0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 2, 0]])
def test_a_row_that_several_processes_hold_is_counted_in_one(owners, monkeypatch):
    """Four devices, of these processes; the first two hold rows 0 to 3, the others rows 4 to 7."""
    rows = [slice(0, 4), slice(0, 4), slice(4, 8), slice(4, 8)]
    devices = [type("Device", (), {"process_index": process})() for process in owners]
    placed = {device: (held, slice(None)) for device, held in zip(devices, rows, strict=True)}
    sharding = SimpleNamespace(devices_indices_map=lambda _: placed)
    counted = []
    for process in set(owners):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        counted += counted_rows(sharding, 8)
    assert sorted(counted) == list(range(8))


def test_large_numbers_are_added_exactly_over_processes(monkeypatch):
    """JAX would exchange them in 32 bits."""
    theirs = [2**63 - 1, 5, 0]

    def gathered(own):
        assert own.dtype == np.int32
        digits = [[number >> shift & 0xFFFF for shift in (0, 16, 32, 48)] for number in theirs]
        return np.stack([own, np.array(digits, np.int32)])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("mmfree_jax.distributed.multihost_utils.process_allgather", gathered)
    assert sum_integers([2**62 + 3, 0, 70_000]) == [2**63 - 1 + 2**62 + 3, 5, 70_000]
