"""The verb `evaluate`: losses of models on text, scores on tasks, and both as paired comparisons."""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from mmfree_jax import distributed, flops, held_out
from mmfree_jax.command_line import parse
from mmfree_jax.commands.train import Processes
from mmfree_jax.config import ConfigError, MeshConfig, require
from mmfree_jax.devices import check_platform, check_settings, use_compile_cache
from mmfree_jax.evaluation.comparison import Paired, paired
from mmfree_jax.evaluation.loss import Sums
from mmfree_jax.files import cache_folder
from mmfree_jax.inference.packed import is_packed, read_packed
from mmfree_jax.output import program
from mmfree_jax.remote.reading import fetched
from mmfree_jax.weights import model_config

SHOWN = ("run_id", "corpus", "loss", "loss_se", "perplexity", "bpb", "val_tokens", "val_documents")
# The whole of a single row, as lines NAME VALUE.
NAMED = {"val_tokens": "tokens", "val_documents": "documents"}
LINES = ("loss", "loss_se", "perplexity", "perplexity_se", "bpb", "bpb_se", "val_tokens", "val_documents")


@dataclasses.dataclass(frozen=True)
class EvaluateArguments:
    """Score models: their loss on held-out text, or on tasks of lm-evaluation-harness; each by itself, or two compared.

    A model is a run directory (its newest checkpoint), an imported, packed or Hugging Face folder. Standard errors and
    intervals are by document.
    """

    models: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of models."""
    corpus: tuple[str, ...] = ()
    """Corpora to compute the loss on: names or folders of token sets, files or folders of text (default: that of the
    run; required for other models)."""
    domains: bool = False
    """Compute the loss on the held-out text of every corpus of the run's mixture."""
    sequence: int = 0
    """Tokens in a window, which may be more than in training (default: those of the run, else 2048)."""
    by_position: bool = False
    """Also print the loss by how many tokens a token is predicted from."""
    checkpoints: bool = False
    """Evaluate every checkpoint that the runs hold, not only the newest."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness instead, separated by blanks or commas; `paper` is the paper's six (needs the
    extra `eval`)."""
    include: Path | None = None
    """Folder with further tasks."""
    data: Path | None = None
    """Folder with TASK/SPLIT.jsonl, used instead of the hub."""
    limit: int = 0
    """Items a task, at most (0: all)."""
    fewshot: int | None = None
    """Examples before each item (default: as the task says)."""
    against: tuple[Path, ...] = ()
    """Models to compare with: one for each of `models`, in the same order. Several make two families."""
    json: bool = False
    """Print a JSON object a line: rows of losses that `scaling` reads, or items of tasks."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """Devices to compute losses on, which may differ from those of training. Tasks take all devices of the process."""
    group: Annotated[Processes, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Processes)

    def __post_init__(self) -> None:
        require(len(self.models) > 0, "give the folder of a model")
        pairs = not self.against or len(self.against) == len(self.models)
        require(pairs, f"--against needs a model for each of the {len(self.models)}, and has {len(self.against)}")
        # An option of the other kind would be ignored without a word.
        of_losses = ("corpus", "domains", "sequence", "by_position", "checkpoints")
        for name in of_losses if self.tasks else ("include", "data", "limit", "fewshot"):
            given = getattr(self, name) not in ((), False, 0, None)
            flag = f"--{name.replace('_', '-')}"
            require(not given, f"{flag} is for losses, not for --tasks" if self.tasks else f"{flag} needs --tasks")
        require(not (self.against and (self.checkpoints or self.by_position)), "--against compares whole losses only")
        meshed = self.tasks and self.mesh != MeshConfig()
        require(not meshed, "--mesh is for losses: tasks take all devices of the process, a copy of the model each")


def evaluate(arguments: list[str]) -> int:
    """Score models."""
    options = parse(EvaluateArguments, arguments, f"{program()} evaluate", urls=("models", "against"))
    several = options.group.join()
    check_settings()
    check_platform()
    here = lambda paths: tuple(fetched(path, options.checkpoints) for path in paths)
    options = dataclasses.replace(options, models=here(options.models), against=here(options.against))
    if options.tasks:
        require(not several, "tasks are asked by one process, with all of its devices")
        _tasks(options)
    elif options.against:
        _compare_losses(options)
    else:
        _losses(options)
    return 0


def _warn(line: str) -> None:
    """Standard output is for scores alone, so that other programs can read it."""
    print(line, file=sys.stderr)


def _losses(options: EvaluateArguments) -> None:
    rows = []
    for path in options.models:
        for row in _rows(path, options):
            rows.append(row)
            if options.json and distributed.is_first():
                print(json.dumps(row), flush=True)
    if options.json or not distributed.is_first():
        return
    if len(rows) == 1:
        values = ((NAMED.get(name, name), rows[0][name]) for name in LINES)
        print("\n".join(f"{name} {value:.6g}" for name, value in values if value is not None))
    else:
        _print_table(SHOWN, [[row[name] for name in SHOWN] for row in rows])
    for row in rows if options.by_position else ():
        print(f"\n{row['run_id']} on {row['corpus']}: loss by the number of tokens seen")
        _print_table(list(row["by_position"][0]), [list(one.values()) for one in row["by_position"]])


def _rows(path: Path, options: EvaluateArguments) -> Iterator[dict[str, Any]]:
    for source in held_out.sources(path, options.corpus, options.domains):
        model = held_out.open_model(path, source, options.mesh, _warn)
        for step in held_out.steps_of(path) if options.checkpoints else (None,):
            sums = held_out.sums_of(model, model.load(step), source, options.sequence)
            yield held_out.row(model, step, source, sums, options.sequence, options.by_position)


def _compare_losses(options: EvaluateArguments) -> None:
    """Compare two models, or families, on every text, by the nats of each document."""
    corpora = [source.name for source in held_out.sources(options.models[0], options.corpus, options.domains)]
    rows = []
    for name in corpora:
        sides = [[_opened(path, name, options) for path in paths] for paths in (options.models, options.against)]
        every = [one for side in sides for one in side]
        require(
            len({source.vocab_hash for _, source in every}) == 1,
            "the models have different tokenizers: their losses by token do not compare",
        )
        windows = sorted({options.sequence or held_out.window(model) for model, _ in every})
        require(len(windows) == 1, f"the models were trained in windows of {windows}: choose one by --sequence")
        first, second = ([_scored(*one, windows[0]) for one in side] for side in sides)
        rows.append((name, "loss", _paired_losses(first, second)))
    if distributed.is_first():
        _print_comparison(("corpus", "metric"), rows, options.json)


def _opened(path: Path, corpus: str, options: EvaluateArguments) -> tuple[held_out.Opened, held_out.Source]:
    (source,) = held_out.sources(path, [corpus])
    return held_out.open_model(path, source, options.mesh, _warn), source


def _scored(model: held_out.Opened, source: held_out.Source, sequence: int) -> Sums:
    return held_out.sums_of(model, model.load(None), source, sequence)


def _paired_losses(first: Sequence[Sums], second: Sequence[Sums]) -> Paired:
    targets = first[0].targets.sum(axis=1)
    some = targets > 0
    one, other = (np.array([sums.nats.sum(axis=1)[some] for sums in side]) for side in (first, second))
    return paired(one, other, targets[some])


def _tasks(options: EvaluateArguments) -> None:
    try:  # only these need the harness, which is an extra
        from mmfree_jax.evaluation.harness import MMFree, paper, tasks
    except ModuleNotFoundError as error:
        raise ConfigError(f"--tasks needs {error.name}: pip install 'mmfree-jax[eval]'") from None
    for folder in (*options.models, *options.against):
        require(folder.is_dir(), f"{folder} is no folder: give that of a model")
    use_compile_cache(cache_folder() / "compiled")
    names = tuple(name for given in options.tasks for name in given.split(",") if name)
    asked = tasks.Asked(names, options.include, options.data, options.limit, options.fewshot)
    sides = [[tasks.ask(MMFree(str(path)), asked) for path in paths] for paths in (options.models, options.against)]
    if options.against:
        found = tasks.compare(*([one.items for one in side] for side in sides))
        _print_comparison(("task", "metric"), [(*key, one) for key, one in found.items()], options.json)
        return
    paths = [path.resolve().name for path in options.models]
    if options.json:
        for path, outcome in zip(paths, sides[0], strict=True):
            for item in outcome.items:
                print(json.dumps({"model": path, **item}))
        return
    rows = [
        [path, task, outcome.versions.get(task, ""), metric, *value]
        for path, outcome in zip(paths, sides[0], strict=True)
        for task, metrics in outcome.scores.items()
        for metric, value in metrics.items()
    ]
    _print_table(("model", "task", "version", "metric", "value", "standard error"), rows)
    if "paper" in asked.tasks:
        accuracies = map(tasks.headline, sides[0])
        own = [(path.name, *_size(path), found) for path, found in zip(options.models, accuracies, strict=True)]
        print("\n" + paper.table(own))


def _size(path: Path) -> tuple[str, str]:
    """Parameters and training tokens of a model as the paper writes them; tokens only where they are known."""
    config = read_packed(path)[0]["model"] if is_packed(path) else model_config(path)
    result = path / held_out.RESULT
    tokens = json.loads(result.read_text())["D"] if result.exists() else None
    return _short(flops.parameters(config).total), "" if tokens is None else _short(tokens)


def _short(count: float) -> str:
    power = min(3, max(0, (len(str(int(count))) - 1) // 3))
    return f"{count / 1000**power:.3g}{('', 'K', 'M', 'B')[power]}"


def _print_comparison(keys: tuple[str, str], rows: Sequence[tuple[str, str, Paired]], as_json: bool) -> None:
    shown = [field.name for field in dataclasses.fields(Paired) if field.name != "draws"]
    if as_json:
        for *names, one in rows:
            values = {name: getattr(one, name) for name in shown}
            print(json.dumps(dict(zip(keys, names, strict=True)) | values))
        return
    _print_table((*keys, *shown), [[*names, *(getattr(one, name) for name in shown)] for *names, one in rows])


def _print_table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for n, head in enumerate(heads):
        numeric = all(not isinstance(row[n], str) for row in rows)
        table.add_column(head, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{v:.6g}" if isinstance(v, float) else "" if v is None else str(v) for v in row))
    # As wide as it must be: a table that is cut to a terminal of 80 columns loses numbers.
    Console(width=max(200, 20 * len(heads)), markup=False, emoji=False, highlight=False).print(table)
