"""Sweeps: what fails is named and does not take the rest with it; what is done stays done."""

import csv
import dataclasses
import importlib.metadata
import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from mmfree_jax.config import ConfigError, MeshConfig, RunConfig
from mmfree_jax.data import resolve_data
from mmfree_jax.files import locked, write_json
from mmfree_jax.run_folder import claim, read_run
from mmfree_jax.sweep.executor import open_chains
from mmfree_jax.sweep.experiment import Study, trunk_and_decays
from mmfree_jax.sweep.local import Local, Slot, combine_slots, find_slots, this_machine
from mmfree_jax.sweep.status import collect, run_folder, status
from mmfree_jax.sweep.study import prepare, sweep
from mmfree_jax.sweep.view import View
from mmfree_jax.training.loop import train
from tests.conftest import tiny_run

SLOTS = [Slot("one", {"JAX_PLATFORMS": "cpu"}, frozenset(os.sched_getaffinity(0)))]


def states(out, runs) -> list[str]:
    return [status(run_folder(out, run), run).state for run in runs]


@pytest.fixture(autouse=True)
def cache(programs, monkeypatch):
    monkeypatch.setenv("MMFREE_JAX_CACHE", str(programs))


@pytest.mark.slow
def test_a_failing_trunk_takes_its_branches_with_it_and_nothing_else(token_set, tmp_path):
    bad = tiny_run("transformer++", token_set.path, name="bad")
    bad = dataclasses.replace(bad, optim=dataclasses.replace(bad.optim, lr=1e30, clip=0.0, warmup_steps=0))
    good = tiny_run("matmul-free", token_set.path, name="good", steps=8)
    runs = (
        *trunk_and_decays(bad, (6, 12)),
        dataclasses.replace(good, optim=dataclasses.replace(good.optim, decay_steps=0)),
    )
    study = Study("s", "t", runs, "a")
    text = io.StringIO()
    assert sweep(study, tmp_path / "out", Console(file=text, width=200), Local(find_slots())) == 1
    assert states(tmp_path / "out", runs) == ["failed", "failed", "failed", "done"]
    trunk, branch = (status(run_folder(tmp_path / "out", run), run).error for run in runs[:2])
    assert "Diverged: bad-trunk: loss" in trunk
    assert branch == "not started: its trunk bad-trunk failed"
    assert "lower optim.lr" in text.getvalue()
    with (tmp_path / "out" / "runs.csv").open() as file:
        assert [row["run_id"] for row in csv.DictReader(file)] == ["good"]


def test_a_worker_killed_twice_is_reported_with_its_signal(tmp_path, monkeypatch):
    """As the kernel does to a process that takes too much memory."""
    run = tiny_run("matmul-free", Path("c"))
    claim(run, run_folder(tmp_path, run))
    starts = tmp_path / "starts"
    monkeypatch.setattr(
        "mmfree_jax.sweep.executor.WORKER", ("/bin/sh", "-c", f"echo begun | tee -a {starts}; kill -9 $$")
    )
    assert Local(SLOTS).execute(tmp_path, open_chains(tmp_path, [run]), lambda: None) == 0
    assert starts.read_text().count("begun") == 2
    found = status(run_folder(tmp_path, run), run)
    assert found.state == "failed"
    assert found.error == "its worker was killed by SIGKILL; its last words: begun"


def test_a_chain_that_goes_on_gets_no_more_starts_in_vain_than_a_new_one(tmp_path, monkeypatch):
    run = tiny_run("matmul-free", Path("c"))
    claim(run, run_folder(tmp_path, run))
    (run_folder(tmp_path, run) / "checkpoints" / "10").mkdir(parents=True)
    starts = tmp_path / "starts"
    monkeypatch.setattr("mmfree_jax.sweep.executor.WORKER", ("/bin/sh", "-c", f"echo begun >> {starts}; kill -9 $$"))
    assert Local(SLOTS).execute(tmp_path, open_chains(tmp_path, [run]), lambda: None) == 0
    assert starts.read_text().count("begun") == 2


def test_a_folder_that_another_process_holds_is_given_up_without_a_trace_in_it(tmp_path, monkeypatch):
    run = tiny_run("matmul-free", Path("c"))
    folder = run_folder(tmp_path, run)
    claim(run, folder)
    before = sorted(path.name for path in folder.iterdir())
    starts = tmp_path / "starts"
    monkeypatch.setattr("mmfree_jax.sweep.executor.WORKER", ("/bin/sh", "-c", f"echo begun >> {starts}; exit 1"))
    work = open_chains(tmp_path, [run])
    with locked(folder):
        assert Local(SLOTS).execute(tmp_path, work, lambda: None) == 0
        assert status(folder, run).state == "running"
    assert starts.read_text().count("begun") == 2
    assert sorted(path.name for path in folder.iterdir()) == [".lock", *before]


