"""Probes as tasks of lm-evaluation-harness, so that any model of any framework can take them.

An item is the text of a row up to one of its answers: earlier questions of the row are its examples. The choices are
all answers of the probe, each a word after a space.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmfree_jax.evaluation.probes.drawing import Draw, Probe, Random, draw
from mmfree_jax.files import write_atomically

PREFIX = "mmfree_probe_"

# The harness loads this file from the folder of the tasks, wherever that is; it needs nothing of ours.
LOADER = '''"""What the YAML files of this folder name: items from the file beside them, accuracy by distance."""

import json
from pathlib import Path

import datasets


def documents(items, **_):
    lines = (Path(__file__).parent / items).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def results(doc, answers):
    likelihoods = [answer[0] for answer in answers]
    right = float(likelihoods.index(max(likelihoods)) == doc["gold"])
    return {"acc": right, doc["metric"]: right}
'''


def write_tasks(folder: Path, probes: Mapping[str, Probe], count: int = 500, seed: int = 0) -> list[str]:
    """Write each probe as a task of `count` items from the test split. Returns the names of the tasks.

    A task is NAME.yaml and NAME.jsonl; probes.yaml makes a group of them, `mmfree_probes`, and probe_items.py loads
    them. The folder may be moved. It is used with `lm_eval --include_path FOLDER --tasks mmfree_probes`.

    The metrics of a task are `acc` over all items and `acc_dLOW` over those at distances from LOW to 2 LOW - 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [PREFIX + name.replace("-", "_") for name in probes]
    for name, probe in zip(names, probes.values(), strict=True):
        found = items(probe, count, seed)
        lines = [json.dumps(item, ensure_ascii=False) for item in found]
        write_atomically(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
        _write_yaml(folder / f"{name}.yaml", task(name, probe, found, seed))
    _write_yaml(folder / "probes.yaml", {"group": "mmfree_probes", "task": names})
    write_atomically(folder / "probe_items.py", LOADER)
    return names


def items(probe: Probe, count: int, seed: int) -> list[dict[str, Any]]:
    """The items of a task: `context`, `choices`, `gold` (the index of the right one), `distance`, `metric`."""
    drawn, words = draw(probe, seed, count, "test"), probe.words
    choices = [words[answer] for answer in probe.answers]
    found = []
    for row, target in enumerate(_one_target_a_row(drawn, seed)):
        distance = int(drawn.distance[row, target])
        context = " ".join(words[token] for token in drawn.tokens[row, : target + 1])
        gold = int(drawn.tokens[row, target + 1]) - probe.answers.start
        metric = f"acc_d{1 << (distance.bit_length() - 1)}"
        found.append({"context": context, "choices": choices, "gold": gold, "distance": distance, "metric": metric})
    return found


def task(name: str, probe: Probe, items: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The configuration of a task, as the harness reads it; `!function` is written by `_write_yaml`."""
    by_distance = sorted({item["metric"] for item in items}, key=lambda metric: int(metric.removeprefix("acc_d")))
    metrics = ["acc", *by_distance]
    return {
        "task": name,
        "custom_dataset": Function("probe_items.documents"),
        "dataset_kwargs": {"items": f"{name}.jsonl"},
        "test_split": "test",
        "output_type": "multiple_choice",
        "description": f"{probe.description}\n\n",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "process_results": Function("probe_items.results"),
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        "metadata": {"version": 1, "probe": repr(probe), "seed": seed, "chance": 1 / len(probe.answers)},
    }


class Function(str):
    """The name of a function that the harness looks up beside the YAML file."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def _one_target_a_row(drawn: Draw, seed: int) -> np.ndarray:
    """Choose one scored target of each row at random, int64 [N]: items are then independent of one another."""
    keys = Random("choice", seed).raw(*drawn.mask.shape)
    return np.where(drawn.mask, keys | np.uint64(1), np.uint64(0)).argmax(axis=1)
