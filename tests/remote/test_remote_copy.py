"""A folder of runs and its copy in a bucket: wherever an upload ends, what is there can be gone on with."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import fsspec
import pytest

from mmfree_jax.checksums import first_damage, write_checksums
from mmfree_jax.config import ConfigError
from mmfree_jax.distributed import PeerLost
from mmfree_jax.files import url_of
from mmfree_jax.remote import layout, reading, working
from mmfree_jax.remote.bucket import Bucket, Closed, RemoteError
from mmfree_jax.remote.copy import Copy
from mmfree_jax.remote.lease import LEASE, Lease, here
from mmfree_jax.remote.reading import fetched
from mmfree_jax.remote.working import NotCopied, working_folder
from scaling.tables.readers import ScalingError
from scaling.tables.remote import local

URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFREE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mmfree_jax.remote.lease.SETTLE_SECONDS", 0.0)
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield
    store.store.clear()


class Run:
    """A folder like that of a run, whose state is the number of its steps."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")

    def step(self, number: int) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(f"row {number}\n")

    def save(self, number: int, keep: int = 1) -> None:
        """A checkpoint that names the length of the log, like `_meta`; removes all before the last `keep`."""
        place = self.folder / "checkpoints" / str(number)
        (place / "state").mkdir(parents=True)
        (place / "state" / "array").write_text(f"state {number}" * 50)
        (place / "marks").write_text(str((self.folder / "metrics.jsonl").stat().st_size))
        write_checksums(place)
        for old in self.steps()[:-keep]:
            shutil.rmtree(self.folder / "checkpoints" / str(old))
        (self.folder / "checkpoints.json").write_text(json.dumps({"newest": number}))

    def steps(self) -> list[int]:
        return sorted(int(path.name) for path in (self.folder / "checkpoints").glob("*") if path.name.isdigit())

    def resumed(self) -> list[str]:
        """The rows of the log as a run that goes on cuts it; checks the checkpoint."""
        newest = self.folder / "checkpoints" / str(self.steps()[-1])
        assert first_damage(newest) == ""
        assert (newest / "state" / "array").exists()
        log, mark = (self.folder / "metrics.jsonl").read_bytes(), int((newest / "marks").read_text())
        assert len(log) >= mark
        return log[:mark].decode().splitlines()


def rows(last: int) -> list[str]:
    return [f"row {number}" for number in range(1, last + 1)]


def copy_of(run: Run) -> Copy:
    return Copy(Bucket(URL), run.folder, run.folder.with_name("stage"))


def brought(folder) -> Run:
    """What another machine finds."""
    working._bring(Bucket(URL), folder, folder.with_name(f"{folder.name}-stage"))
    return Run(folder)