@pytest.mark.parametrize(("chips", "devices", "rooms"), [(4, 1, 4), (4, 4, 1), (1, 1, 1)])
def test_a_host_of_tpus_gives_each_worker_a_chip_or_one_worker_all(chips, devices, rooms, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr("mmfree_jax.sweep.local._visible_gpus", lambda: [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "libtpu" or None)
    found = {"/dev/accel[0-9]*": [f"/dev/accel{i}" for i in range(chips)]}
    monkeypatch.setattr("mmfree_jax.sweep.local.glob.glob", lambda pattern: found.get(pattern, []))
    host = this_machine()
    assert [slot.env for slot in host.slots] == [{"TPU_VISIBLE_CHIPS": str(i)} for i in range(chips)]
    run = meshed("r", devices)
    room = host.room([run])
    assert chips // room == rooms
    env = combine_slots(host.slots[:room], devices).env
    if devices == 1:
        assert (env["TPU_VISIBLE_CHIPS"], env["TPU_PROCESS_BOUNDS"]) == ("0", "1,1,1")
        assert host.plan([run])[0].endswith("one a TPU chip")
    else:
        assert env == {}  # as outside a sweep
    with pytest.raises(ConfigError, match="a TPU chip belongs to one worker"):
        this_machine(2)
    if chips == 4:
        with pytest.raises(ConfigError, match="2 of the 4 TPU chips of a host: use one, or all"):
            host.room([meshed("r", 2)])
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert find_slots()[0].name.startswith("cpu")


def meshed(name: str, devices: int) -> RunConfig:
    return tiny_run("matmul-free", Path("c"), name=name, mesh=MeshConfig(data=devices))


# One line when it begins, one when it ends, with its name and its GPUs.
SHARING = """
name=$2
echo "begins $name $CUDA_VISIBLE_DEVICES" >> "$LOG"; sleep 0.3; echo "ends $name $CUDA_VISIBLE_DEVICES" >> "$LOG"
echo '{"loss": 1.0, "train_loss": 1.0}' > "$1/runs/$name/result.json"
"""


def test_a_run_takes_as_many_gpus_as_its_mesh_has_and_no_two_share_one(tmp_path, monkeypatch):
    runs = [meshed("pair", 2), meshed("all", 4), meshed("one", 1), meshed("other", 2)]
    for run in runs:
        claim(run, run_folder(tmp_path, run))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setattr("mmfree_jax.sweep.executor.WORKER", ("/bin/sh", "-c", SHARING, "sh"))
    cores = frozenset(os.sched_getaffinity(0))
    four = Local([Slot(f"gpu{g}", {"CUDA_VISIBLE_DEVICES": g}, cores) for g in "3012"])
    assert four.execute(tmp_path, [[run] for run in runs], lambda: None) == 0
    assert states(tmp_path, runs) == ["done"] * 4
    held: dict[str, set[str]] = {}
    order = []
    for what, name, gpus in map(str.split, (tmp_path / "log").read_text().splitlines()):
        if what == "ends":
            del held[name]
            continue
        order.append(name)
        assert not set(gpus.split(",")) & set().union(*held.values())
        held[name] = set(gpus.split(","))
        assert len(held[name]) == next(run.mesh.devices for run in runs if run.name == name)
    assert order[:2] == ["pair", "all"]  # what needs all of them is not overtaken for ever


def test_a_mesh_of_more_gpus_than_there_are_is_refused_before_anything_is_written(token_set, tmp_path):
    run = tiny_run("matmul-free", token_set.path, name="wide", mesh=MeshConfig(data=4))
    two = Local([Slot(f"gpu{g}", {"CUDA_VISIBLE_DEVICES": g}, frozenset([0])) for g in "01"])
    with pytest.raises(ConfigError, match="wide: its mesh needs 4 GPUs, and 2 may be used here"):
        sweep(Study("s", "t", (run,), "a"), tmp_path / "out", Console(file=io.StringIO()), two)
    assert not (tmp_path / "out" / "runs").exists()


def test_a_mesh_on_cpus_is_simulated_on_as_many_cores(token_set, tmp_path):
    run = tiny_run("matmul-free", token_set.path, mesh=MeshConfig(data=2))
    text = io.StringIO()
    assert sweep(Study("s", "t", (run,), "a"), tmp_path, Console(file=text, width=200), Local(find_slots())) == 0
    assert status(run_folder(tmp_path, run), run).result["devices"] == 2


@pytest.mark.parametrize(
    ("plugins", "visible", "gpus"),
    [(["xla_cuda13"], None, "012"), ([], None, ""), (["xla_cuda13"], "2,0", "20"), (["xla_cuda13"], "-1", "")],
)
def test_workers_are_for_the_gpus_that_jax_can_use(plugins, visible, gpus, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("pynvml.nvmlInit", lambda: None)
    monkeypatch.setattr("pynvml.nvmlDeviceGetCount", lambda: 3)
    found = [importlib.metadata.EntryPoint(name, f"jax_plugins.{name}", "jax_plugins") for name in plugins]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found)
    slots = find_slots()
    assert [slot.env.get("CUDA_VISIBLE_DEVICES") for slot in slots] == (list(gpus) or [None] * len(slots))
    (line,) = Local(slots).plan([tiny_run("matmul-free", Path("c"))])
    assert line.endswith("one a GPU" if gpus else "one a CPU core")


def test_a_run_in_progress_is_seen_from_outside_and_a_stopped_one_is_not_running(token_set, tmp_path):
    run = tiny_run("matmul-free", token_set.path)
    folder = run_folder(tmp_path, run)
    claim(run, folder)
    assert status(folder, run).state == "waiting"
    with locked(folder):
        assert status(folder, run).state == "running"
        (folder / "metrics.jsonl").write_text('{"step": 4, "loss": 2.5, "tokens_per_s": 10.0}\n{"step": 6, "lo')
        found = status(folder, run)
        assert (found.step, found.loss, found.tokens_per_s) == (4, 2.5, 10.0)
    assert status(folder, run).state == "stopped"


def test_a_run_that_was_saved_before_it_logged_anything_is_stopped_not_waiting(tmp_path):
    run = tiny_run("matmul-free", Path("c"))
    folder = run_folder(tmp_path, run)
    (folder / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir(parents=True)  # never finished
    assert status(folder, run).state == "waiting"
    for step in (3, 10):
        (folder / "checkpoints" / str(step)).mkdir()
    assert (status(folder, run).state, status(folder, run).step) == ("stopped", 10)


def test_a_finished_sweep_runs_nothing_and_an_edited_one_is_refused(token_set, tmp_path):
    run = tiny_run("matmul-free", token_set.path, steps=6)
    study = Study("s", "t", (run,), "a")
    claim(run, run_folder(tmp_path, run))
    write_json(run_folder(tmp_path, run) / "result.json", {"run_id": run.name, "loss": 2.0, "train_loss": 1.9})
    before = collect(tmp_path, study.runs).read_text()
    console = Console(file=io.StringIO())
    assert sweep(study, tmp_path, console, Local(SLOTS)) == 0
    assert (tmp_path / "runs.csv").read_text() == before
    assert not (tmp_path / "workers").exists()
    edited = Study("s", "t", (dataclasses.replace(run, seed=1),), "a")
    with pytest.raises(ConfigError, match=r"matmul-free-tiny \(seed is 0, not 1\). Rename them"):
        sweep(edited, tmp_path, console, Local(SLOTS))


def test_a_sweep_goes_on_from_another_working_directory(token_set, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "c").symlink_to(token_set.path)
    runs = tuple(tiny_run("matmul-free", Path("c"), name=name, steps=6) for name in ("one", "two"))
    study, out, console = Study("s", "t", runs, "a"), tmp_path / "out", Console(file=io.StringIO())
    monkeypatch.chdir(tmp_path)
    prepare(study, out, console)
    held = [read_run(run_folder(out, run) / "config.json") for run in runs]
    assert {(run.data.corpus, run.data.contents) for run in held} == {(str(tmp_path / "c"), (token_set.fingerprint,))}
    train(held[0], run_folder(out, runs[0]), resolve_data(held[0].data))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert prepare(study, out, console).fingerprint == token_set.fingerprint
    assert read_run(run_folder(out, runs[1]) / "config.json") == held[1]


@dataclasses.dataclass
class Stopped:
    """An executor that is stopped after some runs."""

    code: int
    done: int

    def plan(self, runs):
        return []

    def execute(self, out, work, watch):
        for chain in work[: self.done]:
            row = {"run_id": chain[0].name, "loss": 2.0, "train_loss": 1.9}
            write_json(run_folder(out, chain[0]) / "result.json", row)
        return self.code


@pytest.mark.parametrize(("code", "done"), [(130, 0), (75, 1)])
def test_a_sweep_that_is_stopped_ends_by_saying_so(code, done, token_set, tmp_path):
    runs = tuple(tiny_run("matmul-free", token_set.path, name=name) for name in ("one", "two"))
    text = io.StringIO()
    assert sweep(Study("s", "t", runs, "a"), tmp_path, Console(file=text, width=200), Stopped(code, done)) == code
    last = text.getvalue().splitlines()[-1]
    assert last == f"interrupted with {done} of 2 runs done: the same command goes on"
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 1 + done


def test_the_table_shows_a_line_a_run_and_fits_the_terminal(token_set, tmp_path):
    runs = [tiny_run("matmul-free", token_set.path, name=f"run-{i}") for i in range(30)]
    entries = [(run, run_folder(tmp_path, run)) for run in runs]
    for _, folder in entries[:10]:
        folder.mkdir(parents=True)
        (folder / "result.json").write_text('{"loss": 1.5, "train_loss": 1.0}')
    for height, shown in ((80, 30), (20, 14)):
        console = Console(file=io.StringIO(), width=120, height=height, force_terminal=True)
        view = View(entries, console)
        console.print(view.render())
        text = console.file.getvalue()
        rows = [line for line in text.splitlines() if "run-" in line]
        assert len(rows) == shown
        assert "10 done, 20 waiting" in text
        assert "33% of the FLOPs" in text
        assert "run-29" in rows[-1]
