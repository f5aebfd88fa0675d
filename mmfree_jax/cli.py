"""The commands behind launch.py that train: typed arguments in, exit status out."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console

from mmfree_jax.config import ConfigError, MeshConfig, ModelConfig, RunConfig, require
from mmfree_jax.flops import parameters
from mmfree_jax.output import line_printer
from mmfree_jax.sweep.executor import Executor
from mmfree_jax.sweep.local import this_machine
from mmfree_jax.sweep.render import Cloud, render
from mmfree_jax.sweep.slurm import Slurm, SlurmExecutor
from mmfree_jax.training.folder import check_held_out_text, held_out_corpus, known_corpora, saved_run, with_padding

T = TypeVar("T")
SIGNS = re.compile(r"[╭╮╰╯│─┌┐└┘]")


@dataclasses.dataclass(frozen=True)
class SweepArguments:
    """Run an experiment: every run that is not done yet, resuming those half done."""

    experiment: tyro.conf.Positional[Path]
    """Python file that defines study()."""
    out: Path
    """Folder for the runs; a folder that holds this sweep already is continued."""
    slots: int = 0
    """Workers on each GPU (0: one, several with small models), or in all without GPUs (0: one a CPU core). Rows of runs
    that shared a GPU leave seconds, joules, mfu and peak memory empty."""
    executor: Literal["local", "slurm"] = "local"
    """Workers on this machine (Linux only), or SLURM jobs."""
    slurm: Slurm = dataclasses.field(default_factory=Slurm)
    """What jobs ask SLURM for."""
    limit_hours: float = 0.0
    """Hours that a run may take before it is saved and called failed (0: any number)."""
    again: bool = False
    """Also run again what diverged."""
    dry_run: bool = False
    """Print what would be run, and stop."""
    status: bool = False
    """Print where each run stands, and stop."""
    collect: bool = False
    """Write runs.csv from the runs that are done by now, and stop."""
    render: Literal["", "skypilot", "jobset"] = ""
    """Write the sweep as SkyPilot tasks or as Kubernetes JobSets into OUT, and stop."""
    cloud: Cloud = dataclasses.field(default_factory=Cloud)
    """What rendered tasks run on."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes as one run."""

    coordinator: str = ""
    """HOST:PORT of process 0 if several processes are one run; found automatically under SLURM and on Cloud TPU."""
    processes: int = 0
    """Number of processes."""
    process: int = -1
    """Index of this process, from 0."""
    patience: float = 300.0
    """Seconds to wait for the other processes to start."""

    def join(self) -> bool:
        """Join the group of processes that flags or the environment ask for; returns whether there is one.

        Call it before anything asks JAX for devices. Raises ConfigError for flags that do not go together, and
        MissingProcess where other processes do not start.
        """
        from mmfree_jax import distributed

        group = distributed.meant(self.coordinator, self.processes, self.process)
        if group is not None:
            distributed.join(group, self.patience)
        return group is not None


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Train one run; an --out that holds it already resumes it. Any field of the preset can be overridden."""

    out: Path
    """Folder of the run."""
    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    profile: str = ""
    """FROM:TO writes a profiler's trace of these steps to OUT/profile (TensorBoard, Perfetto)."""
    no_self_check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Skip the check before training, which compares a step of a two-layer copy with a float32 reference."""
    group: Annotated[Processes, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Processes)


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Held-out loss of a model: a run directory, an imported folder or a Hugging Face folder."""

    model: tyro.conf.Positional[Path]
    """Folder of the model."""
    corpus: str = ""
    """Corpus or folder of a token set (default: that of the run; needed for other models)."""
    sequence: int = 0
    """Tokens in a window (default: the run's own, else 2048)."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """The devices to evaluate on. They need not be those of training."""
    group: Annotated[Processes, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Processes)


@dataclasses.dataclass(frozen=True)
class ImportArguments:
    """Read a Hugging Face folder (hgrn_bit or Llama) into a model that `train --init` and `evaluate` take."""

    source: tyro.conf.Positional[Path]
    """Hugging Face folder: config.json and safetensors."""
    out: Path
    """New folder."""


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """Write a model as a Hugging Face folder."""

    model: tyro.conf.Positional[Path]
    """Folder of the model."""
    out: Path
    """New folder."""
    format: Literal["huggingface"] = "huggingface"
    """The layout to write."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the tensors on disk."""


