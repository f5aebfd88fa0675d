"""The simulated core against the fixed-point model, bit for bit, and against the cycle model."""

import os

import numpy as np
import pytest

if "REQUIRE_SIMULATION" not in os.environ:  # else a missing package fails below
    pytest.importorskip("amaranth", reason="needs the extra `hardware`")

from mmfree_jax.hardware.assembler import assemble
from mmfree_jax.hardware.cycles import MemoryModel, token_cycles
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
