"""`launch.py bench`: tables for people, JSON for programs."""

import dataclasses
import functools
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console
from rich.table import Column, Table

from mmfree_jax.bench import check, first_step, operations, steps
from mmfree_jax.bench.timing import ceilings
from mmfree_jax.command_line import parse
from mmfree_jax.config import ConfigError
from mmfree_jax.devices import check_platform, use_compile_cache
from mmfree_jax.files import read_json, write_json
from mmfree_jax.output import program
from mmfree_jax.training.identity import code_version


@dataclasses.dataclass(frozen=True)
class BenchArguments:
    """Time the operations, each checked against its reference first, and whole training steps on this machine."""

    suite: Literal["all", "start", "kernels", "step", "memory", "check"] = "all"
    """start: what a process waits for before its first step, cold and from the cache; kernels: the operations, variants
    side by side; step: training steps of presets; memory: what steps with every remat policy ask for, compiled but not
    run; check (never part of all): every kernel against float64 at many shapes. Its exit status is 2 if a kernel is
    wrong, and 75 if time ran out first (with --json, the same command continues)."""
    json: Path | None = None
    """File for all figures."""
    only: str = ""
    """Leave out cases whose name does not contain this, or one of several separated by "|": of operations the name
    shown, of steps and memory the preset, "B=8 T=2048" and what differs from the preset ("remat=codes", say)."""
    small: tyro.conf.FlagCreatePairsOff[bool] = False
    """Tiny shapes; a CPU always takes these."""
    shard: str = "0/1"
    """Which part of the checks to run, as 0/4 for the first of four. Each part ends within nine minutes."""
    seed: int = 0
    """Seed of the checks' shapes."""
    shapes: int = 256
    """Shapes of each kernel that all parts together check. Layers are a quarter as many, models an eighth."""


Rows = Callable[[BenchArguments, dict[str, float]], Iterator[dict[str, Any]]]


def main(arguments: list[str]) -> int:
    """Run the suites asked for and print a table of each. Raises ValueError where a variant computes something else."""
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
    with tempfile.TemporaryDirectory() as cache:  # empty: compiling is among what is timed
        use_compile_cache(Path(cache))
        return _measure(chosen, console, arguments)


def _about(arguments: list[str], device: str) -> dict[str, Any]:
    return {
        "command": " ".join(["python launch.py bench", *arguments]),
        "device": device,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def _done(path: Path | None, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks in a file that the same command wrote, on the same device, with the same code. Others do not count."""
    found = read_json(path) if path and path.exists() else {}
    return found["check"] if found == {**about, "check": found.get("check")} else []


def _check(chosen: BenchArguments, console: Console, arguments: list[str]) -> int:
    about, rows = {**_about(arguments, jax.devices()[0].device_kind), "code": code_version()}, []
    wanted = check.wanted(chosen.shard, chosen.seed, chosen.shapes, chosen.only)
    done = _done(chosen.json, about)
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
    for suite, rows in SUITES.items():
        if chosen.suite in ("all", suite):
            found[suite] = []
            for row in rows(chosen, limits):
                found[suite].append(row)
                if chosen.json:
                    write_json(chosen.json, found)
            console.print(_table(suite, found[suite]))
    if not any(found.get(suite) for suite in SUITES):
        raise ConfigError(f"no case has {chosen.only!r} in its name")
    return 0


def _is_small(chosen: BenchArguments) -> bool:
    return chosen.small or jax.default_backend() == "cpu"


def _operation_rows(chosen: BenchArguments, limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    cases = tuple(operations.cases(_is_small(chosen)))
    yield from operations.measure(_chosen(chosen, cases, cases), limits)


def _chosen(chosen: BenchArguments, small: tuple, full: tuple) -> tuple:
    wanted = chosen.only.split("|")
    return tuple(case for case in (small if _is_small(chosen) else full) if any(name in case.name for name in wanted))


def _step_rows(chosen: BenchArguments, limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    cases = _chosen(chosen, steps.SMALL, steps.FULL)
    yield from steps.each(cases, functools.partial(steps.measure, limits=limits))


def _memory_rows(chosen: BenchArguments, limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    yield from steps.each(_chosen(chosen, steps.SMALL_MEMORY, steps.FULL_MEMORY), steps.memory)


def _start_rows(chosen: BenchArguments, limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    for case in _chosen(chosen, first_step.SMALL, first_step.FULL):
        yield from first_step.measure(case)


SUITES: dict[str, Rows] = {"start": _start_rows, "kernels": _operation_rows, "step": _step_rows, "memory": _memory_rows}
CASE = ("preset", "batch", "sequence", "remat", "kernels", "gradient_bits", "unoptimised")
SHOWN = {
    "start": ("preset", "batch", "sequence", "start", "start_s", "lower_s", "compile_s", "compiled"),
    "kernels": ("case", "variant", "ms", "ms_least", "ms_most", "of_copy", "of_bf16", "temporary_mb", "error"),
    "step": (
        *CASE,
        *("tokens_per_s", "step_ms", "step_ms_least", "step_ms_most"),
        *("of_bf16", "of_data_sheet", "total_gb", "temporary_gb", "compile_s"),
    ),
    "memory": (*CASE, "total_gb", "temporary_gb", "compile_s"),
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