def parse(kind: type[T], arguments: list[str], prog: str, default: Any = tyro.MISSING_NONPROP) -> T:
    """Typed arguments of a command. Raises ConfigError with one line for a wrong one; --help prints and exits."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(kind, args=arguments, prog=prog, default=default)
    except SystemExit as end:
        if end.code:
            raise ConfigError(one_line(shown.getvalue(), prog, list(_flags(kind)))) from None
        raise


def _flags(kind: Any, prefix: str = "") -> Iterator[str]:
    """What can be given to a command, as `--optim.warmup-steps`."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        inner = typing.get_args(hint)[0] if marks else hint
        if dataclasses.is_dataclass(inner):
            unnamed = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _flags(inner, prefix if unnamed else f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}".replace("_", "-")


def nearest_flags(unknown: str, known: Sequence[str]) -> list[str]:
    """The known flags that an unknown one may stand for: the nearest, at most three that are equally near.

    Near is a similar spelling, or a last word made of the unknown flag's initials (learning-rate: optim.lr) or of one
    of its parts (batch-size: data.batch).
    """
    group, _, word = unknown.removeprefix("--").replace("_", "-").split("=")[0].rpartition(".")
    initials = "".join(part[:1] for part in word.split("-"))

    def score(flag: str) -> float:
        its_group, _, its_word = flag.removeprefix("--").rpartition(".")
        alike = difflib.SequenceMatcher(None, word, its_word).ratio()
        if "-" in word and (its_word == initials or its_word in word.split("-")):
            alike = max(alike, 0.9)
        return alike + (0.3 if group == its_group else 0.0)

    best = max(map(score, known), default=0.0)
    return [flag for flag in known if score(flag) >= max(best, 1.0 if group else 0.75)][:3]


def one_line(panel: str, prog: str, known: Sequence[str] = ()) -> str:
    """The gist of tyro's error panel: what is wrong, what may have been meant (of the flags `known`), where help is."""
    lines = [line for raw in panel.splitlines() if (line := SIGNS.sub("", raw).strip())]
    parts = re.split(r".*─{5}.*", panel)  # title, what is wrong on one or more lines, hints
    wrong = " ".join(SIGNS.sub("", parts[1]).split()) if len(parts) > 1 else "wrong usage"
    for marker, template in (("Perhaps you meant", "{0} (did you mean {1}?)"), ("Missing from", "{1} is required")):
        at = next((i for i, line in enumerate(lines[:-1]) if line.startswith(marker)), None)
        if at is not None:
            return template.format(wrong, lines[at + 1].split()[0].rstrip(",")) + _also_unknown(lines)
    unknown = [word for word in wrong.removeprefix("Unrecognized options:").split(", ") if word.strip()[:2] == "--"]
    near = nearest_flags(unknown[0].strip(), known) if unknown and wrong.startswith("Unrecognized") else []
    return f"{wrong} (did you mean {' or '.join(near)}?)" if near else f"{wrong} (see {prog} --help)"


def _also_unknown(lines: list[str]) -> str:
    """A panel on what is missing lists below it, one a line, what it could not place."""
    at = next((i for i, line in enumerate(lines) if line == "Unrecognized options:"), None)
    if at is None:
        return ""
    words = itertools.takewhile(lambda line: "───" not in line and " " not in line, lines[at + 1 :])
    return f" (and these are unknown: {' '.join(words)})"


def study(arguments: list[str]) -> int:
    """Sweep, fit, report."""
    return _sweep("study", arguments)


def sweep(arguments: list[str]) -> int:
    """Just the runs."""
    return _sweep("sweep", arguments)


