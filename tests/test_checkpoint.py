"""Checkpoints move: a run saved on one mesh goes on on others to the same losses. What cannot be read says why."""

import contextlib
import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from mmfree_jax import checkpoint
from mmfree_jax.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint, restore
from mmfree_jax.checksums import first_damage, is_sealed, write_checksums
from tests.simulated import run

# Eight simulated devices in one process for all meshes: compiling is what takes the time.
PROGRAM = """
import dataclasses, json, shutil, sys
from pathlib import Path
import jax
from mmfree_jax.config import MeshConfig, OptimConfig
from mmfree_jax.data import TokenSet
from mmfree_jax.training import loop
from tests.conftest import read_metrics, tiny_run
from tests.training.test_loop import Guarded

family, corpus, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
run = tiny_run(family, corpus, steps=8, checkpoint_every=4, evaluate=False, log_every=1)
run = dataclasses.replace(
    run,
    data=dataclasses.replace(run.data, batch=8),
    optim=OptimConfig(lr=1e-3, warmup_steps=1),
    mesh=MeshConfig(data=4, fsdp=2),
)
own, loop.Diagnostics = loop.Diagnostics, Guarded
loop.train(run, out / "4x2", TokenSet.open(corpus))
loop.Diagnostics = own
curves = {}
for data, fsdp in ((8, 1), (2, 4), (1, 1)):
    folder = out / f"{data}x{fsdp}"
    shutil.copytree(out / "4x2", folder)
    shutil.rmtree(folder / "checkpoints" / "8")
    (folder / "result.json").unlink()
    loop.train(dataclasses.replace(run, mesh=MeshConfig(data=data, fsdp=fsdp)), folder, TokenSet.open(corpus))
    assert json.loads((folder / "config.json").read_text())["mesh"]["fsdp"] == fsdp
for folder in out.iterdir():
    curves[folder.name] = [row["loss"] for row in read_metrics(folder)]
print(json.dumps(curves))
"""


@pytest.mark.slow
def test_a_run_saved_on_one_mesh_goes_on_on_others(token_set, tmp_path):
    """On the first, from its third step on, transfers from the host that nobody asked for are errors."""
    said, _ = run("-c", PROGRAM, "matmul-free", str(token_set.path), str(tmp_path))
    curves = json.loads(said.splitlines()[-1])
    saved = curves.pop("4x2")
    assert len(saved) == 8
    assert set(curves) == {"8x1", "2x4", "1x1"}
    for name, curve in curves.items():
        assert curve[:4] == saved[:4], name
        # int8 codes that a rounding error tips over are the only difference there can be
        np.testing.assert_allclose(curve, saved, rtol=1e-4, err_msg=name)


def shaped(*shape: int) -> jax.ShapeDtypeStruct:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here)


@pytest.mark.parametrize("name", ["x[lr=3e-3]", "a*b", "is it?", "b]:x:é", "{0}%d"])
def test_a_folder_of_any_name_holds_checkpoints_that_can_be_read(name, tmp_path):
    with Checkpoints(tmp_path / name) as checkpoints:
        checkpoints.save({"a": jnp.arange(4.0)}, {"more": 1}, 3)
    state, meta = restore(tmp_path / name, {"a": shaped(4)})
    assert state["a"].tolist() == [0, 1, 2, 3]
    assert meta == {"more": 1}


def halved(name: str) -> Callable[[Path], None]:
    def cut(step: Path) -> None:
        for path in step.rglob(name):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: (step / "state" / "_METADATA").unlink(),
        lambda step: shutil.rmtree(step / "state"),
        lambda step: [shutil.rmtree(folder) for folder in list(step.rglob("d"))],
        halved("_METADATA"),
        halved("manifest.ocdbt"),
    ],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_what_is_damaged_is_said_to_be_and_what_to_fall_back_on(damage, sealed, tmp_path):
    """Also where it has no checksums, as after a kill between the end of a save and theirs."""
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in (3, 7):
            checkpoints.save({"a": jnp.ones(4)}, {"more": 1}, step)
    damage(tmp_path / "c" / "7")
    if not sealed:
        (tmp_path / "c" / "7" / "checksums-0-of-1.json").unlink()
    with pytest.raises(CheckpointError, match=r"c/7 cannot be read: .*is damaged, remove it: the one before .* 3$"):
        restore(tmp_path / "c", {"a": shaped(4)})
    restore(tmp_path / "c", {"a": shaped(4)}, step=3)


