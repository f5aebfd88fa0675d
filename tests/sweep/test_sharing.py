"""Several workers on one GPU: how many, what each gets, and what the rows of their runs leave out."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmfree_jax import nvidia
from mmfree_jax.config import ConfigError, MeshConfig
from mmfree_jax.presets import run_preset
from mmfree_jax.run_folder import claim
from mmfree_jax.sweep import sharing
from mmfree_jax.sweep.experiment import chains, load_study
from mmfree_jax.sweep.local import Local, Slot, combine_slots, this_machine
from mmfree_jax.sweep.status import run_folder
from mmfree_jax.training.loop import train
from tests.conftest import read_metrics, tiny_run

CORES = frozenset(os.sched_getaffinity(0))
QUICKSTART = Path(__file__).parents[2] / "experiments" / "quickstart.py"
GB = 1e9


def gpus(count: int, memory: float | None = 141 * GB, cores: int = 64) -> list[Slot]:
    """So many GPUs of one machine with many cores."""
    return [Slot(f"gpu{g}", {nvidia.VISIBLE: str(g)}, frozenset(range(cores)), memory) for g in range(count)]


@pytest.fixture(autouse=True)
def large_host(monkeypatch):
    monkeypatch.setattr(sharing, "host_memory", lambda: 2e12)


@pytest.mark.parametrize(
    ("preset", "memory", "cores", "host", "expected"),
    [
        ("matmul-free-tiny", 141 * GB, 64, 1e12, sharing.MOST),
        ("matmul-free-tiny", None, 64, 1e12, 1),  # its memory is not known
        ("matmul-free-tiny", 141 * GB, 4, 1e12, 4),  # each compiles
        ("matmul-free-tiny", 141 * GB, 64, 16 * GB, 5),
        ("matmul-free-tiny", 16 * GB, 64, 1e12, 7),
        ("matmul-free-370m", 141 * GB, 64, 1e12, 1),  # fills the device itself
    ],
)
def test_as_many_workers_share_a_gpu_as_their_models_leave_room_for(preset, memory, cores, host, expected):
    assert sharing.workers([run_preset(preset)], memory, cores, host) == expected


def test_a_run_that_fits_once_does_not_share_however_short_its_steps_are():
    run = run_preset("transformer++-1.3b")
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, batch=1, sequence=64))
    assert sharing.step_bytes(run) > 20 * GB
    assert sharing.workers([run], 24 * GB, 64, 1e12) == 1


def test_memory_is_divided_with_room_for_each_process_of_cuda():
    for memory, sharers in ((141 * GB, 12), (16 * GB, 4), (80 * GB, 2)):
        taken = sharers * (sharing.fraction(memory, sharers) * memory + sharing.CONTEXT)
        assert taken == pytest.approx(sharing.USABLE * memory)
    with pytest.raises(ConfigError, match=r"--slots 16: a GPU of 16 GB has no memory for so many workers"):
        Local(gpus(1, 16 * GB), sharers=16)
    with pytest.raises(ConfigError, match="must not be negative"):
        Local(gpus(1), sharers=-1)


def test_the_quickstart_runs_all_its_chains_at_once_on_one_h200():
    runs = load_study(QUICKSTART).runs
    count = len(chains(runs))
    (line,) = Local(gpus(1)).plan(runs)
    assert line.endswith(f"on {count} workers, up to {count} a GPU")
    (line,) = Local(gpus(8)).plan(runs)
    assert line.endswith(f"on {8 * -(-count // 8)} workers, {'one' if count <= 8 else 'up to 2'} a GPU")
    (line,) = Local(gpus(1), sharers=3).plan(runs)
    assert line.endswith("on 3 workers, up to 3 a GPU")


# One line when it begins, one when it ends, with its name, its GPUs and its share of their memory. A small run lasts
# until four have begun on its GPU, however slowly they do, but no longer than there can be others.
SHARING = """
name=$2; had="$name $CUDA_VISIBLE_DEVICES ${XLA_PYTHON_CLIENT_MEM_FRACTION:-whole} ${MMFREE_JAX_SHARERS:-1}"
echo "begins $had" >> "$LOG"
sleep 0.4
case $name in small*)
    for i in $(seq 40); do
        [ $(grep -c "begins small[0-9]* $CUDA_VISIBLE_DEVICES " "$LOG") -ge 4 ] && break
        sleep 0.1
    done
