"""`mmfree bench`: tables for people, JSON for programs."""

import dataclasses
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console
from rich.table import Column, Table

from mmfree_jax.bench import check, decode, first_step, operations, steps
from mmfree_jax.bench.timing import ceilings
from mmfree_jax.command_line import parse
from mmfree_jax.config import ConfigError
from mmfree_jax.devices import check_platform, use_compile_cache
from mmfree_jax.files import read_json, write_json
from mmfree_jax.output import program
from mmfree_jax.training.identity import code_version
from mmfree_jax.training.step import make_program


@dataclasses.dataclass(frozen=True)
class BenchArguments:
    """Time the operations, each checked against its reference first, and whole training steps on this machine."""

    suite: Literal["all", "start", "kernels", "step", "memory", "decode", "check"] = "all"
    """start: time until the first step, without and with the compile cache; kernels: the operations, with their
    variants; step: training steps of presets; memory: memory of steps with every remat policy, compiled but not run;
    decode (not part of all): tokens of served models of random weights; on a CPU at full size too, without --small;
    check (not part of all): every kernel against float64 at many shapes. The exit status of check is 2 if a kernel is
    wrong, and 75 if time ran out (with --json, the same command continues)."""
    json: Path | None = None
    """File for all figures."""
    only: str = ""
    """Only cases whose name contains this, or one of several texts separated by "|". The name of an operation is shown
    in the table; that of a step has the preset, "B=8 T=2048" and what differs from the preset ("remat=codes")."""
    small: tyro.conf.FlagCreatePairsOff[bool] = False
    """Tiny shapes; a CPU always takes these."""
    shard: str = "0/1"
    """Which part of the checks to run, as 0/4 for the first of four. Each part ends within nine minutes."""
    seed: int = 0
    """Seed of the checks' shapes."""
    shapes: int = 256
    """Shapes of each kernel that all parts together check. Layers are a quarter as many, models an eighth."""


def main(arguments: list[str]) -> int:
    """Run the suites and print a table of each. Raises ValueError if a variant computes something else."""
    chosen = parse(BenchArguments, arguments, f"{program()} bench")
    if chosen.suite == "check":
        # Checks run in several processes, which share the device's memory: none may take most of it when JAX starts.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    check_platform()
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, markup=False, emoji=False, width=None if Console().is_terminal else 200)
    if chosen.suite == "check":
        return _check(chosen, console, arguments)
    with tempfile.TemporaryDirectory() as cache:  # an empty cache, because compile time is measured too
        use_compile_cache(Path(cache))
        return _measure(chosen, console, arguments)


def _about(arguments: list[str], device: str) -> dict[str, Any]:
    return {
        "command": " ".join(["python launch.py bench", *arguments]),
        "device": device,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def _check(chosen: BenchArguments, console: Console, arguments: list[str]) -> int:
    about, rows = {**_about(arguments, jax.devices()[0].device_kind), "code": code_version()}, []
    wanted = check.uses_of_shard(chosen.shard, chosen.seed, chosen.shapes, chosen.only)
    # Checks that the same command has written, on the same device and with the same code, are not repeated.
    found = read_json(chosen.json) if chosen.json and chosen.json.exists() else {}
    done = found["check"] if found == {**about, "check": found.get("check")} else []
    for row in check.measure(wanted, done):
        rows.append(row)
        if chosen.json:
            write_json(chosen.json, {**about, "check": rows})
    console.print(_table("check", check.by_kernel(rows)))
    wrong = [row for row in rows if not row["passed"]]
    for row in wrong:
        console.print(f"{row['use']}: {row['worst']}")
    left = len(wanted) - len(rows)
    rest = f", {left} left: run the same command again" if left else ""
    console.print(f"{len(rows)} checks, {len(wrong)} wrong{rest}")
    return 2 if wrong else 75 if left else 0


def _measure(chosen: BenchArguments, console: Console, arguments: list[str]) -> int:
    limits, device = ceilings(), jax.devices()[0].device_kind
    copied, products = limits["copy_bytes_per_s"] / 1e12, limits["bf16_flops"] / 1e12
    console.print(f"{device}, jax {jax.__version__}: copy {copied:.3f} TB/s, bfloat16 products {products:.1f} TFLOP/s")
    found: dict[str, Any] = {**_about(arguments, device), "ceilings": limits}
    for suite in SUITES:
        if chosen.suite == suite or (chosen.suite == "all" and suite != "decode"):
            found[suite] = []
            for row in _rows(suite, chosen, limits):
                found[suite].append(row)
                if chosen.json:
                    write_json(chosen.json, found)
            console.print(_table(suite, found[suite]))
    if not any(found.get(suite) for suite in SUITES):
        raise ConfigError(f"no case has {chosen.only!r} in its name")
    return 0


def _rows(suite: str, chosen: BenchArguments, limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Measure the cases of a suite whose names match `--only`; tiny ones on a CPU."""
    small, names = chosen.small or jax.default_backend() == "cpu", chosen.only.split("|")
    cases: tuple[Any, ...] = {
        "start": lambda: first_step.SMALL if small else first_step.FULL,
        "kernels": lambda: tuple(operations.cases(small)),
        "step": lambda: steps.SMALL if small else steps.FULL,
        "memory": lambda: steps.SMALL_MEMORY if small else steps.FULL_MEMORY,
        "decode": lambda: decode.cases(chosen.small),
    }[suite]()
    cases = tuple(case for case in cases if any(name in case.name for name in names))
    if suite == "start":
        for case in cases:
            yield from first_step.measure(case)
    elif suite == "kernels":
        yield from operations.measure(cases, limits)
    elif suite == "decode":
        yield from decode.measure(cases)
    else:
        for case in cases:
            yield steps.measure(case, limits if suite == "step" else None)
            make_program.cache_clear()  # what one case held on the device is gone before the next
            jax.clear_caches()


SUITES = ("start", "kernels", "step", "memory", "decode")
CASE = ("preset", "batch", "sequence", "remat", "kernels", "gradient_bits", "moments", "documents", "unoptimised")
SHOWN = {
    "start": ("preset", "batch", "sequence", "start", "start_s", "lower_s", "compile_s", "compiled"),
    "kernels": ("case", "variant", "ms", "ms_least", "ms_most", "of_copy", "of_bf16", "temporary_mb", "error"),
    "step": (
        *CASE,
        *("tokens_per_s", "step_ms", "step_ms_least", "step_ms_most"),
        *("of_bf16", "of_data_sheet", "total_gb", "temporary_gb", "compile_s"),
    ),
    "memory": (*CASE, "total_gb", "temporary_gb", "compile_s"),
    "decode": (
        *("preset", "batch", "context", "kernels", "ms", "tokens_per_s", "joules"),
        *("resident_gb", "read_gb", "of_read", "compile_s"),
    ),
    "check": ("kernel", "shapes", "wrong", "deviation", "most deviating"),
}


def _table(suite: str, rows: list[dict[str, Any]]) -> Table:
    name, *figures = SHOWN[suite]
    table = Table(Column(name, no_wrap=True), *figures, title=suite)
    for row in rows:
        table.add_row(*(_figure(name, row[name]) for name in SHOWN[suite]))
    return table


def _figure(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str | int):
        return str(value)
    if name.startswith("of_"):
        return f"{value:.1%}"
    return f"{value:.2g}" if name == "error" else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
