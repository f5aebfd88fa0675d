"""Full disks, stalled readers, devices that hang or are too small, two processes in one folder: named and survived."""

import dataclasses
import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from mmfree_jax import api
from mmfree_jax.distributed import PeerLost, naming_lost_peers
from mmfree_jax.files import LockedError, locked
from mmfree_jax.lowering.out_of_memory import OutOfMemory, advice
from mmfree_jax.run_folder import claim
from mmfree_jax.sweep import worker
from mmfree_jax.sweep.status import run_folder, status
from mmfree_jax.training import loop
from mmfree_jax.training.lines import Lines
from mmfree_jax.training.loop import train
from tests.conftest import read_metrics, tiny_run
from tests.training.test_loop import curve, numbers

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of four megabytes, and a function that fills it."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")

    def fill() -> None:
        with (place / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    yield place, fill
    subprocess.run(["umount", "-l", place], check=True)


class Trouble:
    """Stands for Diagnostics: fills the disk before one step, and makes room before another."""

    def __init__(self, fill, place: Path, full: int, free: int):
        self.fill, self.place, self.full, self.free = fill, place, full, free

    def __call__(self, *_):
        return self

    def before(self, step, *_):
        if step == self.full:
            self.fill()
        if step == self.free:
            (self.place / "filler").unlink()

    def after(self, *_):
        time.sleep(0.2)
        return False


def test_a_disk_that_is_full_for_a_while_loses_nothing(small_disk, token_set, tmp_path, monkeypatch, capsys):
    """Logs, TensorBoard and a checkpoint meet it; what waits is written when there is room."""
    place, fill = small_disk
    config = tiny_run("matmul-free", token_set.path, log_every=1, evaluate=False)
    whole = train(config, tmp_path / "whole", token_set)
    monkeypatch.setattr(loop, "Diagnostics", Trouble(fill, place, 3, 8))
    assert numbers(train(config, place / "run", token_set)) == numbers(whole)
    assert curve(place / "run") == curve(tmp_path / "whole")
    said = capsys.readouterr().err
    assert re.search(r"the checkpoint of step 5 was not written: .*(No space left|ENOSPC)", said)
    assert "Traceback" not in said


def test_a_disk_that_stays_full_ends_the_run_in_one_line_and_it_goes_on_later(
    small_disk, token_set, tmp_path, monkeypatch
):
    place, fill = small_disk
    config = tiny_run("matmul-free", token_set.path, evaluate=False)
    whole = train(config, tmp_path / "whole", token_set)
    monkeypatch.setattr("mmfree_jax.checkpoint.PAUSES_SECONDS", (0.1,))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Diagnostics", Trouble(fill, place, 7, -1))
        with pytest.raises(Exception, match=r"No space left|cannot be written") as failed:
            train(config, place / "run", token_set)
    assert "\n" not in str(failed.value)
    (place / "filler").unlink()
    assert numbers(train(config, place / "run", token_set)) == numbers(whole)
    assert curve(place / "run") == curve(tmp_path / "whole")


@pytest.mark.parametrize("file", ["result.json", "config.json", "corpus.json"])
def test_a_file_that_cannot_be_written_is_named_and_the_run_goes_on_later(file, token_set, tmp_path, monkeypatch):
    config = tiny_run("matmul-free", token_set.path)
    whole = train(config, tmp_path / "whole", token_set)
    fsync = os.fsync

    def full(handle):
        if f".{file}." in os.readlink(f"/proc/self/fd/{handle}"):
            raise FULL
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=rf"No space left on device: .*{file}"):
            train(config, tmp_path / "run", token_set)
    assert numbers(train(config, tmp_path / "run", token_set)) == numbers(whole)


def test_lines_are_not_torn_however_little_is_taken(tmp_path, monkeypatch, capsys):
    lines = Lines(tmp_path / "x")
    real, taken = lines._file.write, iter([3, FULL, FULL, 2, 100])

    class Small:
        def write(self, data):
            room = next(taken, 100)
            if isinstance(room, OSError):
                raise OSError(room.errno, room.strerror)
            return real(data[:room])

        def __getattr__(self, name):
            return getattr(lines_file, name)

    lines_file, lines._file = lines._file, Small()
    lines.write("first\n")
    with pytest.raises(OSError, match=r"No space left on device: .*/x"):
        lines.sync()
    lines.write("second\n")
    lines.sync()
    lines.close()
    assert (tmp_path / "x").read_text() == "first\nsecond\n"
    assert capsys.readouterr().err.count("No space left") == 1


