"""Is the FPGA core what it is said to be? `python -m experiments.hardware_core` (needs the extra `hardware`, g++).

matmul-free-tiny is trained on the embedded corpus (its preset, about a minute) and exported as a packed folder.
results/hardware_loss.csv: nats a token on the entire held-out split, of the model in float32 (`mmfree evaluate`) and of
the fixed-point model on the same windows. results/hardware_core.csv: for each core and memory, how many of 32 generated
tokens are those of the fixed-point model, whether all logits are equal, and the cycles of a token, simulated and by the
cycle model. The last row is one block of d = 512: what a second layer adds to a token, simulated.

Expect losses within 0.01 %, every token and logit equal, and cycles within 2 %. Ten minutes on 2 CPU
cores, half of them for the loss.
"""

import argparse
import csv
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flax import nnx
from scipy.special import logsumexp

import mmfree_jax
from mmfree_jax.data import TokenSet, evaluation_windows, resolve_corpus
from mmfree_jax.hardware.assembler import assemble
from mmfree_jax.hardware.cycles import MemoryModel, token_cycles
from mmfree_jax.hardware.instructions import CoreShape, Program
from mmfree_jax.hardware.machine import Machine
from mmfree_jax.hardware.report import paper_block
from mmfree_jax.hardware.simulate import Simulation, build_simulation
from mmfree_jax.inference.packed import save_packed
from mmfree_jax.models.language_model import LanguageModel

CORES = ((8, 1), (24, 3), (32, 4), (64, 4))  # bits of memory, lanes
MEMORIES = ((20, (1, 1)), (5, (1, 2)), (50, (1, 1)), (20, (3, 4)), (100, (1, 1)))  # latency, words in cycles
BATCH = 512  # windows that the fixed-point model reads together
PROMPT, TOKENS = 8, 32


def main() -> None:
    """Write both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        run, packed = Path(folder) / "run", Path(folder) / "packed"
        config = mmfree_jax.preset("matmul-free-tiny")
        mmfree_jax.train(config, run)
        mmfree_jax.export(run, packed, format="packed")
        text = resolve_corpus(config.data.corpus, config.data.vocab)
        write(out / "hardware_loss.csv", [loss_row(run, packed, text, config.data.sequence)])
        prompt = text.split("valid")[:PROMPT].tolist()
        write(out / "hardware_core.csv", [*core_rows(packed, prompt, Path(folder)), *block_rows(Path(folder))])


def write(path: Path, rows: list[dict]) -> None:
    """Write a table."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def loss_row(run: Path, packed: Path, text: TokenSet, sequence: int) -> dict:
    """Compare losses on the entire held-out split."""
    scores = mmfree_jax.evaluate(run)
    found = fixed_point_nats(packed, text, sequence)
    assert len(found) == scores["tokens"]
    row = {
        "model": "matmul-free-tiny",
        "corpus": "embedded, held out",
        "tokens": len(found),
        "float32": f"{scores['loss']:.5f}",
        "fixed_point": f"{found.mean():.5f}",
        "relative_difference": f"{found.mean() / scores['loss'] - 1:.1e}",
    }
    print(row, flush=True)
    return row


def fixed_point_nats(packed: Path, text: TokenSet, sequence: int) -> np.ndarray:
    """Compute -log p of every held-out token except the first, by the fixed-point model."""
    program, image = assemble(packed, CoreShape(32, 4, 128, 384))
    found = []
    for tokens, mask in evaluation_windows(text.split("valid"), sequence, BATCH):
        machine = Machine(program, image, rows=BATCH)  # each window begins with states of zeros
        for t in range(sequence):
            logits = machine.token(tokens[:, t]) * 2.0**-16
            nats = logsumexp(logits, axis=1) - logits[np.arange(BATCH), tokens[:, t + 1]]
            found.append(nats[mask[:, t]])
    return np.concatenate(found)


def core_rows(packed: Path, prompt: list[int], folder: Path) -> Iterator[dict]:
    """Simulate each core with each memory."""
    for bits, lanes in CORES:
        shape = CoreShape(bits, lanes, 128, 384)
        program, image = assemble(packed, shape)
        binary = build_simulation(shape, folder / f"core-{bits}-{lanes}")
        expected = Machine(program, image).generate(prompt, TOKENS)
        read = [*prompt, *expected[:-1]]
        machine = Machine(program, image)
        logits = np.concatenate([machine.token(np.array([t])) for t in read])
        for number, (latency, rate) in enumerate(MEMORIES):
            count = 1 if number else TOKENS  # other memories change the time only
            with Simulation(binary, program, image, folder, latency, rate, keep_logits=True) as core:
                found, cycles = core.generate(prompt, count)
                equal = np.array_equal(core.logits(), logits[: len(cycles)])
            matching = f"{sum(a == b for a, b in zip(found, expected, strict=False))} of {count}"
            yield row("matmul-free-tiny", program, latency, rate, matching, equal, float(np.mean(cycles)))


def block_rows(folder: Path) -> Iterator[dict]:
    """Simulate one block of d = 512 on a core of 8 bits: what a second layer adds to a token."""
    shape, cycles, predicted = CoreShape(8, 1, 512, 1536), [], []
    binary = build_simulation(shape, folder / "block")
    for depth in (1, 2):
        config = dataclasses.replace(paper_block(), depth=depth, vocab=64)
        save_packed(LanguageModel(config, rngs=nnx.Rngs(0)), folder / f"layers-{depth}")
        program, image = assemble(folder / f"layers-{depth}", shape)
        with Simulation(binary, program, image, folder) as core:
            cycles.append(core.token(5)[1])
        predicted.append(token_cycles(program).total)
    yield row("one block, d = 512", program, 20, (1, 1), "", "", cycles[1] - cycles[0], predicted[1] - predicted[0])


def row(
    what: str, program: Program, latency: int, rate: tuple[int, int], tokens: int | str, equal: bool | str,
    simulated: float, predicted: float = 0.0,
) -> dict:  # fmt: skip
    """Return a row of the table."""
    shape = program.shape
    predicted = predicted or token_cycles(program, MemoryModel(latency, rate[0] / rate[1])).total
    found = {
        "what": what,
        "memory_bits": shape.memory_bits,
        "lanes": shape.lanes,
        "latency": latency,
        "words_per_cycle": rate[0] / rate[1],
        "tokens_equal": tokens,
        "logits_equal": equal,
        "cycles_simulated": round(simulated),
        "cycles_modelled": round(predicted),
        "deviation": f"{predicted / simulated - 1:+.2%}",
    }
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()
