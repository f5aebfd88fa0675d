"""`mmfree lower`: a table for people, JSON for programs, exit status 0 (fits) or 2 (does not)."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from mmfree_jax import flops
from mmfree_jax.command_line import parse
from mmfree_jax.config import MeshConfig, RunConfig, require, suggestion
from mmfree_jax.devices import DEVICES
from mmfree_jax.lowering import serving
from mmfree_jax.lowering.compiled import Compiled, check_installed, compile_absent
from mmfree_jax.lowering.program import Traffic
from mmfree_jax.lowering.verdict import Verdict, judge
from mmfree_jax.output import program
from mmfree_jax.presets import PRESETS, run_preset


@dataclasses.dataclass(frozen=True)
class LowerArguments:
    """Predict for a run on a machine that is not here: does it fit, how long is a step, what do devices exchange."""

    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    device: Literal["h200", "h100", "a100", "tpu-v5e", "tpu-v5p", "tpu-v6e"] = "h200"
    """Type of the devices. Their number and use follow from the mesh, such as --mesh fsdp=64,tensor=8."""
    compile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile the step for these devices as well, by their own compiler (jax[tpu], jax[cuda13]), which then decides
    whether it fits. A minute or more; no such device is needed."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print everything as one JSON object."""


def main(arguments: list[str]) -> int:
    """Print the verdict on one run, or with --serve on a model that is served. Returns 0 if it fits, else 2."""
    name = f"{program()} lower"
    if "--serve" in arguments:
        return serving.main([argument for argument in arguments if argument != "--serve"])
    if not arguments or arguments[0].startswith("-"):
        print(f"usage: {name} PRESET --mesh fsdp=64,tensor=8 [--device h200] [--compile] [--json] [overrides]")
        print(f"       {name} MODEL --serve --context 2048 --batch 1 [--device h200], for a preset or a folder\n")
        print(f"presets: {', '.join(PRESETS)}\n\n{name} PRESET --help lists what can be overridden")
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 1
    preset, *rest = arguments
    default = LowerArguments(run=run_preset(preset))
    options = parse(LowerArguments, with_mesh(rest), f"{name} {preset}", default)
    if options.compile:
        check_installed(options.device)
    verdict = judge(options.run, options.device)
    if options.compile:
        verdict = dataclasses.replace(verdict, compiled=compile_absent(options.run, options.device))
    if options.json:
        print(json.dumps(as_json(options.run, verdict), allow_nan=False))
    else:
        # Where the output is a file there is no width to fit into; rich would assume 80 columns and cut cells.
        width = None if Console().is_terminal else 160
        show(options.run, verdict, Console(highlight=False, markup=False, emoji=False, width=width))
    return 0 if verdict.fits else serving.DOES_NOT_FIT


def with_mesh(arguments: list[str]) -> list[str]:
    """Turn `--mesh fsdp=64,tensor=8` into `--mesh.fsdp 64 --mesh.tensor 8`. Raises ConfigError for anything else."""
    # tyro knows one flag for each field. This form is shorter to write, and is what people call a mesh.
    split = lambda argument: argument.split("=", 1) if argument.startswith("--mesh=") else [argument]
    arguments = [part for argument in arguments for part in split(argument)]
    if "--mesh" not in arguments:
        return arguments
    at = arguments.index("--mesh")
    text = arguments[at + 1] if at + 1 < len(arguments) else ""
    axes = [field.name for field in dataclasses.fields(MeshConfig)]
    long: list[str] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\w+)=(\d+)", part)
        require(found is not None, f"--mesh {text!r}: must be axes and sizes such as fsdp=64,tensor=8")
        assert found is not None
        require(found[1] in axes, f"--mesh {text!r}: no axis {found[1]!r}{suggestion(found[1], axes)}")
        require(f"--mesh.{found[1]}" not in long, f"--mesh {text!r}: {found[1]} is given twice")
        long += [f"--mesh.{found[1]}", found[2]]
    return [*arguments[:at], *long, *arguments[at + 2 :]]


def as_json(run: RunConfig, verdict: Verdict) -> dict[str, Any]:
    """Return everything in bytes and seconds; memory and traffic are those of one device."""
    found = dataclasses.asdict(verdict)
    found["memory"]["total"], found["time"]["total"] = verdict.memory.total, verdict.time.total
    return {
        "run": dataclasses.asdict(run),
        **found,
        "communication_share": verdict.time.communication / verdict.time.total,
        "tokens_per_s": run.data.tokens_per_step / verdict.time.total,
        "fits": verdict.fits,
        "verdict": "fits" if verdict.fits else "does not fit",
    }


