"""The simulated core against the fixed-point model, bit for bit, and against the cycle model."""

import dataclasses
import os

import numpy as np
import pytest

if "REQUIRE_SIMULATION" not in os.environ:  # else a missing package fails below
    pytest.importorskip("amaranth", reason="needs the extra `hardware`")

from mmfree_jax.commands import main
from mmfree_jax.config import ConfigError
from mmfree_jax.hardware.assembler import assemble, matrix_bytes
from mmfree_jax.hardware.cycles import MemoryModel, token_cycles
from mmfree_jax.hardware.instructions import B, Op, Vector, reads
from mmfree_jax.hardware.machine import Machine
from mmfree_jax.hardware.simulate import Simulation
from tests.hardware.small import CORES, odd_model

MEMORIES = {"at once": (1, (1, 1)), "late": (25, (1, 1)), "slow": (20, (1, 2)), "uneven": (7, (3, 4))}


def run(simulation, program, image, folder, tokens, **memory):
    """Logits of the core and cycles of each token."""
    with Simulation(simulation, program, image, folder, keep_logits=True, **memory) as core:
        cycles = [core.token(token)[1] for token in tokens]
        return core.logits(), cycles


@pytest.mark.parametrize("changes", [{}, {"output_gate": "paper"}, {"tie_embeddings": True, "glu_width": 48}], ids=str)
def test_logits_of_odd_models_are_equal_bit_for_bit(simulation, changes, tmp_path):
    _, folder = odd_model(tmp_path / "packed", **changes)
    program, image = assemble(folder, CORES["three lanes"])
    machine, tokens = Machine(program, image), [5, 100, 0, 17, 17]
    found, _ = run(simulation, program, image, tmp_path, tokens)
    assert np.array_equal(found, np.concatenate([machine.token(np.array([t])) for t in tokens]))
    assert len(np.unique(found)) > 100


def test_a_trained_model_generates_the_same_32_tokens(simulation, trained, tmp_path):
    program, image = assemble(trained / "packed", CORES["three lanes"])
    prompt = list(b"the loss ")
    with Simulation(simulation, program, image, tmp_path) as core:
        chosen, _ = core.generate(prompt, 32)
    assert chosen == Machine(program, image).generate(prompt, 32)
    assert len(set(chosen)) > 3


def test_zeros_and_saturated_numbers_are_equal_too(simulation, odd, tmp_path):
    """An embedding of zeros except for one token, whose row is as large as 16-bit integers are."""
    _, program, image = odd
    begin, row = (program.loads[0].address, program.loads[0].stride)
    size = program.shape.memory_bits // 8
    data = bytearray(image)
    data[begin * size : (begin + 101 * row) * size] = bytes(101 * row * size)
    loud = np.where(np.arange(37) % 3, 2**15 - 1, -(2**15) + 1).astype("<i2").tobytes()
    data[(begin + 7 * row) * size : (begin + 7 * row) * size + len(loud)] = loud
    image = bytes(data)
    machine, tokens = Machine(program, image), [0, 7, 7, 0, 3]
    found, _ = run(simulation, program, image, tmp_path, tokens)
    assert np.array_equal(found, np.concatenate([machine.token(np.array([t])) for t in tokens]))
    assert not found[0].any()


def of_one_value(program, image, weight):
    """The image with this weight in every place of every matrix."""
    data, size = bytearray(image), program.shape.memory_bits // 8
    for i, read in zip(program.instructions, reads(program), strict=True):
        if i.op == Op.TERNARY:
            matrix = matrix_bytes(np.full((i.count, i.depth), weight, np.int8), program.shape.rows)
            data[read.address * size : (read.address + read.words) * size] = matrix
    return bytes(data)