def _sweep(verb: str, arguments: list[str]) -> int:
    from mmfree_jax.sweep import study as flow
    from mmfree_jax.sweep.experiment import load_study

    chosen = parse(SweepArguments, arguments, f"launch.py {verb}")
    asked = [name for name in ("dry_run", "status", "collect", "render") if getattr(chosen, name)]
    flags = " and ".join(f"--{name.replace('_', '-')}" for name in asked)
    require(len(asked) < 2, f"{flags} are asked for together: choose one")
    _check_idle(chosen)
    declared = load_study(chosen.experiment)
    console = Console()
    if chosen.dry_run:
        print("\n".join(flow.plan_lines(declared, _executor(chosen, console))))
        return 0
    if chosen.status:
        print("\n".join(flow.status_lines(declared, chosen.out)))
        return 0
    if chosen.collect:
        print(f"runs table: {flow.collect(chosen.out, declared.runs)}")
        return 0
    if chosen.render:
        placed = declared, chosen.experiment, chosen.out, chosen.render
        print(*render(*placed, chosen.cloud, chosen.limit_hours), sep="\n")
        return 0
    run = flow.run_study if verb == "study" else flow.sweep
    return run(declared, chosen.out, console, _executor(chosen, console), chosen.again)


def _check_idle(chosen: SweepArguments) -> None:
    """Refuse options of an executor that is not asked for: a sweep meant for a cluster would begin on this machine."""
    watched = chosen.status or chosen.collect  # of a sweep that ran wherever it ran
    require(
        chosen.slurm == Slurm() or chosen.executor == "slurm" or watched,
        "--slurm.… would do nothing: it needs --executor slurm",
    )
    require(chosen.cloud == Cloud() or bool(chosen.render) or watched, "--cloud.… would do nothing: it needs --render")


def _executor(chosen: SweepArguments, console: Console) -> Executor:
    if chosen.executor == "slurm":
        require(chosen.slots == 0, "--slots is for workers of this machine: with SLURM use --slurm.parallel")
        return SlurmExecutor(chosen.slurm, chosen.limit_hours, line_printer(console))
    return this_machine(chosen.slots, chosen.limit_hours)


def train(arguments: list[str]) -> int:
    """One run from a preset."""
    from mmfree_jax import distributed
    from mmfree_jax.presets import PRESETS, run_preset
    from mmfree_jax.training.profiling import step_range

    if not arguments or arguments[0].startswith("-"):
        print(f"usage: launch.py train PRESET --out DIR [overrides]\n\npresets: {', '.join(PRESETS)}\n")
        print("launch.py train PRESET --help lists what can be overridden")
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 1
    preset, *rest = arguments
    default = TrainArguments(out=tyro.MISSING, run=run_preset(preset))
    chosen = parse(TrainArguments, rest, f"launch.py train {preset}", default)
    if chosen.group.join():
        print(distributed.process_table(), flush=True)
    return _train(
        _with_init(chosen.run, preset, chosen.out), chosen.out, step_range(chosen.profile), not chosen.no_self_check
    )


def _with_init(run: RunConfig, preset: str, out: Path) -> RunConfig:
    """The run with the architecture of the weights that it starts from, if there are any.

    A run that has made a checkpoint has its architecture in its folder: the weights need not exist any more.
    """
    from mmfree_jax.weights import model_config

    held, init = saved_run(out), run.init and str(Path(run.init).resolve())
    if held is not None and held.init and init in ("", held.init):
        return _of_weights(dataclasses.replace(run, init=held.init), preset, held.model)
    return _of_weights(run, preset, model_config(Path(run.init))) if run.init else run


def _of_weights(run: RunConfig, preset: str, found: ModelConfig) -> RunConfig:
    """The run with the architecture `found` of the weights that it starts from.

    Raises ConfigError where the preset is of another family, whose rate and schedule would be another's, or the command
    line asks for another architecture. How gradients are computed is the run's own.
    """
    from mmfree_jax.presets import run_preset

    usual, own = run_preset(preset).model, ("gradient_bits", "tokenizer_vocab")  # these two do not shape the weights
    require(
        found.family == usual.family,
        f"init={run.init} holds a model of family {found.family}, and {preset} is of {usual.family}: take a preset of "
        f"{found.family}",
    )
    for name in (field.name for field in dataclasses.fields(found)):
        asked = getattr(run.model, name)
        require(
            asked in (getattr(usual, name), getattr(found, name)) or name in own,
            f"model.{name}={asked!r}, but init={run.init} has {getattr(found, name)!r}: leave it out",
        )
    model = dataclasses.replace(found, **{name: getattr(run.model, name) for name in own})
    return dataclasses.replace(run, init=str(Path(run.init).resolve()), model=model)


