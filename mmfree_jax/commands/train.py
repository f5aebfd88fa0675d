"""The verb `train`: one run from a preset."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console

from mmfree_jax import api, distributed
from mmfree_jax.command_line import parse
from mmfree_jax.config import RunConfig
from mmfree_jax.devices import check_platform, use_compile_cache
from mmfree_jax.files import cache_folder, url_of
from mmfree_jax.lowering.out_of_memory import explained
from mmfree_jax.output import line_printer, program
from mmfree_jax.presets import PRESETS, run_preset
from mmfree_jax.remote.working import NotCopied, working_folder
from mmfree_jax.sweep.view import follow
from mmfree_jax.training import loop
from mmfree_jax.training.interrupt import PREEMPTED, Interrupted
from mmfree_jax.training.profiling import step_range
from mmfree_jax.weights import with_initial_weights


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes that train or evaluate together."""

    coordinator: str = ""
    """Address HOST:PORT of process 0. SLURM and Cloud TPU need none of these flags: the processes are found there."""
    processes: int = 0
    """Number of processes."""
    process: int = -1
    """Index of this process, starting at 0."""
    patience: float = 300.0
    """Seconds to wait for the other processes to start."""

    def join(self) -> bool:
        """Join the group of processes that the flags or the environment describe. Returns whether there is one.

        Call it before anything asks JAX for devices. Raises ConfigError for flags that do not fit together, and
        MissingProcess if other processes do not start.
        """
        group = distributed.find_group(self.coordinator, self.processes, self.process)
        if group is not None:
            distributed.join(group, self.patience)
        return group is not None


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Train one run. If OUT already holds it, it is resumed. Any field of the preset can be overridden."""

    out: Path
    """Folder of the run, or a URL such as s3://BUCKET/RUN."""
    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    profile: str = ""
    """FROM:TO writes a profiler trace of these steps to OUT/profile (for TensorBoard or Perfetto)."""
    no_self_check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Skip the check before training, which compares one step of a two-layer copy with a float32 reference."""
    group: Annotated[Processes, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Processes)


def train(arguments: list[str]) -> int:
    """Train or resume one run. Returns the exit status."""
    if not arguments or arguments[0].startswith("-"):
        print(f"usage: {program()} train PRESET --out DIR [overrides]\n\npresets: {', '.join(PRESETS)}\n")
        print(f"{program()} train PRESET --help lists what can be overridden")
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 1
    preset, *rest = arguments
    # The preset is the default of every flag, so `train PRESET --help` shows the values that the run would have.
    default = TrainArguments(out=tyro.MISSING, run=run_preset(preset))
    options = parse(TrainArguments, rest, f"{program()} train {preset}", default, ("out",))
    profile_steps = step_range(options.profile)
    # Before anything asks JAX for its devices: afterwards a process can no longer join the others.
    if options.group.join():
        print(distributed.process_table(), flush=True)
    check_platform()
    try:
        with working_folder(options.out) as out:
            return _train(options, preset, out, profile_steps)
    except NotCopied as error:
        print(error, file=sys.stderr)
        return PREEMPTED


def _train(options: TrainArguments, preset: str, out: Path, profile_steps: range) -> int:
    run = with_initial_weights(options.run, preset, out)
    # One process speaks for all; the others would print the same lines.
    console = Console(quiet=jax.process_index() > 0)
    say = line_printer(console)
    run, token_set = api.prepare(run, out, say)
    use_compile_cache(cache_folder() / "compiled")
    try:
        with follow(run, out, console), explained(run):
            result = loop.train(run, out, token_set, profile_steps, not options.no_self_check)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.status
    # A trunk is not evaluated, so it ends without a held-out loss.
    loss = "done"
    if result["loss"] is not None:
        loss = f"held-out loss {result['loss']:.4f} nats a token, {result['bpb']:.4f} bits a byte"
    say(f"{loss} · {url_of(options.out) or out}")
    return 0