@pytest.mark.parametrize("other", [{"a": shaped(5)}, {"b": shaped(4)}, {"a": shaped(4), "b": shaped(4)}])
def test_a_checkpoint_of_another_model_is_not_called_damaged(other, tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save({"a": jnp.ones(4)}, {"more": 1}, 3)
    with pytest.raises(CheckpointError, match=r"c/3 cannot be read: it holds other arrays") as failed:
        restore(tmp_path / "c", other)
    assert "remove" not in str(failed.value)


def test_a_device_without_the_memory_for_a_checkpoint_does_not_make_it_damaged(tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save({"a": jnp.ones(4)}, {"more": 1}, 3)

    def full(*_, **__):
        raise KeyError("state") from jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(ocp.training.Checkpointer, "load_checkpointables", full)
    with pytest.raises(CheckpointError, match=r"cannot be read: JaxRuntimeError: RESOURCE_EXHAUSTED") as failed:
        restore(tmp_path / "c", {"a": shaped(4)})
    assert "remove" not in str(failed.value)


def flipped(step: Path) -> None:
    """One bit of the file that holds the arrays."""
    path = max((step / "state" / "d").iterdir(), key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def missing(step: Path) -> None:
    next(file for file in sorted(step.rglob("*")) if file.is_file() and file.parent.name == "d").unlink()


def saved(folder: Path, steps: tuple[int, ...]) -> None:
    with Checkpoints(folder, keep=len(steps)) as checkpoints:
        for step in steps:
            checkpoints.save({"a": jnp.full(4000, step)}, {"step": step}, step)


@pytest.mark.parametrize("damage", [flipped, missing, halved("manifest.ocdbt"), halved("checksums-*")])
def test_the_newest_checkpoint_that_is_not_damaged_is_used_and_the_others_are_set_aside(damage, tmp_path):
    saved(tmp_path / "c", (3, 5, 7))
    damage(tmp_path / "c" / "7")
    damage(tmp_path / "c" / "5")
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        state, meta = checkpoints.restore({"a": shaped(4000)})
        assert (meta, state["a"][0], checkpoints.steps) == ({"step": 3}, 3, [3])
        said = checkpoints.news
        assert [line.partition(" is damaged (")[0] for line in said] == [f"the checkpoint of step {n}" for n in (7, 5)]
        assert all(line.endswith(": the run goes on from step 3") for line in said)
        checkpoints.save({"a": jnp.zeros(4000)}, {"step": 7}, 7)
    assert restore(tmp_path / "c", {"a": shaped(4000)})[1] == {"step": 7}
    assert (tmp_path / "c" / "damaged-5").is_dir()


def test_where_all_are_damaged_nothing_is_moved_and_all_are_named(tmp_path):
    saved(tmp_path / "c", (3, 5))
    flipped(tmp_path / "c" / "3")
    missing(tmp_path / "c" / "5")
    for _ in range(2):
        with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(CheckpointError) as failed:
            checkpoints.restore({"a": shaped(4000)})
    says = (
        r"has no checkpoint that is not damaged \(step 5: .* is missing; step 3: .* has other .*\): put one back from"
    )
    assert failed.match(says)
    assert "\n" not in str(failed.value)


def test_a_run_whose_checkpoints_are_gone_does_not_start_over(tmp_path):
    saved(tmp_path / "c", (3, 5))
    shutil.rmtree(tmp_path / "c")
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(
            CheckpointError, match=r"although one of step 5 was written: put it back .* or remove .*c\.json"
        ):
            checkpoints.check_not_lost()
        (tmp_path / "c.json").unlink()
        checkpoints.check_not_lost()


@pytest.fixture
def largest_file():
    """Sets the most bytes that this process may write into a file."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def test_a_save_that_fails_in_the_background_is_reported_and_the_next_ones_are_made(
    largest_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "PAUSES_SECONDS", (0.1,))
    noise = {"a": jax.random.normal(jax.random.key(0), 30_000)}
    with Checkpoints(tmp_path / "c", keep=3) as checkpoints:
        checkpoints.save_now(noise, {"more": 1}, 3)
        largest_file(50_000)
        checkpoints.save(noise, {"more": 1}, 5)
        with pytest.raises(CheckpointError, match=r"cannot be written \(.*File too large.*\): .* is of step 3$"):
            checkpoints.save_now(noise, {"more": 1}, 6)
        largest_file(resource.RLIM_INFINITY)
        assert [line[:32] for line in checkpoints.news] == [f"the checkpoint of step {n} was not" for n in (5, 6, 6)]
        for step in (6, 7):
            checkpoints.save(noise, {"more": 1}, step)
        checkpoints.save_now(noise, {"more": 1}, 8)
        assert checkpoints.steps == [6, 7, 8]
        assert not checkpoints.failed
    restore(tmp_path / "c", {"a": shaped(30_000)}, step=6)


def test_processes_that_seal_a_checkpoint_at_once_list_every_file_once(tmp_path):
    """Also while one sees the file that another is writing its list into."""
    for name in "abcde":
        (tmp_path / name).write_text(name)
    write_checksums(tmp_path, 0, 3)
    (tmp_path / ".checksums-1-of-3.json.x7").write_text("half")
    for part in (1, 2):
        write_checksums(tmp_path, part, 3)
    lists = [json.loads((tmp_path / f"checksums-{part}-of-3.json").read_text()) for part in range(3)]
    assert sorted(name for one in lists for name in one) == list("abcde")


def test_a_checkpoint_that_was_not_sealed_is_sealed_by_the_run_that_goes_on(tmp_path):
    """Killed between the two; and nothing more is saved if it was the last one."""
    saved(tmp_path / "c", (3,))
    (tmp_path / "c" / "3" / "checksums-0-of-1.json").unlink()
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.restore({"a": shaped(4000)})
    assert first_damage(tmp_path / "c" / "3") == ""
    assert is_sealed(path.name for path in (tmp_path / "c" / "3").iterdir())
    assert not checkpoints.news


def test_lists_of_some_of_the_processes_are_no_seal():
    assert is_sealed(["checksums-0-of-1.json", "checksums-0-of-2.json", "x"])
    assert is_sealed([f"checksums-{part}-of-12.json" for part in range(12)])
    assert not is_sealed([f"checksums-{part}-of-12.json" for part in range(11)])
    assert not is_sealed(
        ["checksums-1-of-1.json", ".checksums-0-of-1.json.x7", "checksums-0-of-0.json", f"checksums-0-of-{10**12}.json"]
    )


def test_a_checkpoint_without_its_checksums_gets_them_by_a_second_attempt(tmp_path, monkeypatch):
    """Orbax refuses a step that is there already."""
    calls = []

    def once(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError("no room")
        write_checksums(*arguments)

    monkeypatch.setattr(checkpoint, "PAUSES_SECONDS", (0.0,))
    monkeypatch.setattr(checkpoint, "write_checksums", once)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save_now({"a": jnp.ones(4)}, {"more": 1}, 3)
        assert not checkpoints.failed
    assert len(calls) == 2
    assert list((tmp_path / "c" / "3").glob("checksums-*"))


@pytest.mark.parametrize("failures", [1, 3])
def test_a_save_that_fails_in_another_process_is_tried_again_in_all(tmp_path, monkeypatch, failures):
    """Here `sum_integers` stands for the other process, which fails so often."""
    elsewhere, sealed = iter([*[1] * failures, 0]), []
    monkeypatch.setattr(checkpoint, "PAUSES_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(checkpoint, "_made_everywhere", lambda meta: meta)
    monkeypatch.setattr(checkpoint, "sum_integers", lambda own: [own[0] + next(elsewhere)])
    monkeypatch.setattr(checkpoint, "write_checksums", lambda folder, *_: sealed.append(folder.name))
    with Checkpoints(tmp_path / "c") as checkpoints:
        lost = pytest.raises(CheckpointError, match="another process could not write its part")
        with lost if failures == 3 else contextlib.nullcontext():
            checkpoints.save_now({"a": jnp.ones(4)}, {"more": 1}, 3)
    assert sealed == ["3"] * min(failures + 1, 3)


def test_a_last_save_that_fails_is_an_error_at_the_end(largest_file, tmp_path):
    noise = {"a": jax.random.normal(jax.random.key(0), 30_000)}
    one = Checkpoints(tmp_path / "c")
    largest_file(50_000)
    one.save(noise, {"more": 1}, 5)
    with pytest.raises(CheckpointError, match="the newest checkpoint is of step none"):
        one.__exit__(None)


def test_a_reader_does_not_fall_back(tmp_path):
    """An evaluation of another step than the newest would look like that of the run."""
    saved(tmp_path / "c", (3, 5))
    flipped(tmp_path / "c" / "5")
    with pytest.raises(
        DamagedCheckpoint, match=r"c/5 cannot be read: .*SHA-256\); it is damaged, remove it: .* step 3$"
    ):
        restore(tmp_path / "c", {"a": shaped(4000)})
    assert (tmp_path / "c" / "5").is_dir()
