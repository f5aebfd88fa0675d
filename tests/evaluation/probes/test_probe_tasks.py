"""Probes as files of lm-evaluation-harness: the items, and the harness itself where it is installed."""

import hashlib
import json
import shutil

import pytest
import yaml

from mmfree_jax.evaluation.probes import PROBES, write_tasks
from mmfree_jax.evaluation.probes.tasks import items
from tests.evaluation.probes.reading import SMALL


@pytest.mark.parametrize("name", list(PROBES))
def test_an_item_is_a_row_up_to_an_answer_that_a_reader_of_the_text_finds(name):
    reader = SMALL[name][1]
    for item in items(PROBES[name], 50, 1):
        right = item["choices"][item["gold"]]
        words = [*item["context"].split(), right, *([] if name == "induction" else [right])]
        found = {at: (answer, distance) for at, answer, distance in reader(words)}
        assert found[len(item["context"].split())] == (right, item["distance"])
        assert item["metric"] == f"acc_d{2 ** (len(bin(item['distance'])) - 3)}"
        assert len(set(item["choices"])) == len(PROBES[name].answers)


def test_published_items_are_the_same_for_ever():
    found = [items(probe, 20, 2026) for probe in PROBES.values()]
    assert (
        hashlib.sha256(json.dumps(found).encode()).hexdigest()
        == "1613cb07c24a9bf4d9bace9b4b7c5ba6c8dfa678ec03bd0ce9dd8b70dcfab332"
    )


def test_items_are_spread_over_targets_and_answers():
    found = items(PROBES["parity"], 1000, 0)
    assert 430 < sum(item["gold"] for item in found) < 570
    metrics = [item["metric"] for item in found]
    assert all(140 < metrics.count(f"acc_d{d}") < 260 for d in (2, 4, 8, 16, 32))


def test_files_are_the_same_again_and_hold_what_they_say(tmp_path):
    names = write_tasks(tmp_path / "a", PROBES, 20, 5)
    write_tasks(tmp_path / "b", PROBES, 20, 5)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(
        ["probe_items.py", "probes.yaml", *(f"{n}.{kind}" for n in names for kind in ("jsonl", "yaml"))]
    )
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    lines = (tmp_path / "a" / f"{names[0]}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == items(PROBES["recall"], 20, 5)
    assert yaml.safe_load((tmp_path / "a" / "probes.yaml").read_text()) == {"group": "mmfree_probes", "task": names}


def test_the_harness_loads_and_scores_them(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm-eval")
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    readers = {f"mmfree_probe_{name.replace('-', '_')}": SMALL[name][1] for name in PROBES}

    class Reader(LM):
        """Finds answers at distances under 32 by the rule of the task, and says the first choice to all others."""

        def loglikelihood(self, requests):
            return [(self.likelihood(request), False) for request in requests]

        def likelihood(self, request):
            context, continuation = request.args
            description, words = context.split("\n\n")
            assert description.endswith(".")
            assert continuation[0] == " "
            assert continuation[1:] == request.doc["choices"][request.idx]
            words = words.split()
            reader = readers[request.task_name]
            found = [f for f in reader([*words, continuation[1:], "."]) if f[0] == len(words)]
            near = bool(found) and found[0][2] < 32 and found[0][1] == continuation[1:]
            return float(near) - request.idx / 1e6

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

        def generate_until(self, requests):
            raise NotImplementedError

    names = write_tasks(tmp_path / "written", PROBES, 100, 3)
    shutil.move(tmp_path / "written", tmp_path / "moved")
    manager = TaskManager(include_path=str(tmp_path / "moved"), include_defaults=False)
    out = lm_eval.simple_evaluate(model=Reader(), tasks=["mmfree_probes"], task_manager=manager, bootstrap_iters=0)
    assert set(out["results"]) >= set(names)
    for name, probe in zip(names, PROBES, strict=True):
        expected = items(PROBES[probe], 100, 3)
        right = [item["distance"] < 32 or item["gold"] == 0 for item in expected]
        result = out["results"][name]
        assert result["acc,none"] == pytest.approx(sum(right) / 100)
        for metric in {item["metric"] for item in expected}:
            part = [r for r, item in zip(right, expected, strict=True) if item["metric"] == metric]
            assert result[f"{metric},none"] == pytest.approx(sum(part) / len(part))
        assert out["n-samples"][name]["original"] == 100
