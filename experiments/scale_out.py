"""How training scales over the devices of a host: `python -m experiments.scale_out --out scale_out.csv`.

weak: the same batch on every device, on 1, 2, 4 and 8 of them. strong: one batch divided over them. gather: the form in
which weights are gathered: int8 codes, four codes in a byte, or bfloat16 (the rows of `hgrn`, whose shapes are those of
`matmul-free`). sequence: 65,536 tokens of a text, divided over the devices. A row is a case: tokens a second (median of
five rounds of five queued steps, the least and the most), efficiency against the fewest devices of the same kind and
preset, what one device sends in a step, memory as compiled and its peak.

Every case is a process of its own, so that its peak is its own; cases with more devices than there are do not run. The
same command goes on where it stopped, and begins no case after --limit seconds. `--predict` adds what `mmfree lower`
says about each row, needs no GPU, and prints which rows it misses (memory by 10 %, time by 25 %). --small tries all of
it on a CPU, with XLA_FLAGS=--xla_force_host_platform_device_count=8, where times mean nothing. NVLink multicast stays
off on hosts that have it switched off: NCCL_NVLS_ENABLE=0.

A run that is saved on eight devices and goes on on two:

    mmfree train matmul-free-1.3b --out run --steps 20 --checkpoint-every 10 --mesh fsdp=8      # Ctrl-C after step 10
    CUDA_VISIBLE_DEVICES=0,1 mmfree train matmul-free-1.3b --out run --steps 20 --checkpoint-every 10 --mesh fsdp=2

Goals on eight H200s: 90 % at 1.3b, weak; on two 95 %. results/scale_out.md has what two H100s did.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmfree_jax.bench.timing import memory_bytes
from mmfree_jax.config import MeshConfig, RunConfig
from mmfree_jax.devices import peak_memory_bytes
from mmfree_jax.lowering.program import Traffic, read_traffic
from mmfree_jax.lowering.verdict import judge
from mmfree_jax.presets import run_preset
from mmfree_jax.training.optim import Rates
from mmfree_jax.training.step import make_program, program_key

WARM, ROUNDS, STEPS = 3, 5, 5  # steps before timing; timed rounds of steps queued one behind the other
MEASURED = (
    "tokens_per_s", "least", "most", "gathered_gb", "reduced_gb", "summed_gb", "permuted_gb", "compiled_gb", "peak_gb",
    "device", "jax",
)  # fmt: skip
PREDICTED = ("lower_gb", "lower_s", "lower_communication_s")
SENT = {
    "gathered_gb": "all-gather",
    "reduced_gb": "reduce-scatter",
    "summed_gb": "all-reduce",
    "permuted_gb": "collective-permute",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A training step on so many devices."""

    kind: str
    preset: str
    devices: int
    batch: int  # sequences of a step, on all devices
    sequence: int
    axis: str = "fsdp"  # of the mesh, that the devices lie along
    gather: str = "int8"
    accumulate: int = 1

    def run(self) -> RunConfig:
        """The run of the case: nothing is recomputed, layers are unrolled."""
        run = run_preset(self.preset)
        return dataclasses.replace(
            run,
            data=dataclasses.replace(run.data, batch=self.batch, sequence=self.sequence),
            optim=dataclasses.replace(run.optim, accumulate=self.accumulate),
            mesh=MeshConfig(**{self.axis: self.devices}),
            gather=self.gather,  # type: ignore[arg-type]
            remat="none",
            unroll=run.model.depth,
        )