esac
echo "ends $had" >> "$LOG"
echo '{"loss": 1.0, "train_loss": 1.0}' > "$1/runs/$name/result.json"
"""


def test_small_runs_share_gpus_and_large_ones_have_theirs_alone(tmp_path, monkeypatch):
    small = [tiny_run("matmul-free", Path("c"), name=f"small{i}") for i in range(8)]
    large = [
        tiny_run("matmul-free", Path("c"), name="pair", mesh=MeshConfig(data=2)),
        dataclasses.replace(run_preset("transformer++-370m"), name="large"),
    ]
    runs = [small[0], *large, *small[1:]]
    for run in runs:
        claim(run, run_folder(tmp_path, run))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setattr("mmfree_jax.sweep.executor.WORKER", ("/bin/sh", "-c", SHARING, "sh"))
    slots = [dataclasses.replace(slot, cores=CORES) for slot in gpus(2)]
    monkeypatch.setattr("mmfree_jax.sweep.sharing.workers", lambda chain, *_: 4 if chain[0] in small else 1)
    assert Local(slots).execute(tmp_path, [[run] for run in runs], lambda: None) == 0
    most, here = 0, {}
    for what, name, devices, memory, sharers in map(str.split, (tmp_path / "log").read_text().splitlines()):
        if what == "ends":
            del here[name]
            continue
        beside = [n for n, others in here.items() if set(others.split(",")) & set(devices.split(","))]
        here[name] = devices
        assert devices.count(",") == (name == "pair")
        if name.startswith("small"):
            assert (memory, sharers) == (f"{sharing.fraction(141 * GB, 4):.4f}", "4")
            assert all(other.startswith("small") for other in beside)
            most = max(most, 1 + len(beside))
        else:
            assert (memory, sharers, beside) == ("whole", "1", [])
    assert most == 4


def test_a_run_that_shared_its_gpu_leaves_out_what_it_cannot_know(token_set, tmp_path, monkeypatch):
    """For good: also where it went on alone."""
    config = tiny_run("matmul-free", token_set.path, steps=6, evaluate=False)
    env = combine_slots(gpus(1), 1, sharers=4).env
    with monkeypatch.context() as patch:
        patch.setenv(nvidia.SHARERS, env[nvidia.SHARERS])
        train(config, tmp_path / "run", token_set)
    (tmp_path / "run" / "result.json").unlink()
    row = train(config, tmp_path / "run", token_set)
    for name in ("seconds", "joules", "peak_memory_bytes"):
        assert row[name] is None
    for logged in read_metrics(tmp_path / "run"):
        assert logged["mfu"] is logged["seconds"] is logged["joules"] is None
    assert read_metrics(tmp_path / "run")[-1]["tokens_per_s"] > 0
    alone = train(config, tmp_path / "alone", token_set)
    assert alone["seconds"] > 0
    assert alone["peak_memory_bytes"] > 0


def test_without_gpus_slots_are_workers_on_cores_of_their_own(monkeypatch):
    monkeypatch.setattr("mmfree_jax.sweep.local._visible_gpus", lambda: [])
    have = len(CORES)
    assert len(this_machine().slots) == have
    assert len(this_machine(1).slots) == 1
    with pytest.raises(ConfigError, match=rf"this machine has {have} CPU cores"):
        this_machine(have + 1)
    with pytest.raises(ConfigError, match="must not be negative"):
        this_machine(-1)


def test_where_this_is_not_linux_that_is_said(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(ConfigError, match=r"need Linux, and this is darwin: use --executor slurm or --render"):
        this_machine()


def test_the_driver_decides_without_jax_which_must_not_be_loaded_where_processes_are_forked():
    code = (
        "import sys; from mmfree_jax.sweep import sharing, study; from mmfree_jax.presets import run_preset\n"
        "assert sharing.workers([run_preset('matmul-free-tiny')], 8e10, 8, 1e12) > 1; sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