def _train(config: RunConfig, out: Path, profiled: range, checked: bool) -> int:
    import jax

    from mmfree_jax.data.corpora import cache_folder, resolve_data
    from mmfree_jax.devices import check_platform, use_compile_cache
    from mmfree_jax.sharding import left_idle, make_mesh
    from mmfree_jax.sweep.view import follow
    from mmfree_jax.training.interrupt import Interrupted
    from mmfree_jax.training.loop import resolved
    from mmfree_jax.training.loop import train as train_run
    from mmfree_jax.training.step import make_program, program_key

    check_platform()
    console = Console(quiet=jax.process_index() > 0)
    say = line_printer(console)
    make_mesh(config.mesh)  # refuses missing devices before a corpus is prepared
    if idle := left_idle(config.mesh):
        say(idle)
    token_set = resolve_data(config.data, say, known_corpora(out))
    config = resolved(config, out, token_set)
    for line in make_program(program_key(config, token_set.end_of_document)).uncut:
        say(line)
    use_compile_cache(cache_folder() / "compiled")

    try:
        with follow(config, out, console):
            result = train_run(config, out, token_set, profiled, checked)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.status
    scored = result["loss"] is not None
    held_out = f"held-out loss {result['loss']:.4f} nats a token, {result['bpb']:.4f} bits a byte" if scored else "done"
    say(f"{held_out} · {out}")
    return 0


def evaluate(arguments: list[str]) -> int:
    """Held-out loss of a model."""
    chosen = parse(EvaluateArguments, arguments, "launch.py evaluate")
    chosen.group.join()

    from mmfree_jax import distributed, evaluation
    from mmfree_jax.devices import check_platform, check_settings
    from mmfree_jax.sharding import left_idle, make_mesh
    from mmfree_jax.training.step import make_program, program_key
    from mmfree_jax.weights import is_run, load_params, run_config

    check_settings()
    check_platform()
    run, mesh = run_config(chosen.model), chosen.mesh
    known = bool(chosen.corpus) or is_run(chosen.model)
    require(known, f"{chosen.model} was not trained here: give the corpus to evaluate on with --corpus")
    make_mesh(mesh)
    if idle := left_idle(mesh):
        print(idle, file=sys.stderr)
    sequence = chosen.sequence or run.data.sequence
    even = sequence % mesh.sequence == 0
    require(even, f"a sequence of {sequence} is not divisible by mesh.sequence={mesh.sequence}: choose others")
    token_set = held_out_corpus(chosen.model, run.data, chosen.corpus)
    run = dataclasses.replace(run, model=with_padding(run.model, token_set))
    check_held_out_text(token_set)
    program = make_program(dataclasses.replace(program_key(run, token_set.end_of_document), mesh=mesh))
    params = load_params(chosen.model, program.abstract_state.params)
    scores = evaluation.evaluate(program, params, token_set, sequence)
    if distributed.is_first():
        print("\n".join(evaluation.shown(scores)))
    return 0


def import_model(arguments: list[str]) -> int:
    """Hugging Face -> our folder."""
    chosen = parse(ImportArguments, arguments, "launch.py import")
    from mmfree_jax.interop import load_huggingface, read_origin
    from mmfree_jax.weights import save_model

    model = load_huggingface(chosen.source)
    save_model(model, chosen.out, read_origin(chosen.source))
    print(f"{model.config.family}, {parameters(model.config).total:,} parameters · {chosen.out}")
    return 0


def export_model(arguments: list[str]) -> int:
    """A model -> Hugging Face folder."""
    chosen = parse(ExportArguments, arguments, "launch.py export")
    from mmfree_jax.interop import save_huggingface
    from mmfree_jax.weights import load_model, origin

    model, known = load_model(chosen.model), origin(chosen.model)
    save_huggingface(model, chosen.out, chosen.dtype, origin=known)
    words = model.config.tokenizer_vocab
    padding = f", without {model.config.vocab - words} tokens of padding" if words else ""
    print(f"{model.config.family}, {parameters(model.config).total:,} parameters{padding} · {chosen.out}")
    return 0
