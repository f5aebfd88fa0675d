"""How fast are evaluations? `python -m experiments.evaluation_speed`: tokens a second of a model in three ways.

forward: the training forward pass by itself, compiled, on batches that lie on the device. evaluate: what `mmfree
evaluate` does on the same windows, sums by document included. harness: the adapter's log-likelihoods of continuations
of four tokens after contexts of 20 to 500 tokens, all tokens read counted. Each is the fastest of --repeats, taken in
turn. --processor-time counts the seconds of all CPU threads instead of the clock's: on a CPU that other programs use
too, these say what a way costs. Goal: both at least 80 % of the forward pass. results/evaluation_speed.csv has the
table. Its last row was made by --size 370m --batches 8 --repeats 3 on an H200, which 64 requests do not fill.
"""

import argparse
import csv
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import mmfree_jax
from mmfree_jax.architecture import FAMILIES
from mmfree_jax.evaluation.likelihood import log_likelihoods, scorable, unique_inputs
from mmfree_jax.evaluation.loss import EVALUATION_BATCH, Text, document_sums
from mmfree_jax.training.step import make_program, program_key

SEQUENCE, REQUESTS = 512, 64


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "evaluation_speed.csv")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=1, help="of the text that is evaluated")
    parser.add_argument("--processor-time", action="store_true")
    chosen = parser.parse_args()
    with chosen.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("preset", "device", "forward", "evaluate", "harness", "evaluate_share", "harness_share"))
        for family in chosen.families:
            ways = dict(
                zip(("forward", "evaluate", "harness"), made(f"{family}-{chosen.size}", chosen.batches), strict=True)
            )
            rates = fastest(ways, chosen.repeats, time.process_time if chosen.processor_time else time.perf_counter)
            shares = [f"{rates[name] / rates['forward']:.2f}" for name in ("evaluate", "harness")]
            speeds = [f"{rate:.0f}" for rate in rates.values()]
            row = (f"{family}-{chosen.size}", jax.devices()[0].device_kind, *speeds, *shares)
            writer.writerow(row)
            print(*row, flush=True)


def fastest(ways: dict[str, Callable[[], int]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Tokens a second of each way, in turn, so that what else the machine does meets all of them."""
    rates = dict.fromkeys(ways, 0.0)
    for way in ways.values():
        way()  # compiles
    for _ in range(repeats):
        for name, way in ways.items():
            began = clock()
            rates[name] = max(rates[name], way() / (clock() - began))
    return rates


def made(preset: str, batches: int) -> tuple[Callable[[], int], Callable[[], int], Callable[[], int]]:
    """The three ways, functions that return how many tokens they have read."""
    run = mmfree_jax.preset(preset)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, sequence=SEQUENCE))
    program = make_program(program_key(run, None))
    with jax.set_mesh(program.mesh):
        params = program.init(jax.random.key(0)).params
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, run.model.vocab, batches * EVALUATION_BATCH * SEQUENCE + 1).astype(np.int32)
    text = Text(tokens, np.arange(0, len(tokens), 700), 4 * len(tokens))
    rows = [
        tokens[:-1].reshape(batches, EVALUATION_BATCH, SEQUENCE),
        tokens[1:].reshape(batches, EVALUATION_BATCH, SEQUENCE),
    ]
    placed: list[Any] = [[program.place(batch) for batch in part] for part in rows]
    loss = jax.jit(lambda params, inputs, targets: nnx.merge(program.graphdef, params).loss(inputs, targets).total)

    def forward() -> int:
        with jax.set_mesh(program.mesh):
            jax.block_until_ready([loss(params, *batch) for batch in zip(*placed, strict=True)])
        return len(tokens) - 1

    def evaluate() -> int:
        document_sums(program.nats, program.mesh, params, text, SEQUENCE)
        return len(tokens) - 1

    model = scorable(nnx.merge(program.graphdef, params))
    draw = lambda count: rng.integers(1, run.model.vocab, count).tolist()
    requests = [(draw(rng.integers(20, 500)), draw(4)) for _ in range(REQUESTS)]
    read = sum(len(one.tokens) for one in unique_inputs(requests, 2048))

    def harness() -> int:
        log_likelihoods(model, requests, 2048)
        return read

    return forward, evaluate, harness


if __name__ == "__main__":
    main()