def cases(small: bool) -> list[Case]:
    """All cases, the most wanted first."""
    if small:
        pairs = itertools.product(("matmul-free-tiny", "transformer++-tiny"), (1, 2, 8))
        weak = [Case("weak", preset, devices, 2 * devices, 64) for preset, devices in pairs]
        strong = [Case("strong", "matmul-free-tiny", n, 16, 64, accumulate=8 // n) for n in (1, 8)]
        return [
            *weak,
            *strong,
            Case("gather", "matmul-free-tiny", 8, 16, 64, gather="packed"),
            Case("sequence", "matmul-free-tiny", 8, 1, 512, axis="sequence"),
        ]
    main = "matmul-free", "transformer++"
    found = [Case("weak", f"{family}-1.3b", n, 8 * n, 2048) for n in (1, 8, 2, 4) for family in main]
    found += [Case("weak", f"{family}-7b", n, 4 * n, 2048) for n in (8, 2, 4) for family in main]
    found += [Case("gather", "matmul-free-1.3b", 8, 64, 2048, gather=form) for form in ("int8", "packed")]
    found += [Case("gather", "hgrn-1.3b", 8, 64, 2048)]
    found += [Case("sequence", f"{family}-1.3b", 8, 1, 65_536, axis="sequence") for family in main]
    found += [Case("strong", f"{family}-1.3b", n, 64, 2048, accumulate=8 // n) for n in (8, 1, 2, 4) for family in main]
    found += [Case("weak", f"{family}-370m", n, 8 * n, 2048) for n in (1, 2, 8) for family in main]
    return found


def measure(case: Case) -> dict[str, Any]:
    """Compile the step of a case, run it, and describe both."""
    run = case.run()
    program = make_program(program_key(run, end_of_document=None))
    tokens = np.random.default_rng(0).integers(0, run.model.vocab, (case.batch, case.sequence + 1), dtype=np.int32)
    program.prepare(tokens.shape)
    rates = []
    with jax.set_mesh(program.mesh):
        state, batch = program.init(jax.random.key(0)), program.place(tokens)
        now = program.repeat(Rates(np.float32(1e-4), np.float32(1)))
        compiled = program.train_step.lower(state, batch, now).compile()
        memory, text = memory_bytes(compiled), compiled.as_text() or ""
        for steps in [WARM, *[STEPS] * ROUNDS]:
            began = time.perf_counter()
            for _ in range(steps):
                state, metrics = compiled(state, batch, now)
            jax.block_until_ready(metrics)
            rates.append(steps * run.data.tokens_per_step / (time.perf_counter() - began))
    rates, traffic = rates[1:], read_traffic(text, run.mesh)
    return {
        "tokens_per_s": round(statistics.median(rates)),
        "least": round(min(rates)),
        "most": round(max(rates)),
        **{name: sent(traffic, kind) for name, kind in SENT.items()},
        "compiled_gb": f"{memory['total'] / 1e9:.2f}",
        "peak_gb": f"{peak_memory_bytes() / 1e9:.2f}",
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def sent(traffic: Sequence[Traffic], kind: str) -> str:
    """GB that one device sends in a step, by type."""
    parts = [f"{one.sent / 1e9:.3f} {one.dtype}" for one in traffic if one.kind == kind and one.sent > 0]
    return " + ".join(parts)


def with_efficiency(rows: list[dict[str, Any]]) -> None:
    """Write into each row its rate a device, as a share of that of the fewest devices of the same kind and preset."""
    for row in rows:
        alike = [one for one in rows if all(one[name] == row[name] for name in ("kind", "preset", "gather"))]
        least = min(alike, key=lambda one: int(one["devices"]))
        each = lambda one: float(one["tokens_per_s"]) / int(one["devices"])
        row["efficiency"] = f"{each(row) / each(least):.3f}"


def predict(row: dict[str, Any], case: Case) -> None:
    """Write into a row what `lower` says about H200s, and print where that misses."""
    verdict = judge(case.run(), "h200")
    communication = verdict.time.communication
    values = verdict.memory.total / 1e9, verdict.time.total, communication
    row |= dict(zip(PREDICTED, (f"{values[0]:.2f}", f"{values[1]:.4f}", f"{values[2]:.4f}"), strict=True))
    memory = values[0] / float(row["compiled_gb"]) - 1
    seconds = values[1] * float(row["tokens_per_s"]) / (case.batch * case.sequence) - 1
    missed = "MISSED " if abs(memory) > 0.10 or abs(seconds) > 0.25 else ""
    print(f"{missed}{case.kind} {case.preset} x {case.devices}: memory {memory:+.1%}, time {seconds:+.1%}", flush=True)


def main() -> None:
    """Measure what the table lacks, or add predictions to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="cases whose kind, preset or gather contains this")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no case is begun")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)  # measure this one here, and print it as JSON
    chosen = parser.parse_args()
    everything = cases(chosen.small)
    if chosen.case is not None:
        print(json.dumps(measure(everything[chosen.case])))
        return
    named = {key_of(dataclasses.asdict(case)): number for number, case in enumerate(everything)}
    rows = list(csv.DictReader(chosen.out.open())) if chosen.out.exists() else []
    if chosen.predict:
        for row in rows:
            predict(row, everything[named[key_of(row)]])
        write(chosen.out, rows)
        return
    began, held = time.monotonic(), {key_of(row) for row in rows}
    devices = device_count()
    for key, number in named.items():
        case = everything[number]
        wanted = chosen.only in f"{case.kind} {case.preset} {case.gather}" and case.devices <= devices
        if key in held or not wanted or time.monotonic() - began > chosen.limit:
            continue
        found = in_a_process(number, case, chosen.small)
        if found is not None:
            rows.append({**{name: str(value) for name, value in dataclasses.asdict(case).items()}, **found})
            with_efficiency(rows)
            write(chosen.out, rows)
            print(f"{case.kind} {case.preset} x {case.devices}: {rows[-1]}", flush=True)


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What identifies a case in a table."""
    return tuple(str(row[field.name]) for field in dataclasses.fields(Case))


def device_count() -> int:
    """Devices of this host, counted in a process of its own: one that has seen them keeps their memory."""
    code = "import jax; print(jax.device_count())"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def in_a_process(number: int, case: Case, small: bool) -> dict[str, Any] | None:
    """Measure a case in a process that sees as many devices as it needs; None, after saying why, if it fails."""
    command = [sys.executable, "-m", "experiments.scale_out", "--out", os.devnull, "--case", str(number)]
    selected = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(case.devices)))).split(",")
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(selected[: case.devices])} if not small else {}
    done = subprocess.run(
        [*command, *["--small"] * small], env={**os.environ, **visible}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"FAILED {case}: {' '.join(done.stderr.strip().splitlines()[-1:])[:500]}", flush=True)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the table whole."""
    columns = (*(field.name for field in dataclasses.fields(Case)), "efficiency", *MEASURED, *PREDICTED)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main()
