"""`lower --compile`: what the target's compiler says decides; without the compiler one line names the package."""

import dataclasses
import json
import math

import pytest

from mmfree_jax.config import ConfigError
from mmfree_jax.devices import DEVICES
from mmfree_jax.lowering import cli, compiled, verdict
from mmfree_jax.lowering.program import Traffic, rematerialisations
from tests.lowering.test_memory import state_of

FOUND = compiled.Compiled(
    state=1.1e9,
    temporaries=6.0e9,
    code=3e7,
    traffic=(Traffic("all-gather", "s8", 337, 4.9e8, ("fsdp",), 4),),
    products={"s8 x s8 -> s32": 7},
    kernels={"recurrence": 1},
    host_transfers=0,
    rematerialised=0,
)
COMMAND = ["matmul-free-370m", "--mesh", "fsdp=4", "--data.batch", "16", "--device", "tpu-v5e", "--compile"]


@pytest.fixture
def answers(monkeypatch):
    """A function that sets what the compiler says; nothing is lowered."""
    monkeypatch.setattr(verdict, "inspect", lambda run, platform: state_of(run))
    monkeypatch.setattr(cli, "check_installed", lambda device: None)
    return lambda found: monkeypatch.setattr(cli, "compile_absent", lambda run, device: found)


def test_what_the_compiler_says_stands_beside_the_model_and_decides(answers, capsys):
    answers(FOUND)
    assert cli.main(COMMAND) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == "fits: 7.1 GB a device, compiled <= 15.8 GB usable"
    row = next(line for line in text.splitlines() if "temporaries" in line)
    assert "6.00" in row
    assert "collective, compiled" in text
    assert cli.main([*COMMAND, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["compiled"]["products"] == {"s8 x s8 -> s32": 7}


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({"temporaries": 20e9}, "does not fit: 21.1 GB a device, compiled > 15.8 GB usable"),
        ({"refused": "the compiler refuses the program: 27.10GiB where"}, "refuses the program: 27.10GiB where"),
    ],
)
def test_what_the_compiler_refuses_or_needs_too_much_for_does_not_fit(answers, capsys, changes, last):
    answers(dataclasses.replace(FOUND, **changes))
    assert cli.main(COMMAND) == 2
    assert capsys.readouterr().out.splitlines()[-1].endswith(last)


@pytest.mark.parametrize(("device", "package"), [("tpu-v5p", "jax[tpu]"), ("h200", "jax[cuda13]")])
def test_without_the_compiler_one_line_names_the_package(monkeypatch, device, package):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError) as raised:
        cli.main(["matmul-free-tiny", "--mesh", "fsdp=4", "--device", device, "--compile"])
    assert f"pip install '{package}'" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_slices_grow_and_every_tpu_has_some():
    assert compiled.SLICES.keys() == {name for name, device in DEVICES.items() if device.platform == "tpu"}
    for slices in compiled.SLICES.values():
        assert list(slices) == [math.prod(map(int, topology.split("x"))) for topology in slices.values()]
        assert list(slices) == sorted(slices)
        assert 4 in slices


def test_a_refusal_says_how_much_the_program_would_use():
    for message in (
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 27.10G of 15.75G hbm. Exceeded",
        "the total memory required for HLO temporaries (27.10G) exceeds available HBM (15.75G).",
    ):
        assert compiled.REFUSED.search(message).groups() == ("27.10", "G", "15.75", "G")


def test_what_the_partitioner_logs_is_counted():
    """As libtpu 0.0.42 wrote it for the program in experiments/tpu_steps.py that provokes it."""
    said = (
        "W1130 16:15:22.157033   11262 spmd_partitioner.cc:654] [SPMD] Involuntary full rematerialization. The "
        "compiler cannot go from sharding {devices=[8,1,1]<=[4,2]T(1,0)} to {devices=[1,4,2]<=[8]} efficiently for HLO "
    )
    assert rematerialisations(said + "\nW1130 llo_loop.cc:101] 0-iteration loop inserted\n" + said) == 2
    assert rematerialisations("Very slow compile?") == 0
