"""Models on disk: imported, trained on, exported, evaluated; through the commands that users type."""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from launch import main
from mmfree_jax.checkpoint import restore_params
from mmfree_jax.commands import models
from mmfree_jax.commands.evaluate import evaluate as evaluate_command
from mmfree_jax.commands.train import train as train_command
from mmfree_jax.config import ConfigError, MeshConfig, OptimConfig
from mmfree_jax.data import resolve_data
from mmfree_jax.data.building.token_writer import write_token_set
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer, train_bpe
from mmfree_jax.files import read_json
from mmfree_jax.interop.huggingface import load_huggingface, save_huggingface
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.run_folder import claim
from mmfree_jax.training.loop import train
from mmfree_jax.training.step import make_program, program_key
from mmfree_jax.weights import load_model, model_config, run_config, save_model
from tests.conftest import MAIN_FAMILIES, sentences, tiny_model, tiny_run
from tests.in_process import called
from tests.simulated import run

launch = functools.partial(called, main)


@pytest.fixture(autouse=True)
def cache(programs, monkeypatch):
    monkeypatch.setenv("MMFREE_JAX_CACHE", str(programs))


def parameters(model: nnx.Module) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def assert_equal(one: nnx.Module, other: nnx.Module) -> None:
    for a, b in zip(parameters(one), parameters(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_a_saved_model_comes_back_to_the_last_bit(family, tmp_path):
    model = LanguageModel(tiny_model(family), rngs=nnx.Rngs(3))
    save_model(model, tmp_path / "m")
    assert model_config(tmp_path / "m") == model.config
    assert_equal(load_model(tmp_path / "m"), model)
    with pytest.raises(ConfigError, match="not an empty folder"):
        save_model(model, tmp_path / "m")
    with pytest.raises(ConfigError, match="is not a model"):
        load_model(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_imported_weights_are_trained_on_and_exported(family, token_set, tmp_path):
    save_huggingface(LanguageModel(tiny_model(family), rngs=nnx.Rngs(3)), tmp_path / "hf")
    done = launch("import", tmp_path / "hf", "--out", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert family in done.stdout
    assert_equal(load_model(tmp_path / "ours"), load_huggingface(tmp_path / "hf"))

    # A rate of almost nothing: the weights trained on are those that were imported, not fresh ones.
    settings = ["--data.corpus", token_set.path, "--data.sequence", 32, "--data.batch", 4, "--steps", 2]
    settings += ["--optim.warmup-steps", 0, "--optim.decay-steps", 0, "--optim.lr", 1e-12, "--diagnose-every", 0]
    done = launch("train", f"{family}-tiny", "--out", tmp_path / "run", "--init", tmp_path / "ours", *settings)
    assert done.returncode == 0, done.stderr
    for a, b in zip(parameters(load_model(tmp_path / "run")), parameters(load_model(tmp_path / "ours")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9)

    done = launch("export", tmp_path / "run", "--out", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert_equal(load_huggingface(tmp_path / "back"), load_model(tmp_path / "run"))


def exported(source: Path, out: Path) -> dict:
    """config.json of a model after the command."""
    assert models.export_model([str(source), "--out", str(out)]) == 0
    return read_json(out / "config.json")


def test_what_an_export_says_of_the_text_is_the_corpuss_or_what_was_imported(token_set, tmp_path, capsys):
    run = tiny_run("transformer++", token_set.path, model=tiny_model("transformer++", vocab=288), steps=6)
    train(run, tmp_path / "run", token_set)
    values = exported(tmp_path / "run", tmp_path / "a")
    assert "without 31 tokens of padding" in capsys.readouterr().out
    end = token_set.end_of_document
    assert (values["bos_token_id"], values["eos_token_id"], values["max_position_embeddings"]) == (end, end, 32)
    assert values["vocab_size"] == 257

    facts = {"bos_token_id": 100, "eos_token_id": [101, 102], "pad_token_id": 103, "max_position_embeddings": 8192}
    (tmp_path / "a" / "config.json").write_text(json.dumps(values | facts))
    assert models.import_model([str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 0
    for source, out in ((tmp_path / "b", tmp_path / "c"), (tmp_path / "a", tmp_path / "d")):  # imported, and directly
        values = exported(source, out)
        assert {name: values[name] for name in facts} == facts

    (tmp_path / "run" / "corpus.json").unlink()  # a run of before it was written down
    values = exported(tmp_path / "run", tmp_path / "e")
    assert (values["bos_token_id"], values["eos_token_id"], values["max_position_embeddings"]) == (None, None, 32)


def test_a_run_is_evaluated_from_anywhere_on_its_own_corpus_or_not_at_all(token_set, tmp_path, monkeypatch, capsys):
    (tmp_path / "here" / "there").mkdir(parents=True)
    shutil.copytree(token_set.path, tmp_path / "here" / "c")
    monkeypatch.chdir(tmp_path / "here")
    run = tiny_run("matmul-free", Path("c"), steps=6)
    loss = train(run, tmp_path / "run", resolve_data(run.data))["loss"]

    def evaluated(*more: str) -> bool:
        assert evaluate_command([str(tmp_path / "run"), *more]) == 0
        return f"loss {loss:.6g}\n" in capsys.readouterr().out

    monkeypatch.chdir(tmp_path / "here" / "there")
    assert evaluated()
    shutil.move(tmp_path / "here" / "c", tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"no corpus '.*/here/c'"):
        evaluate_command([str(tmp_path / "run")])
    assert evaluated("--corpus", "../../moved")
    texts = {"train": sentences(9, 2), "valid": sentences(9, 3)}
    card = {"name": "other", "description": "made up", "sources": []}
    write_token_set(tmp_path / "here" / "c", texts, byte_tokenizer(), card)
    with pytest.raises(ConfigError, match=r"was trained on \w{16}: give the corpus to evaluate on with --corpus"):
        evaluate_command([str(tmp_path / "run")])
    assert not evaluated("--corpus", str(tmp_path / "here" / "c"))
    other = train_bpe(texts["train"], 257)
    other.vocab_hash = "0" * 64  # as many tokens, but others
    write_token_set(tmp_path / "d", texts, other, card)
    with pytest.raises(ConfigError, match="another tokenizer"):
        evaluate_command([str(tmp_path / "run"), "--corpus", str(tmp_path / "d")])


def test_a_run_that_goes_on_needs_the_weights_it_began_with_no_more(token_set, tmp_path):
    save_model(LanguageModel(tiny_model("matmul-free"), rngs=nnx.Rngs(3)), tmp_path / "m")
    settings = ["matmul-free-tiny", "--out", tmp_path / "run", "--data.corpus", token_set.path, "--data.sequence", 32]
    settings += ["--data.batch", 4, "--steps", 4, "--checkpoint-every", 2, "--optim.warmup-steps", 0]
    command = [*map(str, settings), "--optim.decay-steps", "0", "--diagnose-every", "0"]
    assert train_command([*command, "--init", str(tmp_path / "m")]) == 0
    row = read_json(tmp_path / "run" / "result.json")
    assert row["init"] == str(tmp_path / "m")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    with pytest.raises(ConfigError, match=r"is not a model"):
        train_command([*command, "--init", str(tmp_path / "another")])
    for again in ([], ["--init", str(tmp_path / "m")]):
        (tmp_path / "m").rename(tmp_path / "gone") if (tmp_path / "m").exists() else None
        (tmp_path / "run" / "result.json").unlink(missing_ok=True)
        assert train_command([*command, *again]) == 0
        assert read_json(tmp_path / "run" / "result.json")["loss"] == row["loss"]
    (tmp_path / "gone").rename(tmp_path / "another")
    with pytest.raises(ConfigError, match=r"holds another run \(init is .*/m, not .*/another"):
        train_command([*command, "--init", str(tmp_path / "another")])
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # nothing to go on from: the weights are needed again
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.vocab=2048, but the corpus has 257"):  # what they are is not known
        train_command(command)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_models_of_every_kind_are_loaded_in_shards_of_any_mesh(family, token_set, tmp_path):
    """None of the eight devices ever needs the memory of a whole model that is cut over them."""
    model = LanguageModel(tiny_model(family, vocab=264), rngs=nnx.Rngs(3))
    save_model(model, tmp_path / "ours")
    save_huggingface(model, tmp_path / "huggingface")
    train(
        tiny_run(family, token_set.path, evaluate=False, steps=4, optim=OptimConfig(warmup_steps=1)),
        tmp_path / "run",
        token_set,
    )
    said, _ = run("-m", "tests.load_program", *(str(tmp_path / kind) for kind in ("ours", "huggingface", "run")))
    found = json.loads(said.splitlines()[-1])
    assert found.keys() == {"ours", "huggingface", "run"}
    for kind, meshes in found.items():
        assert all(one["equal"] for one in meshes.values()), kind
        assert meshes["copies"]["held"] == 1
        for name, ways in (("fsdp", 8), ("both", 4)):
            whole = 0.55 if kind == "run" else 0.05  # norms; of the run a vocabulary of 257, which nothing divides
            assert 1 / ways <= meshes[name]["held"] < 1 / ways + whole, (kind, name)


def test_the_moments_of_a_run_are_not_read_for_its_parameters(token_set, tmp_path):
    config = tiny_run("matmul-free", token_set.path, evaluate=False)
    train(config, tmp_path, token_set)
    program = make_program(program_key(config, None))
    asked = []
    load = ocp.training.Checkpointer.load_checkpointables
    with pytest.MonkeyPatch.context() as patch:

        def recorded(self, step, *, abstract_checkpointables):
            asked.append(abstract_checkpointables["state"])
            return load(self, step, abstract_checkpointables=abstract_checkpointables)

        patch.setattr(ocp.training.Checkpointer, "load_checkpointables", recorded)
        params = restore_params(tmp_path / "checkpoints", program.abstract_state.params)
    assert [set(one) for one in asked] == [{"params"}]
    assert_equal(nnx.merge(program.graphdef, params), load_model(tmp_path))


def test_evaluating_a_run_gives_the_loss_of_its_result(token_set, tmp_path):
    result = train(tiny_run("matmul-free", token_set.path), tmp_path / "run", token_set)
    done = launch("evaluate", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    scores = dict(line.split() for line in done.stdout.splitlines())
    assert float(scores["loss"]) == pytest.approx(result["loss"], rel=1e-5)
    assert int(scores["tokens"]) == result["val_tokens"]


def test_a_model_that_was_not_trained_here_is_evaluated_on_no_corpus_that_nobody_named(tmp_path):
    """The embedded corpus would get a tokenizer of its own, and the loss would mean nothing."""
    save_model(LanguageModel(tiny_model("matmul-free"), rngs=nnx.Rngs(3)), tmp_path / "m")
    done = launch("evaluate", tmp_path / "m")
    assert done.returncode == 1
    assert "give the corpus to evaluate on with --corpus" in done.stderr


@pytest.mark.parametrize("text", ['{"name": ', '{"name": "r", "stepz": 3}'])
def test_a_damaged_config_is_named(text, token_set, tmp_path):
    (tmp_path / "config.json").write_text(text)
    for read in (load_model, lambda path: train(tiny_run("matmul-free", token_set.path), path, token_set)):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json"))):
            read(tmp_path)


def test_a_run_of_packed_gathers_is_read_on_one_device(tmp_path):
    config = tiny_run("matmul-free", Path("c"), mesh=MeshConfig(fsdp=2), gather="packed")
    claim(config, tmp_path)
    assert model_config(tmp_path) == config.model


def test_weights_of_another_architecture_are_refused(token_set, tmp_path):
    save_model(LanguageModel(tiny_model("matmul-free", width=24), rngs=nnx.Rngs(3)), tmp_path / "m")
    config = tiny_run("matmul-free", token_set.path, init=str(tmp_path / "m"))
    with pytest.raises(ConfigError, match=r"another architecture \(width is 24, not 16\)"):
        train(config, tmp_path / "run", token_set)


@pytest.mark.parametrize(
    ("preset", "flags", "says"),
    [
        ("transformer++-tiny", [], "holds a model of family matmul-free, and transformer++-tiny is of transformer++"),
        ("matmul-free-tiny", ["--model.depth", "3"], "model.depth=3, but init="),
    ],
)
def test_what_the_weights_are_not_is_refused_and_not_replaced_by_what_they_are(preset, flags, says, tmp_path):
    save_model(LanguageModel(tiny_model("matmul-free"), rngs=nnx.Rngs(3)), tmp_path / "m")
    with pytest.raises(ConfigError, match=re.escape(says)):
        train_command([preset, "--out", str(tmp_path / "run"), "--init", str(tmp_path / "m"), *flags])


def test_gradients_are_computed_as_the_command_says_whatever_computed_the_weights(token_set, tmp_path):
    save_model(LanguageModel(tiny_model("matmul-free"), rngs=nnx.Rngs(3)), tmp_path / "m")
    settings = ["--data.corpus", token_set.path, "--data.sequence", 32, "--data.batch", 4, "--steps", 2]
    settings += ["--optim.warmup-steps", 0, "--optim.decay-steps", 0, "--diagnose-every", 0, "--no-evaluate"]
    settings += ["--model.gradient-bits", 8, "--init", tmp_path / "m"]
    assert train_command(["matmul-free-tiny", "--out", str(tmp_path / "run"), *map(str, settings)]) == 0
    assert run_config(tmp_path / "run").model == tiny_model("matmul-free", gradient_bits=8)
