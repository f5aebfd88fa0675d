"""`evaluate`: losses by text, position, checkpoint and domain; tasks from local files; paired comparisons."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

import scaling
from mmfree_jax.commands.evaluate import evaluate
from mmfree_jax.config import ConfigError, OptimConfig
from mmfree_jax.data import Mixture, TokenSet
from mmfree_jax.data.building.token_writer import write_token_set
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer
from mmfree_jax.evaluation.harness import paper
from mmfree_jax.files import read_json
from mmfree_jax.inference.packed import save_packed
from mmfree_jax.training.loop import train
from mmfree_jax.weights import load_model
from tests.conftest import sentences, tiny_run

CARD = {"name": "made up", "description": "made up", "sources": []}


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> TokenSet:
    """A second domain: numbers."""
    rng = np.random.default_rng(0)
    lines = lambda count: [" ".join(map(str, rng.integers(0, 99, 40))) for _ in range(count)]
    folder = tmp_path_factory.mktemp("domain") / "numbers"
    return write_token_set(folder, {"train": lines(100), "valid": lines(9)}, byte_tokenizer(), CARD)


@pytest.fixture(scope="module")
def runs(token_set, other, tmp_path_factory) -> Path:
    """`mixed`, on two domains, and `plain`, each with checkpoints of steps 10 and 12 and the end."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {"keep_checkpoints": 3, "milestones": (5, 10)}
    plain = tiny_run("matmul-free", token_set.path, name="plain", **changes)
    data = dataclasses.replace(plain.data, mixture=(str(other.path),), weights=(3.0, 1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmfree_jax.training.loop.self_check", lambda *a: None)
        train(plain, folder / "plain", token_set)
        mixed = dataclasses.replace(plain, name="mixed", data=data, optim=OptimConfig(lr=1e-3, warmup_steps=2))
        train(mixed, folder / "mixed", Mixture([token_set, other], [3.0, 1.0]))
    return folder


@pytest.fixture(autouse=True)
def compile_cache_of_the_tests(monkeypatch):
    """The commands' own would take the place of the tests' in this process."""
    monkeypatch.setattr("mmfree_jax.commands.evaluate.use_compile_cache", lambda folder: None)


def rows(capsys, *arguments) -> list[dict]:
    assert evaluate([*map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def lines(capsys, *arguments) -> dict[str, float]:
    assert evaluate([*map(str, arguments)]) == 0
    return {name: float(value) for name, value in (line.split() for line in capsys.readouterr().out.splitlines())}


def test_one_loss_is_printed_as_lines(runs, capsys):
    found, result = lines(capsys, runs / "plain"), read_json(runs / "plain" / "result.json")
    assert found["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert found["loss_se"] == pytest.approx(result["loss_se"], rel=1e-3)
    assert found["perplexity"] == pytest.approx(math.exp(result["loss"]), rel=1e-4)
    assert found["bpb_se"] / found["bpb"] == pytest.approx(found["loss_se"] / found["loss"], rel=1e-3)
    assert (found["tokens"], found["documents"]) == (result["val_tokens"], 25)


def test_a_checkpoint_curve_is_one_command_and_a_table_for_scaling(runs, tmp_path, capsys):
    found = rows(capsys, runs / "plain", runs / "mixed", "--checkpoints")
    assert [row["run_id"] for row in found[:3]] == ["plain@5", "plain@10", "plain"]
    assert [row["ended"] for row in found[:3]] == [False, False, True]
    final = read_json(runs / "plain" / "result.json")
    assert {name: found[2][name] for name in ("D", "U", "flops", "N", "seed", "lr")} == {
        name: final[name] for name in ("D", "U", "flops", "N", "seed", "lr")
    }
    assert [row["D"] for row in found[:3]] == [5 * 128, 10 * 128, 12 * 128]
    assert found[0]["flops"] == pytest.approx(final["flops"] * 5 / 12)
    assert found[0]["loss"] > found[1]["loss"] > found[2]["loss"] == pytest.approx(final["loss"], rel=1e-6)
    table = tmp_path / "curve.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in found))
    with pytest.raises(scaling.ScalingError, match="4 run"):  # points inside of runs are not end points
        scaling.Runs.read(table)
    read = scaling.Runs.read(table, allow_midrun=True)
    records = list(read.records())
    assert len(records) == 6
    assert {row["cluster"] for row in records} == {"plain", "mixed"}


def test_text_files_are_scored_from_their_first_token_and_in_bytes(runs, token_set, tmp_path, capsys):
    documents = sentences(25, 1)  # the held-out text
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.txt").write_text(documents[0])
    found, one, whole = (
        rows(capsys, runs / "plain", "--corpus", *names)
        for names in ([tmp_path / "text.jsonl"], [tmp_path / "folder"], [token_set.path])
    )
    assert found[0]["val_documents"] == 25
    assert found[0]["val_tokens"] == whole[0]["val_tokens"] + 1  # of a token set the first token is not predicted
    assert found[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-2)
    size = sum(len(one.encode()) for one in documents)
    assert found[0]["bpb"] == pytest.approx(found[0]["loss"] / math.log(2) * (size + 26) / size, rel=1e-6)
    assert (one[0]["val_tokens"], one[0]["loss_se"]) == (len(documents[0]) + 1, None)


def test_the_loss_by_position_goes_beyond_the_windows_of_training(runs, capsys):
    (row,) = rows(capsys, runs / "plain", "--sequence", 128, "--by-position")
    reach = row["by_position"]
    assert [one["seen_from"] for one in reach] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert sum(one["tokens"] for one in reach) == row["val_tokens"]
    assert sum(one["tokens"] * one["loss"] for one in reach) == pytest.approx(row["val_tokens"] * row["loss"])
    assert evaluate([str(runs / "plain"), "--sequence", "128", "--by-position"]) == 0
    assert "loss by the number of tokens seen" in capsys.readouterr().out


def test_the_domains_of_a_mixture_are_scored_each(runs, other, token_set, capsys):
    found = rows(capsys, runs / "mixed", "--domains")
    assert [row["corpus"] for row in found] == [str(token_set.path), str(other.path)]
    assert [row["val_documents"] for row in found] == [25, 9]
    (alone,) = rows(capsys, runs / "mixed", "--corpus", other.path)
    assert alone["loss"] == found[1]["loss"] != found[0]["loss"]
    assert evaluate([str(runs / "mixed"), "--domains"]) == 0
    assert "numbers" in capsys.readouterr().out


def test_a_packed_model_is_scored_on_a_corpus(runs, token_set, tmp_path, capsys):
    model = load_model(runs / "plain")
    text = byte_tokenizer().backend.to_str()
    save_packed(model, tmp_path / "p", stored="float32", layout="planes", tokenizer_json=text, end=[0], beside=[])
    whole, packed = (
        lines(capsys, path, "--corpus", token_set.path, "--sequence", 32) for path in (runs / "plain", tmp_path / "p")
    )
    assert packed["tokens"] == whole["tokens"]
    assert packed["loss"] == pytest.approx(whole["loss"], rel=1e-3)
    with pytest.raises(ConfigError, match="give the corpus to evaluate on with --corpus"):
        evaluate([str(tmp_path / "p")])


def test_losses_are_compared_document_by_document(runs, capsys):
    (same,) = rows(capsys, runs / "plain", "--against", runs / "plain")
    assert (same["difference"], same["low"], same["high"]) == (0, 0, 0)
    (found,) = rows(capsys, runs / "plain", "--against", runs / "mixed")
    single = [rows(capsys, runs / name)[0] for name in ("plain", "mixed")]
    assert found["first"] == pytest.approx(single[0]["loss"], rel=1e-6)
    assert found["difference"] == pytest.approx(single[0]["loss"] - single[1]["loss"], rel=1e-4)
    assert found["low"] < found["difference"] < found["high"] < 0
    assert evaluate([*map(str, (runs / "plain", runs / "mixed", "--against", runs / "mixed", runs / "plain"))]) == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "give the folder of a model"),
        (["a", "--against", "b", "c"], "needs a model for each of the 1, and has 2"),
        (["a", "--tasks", "x", "--sequence", "9"], "--sequence is for losses, not for --tasks"),
        (["a", "--fewshot", "5"], "--fewshot needs --tasks"),
        (["a", "--tasks", "x", "--mesh.data", "2"], "--mesh is for losses"),
        (["a", "--against", "b", "--checkpoints"], "compares whole losses only"),
        (["a", "--corpus", "x", "--domains"], "give --corpus or --domains"),
        (["absent"], "absent is no folder"),
        (["absent", "--tasks", "x"], "absent is no folder"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments, why):
    with pytest.raises(ConfigError, match=why):
        evaluate(arguments)


# One question each, in the form that the data of the paper's tasks have.
ARC = {"question": "What falls?", "choices": {"text": ["the loss", "time"], "label": ["A", "B"]}, "answerKey": "A"}
QUESTIONS = {
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "hellaswag": {
        "activity_label": "Training", "ctx_a": "The loss falls", "ctx_b": "and data", "label": "1",
        "endings": ["grow together", "in [title] time"],
    },
    "openbookqa": {"question_stem": "data", "choices": ARC["choices"], "answerKey": "B"},
    "piqa": {"goal": "train", "sol1": "a model", "sol2": "time", "label": 0},
    "winogrande": {"sentence": "The _ falls in time.", "option1": "loss", "option2": "data", "answer": "1"},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task, question in QUESTIONS.items():
        (folder / task).mkdir()
        for split in ("train", "validation", "test"):
            (folder / task / f"{split}.jsonl").write_text((json.dumps(question) + "\n") * 3)
    return folder


def test_the_papers_suite_runs_on_local_files_and_prints_its_table(runs, data, capsys):
    assert evaluate([str(runs / "plain"), "--tasks", "paper", "--data", str(data)]) == 0
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert table[0] == "| model | size | tokens | ARCe | ARCc | HS | OQ | PQ | WGe | Avg |"
    assert len(table) == 2 + len(paper.PUBLISHED) + 1
    own = [cell.strip() for cell in table[-1].strip("|").split("|")]
    assert own[0] == "plain"
    assert own[2] == "1.54K"
    scores = list(map(float, own[3:]))
    assert set(scores[:6]) <= {0.0, 100.0}
    assert scores[6] == pytest.approx(sum(scores[:6]) / 6, abs=0.06)


def test_the_published_averages_are_those_of_the_published_scores():
    for row in paper.PUBLISHED:  # as printed, to a tenth, from numbers of a tenth
        if row[:2] != ("MatMul-free LM", "370M"):  # whose six numbers give 39.97
            assert sum(row.scores) / 6 == pytest.approx(row.average, abs=0.11), row


def test_tasks_of_ones_own_are_compared_item_by_item(runs, tmp_path, capsys):
    items = [
        {"context": " ".join(sentences(1, n)[0].split()[: 3 + n % 5]), "choices": [" loss", " 7", " zq"], "gold": n % 3}
        for n in range(40)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(one) + "\n" for one in items))
    task = {
        "task": "made_up", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "doc_to_text": "{{context}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}], "metadata": {"version": 1},
    }  # fmt: skip
    (tmp_path / "made_up.yaml").write_text(yaml.safe_dump(task))
    asked = ["--tasks", "made_up", "--include", str(tmp_path)]
    each = {name: rows(capsys, runs / name, *asked) for name in ("plain", "mixed")}
    assert [one["doc_id"] for one in each["plain"]] == list(range(40))
    right = {name: np.array([one["acc"] for one in items]) for name, items in each.items()}
    (found,) = rows(capsys, runs / "plain", *asked, "--against", runs / "mixed")
    assert found["first"] == right["plain"].mean()
    assert found["difference"] == pytest.approx((right["plain"] - right["mixed"]).mean())
    assert found["only_first"] == ((right["plain"] == 1) & (right["mixed"] == 0)).sum()
    assert len(rows(capsys, runs / "plain", *asked, "--limit", 7)) == 7
    with pytest.raises(ConfigError, match="no task made_down"):
        evaluate([str(runs / "plain"), "--tasks", "made_down"])