def content(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trained(folder, steps: int, every: int = 5) -> Run:
    run = Run(folder)
    for number in range(1, steps + 1):
        run.step(number)
        if number % every == 0:
            run.save(number)
    return run


def test_another_machine_finds_what_the_first_has_written(tmp_path):
    run = trained(tmp_path / "run", 12)
    (run.folder / "tb").mkdir()
    (run.folder / "tb" / "events.out").write_text("points")
    (run.folder / ".lock").write_text("")
    (run.folder / "heartbeat.json").write_text("{}")
    unfinished = run.folder / "checkpoints" / "12.orbax-checkpoint-tmp" / "x"
    unfinished.parent.mkdir()
    unfinished.write_text("")
    assert copy_of(run).attempt() == ""
    other = brought(tmp_path / "other")
    assert other.resumed() == rows(10)
    (run.folder / ".lock").unlink()
    (run.folder / "heartbeat.json").unlink()
    unfinished.unlink()
    mark = int((run.folder / "checkpoints" / "10" / "marks").read_text())
    expected = content(run.folder)
    assert {**content(other.folder), "metrics.jsonl": expected["metrics.jsonl"]} == expected
    assert mark == len("row 1\n") * 9 + len("row 10\n")


def ending(real, left: list[int]):
    """A method of the store that fails after so many calls of all such methods."""

    def call(self, *arguments, **more):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("power is off")
        return real(self, *arguments, **more)

    return call


def test_wherever_an_upload_ends_there_is_a_checkpoint_with_its_logs(tmp_path, monkeypatch, capsys):
    """And the next process on the same folder completes it, after which the old checkpoint is gone."""
    outcomes = set()
    for operations in range(40):
        fsspec.filesystem("memory").store.clear()
        run = trained(tmp_path / f"run-{operations}", 7)
        copy = copy_of(run)
        assert copy.attempt() == ""
        for number in range(8, 13):
            run.step(number)
            if number == 10:
                run.save(10)
        left = [operations]
        with monkeypatch.context() as patch:
            store = type(copy.bucket.fs)
            for name in ("pipe_file", "put_file", "rm_file"):
                patch.setattr(store, name, ending(getattr(store, name), left))
            failed = copy.attempt()
        other = brought(tmp_path / f"other-{operations}")
        assert other.resumed() in (rows(5), rows(10))
        assert json.loads((other.folder / "checkpoints.json").read_text())["newest"] <= other.steps()[-1]
        outcomes.add((bool(failed), other.steps()[-1]))
        if not failed:
            break
        assert copy_of(run).attempt() == ""
        assert brought(tmp_path / f"again-{operations}").resumed() == rows(10)
    assert outcomes == {(True, 5), (True, 10), (False, 10)}
    assert "is damaged" not in capsys.readouterr().err  # what is not complete is absent
    assert not [name for name in Bucket(URL).names() if name.startswith(("checkpoints/5/", "logs/5/"))]


def test_a_checkpoint_that_is_removed_during_its_upload_arrives(tmp_path, monkeypatch):
    """Otherwise a run that saves faster than its bucket takes would never have any there."""
    run = trained(tmp_path / "run", 5)
    copy, real = copy_of(run), Bucket.upload

    def slow(self, *arguments):
        if run.steps() == [5]:
            run.step(6)
            run.save(6)
        real(self, *arguments)

    monkeypatch.setattr(Bucket, "upload", slow)
    assert copy.attempt() == ""
    assert run.steps() == [6]
    assert brought(tmp_path / "other").resumed() == rows(5)
    assert copy.attempt() == ""
    assert brought(tmp_path / "another").steps() == [6]


def test_after_a_rewind_no_checkpoint_is_ahead_of_the_logs(tmp_path, monkeypatch):
    """The run goes back to step 5 while step 10 is in the bucket, and comes to another step 10."""
    run = trained(tmp_path / "run", 5)
    copy = copy_of(run)
    assert copy.attempt() == ""
    for number in range(6, 11):
        run.step(number)
    run.save(10, keep=2)
    assert copy.attempt() == ""
    shutil.rmtree(run.folder / "checkpoints" / "10")
    (run.folder / "metrics.jsonl").write_text("".join(f"row {n}\n" for n in range(1, 6)))
    real, ahead = Bucket.write, []

    def looked(self, name, data):
        real(self, name, data)
        ahead.append(brought(tmp_path / f"other-{len(ahead)}").resumed())

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write", looked)
        assert copy.attempt() == ""
    assert ahead[0] == rows(10)  # that of before, with its own logs
    assert brought(tmp_path / "back").resumed() == rows(5)
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write("other row\n")
    run.save(10, keep=2)
    assert copy.attempt() == ""
    assert brought(tmp_path / "new").resumed() == [*rows(5), "other row"]


def test_the_last_checkpoint_of_a_run_stays_until_the_next_is_there(tmp_path):
    """Between the end of a save, which removes the one before it, and its checksums."""
    run = trained(tmp_path / "run", 5)
    copy = copy_of(run)
    assert copy.attempt() == ""
    run.save(6)
    lists = run.folder / "checkpoints" / "6" / "checksums-0-of-1.json"
    sums = lists.read_bytes()
    lists.unlink()
    assert copy.attempt() == ""
    assert brought(tmp_path / "other").steps() == [5]
    lists.write_bytes(sums)
    assert copy.attempt() == ""
    assert brought(tmp_path / "another").steps() == [6]


def test_another_checkpoint_of_the_same_step_takes_the_place_of_the_first(tmp_path):
    run = trained(tmp_path / "run", 5)
    (run.folder / "checkpoints" / "5" / "state" / "old").write_text("")
    copy = copy_of(run)
    assert copy.attempt() == ""
    shutil.rmtree(run.folder / "checkpoints" / "5")
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write("more\n")
    run.save(5)
    assert copy.attempt() == ""
    assert brought(tmp_path / "other").resumed() == [*rows(5), "more"]
    assert "checkpoints/5/state/old" not in Bucket(URL).names()


def test_what_this_process_has_not_seen_is_not_removed(tmp_path):
    """Milestones of a machine that is gone."""
    assert copy_of(trained(tmp_path / "run", 5)).attempt() == ""
    assert copy_of(trained(tmp_path / "new" / "run", 10, every=10)).attempt() == ""
    assert brought(tmp_path / "other").steps() == [5, 10]


def test_a_damaged_checkpoint_in_the_bucket_is_named_and_the_one_before_it_is_used(tmp_path, capsys):
    run = trained(tmp_path / "run", 5)
    copy = copy_of(run)
    copy.attempt()
    for number in range(6, 11):
        run.step(number)
    run.save(10, keep=2)
    copy.attempt()
    name = "/bucket/run/checkpoints/10/state/array"
    damaged = bytearray(fsspec.filesystem("memory").cat_file(name))
    damaged[7] ^= 4
    fsspec.filesystem("memory").pipe_file(name, bytes(damaged))
    other = brought(tmp_path / "other")
    assert other.resumed() == rows(5)
    assert "memory://bucket/run/checkpoints/10/ is damaged (state/array has other bytes" in capsys.readouterr().err
    for number in range(6, 11):
        other.step(number)
    shutil.copytree(run.folder / "checkpoints" / "10", other.folder / "checkpoints" / "10")
    assert copy_of(other).attempt() == ""  # the good one takes its place, though the bucket has one of this step
    assert brought(tmp_path / "third").steps() == [5, 10]


def test_a_file_that_is_removed_here_is_removed_there(tmp_path):
    """Also one that was brought: a run that goes on removes curves that its checkpoint does not know."""
    run = trained(tmp_path / "run", 5)
    (run.folder / "tb").mkdir()
    for name in ("tb/events.1", "error.txt"):
        (run.folder / name).write_text(name)
    copy_of(run).attempt()
    other = brought(tmp_path / "other")
    copy = copy_of(other)
    (other.folder / "tb" / "events.1").unlink()
    assert copy.attempt() == ""
    (other.folder / "error.txt").unlink()
    assert copy.attempt() == ""
    assert {"metrics.jsonl", "config.json"} < set(Bucket(URL).names())
    assert not {"tb/events.1", "error.txt"} & set(Bucket(URL).names())


def test_a_newer_folder_is_left_as_it_is(tmp_path):
    run = trained(tmp_path / "run", 5)
    copy_of(run).attempt()
    for number in range(6, 11):
        run.step(number)
    run.save(10)
    before = content(run.folder)
    working._bring(Bucket(URL), run.folder, tmp_path / "stage")
    assert content(run.folder) == before


@pytest.mark.parametrize("name", ["../../evil", "{out}", "/{out}", "a/{out}", "a//b", "a/./b", "/"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name, tmp_path):
    """An absolute path too, which an empty part of a name leaves."""
    Bucket(URL).write("good", b"x")
    store = fsspec.filesystem("memory").store
    store[f"/bucket/run/{name.format(out=tmp_path / 'evil.csv')}"] = store["/bucket/run/good"]
    for read in (fetched, lambda url: working_folder(url).__enter__()):
        with pytest.raises(RemoteError, match="would lead out of a folder"):
            read(Path(URL))
    assert not (tmp_path / "evil.csv").exists()


def test_the_object_of_a_folder_is_no_file():
    Bucket(URL).write("good", b"x")
    store = fsspec.filesystem("memory").store
    store["/bucket/run/"] = store["/bucket/run/a/"] = store["/bucket/run/good"]
    assert set(Bucket(URL).names()) == {"good"}


def test_a_table_whose_name_leads_out_of_the_folder_is_not_read(tmp_path):
    Bucket(URL).write("runs.csv", b"run_id\n")
    store = fsspec.filesystem("memory").store
    for name in (tmp_path / "evil.csv", f"a/{tmp_path}/evil.csv", f"../../{tmp_path}/evil.csv"):
        store[f"/bucket/run/{name}"] = store["/bucket/run/runs.csv"]
    assert [path.name for path in local(URL).rglob("*")] == ["runs.csv"]
    assert not (tmp_path / "evil.csv").exists()


@pytest.mark.parametrize("scheme", ["file", "local"])
def test_a_url_of_this_machine_is_refused(scheme, tmp_path, monkeypatch):
    """It would be a relative path, because `Path` makes one slash of three."""
    monkeypatch.chdir(tmp_path)
    url = Path(f"{scheme}://{tmp_path}/run")
    for error, use in (
        (ConfigError, lambda: working_folder(url).__enter__()),
        (ConfigError, lambda: fetched(url)),
        (ScalingError, lambda: local(url)),
    ):
        with pytest.raises(error, match=rf"is of this machine: give the path, {tmp_path}/run$"):
            use()
    assert not list(tmp_path.iterdir())


# ---- broken connections ----


def test_what_a_broken_download_leaves_does_not_count(tmp_path, monkeypatch):
    """Neither in a folder to work in nor in one to read."""
    run = trained(tmp_path / "run", 5)
    whole = (run.folder / "metrics.jsonl").read_bytes()
    assert copy_of(run).attempt() == ""
    store = type(fsspec.filesystem("memory"))
    real = store.get_file

    def broken(self, source, target, **more):
        real(self, source, target, **more)
        if "checkpoints/" not in source:
            os.truncate(target, 3)
            raise OSError("connection lost")

    for use in (lambda: brought(tmp_path / "other").folder, lambda: fetched(Path(URL))):
        with monkeypatch.context() as patch:
            patch.setattr(store, "get_file", broken)
            with pytest.raises(RemoteError, match="connection lost"):
                use()
        folder = use()
        assert (folder / "metrics.jsonl").read_bytes() == whole
        assert (folder / "config.json").read_text() == "{}"
        assert not list(folder.glob(".*"))


def test_what_a_killed_download_leaves_is_removed(tmp_path):
    (tmp_path / "other" / ".incoming").mkdir(parents=True)
    (tmp_path / "other" / ".incoming" / "0").write_text("half")
    assert copy_of(trained(tmp_path / "run", 5)).attempt() == ""
    assert not (brought(tmp_path / "other").folder / ".incoming").exists()


def test_a_file_that_is_read_stays_as_it_is_when_another_is_fetched():
    """A server has it mapped: what is truncated under it would kill it."""
    Bucket(URL).write("model.safetensors", b"1" * 5000)
    with (fetched(Path(URL)) / "model.safetensors").open("rb") as served:
        Bucket(URL).write("model.safetensors", b"2")
        assert (fetched(Path(URL)) / "model.safetensors").read_bytes() == b"2"
        assert served.read() == b"1" * 5000


def test_a_checkpoint_that_could_not_be_sent_takes_no_room_once_another_follows(tmp_path, monkeypatch):
    run = trained(tmp_path / "run", 5)
    copy = copy_of(run)
    staged = lambda: {path.name for kind in ("checkpoints", "logs") for path in copy.stage.glob(f"{kind}/*")}

    def refused(*_):
        raise RemoteError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "upload", refused)
        for number in (6, 7, 8):
            run.step(number)
            run.save(number)
            assert copy.attempt() == "out of order"
            assert staged() == {str(number)}
    assert copy.attempt() == ""
    assert not staged()
    assert brought(tmp_path / "other").resumed() == rows(8)


def test_what_somebody_else_has_removed_there_need_not_be_removed(tmp_path):
    run = trained(tmp_path / "run", 5)
    copy = copy_of(run)
    assert copy.attempt() == ""
    (run.folder / "config.json").unlink()
    fsspec.filesystem("memory").rm_file("/bucket/run/config.json")
    assert copy.attempt() == ""


@pytest.mark.parametrize("list_of", [layout.others, layout.lists])
def test_a_folder_that_goes_while_it_is_listed_is_no_failure(list_of, tmp_path, monkeypatch):
    """As a checkpoint that another thread removes, and a profile."""
    run, real = trained(tmp_path / "run", 5), os.scandir
    (run.folder / "profile" / "a").mkdir(parents=True)

    def gone(path):
        if str(path).endswith(("profile", "checkpoints/5")):
            Path(path).rename(tmp_path / Path(path).name)
        return real(path)

    monkeypatch.setattr(os, "scandir", gone)
    found = [name for name in list_of(run.folder) if not name.startswith("checkpoints/")]
    assert found == (["checkpoints.json", "config.json", "metrics.jsonl"] if list_of is layout.others else [])
    assert not (run.folder / "profile").exists()


# ---- the lease ----


def test_a_holder_that_lives_is_named_and_one_that_was_killed_gives_way(monkeypatch):
    monkeypatch.setattr("mmfree_jax.remote.lease.STALE_SECONDS", 1.0)
    first, second = Lease(Bucket(URL)), Lease(Bucket(URL))
    first.host = "far-away"
    first.take()
    beating = threading.Timer(0.3, first.beat)
    beating.start()
    with pytest.raises(RemoteError, match=rf"^memory://bucket/run: process {os.getpid()} on far-away is working here"):
        second.take()
    beating.join()
    second.release()  # gives nothing away: it is not the holder
    began = time.monotonic()
    second.take()  # nobody beats
    assert 0.9 < time.monotonic() - began < 5
    assert second.run == first.run
    first.beat()
    assert first.successor == f"process {os.getpid()} on {os.uname().nodename}"
    first.release()  # nor does this
    second.beat()
    assert not second.successor
    second.release()
    began = time.monotonic()
    Lease(Bucket(URL)).take()
    assert time.monotonic() - began < 0.5


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for():
    gone = {"run": "r", "token": "t", "beats": 3, **here(), "pid": 2**22 + 1}
    Bucket(URL).write(LEASE, json.dumps(gone).encode())
    began = time.monotonic()
    Lease(Bucket(URL)).take()
    assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("other", ["host", "boot", "space"])
def test_a_process_of_another_machine_or_container_may_live_whatever_its_number_is_here(other, monkeypatch):
    """Containers often have the same host name, and no number of one means anything in another."""
    monkeypatch.setattr("mmfree_jax.remote.lease.STALE_SECONDS", 0.5)
    if not here()[other]:
        pytest.skip("this system does not say")
    held = {"run": "r", "token": "t", "beats": 3, **here(), "pid": 2**22 + 1, other: "elsewhere"}
    Bucket(URL).write(LEASE, json.dumps(held).encode())
    began = time.monotonic()
    Lease(Bucket(URL)).take()
    assert time.monotonic() - began > 0.4


def test_of_two_that_come_at_once_one_goes(monkeypatch):
    first, second = Lease(Bucket(URL)), Lease(Bucket(URL))
    monkeypatch.setattr("mmfree_jax.remote.lease.SETTLE_SECONDS", 0.3)
    failures = []

    def take(lease):
        try:
            lease.take()
        except RemoteError as error:
            failures.append(error)

    threads = [threading.Thread(target=take, args=(lease,)) for lease in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) == 1


def lease_of(pid: str) -> bytes:
    return b'{"run": "r", "token": "t", "beats": 1, "host": "h", "pid": %s}' % pid.encode()


NONE = [b"", b"[]", b'{"pid": "x"}', b"\xff", b"[" * 100_000, *map(lease_of, ("-1", "0", "1" + "0" * 30, "1e999"))]


@pytest.mark.parametrize("content", NONE)
def test_a_lease_that_is_none_is_named(content):
    Bucket(URL).write(LEASE, content)
    with pytest.raises(RemoteError, match=r"\.lease\.json does not name a process: remove it"):
        Lease(Bucket(URL)).take()


# ---- the folder to work in ----


def test_a_folder_is_itself_and_a_url_is_a_folder_whose_content_outlives_it(tmp_path):
    with working_folder(tmp_path / "here") as folder:
        assert folder == tmp_path / "here"
    with working_folder(Path(URL)) as folder:
        trained(folder, 12)
    shutil.rmtree(tmp_path / "cache")
    with working_folder(Path(URL)) as folder:
        assert Run(folder).resumed() == rows(10)
        (folder / "result.json").write_text("{}")
    assert (fetched(Path(URL)) / "result.json").read_text() == "{}"


def test_a_second_process_of_this_machine_is_refused_at_once():
    says = rf"^memory://bucket/run: .* another process is working here \(process {os.getpid()} on "
    with working_folder(Path(URL)) as folder:
        trained(folder, 5)
        with pytest.raises(RemoteError, match=says):
            working_folder(Path(URL)).__enter__()
    assert "checkpoints/5/state/array" in Bucket(URL).names()


@pytest.mark.parametrize(
    ("path", "url"),
    [
        (Path("s3://b/run"), "s3://b/run"),
        ("s3://b/run", "s3://b/run"),
        (Path("gs://b/a/b[lr=3e-3]"), "gs://b/a/b[lr=3e-3]"),
        (Path("runs/a:b/c"), ""),
        (Path("/s3:/b"), ""),
        (Path("C:/runs"), ""),
        ("hf:some/name", ""),
        (Path("s3:"), ""),
    ],
)
def test_what_is_a_url(path, url):
    assert url_of(path) == url


def test_what_failed_is_copied_and_the_failure_stays(tmp_path):
    def failing():
        with working_folder(Path(URL)) as folder:
            trained(folder, 5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert brought(tmp_path / "other").steps() == [5]


def test_a_run_does_not_end_well_before_everything_is_there(monkeypatch, capsys):
    monkeypatch.setattr("mmfree_jax.remote.copy.PATIENCE_SECONDS", 2.5)

    calls = []

    def refused(*_, **__):
        calls.append(time.monotonic())
        raise OSError("out of order")

    def failing(patch):
        with working_folder(Path(URL)) as folder:
            trained(folder, 5)
            patch.setattr(type(fsspec.filesystem("memory")), "put_file", refused)

    says = "^memory://bucket/run: OSError: out of order: not everything is there"
    with monkeypatch.context() as patch, pytest.raises(NotCopied, match=says):
        failing(patch)
    assert calls[-1] - calls[0] > 0.9  # tried again, after a second
    assert capsys.readouterr().err.count("out of order: the run goes on") == 1
    with working_folder(Path(URL)):
        pass
    assert "checkpoints/5/state/array" in Bucket(URL).names()


def test_what_somebody_removed_from_the_bucket_is_there_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("mmfree_jax.remote.copy.PERIOD_SECONDS", 0.05)
    gone = ("metrics.jsonl", "checkpoints/5/state/array", "checkpoints/5/checksums-0-of-1.json")
    with working_folder(Path(URL)) as folder:
        trained(folder, 5)
        deadline = time.monotonic() + 20
        while "checkpoints.json" not in Bucket(URL).names():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for name in gone:
            fsspec.filesystem("memory").rm_file(f"/bucket/run/{name}")
    assert brought(tmp_path / "other").resumed() == rows(5)
    assert {*gone} <= Bucket(URL).names().keys()


def test_who_is_taken_over_stops_and_copies_nothing_more(monkeypatch, capsys):
    monkeypatch.setattr("mmfree_jax.remote.working.BEAT_SECONDS", 0.1)
    signals = []
    monkeypatch.setattr("os.kill", lambda *sent: signals.append(sent))

    def taken_over():
        with working_folder(Path(URL)) as folder:
            held = json.loads(Bucket(URL).read(LEASE))
            Bucket(URL).write(LEASE, json.dumps({**held, "token": "x", "pid": 7, "host": "elsewhere"}).encode())
            deadline = time.monotonic() + 10
            while not signals:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            trained(folder, 5)

    with pytest.raises(RemoteError, match="process 7 on elsewhere has taken over"):
        taken_over()
    assert signals == [(os.getpid(), 15)]
    assert set(Bucket(URL).names()) == {LEASE}
    assert json.loads(Bucket(URL).read(LEASE))["token"] == "x"


def slowed(monkeypatch, name: str, seconds: float, seen: list) -> None:
    """Writing an object of this name takes time; `seen` gets what the lease says afterwards."""
    real = Bucket.write

    def write(self, one, data):
        if one == name:
            time.sleep(seconds)
        real(self, one, data)
        if one == name:
            seen.append(json.loads(self.read(LEASE)))

    monkeypatch.setattr(Bucket, "write", write)


def test_the_last_upload_has_a_heartbeat(monkeypatch):
    """Or another machine would take over a process that lives."""
    monkeypatch.setattr("mmfree_jax.remote.working.BEAT_SECONDS", 0.05)
    seen: list[dict] = []
    slowed(monkeypatch, "result.json", 0.5, seen)
    with working_folder(Path(URL)) as folder:
        folder.mkdir(parents=True)
        (folder / "result.json").write_text("{}")
        before = int(json.loads(Bucket(URL).read(LEASE))["beats"])
    assert seen[0]["beats"] > before + 3
    assert json.loads(Bucket(URL).read(LEASE))["token"] == ""


def test_who_is_taken_over_during_the_last_upload_says_so_and_leaves_the_lease(monkeypatch):
    monkeypatch.setattr("mmfree_jax.remote.working.BEAT_SECONDS", 30.0)  # no heartbeat sees it
    signals, real = [], Bucket.write

    def write(self, name, data):
        real(self, name, data)
        if name == "result.json":
            held = json.loads(self.read(LEASE))
            real(self, LEASE, json.dumps({**held, "token": "x", "pid": 7, "host": "elsewhere"}).encode())

    monkeypatch.setattr(Bucket, "write", write)
    monkeypatch.setattr("os.kill", lambda *sent: signals.append(sent))

    def finished():
        with working_folder(Path(URL)) as folder:
            folder.mkdir(parents=True)
            (folder / "result.json").write_text("{}")

    with pytest.raises(RemoteError, match="process 7 on elsewhere has taken over"):
        finished()
    assert not signals  # nobody is there any more who would save on a signal
    assert json.loads(Bucket(URL).read(LEASE))["token"] == "x"


def test_a_lease_that_was_given_back_is_taken_again_and_that_of_another_is_not_given_back():
    first = Lease(Bucket(URL))
    first.take()
    held = json.loads(Bucket(URL).read(LEASE))
    Bucket(URL).write(LEASE, json.dumps({**held, "token": "x"}).encode())
    first.release()  # before a heartbeat has seen the successor
    assert json.loads(Bucket(URL).read(LEASE))["token"] == "x"
    Bucket(URL).write(LEASE, json.dumps({**held, "token": ""}).encode())
    first.beat()
    assert not first.successor
    assert json.loads(Bucket(URL).read(LEASE))["token"] == first.token


def test_who_is_taken_over_in_the_middle_of_a_pass_ends_the_pass(tmp_path, monkeypatch):
    run = trained(tmp_path / "run", 12)
    copy, real = copy_of(run), Bucket.upload

    def upload(self, *arguments):
        real(self, *arguments)
        self.closed = "process 7 on elsewhere has taken over"

    monkeypatch.setattr(Bucket, "upload", upload)
    with pytest.raises(Closed, match=r"^memory://bucket/run: process 7 on elsewhere has taken over"):
        copy.attempt()
    names = set(Bucket(URL).names())
    assert "checkpoints/10/state/array" in names
    assert not {"checkpoints/10/checksums-0-of-1.json", "checkpoints.json"} & names
    with pytest.raises(Closed):
        copy.bucket.delete(["metrics.jsonl"])
    with pytest.raises(Closed):
        copy.finish()  # and does not wait


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_nothing_is_written_after_the_lease_was_given_back(kind, monkeypatch):
    """Where a run is left in haste."""
    monkeypatch.setattr("mmfree_jax.remote.copy.PERIOD_SECONDS", 0.01)
    seen, begun, real = [], threading.Event(), Bucket.write

    def write(self, name, data):
        if name != LEASE:
            begun.set()
            time.sleep(0.2)
            seen.append(json.loads(self.read(LEASE))["token"])
        real(self, name, data)

    monkeypatch.setattr(Bucket, "write", write)

    def left():
        with working_folder(Path(URL)) as folder:
            trained(folder, 3)
            assert begun.wait(10)
            raise kind

    with pytest.raises(kind):
        left()
    count = len(seen)
    time.sleep(0.3)
    assert len(seen) == count == 1  # of two files
    assert all(seen)
    assert json.loads(Bucket(URL).read(LEASE))["token"] == ""


def test_a_folder_of_another_run_at_the_url_is_not_put_there():
    with working_folder(Path(URL)) as folder:
        trained(folder, 5)
    fsspec.filesystem("memory").store.clear()
    for _ in range(2):
        with pytest.raises(RemoteError, match=r"^memory://bucket/run is not what .* is a copy of"):
            working_folder(Path(URL)).__enter__()
    assert set(Bucket(URL).names()) == {LEASE}
    shutil.rmtree(folder)
    with working_folder(Path(URL)) as again:
        assert not again.exists()


# ---- a machine that comes back ----


@pytest.fixture
def on(tmp_path, monkeypatch):
    """Lets what follows happen on a machine."""
    return lambda machine: monkeypatch.setenv("MMFREE_JAX_CACHE", str(tmp_path / machine))


def write(folder, **content) -> None:
    for stem, text in content.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}.txt").write_text(text)


def texts(folder) -> dict[str, str]:
    return {path.stem: path.read_text() for path in folder.glob("*.txt")}


def test_what_another_machine_has_written_since_is_brought_and_what_it_removed_is_removed(on):
    """With the same last checkpoint, as of a run that was stopped before its held-out loss."""
    on("a")
    with working_folder(Path(URL)) as folder:
        trained(folder, 5)
        write(folder, log="a", error="a")
    on("b")
    with working_folder(Path(URL)) as folder:
        assert texts(folder) == {"log": "a", "error": "a"}
        write(folder, log="b", more="b")
        (folder / "error.txt").unlink()
    on("a")
    for _ in range(2):
        with working_folder(Path(URL)) as folder:
            assert texts(folder) == {"log": "b", "more": "b"}
    assert Bucket(URL).read("log.txt") == b"b"
    assert Bucket(URL).read("error.txt") is None


def test_what_was_not_sent_stays_if_no_other_machine_has_written_since(on):
    """As after SIGKILL."""
    on("a")
    with working_folder(Path(URL)) as folder:
        write(folder, log="a", error="a")
    write(folder, log="longer")
    (folder / "error.txt").unlink()
    with working_folder(Path(URL)) as folder:
        assert texts(folder)["log"] == "longer"
    assert Bucket(URL).read("log.txt") == b"longer"


@pytest.mark.parametrize("further", ["checkpoint", "result"])
def test_a_run_that_has_come_further_here_stays_as_it_is(further, on):
    on("a")
    with working_folder(Path(URL)) as folder:
        trained(folder / "runs" / "a", 5)
        write(folder / "runs" / "a", log="a")
        write(folder, table="a")
    write(folder / "runs" / "a", log="further")
    if further == "checkpoint":
        Run(folder / "runs" / "a").save(6)
    else:
        (folder / "runs" / "a" / "result.json").write_text("{}")
    on("b")
    with working_folder(Path(URL)) as folder:
        write(folder / "runs" / "a", log="b")
        write(folder, table="b")
    on("a")
    with working_folder(Path(URL)) as folder:
        assert texts(folder / "runs" / "a") == {"log": "further"}
        assert texts(folder) == {"table": "b"}


def test_a_machine_that_was_killed_while_it_brought_things_brings_them_the_next_time(on, monkeypatch):
    on("a")
    with working_folder(Path(URL)) as folder:
        write(folder, log="a")
    on("b")
    with working_folder(Path(URL)) as folder:
        write(folder, log="b")
    on("a")
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "download", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            working_folder(Path(URL)).__enter__()
    with working_folder(Path(URL)) as folder:
        assert texts(folder) == {"log": "b"}


# ---- several processes ----


class Second:
    """What the second of two processes is told by the first: a number, and whether that sees its own file."""

    def __init__(self, monkeypatch):
        self.told = iter([5, 1])
        for module in (working, reading):
            monkeypatch.setattr(module, "is_alone", lambda: False)
            monkeypatch.setattr(module, "first_does", lambda _: None)
        monkeypatch.setattr(working, "is_first", lambda: False)
        monkeypatch.setattr(working, "sum_integers", lambda own: [next(self.told) + own[0]])
        monkeypatch.setattr("jax.process_count", lambda: 2)

    def share(self) -> Path:
        """The folder of the first process, where it has written."""
        home = working.home_of(URL)
        for folder in (home, home / "read"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".seen-5").touch()
        return home


def test_a_process_that_does_not_share_the_folder_is_named_though_it_knows_the_url(monkeypatch):
    with working_folder(Path(URL)) as folder:
        trained(folder, 5)
    fetched(Path(URL))
    for use in (lambda url: working_folder(url).__enter__(), fetched):
        with monkeypatch.context() as patch:
            Second(patch)
            with pytest.raises(ConfigError, match=r"^memory://bucket/run: not all processes of this run share the fol"):
                use(Path(URL))
    Second(monkeypatch).share()
    assert fetched(Path(URL)).exists()


def ended_in_a_thread(kind: type[BaseException] | None) -> tuple[threading.Thread, list]:
    """A run that ends with this exception, and with what it ended."""
    outcome = []

    def run():
        try:
            with working_folder(Path(URL)):
                if kind is not None:
                    raise kind
            outcome.append(None)
        except BaseException as error:
            outcome.append(type(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


@pytest.mark.parametrize("kind", [None, ZeroDivisionError, KeyboardInterrupt])
def test_however_a_run_ends_the_others_wait_for_the_last_upload_of_the_first(kind, monkeypatch):
    monkeypatch.setattr(working, "LOOK_SECONDS", 0.01)
    home = Second(monkeypatch).share()
    thread, outcome = ended_in_a_thread(kind)
    (home / "ending").touch()
    thread.join(0.2)
    assert thread.is_alive()
    (home / "ended").touch()
    thread.join(10)
    assert outcome == [kind]


@pytest.mark.parametrize(("kind", "seconds"), [(ZeroDivisionError, 0.1), (PeerLost, 60.0)])
def test_nobody_waits_for_a_first_process_that_does_not_end(kind, seconds, monkeypatch):
    """It may wait for this one, or be gone."""
    monkeypatch.setattr(working, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(working, "FOLLOW_SECONDS", seconds)
    Second(monkeypatch).share()
    thread, outcome = ended_in_a_thread(kind)
    thread.join(5)
    assert outcome == [kind]


def test_the_first_process_says_when_everything_is_there(monkeypatch):
    """Also where the run has failed; what it said the last time is forgotten."""
    monkeypatch.setattr(working, "is_alone", lambda: False)
    home, said, real = working.home_of(URL), [], Bucket.write
    says = lambda: [(home / name).exists() for name in ("ending", "ended")]

    def write(self, name, data):
        if name == "error.txt":
            said.append(says())
        real(self, name, data)

    def failing():
        with working_folder(Path(URL)) as folder:
            said.append(says())
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "error.txt").write_text("Diverged")
            os.utime(folder / "error.txt", (time.time() + len(said),) * 2)
            raise ZeroDivisionError

    monkeypatch.setattr(Bucket, "write", write)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing()
        assert says() == [True, True]
    assert said == [[False, False], [True, False]] * 2


# ---- to read ----


def test_what_is_read_is_what_is_there_now(tmp_path):
    with working_folder(Path(URL)) as folder:
        trained(folder, 10)
        run = Run(folder)
        for number in (11, 12):
            run.step(number)
            run.save(number, keep=2)
        (folder / "error.txt").write_text("it")
    here = fetched(Path(URL))
    assert Run(here).steps() == [12]
    assert not (here / "logs").exists()
    assert Run(fetched(Path(URL), every=True)).steps() == [11, 12]
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/run/config.json", b"[]")  # of the same size
    store.rm_file("/bucket/run/error.txt")
    for name in Bucket(URL).names():
        if name.startswith("checkpoints/12/"):
            store.rm_file(f"/bucket/run/{name}")
    fetched(Path(URL))
    assert (here / "config.json").read_text() == "[]"
    assert Run(here).steps() == [11]
    assert not (here / "error.txt").exists()


def test_nothing_to_read_is_said():
    with pytest.raises(ConfigError, match=r"^memory://bucket/run holds nothing"):
        fetched(Path(URL))


@pytest.mark.parametrize("replaced", [2, 3])
def test_a_checkpoint_that_is_replaced_while_it_is_read_is_looked_for_again(replaced, tmp_path, monkeypatch):
    run = trained(tmp_path / "run", 5)
    copy, real, steps = copy_of(run), Bucket.download, []
    assert copy.attempt() == ""

    def download(self, *arguments):
        steps.append(6 + len(steps))
        if len(steps) <= replaced:
            run.step(steps[-1])
            run.save(steps[-1])
            assert copy.attempt() == ""
        real(self, *arguments)

    monkeypatch.setattr(Bucket, "download", download)
    if replaced < 3:
        assert Run(fetched(Path(URL))).resumed() == rows(7)
    else:
        with pytest.raises(RemoteError, match="FileNotFoundError"):
            fetched(Path(URL))
    assert len(steps) == 3
