"""Runs tasks of lm-evaluation-harness: scores with their standard errors, and the items behind them."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets.exceptions import DatasetNotFoundError
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from mmfree_jax.config import ConfigError, require
from mmfree_jax.evaluation.comparison import Paired, average, paired
from mmfree_jax.evaluation.harness.paper import PAPER, VERSION, metric_of

Item = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Asked:
    """Which tasks, on which data.

    tasks: names of the harness's, or of those below `include`; `paper` stands for the paper's six. include: folder of
    further task files. data: folder with TASK/SPLIT.jsonl, for tasks whose data are not taken from the hub. limit:
    items a task; 0: all. fewshot: examples before each item; None: as the task says. seed: of the choice of examples.
    """

    tasks: tuple[str, ...]
    include: Path | None = None
    data: Path | None = None
    limit: int = 0
    fewshot: int | None = None
    seed: int = 1234

    def __post_init__(self) -> None:
        require(self.limit >= 0, f"limit={self.limit}: must not be negative (0 is all)")
        for folder in (self.include, self.data):
            require(folder is None or folder.is_dir(), f"{folder} is not a folder")

    @property
    def names(self) -> list[str]:
        """The tasks, with suites spelt out."""
        return [name for task in self.tasks for name in (PAPER if task == "paper" else (task,))]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a model did. scores: task -> metric -> value and standard error (None where the harness computes none).
    versions: of the tasks. items: one row a question: task, doc_id, doc_hash, and its value of each metric."""

    scores: dict[str, dict[str, tuple[float, float | None]]]
    versions: dict[str, Any]
    items: list[Item]


def ask(model: LM, asked: Asked) -> Outcome:
    """Run tasks with a model, any of the harness's or `MMFree`.

    Raises ConfigError for a task that does not exist, data that cannot be had, and a task of the paper's suite whose
    version is not the pinned one.
    """
    manager = known_tasks(asked.include, asked.names)
    unknown = [name for name in asked.names if name not in manager.all_tasks]
    require(not unknown, f"no task {', '.join(unknown)}: `lm_eval ls tasks` lists them, --include adds a folder")
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = simple_evaluate(
                model,
                tasks=[_with_local_data(name, asked.data, manager, Path(folder)) for name in asked.names],
                num_fewshot=asked.fewshot,
                limit=asked.limit or None,
                task_manager=manager,
                bootstrap_iters=1000,
                fewshot_random_seed=asked.seed,
            )
    except (ConnectionError, DatasetNotFoundError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"a task's data cannot be had ({why}): give --data FOLDER with TASK/SPLIT.jsonl") from error
    assert found is not None
    items = [item(task, sample) for task, samples in found["samples"].items() for sample in samples]
    versions = {name: found["versions"].get(name) for name in found["samples"]}
    if "paper" in asked.tasks:
        other = {name: versions[name] for name in PAPER if float(versions[name]) != VERSION}
        require(not other, f"the suite is pinned to version {VERSION} of its tasks, and this harness has {other}")
    return Outcome(_scores(found["results"]), versions, items)


def known_tasks(include: Path | None, names: Sequence[str]) -> TaskManager:
    """Return an index of tasks: those of a folder if they are all that is wanted, else the harness's too."""
    own = None if include is None else _index(include, with_the_harnesss=False)
    if own is not None and set(names) <= set(own.all_tasks):
        return own
    return _index(include, with_the_harnesss=True)


@functools.cache
def _index(include: Path | None, with_the_harnesss: bool) -> TaskManager:
    # The harness has thousands of files, which take seconds to read.
    folder = None if include is None else str(include)
    return TaskManager(include_path=folder, include_defaults=with_the_harnesss)


def _with_local_data(name: str, data: Path | None, manager: TaskManager, folder: Path) -> str:
    """A task as the harness knows it, or a file in `folder` that takes its data from JSON lines."""
    files = {} if data is None else {file.stem: str(file) for file in sorted((data.resolve() / name).glob("*.jsonl"))}
    if not files:
        return name
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    task = {"include": str(manager.task_index[name].yaml_path), "task": name, **local}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return str(folder / f"{name}.yaml")


def _scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, float | None]]]:
    found: dict[str, dict[str, tuple[float, float | None]]] = {}
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filter_ = key.partition(",")
            if isinstance(value, int | float) and filter_ and not metric.endswith("_stderr"):
                error = values.get(f"{metric}_stderr,{filter_}")
                found.setdefault(task, {})[metric] = (float(value), error if isinstance(error, float) else None)
    return found


def item(task: str, sample: Mapping[str, Any]) -> Item:
    """Return the row of a question. A metric that is a sum over units, such as a perplexity, is [sum, units]."""
    plain = lambda value: [float(part) for part in value] if isinstance(value, tuple | list) else float(value)
    about = {"task": task, "doc_id": sample["doc_id"], "doc_hash": sample["doc_hash"]}
    values = {name: plain(sample[name]) for name in sample["metrics"] if _is_numeric(sample[name])}
    return {**about, **values}


def _is_numeric(value: Any) -> bool:
    parts = value if isinstance(value, tuple | list) else [value]
    return all(isinstance(part, int | float | np.number) for part in parts)


def compare(first: Sequence[Sequence[Item]], second: Sequence[Sequence[Item]]) -> dict[tuple[str, str], Paired]:
    """Compare the items of two models, or of two families of models that are pairs, by task and metric.

    ("average", METRIC): the mean over tasks, each counting the same, where there are several with that metric.
    Raises ConfigError if they were not asked the same questions.
    """
    keys = [[(one["task"], one["doc_id"], one["doc_hash"]) for one in model] for model in (*first, *second)]
    require(all(own == keys[0] for own in keys), "the models were not asked the same questions in the same order")
    found: dict[tuple[str, str], Paired] = {}
    for task in dict.fromkeys(one["task"] for one in first[0]):
        of_task = lambda model, task=task: [one for one in model if one["task"] == task]
        metrics = [name for name in of_task(first[0])[0] if name not in ("task", "doc_id", "doc_hash")]
        for metric in metrics:
            sides = [_values(list(map(of_task, side)), metric) for side in (first, second)]
            if all(side is not None for side in sides):
                (one, units), (other, _) = sides  # type: ignore[misc]
                found[task, metric] = paired(one, other, units)
    for metric in dict.fromkeys(metric for _, metric in found):
        each = [one for (_, name), one in found.items() if name == metric]
        if len(each) > 1:
            found["average", metric] = average(each)
    return found


def _values(models: Sequence[Sequence[Item]], metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The values of a metric, [models, items], and the units of each item; None where some item has none."""
    if any(metric not in one for model in models for one in model):
        return None
    part: Callable[[Any, int], float] = lambda value, n: value[n] if isinstance(value, list) else (value, 1.0)[n]
    values, units = (np.array([[part(one[metric], n) for one in model] for model in models]) for n in (0, 1))
    return values, units[0]


def headline(outcome: Outcome) -> dict[str, float]:
    """Return the metric that the paper's table has for each of its tasks, in per cent."""
    return {task: 100 * outcome.scores[task][metric_of(task)][0] for task in PAPER if task in outcome.scores}