@pytest.mark.parametrize("weight", [0, 1, -1])
def test_matrices_of_one_value_are_equal_too(simulation, odd, weight, tmp_path):
    _, program, image = odd
    image = of_one_value(program, image, weight)
    machine, tokens = Machine(program, image), [5, 100, 0]
    found, _ = run(simulation, program, image, tmp_path, tokens)
    assert np.array_equal(found, np.concatenate([machine.token(np.array([t])) for t in tokens]))
    assert found.any() == bool(weight)


def test_sums_that_saturate_are_equal_too(simulation, tmp_path):
    """1,101 equal activations with the code 127: their sum passes 131,071, the largest operand."""
    _, folder = odd_model(tmp_path / "packed", glu_width=1101)
    program, image = assemble(folder, CORES["three lanes"])
    image = of_one_value(program, image, 1)
    machine, tokens = Machine(program, image), [5, 100]
    found, _ = run(simulation, program, image, tmp_path, tokens)
    assert np.array_equal(found, np.concatenate([machine.token(np.array([t])) for t in tokens]))
    assert 127 * 1101 > 2**17


@pytest.mark.parametrize("exponent", [-128, -60, 0, 60, 127])
def test_gains_of_any_exponent_are_equal_too(simulation, odd, exponent, tmp_path):
    _, program, image = odd
    extreme = [
        dataclasses.replace(i, stream_exponent=exponent) if isinstance(i, Vector) and i.b == B.STREAM else i
        for i in program.instructions
    ]
    program = dataclasses.replace(program, instructions=tuple(extreme))
    machine, tokens = Machine(program, image), [5, 100, 0]
    found, _ = run(simulation, program, image, tmp_path, tokens)
    assert np.array_equal(found, np.concatenate([machine.token(np.array([t])) for t in tokens]))


def test_a_simulation_that_dies_is_reported(simulation, odd, tmp_path):
    _, program, image = odd
    with Simulation(simulation, program, image, tmp_path) as core:
        core.process.kill()
        with pytest.raises(ConfigError, match="ended by itself, with status -9"):
            core.token(5)


def test_the_verb_compares_the_core_with_the_fixed_point_model(simulation, trained, monkeypatch, capsys):
    """It says so if all tokens are equal, and fails if one differs."""
    from mmfree_jax.hardware import cli
    from mmfree_jax.hardware import simulate as module

    monkeypatch.setattr(cli, "compile_for", lambda model, sizes: assemble(model, CORES["three lanes"]))
    monkeypatch.setattr(module, "build_simulation", lambda shape, folder: simulation)
    arguments = ["hardware", "simulate", str(trained / "packed"), "--tokens", "6"]
    assert main(arguments) == 0
    assert "6 tokens, equal to the fixed-point model's" in capsys.readouterr().out
    token = Simulation.token
    monkeypatch.setattr(Simulation, "token", lambda core, t: (65, token(core, t)[1]))
    assert main(arguments) == 1
    assert "is not that of the fixed-point model" in capsys.readouterr().err


def test_the_memory_changes_the_time_and_nothing_else(simulation, odd, tmp_path):
    _, program, image = odd
    results = {name: run(simulation, program, image, tmp_path, [5, 9], latency=latency, rate=rate)
               for name, (latency, rate) in MEMORIES.items()}  # fmt: skip
    assert all(np.array_equal(logits, results["at once"][0]) for logits, _ in results.values())
    assert results["slow"][1][0] > 1.2 * results["at once"][1][0]


@pytest.mark.parametrize("memory", MEMORIES)
def test_cycles_are_within_two_percent_of_the_model(simulation, memory, trained, tmp_path):
    program, image = assemble(trained / "packed", CORES["three lanes"])
    latency, (words, cycles) = MEMORIES[memory]
    _, found = run(simulation, program, image, tmp_path, [5, 9], latency=latency, rate=(words, cycles))
    expected = token_cycles(program, MemoryModel(latency, words / cycles)).total
    assert abs(found[0] - found[1]) <= 1  # a token's time depends on the token no more than on the memory's beat
    assert abs(expected / found[0] - 1) < 0.02