def show(run: RunConfig, verdict: Verdict, console: Console) -> None:
    """Print the tables, and the verdict as the last line."""
    mesh = " x ".join(f"{name} {size}" for name, size in dataclasses.asdict(run.mesh).items() if size > 1) or "1 device"
    size = flops.parameters(run.model).total
    console.print(
        f"{run.name}: {size / 1e9:.3g}B parameters on {run.mesh.devices} x {verdict.device} ({mesh}), "
        f"{run.data.batch} x {run.data.sequence} tokens a step, remat {run.remat}"
    )
    console.print(_memory_table(verdict))
    if verdict.compiled is not None:
        console.print(_compiled_table(verdict.compiled, verdict))
    title = "collective" if verdict.compiled is None else "collective, by the model"
    console.print(_traffic_table(run, verdict.report.traffic, title))
    if verdict.compiled is not None and verdict.compiled.traffic:
        console.print(_traffic_table(run, verdict.compiled.traffic, "collective, compiled"))
    console.print(_time_table(run, verdict))
    for line in verdict.report.replicated:
        console.print(line)
    if verdict.report.rematerialised:
        console.print(f"the partitioner replicates {verdict.report.rematerialised} arrays on every device")
    console.print(
        "State and collectives are read from the step without our own kernels, lowered for this platform and "
        "partitioned for this mesh on simulated devices. A GPU's compiler makes the same all-gathers and "
        "reduce-scatters, but sums some gradients before it all-reduces them along tensor: up to 1.6 times fewer "
        "bytes. Activations, gradients and working set come from a model, as do times: rates of the data sheet "
        "(mmfree_jax/devices.py) times the shares measured on an H200, without overlap.",
        style="dim",
    )
    if DEVICES[verdict.device].kernels and run.kernels == "auto":
        console.print(
            "kernels: unverified. On that machine `train` checks each of them before it is used.", style="dim"
        )
    for line in _proposals(run, verdict):
        console.print(line)
    if verdict.compiled is not None and verdict.compiled.refused:
        console.print(f"does not fit: {verdict.compiled.refused}")
        return
    sign, by = ("<=" if verdict.fits else ">"), ("" if verdict.compiled is None else ", compiled")
    console.print(
        f"{'fits' if verdict.fits else 'does not fit'}: {verdict.needed / 1e9:.1f} GB a device{by} {sign} "
        f"{verdict.usable / 1e9:.1f} GB usable"
    )


def _memory_table(verdict: Verdict) -> Table:
    table = Table("memory of one device", "GB", "from", title_justify="left")
    # What is exact and what comes from a model must not look alike.
    origin = {"parameters": "shardings", "optimizer": "shardings"}
    for name, value in dataclasses.asdict(verdict.memory).items():
        table.add_row(name, f"{value / 1e9:.2f}", origin.get(name, "model"))
    table.add_row("total", f"{verdict.memory.total / 1e9:.2f}", f"of {verdict.usable / 1e9:.1f} usable", style="bold")
    return table


def _compiled_table(compiled: Compiled, verdict: Verdict) -> Table:
    """What the target's compiler says beside what the model says."""
    table = Table("memory of one device", "compiled, GB", "model, GB", title_justify="left")
    model = verdict.memory
    state, working = model.parameters + model.optimizer, model.activations + model.gradients + model.working
    for name, found, expected in (
        ("state and batch", compiled.state, f"{state / 1e9:.2f}"),
        ("temporaries", compiled.temporaries, f"{working / 1e9:.2f}"),
        ("generated code", compiled.code, ""),
    ):
        table.add_row(name, f"{found / 1e9:.2f}", expected)
    off = "" if compiled.refused else f" ({model.total / compiled.total - 1:+.0%})"
    table.add_row("total", f"{compiled.total / 1e9:.2f}", f"{model.total / 1e9:.2f}{off}", style="bold")
    return table


def _traffic_table(run: RunConfig, traffic: Sequence[Traffic], title: str) -> Table:
    table = Table(title, "type", "arrays a step", "sent by one device, GB", "along")
    for one in sorted(traffic, key=lambda one: -one.sent):
        along = " x ".join(f"{axis} {getattr(run.mesh, axis)}" for axis in one.axes)
        table.add_row(one.kind, one.dtype, f"{one.count:,}", f"{one.sent / 1e9:.3f}", along)
    return table


def _time_table(run: RunConfig, verdict: Verdict) -> Table:
    table = Table("time of one step", "ms", "share")
    total = verdict.time.total
    for name, value in dataclasses.asdict(verdict.time).items():
        table.add_row(name, f"{value * 1e3:,.1f}", f"{value / total:.0%}")
    rate = f"{run.data.tokens_per_step / total:,.0f} tokens/s"
    table.add_row("total", f"{total * 1e3:,.1f}", rate, style="bold")
    return table


def _proposals(run: RunConfig, verdict: Verdict) -> list[str]:
    lines = []
    if verdict.micro_batches is not None:
        at = verdict.micro_batches
        remat = "" if at.remat == run.remat else f" --remat {at.remat}"
        rows = at.batch // (run.mesh.batch_shards * at.accumulate)
        lines.append(
            f"the same batch in micro-batches: --optim.accumulate {at.accumulate}{remat} "
            f"({rows} rows a device at once, {at.memory / 1e9:.1f} GB)"
        )
    if verdict.same_batch is not None:
        lines.append(f"cheapest remat policy for this batch as it is: --remat {verdict.same_batch.remat}")
    if verdict.largest is not None:
        at = verdict.largest
        lines.append(f"largest batch that fits: --data.batch {at.batch} --remat {at.remat}")
    return lines or ["no batch fits on this mesh with any remat policy: take more devices along fsdp or tensor"]
