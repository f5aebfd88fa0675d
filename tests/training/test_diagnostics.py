"""What is looked at during a run: it is right, it is where it is looked for, and looking changes nothing."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmfree_jax.config import OptimConfig
from mmfree_jax.sharding import path_name
from mmfree_jax.training.interrupt import Interrupted
from mmfree_jax.training.loop import train
from mmfree_jax.training.metrics import RunLog
from mmfree_jax.training.optim import Rates
from mmfree_jax.training.step import make_program, program_key
from tests.conftest import MAIN_FAMILIES, read_metrics, tiny_run
from tests.training.test_loop import curve, numbers


def looked_at(family: str, corpus, **changes):
    """Twelve steps, evaluated every three and diagnosed every four, all logged."""
    return tiny_run(family, corpus, **{"log_every": 1, "eval_every": 3, "diagnose_every": 4, **changes})


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_looking_changes_nothing_to_the_last_bit(family, token_set, tmp_path):
    plain = train(looked_at(family, token_set.path, eval_every=0, diagnose_every=0), tmp_path / "plain", token_set)
    seen = train(looked_at(family, token_set.path), tmp_path / "seen", token_set)
    assert numbers(seen) == numbers(plain)
    assert curve(tmp_path / "seen") == curve(tmp_path / "plain")
    rows = {row["step"]: row for row in read_metrics(tmp_path / "seen")}
    assert [step for step, row in rows.items() if "held_out_loss" in row] == [3, 6, 9, 12]
    assert [step for step, row in rows.items() if "diagnostics" in row] == [4, 8, 12]
    assert rows[12]["held_out_loss"] == seen["loss"]
    assert rows[12]["held_out_bpb"] == seen["bpb"]
    for row in (rows[4], rows[12]):
        norms = [np.ravel(one) for one in row["diagnostics"]["grad_norm"].values()]
        assert np.sqrt(np.sum(np.square(np.concatenate(norms)))) == pytest.approx(row["grad_norm"], rel=1e-5)


def test_rows_appear_where_they_are_due_whatever_else_is_logged(token_set, tmp_path):
    config = looked_at("matmul-free", token_set.path, log_every=5, checkpoint_every=0, eval_every=4, diagnose_every=6)
    train(config, tmp_path, token_set)
    rows = {row["step"]: row for row in read_metrics(tmp_path)}
    assert list(rows) == [4, 5, 6, 8, 10, 12]
    assert [step for step, row in rows.items() if "held_out_loss" in row] == [4, 8, 12]
    assert [step for step, row in rows.items() if "diagnostics" in row] == [6, 12]


def test_the_held_out_loss_on_the_way_is_that_of_a_run_which_ends_there(token_set, tmp_path):
    steady = OptimConfig(lr=1e-2, warmup_steps=2)
    config = looked_at("transformer++", token_set.path, optim=steady, steps=6, diagnose_every=0)
    train(config, tmp_path / "long", token_set)
    short = train(dataclasses.replace(config, steps=3, eval_every=0), tmp_path / "short", token_set)
    assert read_metrics(tmp_path / "long")[2]["held_out_loss"] == short["loss"]


def test_a_run_stopped_between_them_has_the_same_rows_in_the_end(token_set, tmp_path, monkeypatch):
    config = looked_at("matmul-free", token_set.path, log_every=2)
    train(config, tmp_path / "whole", token_set)
    asked = iter([0, 0, 0, 0, 15])

    class Stop:
        def __init__(self, mesh):
            pass

        def __call__(self, signal, save=False):
            return next(asked, 0), save

    with monkeypatch.context() as patch:
        patch.setattr("mmfree_jax.distributed.AgreedStop", Stop)
        with pytest.raises(Interrupted, match="after step 5"):
            train(config, tmp_path / "stopped", token_set)
    train(config, tmp_path / "stopped", token_set)
    timeless = lambda row: {k: v for k, v in row.items() if k not in ("tokens_per_s", "data_wait_s", "seconds")}
    whole, stopped = ([timeless(row) for row in read_metrics(tmp_path / name)] for name in ("whole", "stopped"))
    assert stopped == whole


def test_what_happened_at_a_spike_is_seen_by_running_a_copy_again(token_set, tmp_path):
    """From the checkpoint before it, looking at every step: the same losses, and what led to them."""
    config = looked_at(
        "matmul-free", token_set.path, eval_every=0, diagnose_every=0, checkpoint_every=4, keep_checkpoints=3
    )
    train(config, tmp_path / "run", token_set)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "copy" / "result.json").unlink()
    for step in ("8", "12"):
        shutil.rmtree(tmp_path / "copy" / "checkpoints" / step, ignore_errors=True)
    assert [path.name for path in (tmp_path / "copy" / "checkpoints").iterdir()] == ["4"]
    train(dataclasses.replace(config, diagnose_every=1), tmp_path / "copy", token_set)
    assert curve(tmp_path / "copy") == curve(tmp_path / "run")
    seen = [row["step"] for row in read_metrics(tmp_path / "copy") if "diagnostics" in row]
    assert seen == list(range(5, 13))


@pytest.mark.parametrize("family", MAIN_FAMILIES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_seen_is_what_the_step_does(family, accumulate, token_set):
    optim = OptimConfig(warmup_steps=2, accumulate=accumulate)
    program = make_program(program_key(tiny_run(family, token_set.path, optim=optim), None))
    tokens_BT = np.random.default_rng(0).integers(0, 257, (4, 33)).astype(np.int32)
    place = program.place(tokens_BT)
    rates = program.repeat(Rates(np.float32(1e-2), np.float32(1e-3)))
    with jax.set_mesh(program.mesh):
        state = program.init(jax.random.key(0))
        before = jax.tree.map(jnp.copy, state.params)
        seen = program.inspect(state, place, rates)
        after, metrics = program.train_step(state, place, rates)
        model = nnx.merge(program.graphdef, before)
        first = tokens_BT.reshape(-1, accumulate, 33)[:, 0, :-1]
        logits = model(jnp.asarray(first))
    changed = jax.tree.map(lambda new, old: new - old, after.params, before)
    for name, tree in (("param_norm", before), ("update_norm", changed)):
        leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        assert leaves.keys() == seen[name].keys()
        for leaf, values in leaves.items():
            layers = np.asarray(leaves[leaf]).reshape(2, -1) if np.ndim(seen[name][leaf]) else [leaves[leaf].ravel()]
            expected = [np.linalg.norm(layer) for layer in layers]
            np.testing.assert_allclose(np.ravel(seen[name][leaf]), expected, rtol=1e-2, atol=1e-6, err_msg=leaf)
            assert np.ndim(seen[name][leaf]) == leaf.startswith(("blocks.", "lower_bounds")), values.shape
    squares = sum(float(np.sum(np.square(norm))) for norm in seen["grad_norm"].values())
    assert np.sqrt(squares) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    assert float(seen["largest_logit"]) == pytest.approx(float(jnp.max(jnp.abs(logits))), rel=1e-4)
    rms = seen["activation_rms"]
    assert rms["blocks"].shape == (2,)
    table = np.asarray(before["embedding"][...])[first]
    assert float(rms["embedding"]) == pytest.approx(float(np.sqrt(np.mean(table**2))), rel=0.5)
    assert float(rms["norm"]) == pytest.approx(1, rel=0.05)


def test_tensorboard_has_a_curve_for_each_number(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("tensorboardX.SummaryWriter.add_scalar", lambda _, *point: drawn.append(point))
    row = {"step": 7, "loss": 2.0, "mfu": None, "held_out_loss": 3.0}
    with RunLog(tmp_path, {}) as log:
        log.metrics({**row, "diagnostics": {"grad_norm": {"embedding": 1.0, "blocks.a": [0.5, None, 0.25]}}})
    assert drawn == [
        ("train/loss", 2.0, 7),
        ("held_out/loss", 3.0, 7),
        ("grad_norm/embedding", 1.0, 7),
        ("grad_norm/blocks.a/00", 0.5, 7),
        ("grad_norm/blocks.a/02", 0.25, 7),
    ]
