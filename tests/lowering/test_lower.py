"""`launch.py lower`: the command, its proposals, its exit statuses."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmfree_jax.config import ConfigError, MeshConfig
from mmfree_jax.devices import DEVICES
from mmfree_jax.lowering import cli, verdict
from mmfree_jax.lowering.memory import memory
from mmfree_jax.lowering.program import Traffic, in_bfloat16
from mmfree_jax.lowering.roofline import communication
from tests.lowering.test_memory import run_of, state_of

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_command_as_a_user_types_it(tmp_path):
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "launch.py", "lower", "matmul-free-tiny", "--mesh", "fsdp=4,tensor=2"]
    done = subprocess.run(
        [*command, "--device", "tpu-v5e", "--json"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] == "fits"
    assert found["run"]["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1}
    run = run_of("matmul-free-tiny", 16, 128, "none", unroll=1)
    run = dataclasses.replace(run, mesh=MeshConfig(fsdp=4, tensor=2))
    held = state_of(run)
    assert found["report"]["parameters"] == pytest.approx(held.parameters, rel=0.05)  # gains are on every device
    assert found["report"]["optimizer"] == pytest.approx(held.optimizer, rel=0.05)
    assert 0.95 < found["report"]["sharded"] < 1  # all but the gains
    assert {one["kind"] for one in found["report"]["traffic"]} >= {"all-gather", "all-reduce", "reduce-scatter"}
    assert 0 < found["communication_share"] < 1


@pytest.fixture
def instant(monkeypatch):
    """State and traffic without lowering anything."""
    monkeypatch.setattr(verdict, "inspect", lambda run, platform: state_of(run))


def test_the_last_line_is_the_verdict_and_the_status_says_it_too(instant, capsys):
    assert cli.main(["matmul-free-7b", "--mesh=fsdp=64", "--device", "h200"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("fits: ")
    assert cli.main(["transformer++-7b", "--mesh", "fsdp=8", "--device", "tpu-v5e"]) == 2
    *_, proposal, last = capsys.readouterr().out.splitlines()
    assert last.startswith("does not fit: ")
    assert proposal.startswith(("largest batch that fits: ", "no batch fits"))


def test_what_is_proposed_fits_and_what_lies_beyond_does_not(instant):
    run = dataclasses.replace(run_of("matmul-free-7b", 512, 2048, "none", unroll=1), mesh=MeshConfig(fsdp=16))
    found = verdict.judge(run, "h100")
    assert found.largest is not None

    def needs(batch: int, remat: str) -> float:
        one = dataclasses.replace(run, remat=remat, data=dataclasses.replace(run.data, batch=batch))
        return memory(one, state_of(one), DEVICES["h100"]).total

    assert needs(found.largest.batch, found.largest.remat) <= found.usable
    assert needs(2 * found.largest.batch, "full") > found.usable
    assert found.same_batch is None or needs(512, found.same_batch.remat) <= found.usable


def test_micro_batches_are_proposed_first_where_devices_are_too_few(instant, capsys):
    """A preset meant for many devices, on two: the batch stays what it is."""
    assert cli.main(["matmul-free-1.3b", "--mesh", "fsdp=2", "--device", "h200"]) == 2
    said = capsys.readouterr().out.splitlines()
    (line,) = (line for line in said if line.startswith("the same batch in micro-batches: "))
    run = run_of("matmul-free-1.3b", 512, 2048, "products")
    run = dataclasses.replace(run, mesh=MeshConfig(fsdp=2), unroll=0)
    found = verdict.judge(run, "h200").micro_batches
    assert found.batch == 512
    assert found.remat == "products"
    assert f"--optim.accumulate {found.accumulate} ({256 // found.accumulate} rows a device at once, " in line
    assert said.index(line) < next(i for i, line in enumerate(said) if line.startswith("largest batch"))

    def needs(accumulate: int) -> float:
        one = dataclasses.replace(run, optim=dataclasses.replace(run.optim, accumulate=accumulate))
        return memory(one, state_of(one), DEVICES["h200"]).total

    assert (
        needs(found.accumulate)
        == found.memory
        <= verdict.USABLE * DEVICES["h200"].memory
        < needs(found.accumulate // 2)
    )
    assert needs(32) < 40e9  # eight rows on each of the two
    fits = dataclasses.replace(run, optim=dataclasses.replace(run.optim, accumulate=32))
    assert verdict.judge(fits, "h200").micro_batches is None


def test_a_model_whose_state_fills_the_device_gets_no_micro_batches_proposed(instant):
    run = dataclasses.replace(run_of("transformer++-70b", 512, 2048, "full"), mesh=MeshConfig(fsdp=2))
    found = verdict.judge(run, "h100")
    assert found.micro_batches is found.same_batch is found.largest is None


@pytest.mark.parametrize(
    ("mesh", "wrong"),
    [
        ("fsdp", "must be axes and sizes"),
        ("fdsp=8", "did you mean fsdp"),
        ("", "must be axes"),
        ("fsdp=2,fsdp=4", "given twice"),
    ],
)
def test_a_wrong_mesh_says_what_is_right(mesh, wrong):
    with pytest.raises(ConfigError, match=wrong):
        cli.main(["matmul-free-7b", "--mesh", mesh])


def test_traffic_within_an_island_takes_its_links_and_beyond_it_the_network():
    within, beyond = (Traffic("all-gather", "s8", 1, 1e9, ("fsdp",), span) for span in (8, 9))
    device = DEVICES["h200"]
    ratio = communication([beyond], device) / communication([within], device)
    assert ratio == pytest.approx(device.link / device.network)


def test_types_that_a_cpu_widens_are_read_as_they_are_elsewhere():
    promoted = "  %a = f32[4,8]{1,0} all-reduce(%x), to_apply=%add.clone_promoted"
    gathered = "  %g = f32[512,1024]{1,0} all-gather(%w), dimensions={0}"
    keys = "  %k = f32[8,2048,16,64]{3,2,1,0} all-gather(%w), dimensions={1}"
    states = "  %h = f32[8,16,1024]{2,1,0} all-gather(%w), dimensions={1}"
    scales = "  %s = f32[4,8]{1,0} all-gather(%w), dimensions={0}"
    gradient = "  %r = f32[512,1024]{1,0} reduce-scatter(%w), to_apply=%add"
    text = in_bfloat16("\n".join([promoted, gathered, keys, states, scales, gradient]))
    assert [line.split(" = ")[1][:4] for line in text.splitlines()] == ["bf16"] * 3 + ["f32["] * 3