def test_an_unwritable_folder_is_named(token_set, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        train(tiny_run("matmul-free", token_set.path), tmp_path / "file" / "run", token_set)


STALLED = """
import dataclasses, sys, time
from pathlib import Path
from mmfree_jax.data import TokenSet
from mmfree_jax.training import loop
from tests.conftest import tiny_run
kind, corpus, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
run = dataclasses.replace(tiny_run("matmul-free", corpus), stall_minutes=0.05, checkpoint_every=0)
if kind == "reader":
    from mmfree_jax.data.reading import pipeline
    reads = []
    def item(self, index):
        reads.append(index)
        if len(reads) > 30: time.sleep(600)
        return real(self, index)
    real, pipeline.Windows.__getitem__ = pipeline.Windows.__getitem__, item
else:
    def hang(self):
        time.sleep(600) if self.progress.step > 3 else real(self)
    real, loop.Interval.flush = loop.Interval.flush, hang
loop.train(run, out, TokenSet.open(corpus), check_first=False)
"""


@pytest.mark.parametrize(
    ("kind", "says"), [("reader", "the reader of the data is stalled"), ("device", "a collective operation hangs")]
)
def test_what_hangs_is_named_with_its_stacks_and_the_process_ends_to_be_started_again(kind, says, token_set, tmp_path):
    command = [sys.executable, "-c", STALLED, kind, str(token_set.path), str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 75, done.stderr
    assert re.search(rf"no progress for 3 s, .*{says}; stacks are in .*stacks.txt; the same command goes", done.stderr)
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "__next__" in stacks if kind == "reader" else "hang" in stacks
    assert says in (tmp_path / "log.txt").read_text()


def test_a_device_without_memory_is_told_what_dominates_and_what_would_fit(token_set, tmp_path, monkeypatch):
    config = tiny_run("transformer++", token_set.path)

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.")

    monkeypatch.setattr(loop, "_train", full)
    with pytest.raises(OutOfMemory) as failed:
        api.train(config, tmp_path)
    says = r"transformer\+\+-tiny: out of memory; \w+ are [\d.e-]+ of [\d.e-]+ GB that a step needs; these need less: "
    assert re.match(says, str(failed.value))
    assert str(failed.value).count(" GB)") == 3
    large = dataclasses.replace(config, data=dataclasses.replace(config.data, batch=1024, sequence=2048))
    assert re.match("activations are .*--optim.accumulate 1024 --remat full", advice(large))


def test_a_sweep_tries_a_run_that_is_too_large_again_in_micro_batches(token_set, tmp_path, monkeypatch):
    run, seen = tiny_run("transformer++", token_set.path), []
    claim(run, run_folder(tmp_path, run))
    real = worker.train

    def train(config, folder, token_set):
        seen.append(config.optim.accumulate)
        if config.optim.accumulate < 4:
            raise OutOfMemory("out of memory")
        return real(config, folder, token_set)

    monkeypatch.setattr(worker, "train", train)
    assert worker.main(tmp_path, [run.name]) == 0
    assert seen == [1, 2, 4]
    assert status(run_folder(tmp_path, run), run).state == "done"
    assert read_metrics(run_folder(tmp_path, run))[-1]["tokens"] == 12 * 4 * 32
    shutil.rmtree(run_folder(tmp_path, run))
    claim(run, run_folder(tmp_path, run))
    monkeypatch.setattr(worker, "train", lambda *_: (_ for _ in ()).throw(OutOfMemory("out of memory; x")))
    assert worker.main(tmp_path, [run.name]) == 1
    assert "out of memory" in status(run_folder(tmp_path, run), run).error


def test_a_lost_peer_is_named_in_one_line(monkeypatch):
    def broken():
        with naming_lost_peers():
            raise jax.errors.JaxRuntimeError("INTERNAL: [Gloo]\n connection closed by peer")

    with pytest.raises(jax.errors.JaxRuntimeError):
        broken()  # a single process has no peer
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        PeerLost, match=r"another process of this run has ended .* the same command \(INTERNAL: \[Gloo\]"
    ):
        broken()


def test_the_holder_of_a_folder_is_named_and_a_dead_one_forgotten(tmp_path):
    hold = "import sys, time; from pathlib import Path; from mmfree_jax.files import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=rf"is working here \(process {holder.pid} on {os.uname().nodename}\)"):
            locked(tmp_path).__enter__()
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_named(reason, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LockedError, match=r"lies on a file system without locks .*NFS: without nolock"):
        locked(tmp_path).__enter__()
