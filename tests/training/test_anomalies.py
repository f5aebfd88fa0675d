"""Steps that are not finite are left out and dumped; spikes are found and undone; both the same after a kill."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.checkpoint import restore
from mmfree_jax.config import ConfigError, RunConfig
from mmfree_jax.files import read_json
from mmfree_jax.run_folder import changes
from mmfree_jax.sharding import make_mesh
from mmfree_jax.sweep.status import status
from mmfree_jax.training import loop, step
from mmfree_jax.training.anomalies import first_bad_layer, spike_limit
from mmfree_jax.training.interrupt import Interrupted
from mmfree_jax.training.loop import train
from mmfree_jax.training.metrics import Diverged
from mmfree_jax.training.step import make_program, program_key
from mmfree_jax.weights import load_params
from tests.compiling import xla_flags
from tests.conftest import MAIN_FAMILIES, read_metrics, tiny_run
from tests.simulated import ROOT
from tests.test_distributed import finish, free_port
from tests.training.stopping import stop_after

TIMED = ("tokens_per_s", "mfu", "data_wait_s", "seconds", "joules", "attempts", "peak_memory_bytes", "fingerprint")


def timeless(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in TIMED}


def outcome(folder) -> tuple[list[dict], dict]:
    return [timeless(row) for row in read_metrics(folder)], timeless(read_json(folder / "result.json"))


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_a_guarded_run_without_bad_steps_is_the_same_run_but_for_rounding(family, token_set, tmp_path):
    """Another program, which the compiler may arrange in another way."""
    config = tiny_run(family, token_set.path)
    train(config, tmp_path / "plain", token_set)
    train(dataclasses.replace(config, skip_nonfinite=3, spike_sigmas=50.0), tmp_path / "guarded", token_set)
    (rows, _), (guarded, result) = (outcome(tmp_path / name) for name in ("plain", "guarded"))
    assert [row.pop("skipped") for row in guarded] == [0] * len(rows)
    for row, plain in zip(guarded, rows, strict=True):
        assert row == pytest.approx(plain, rel=1e-4)
    assert (result["skipped_steps"], result["rewinds"]) == (0, 0)
    abstract = make_program(program_key(config, None)).abstract_state.params
    for a, b in zip(*(jax.tree.leaves(load_params(tmp_path / n, abstract)) for n in ("plain", "guarded")), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


UNKNOWN = 256  # a token that the text does not have


@pytest.fixture
def nan_batches(monkeypatch):
    """Lets loss and gradients of some 0-based steps be no numbers in the compiled program, by a token in the batch."""
    real = step._gradients

    def gradients(graphdef, key, params, tokens_BT):
        factor = jnp.where((tokens_BT == UNKNOWN).any(), jnp.nan, 1.0)
        return jax.tree.map(lambda a: a * factor, real(graphdef, key, params, tokens_BT))

    def choose(config: RunConfig, bad: set[int]):
        key = program_key(config, None)
        program = step.build_program(key, make_mesh(key.mesh))

        def train_step(state, tokens_BT, rates):
            unknown = program.place(np.full(tokens_BT.shape, UNKNOWN, np.int32))
            now = int(state.step)
            return program.train_step(state, unknown if now in bad else tokens_BT, rates)

        def inspect(state, tokens_BT, rates):
            return program.inspect(state, program.place(np.full(tokens_BT.shape, UNKNOWN, np.int32)), rates)

        changed = dataclasses.replace(program, train_step=train_step, inspect=inspect)
        monkeypatch.setattr(loop, "make_program", lambda key: changed)
        return program

    monkeypatch.setattr(step, "_gradients", gradients)
    return choose


def guarded_run(token_set, **changes) -> RunConfig:
    return tiny_run("transformer++", token_set.path, skip_nonfinite=3, log_every=3, checkpoint_every=5, **changes)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(token_set, tmp_path, nan_batches):
    config = guarded_run(token_set)
    program = nan_batches(config, {4, 5})
    result = train(config, tmp_path, token_set)
    rows = read_metrics(tmp_path)
    assert result["skipped_steps"] == 2
    assert [(row["step"], row["skipped"]) for row in rows] == [(3, 0), (5, 1), (6, 1), (9, 0), (10, 0), (12, 0)]
    assert rows[2]["loss"] is None
    assert all(math.isfinite(row["loss"]) for row in rows if row["loss"] is not None)
    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"step 5: loss nan and gradient norm nan, not applied; batch and state are in anomalies/5", log)
    assert re.search(r"step 6: loss nan and gradient norm nan, not applied$", log, re.MULTILINE)

    batch = np.load(tmp_path / "anomalies" / "5" / "batch.npy")
    assert batch.shape == (4, 33)
    state, meta = restore(tmp_path / "anomalies", program.abstract_state)
    assert meta["step"] == 5
    bad = program.place(np.full_like(batch, UNKNOWN))  # as the stand-in for the program made of it
    before = jax.tree.map(np.asarray, state.params)
    again, metrics = program.train_step(state, bad, program.repeat(loop.rates(config.optim, 12, 4)))
    assert not metrics["applied"]
    assert int(again.step) == 6
    assert all(map(np.array_equal, jax.tree.leaves(again.params), jax.tree.leaves(before)))


def test_too_many_in_a_row_end_the_run_and_the_layer_is_named(token_set, tmp_path, nan_batches):
    config = guarded_run(token_set)
    nan_batches(config, {1, 4, 5, 6})
    with pytest.raises(Diverged, match=r"3 steps in a row up to 7 had no finite loss .* is the gradient of head"):
        train(config, tmp_path, token_set)
    assert [(row["step"], row["skipped"]) for row in read_metrics(tmp_path)] == [(3, 1), (5, 1), (6, 1), (7, 1)]
    (tmp_path / "error.txt").write_text("Diverged: it\n")
    assert status(tmp_path, config).diverged


def test_what_is_left_out_survives_a_signal_in_the_middle_of_a_row_of_bad_steps(token_set, tmp_path, nan_batches):
    config = guarded_run(token_set)
    nan_batches(config, {4, 5, 8})
    train(config, tmp_path / "whole", token_set)
    folder = tmp_path / "stopped"
    while not (folder / "result.json").exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mmfree_jax.training.loop.Diagnostics", stop_after(5))
            with contextlib.suppress(Interrupted):
                train(config, folder, token_set)
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_a_run_that_diverged_may_be_resumed_with_bad_steps_left_out(token_set, tmp_path):
    config = tiny_run("transformer++", token_set.path)
    train(config, tmp_path, token_set)
    (tmp_path / "result.json").unlink()
    assert changes(dataclasses.replace(config, skip_nonfinite=2, spike_sigmas=6.0, on_spike="rewind"), tmp_path) == ""


@pytest.mark.parametrize(
    ("seen", "where"),
    [
        ({}, "the loss itself"),
        ({"param_norm": {"a": [1.0, np.nan]}}, "the parameter a of block 1"),
        ({"activation_rms": {"embedding": 1.0, "blocks": [1.0, np.inf], "norm": np.nan}}, "the output of the block 1"),
        ({"largest_logit": np.inf}, "the logits"),
        ({"grad_norm": {"blocks.a": [np.nan, np.nan], "embedding": np.nan}}, "the gradient of blocks.a of block 1"),
        ({"grad_norm": {"blocks.a": [np.nan], "head.kernel": np.nan}}, "the gradient of head.kernel"),
    ],
)
def test_the_first_bad_layer_is_named(seen, where):
    good = {"embedding": 1.0, "blocks": [1.0, 1.0], "norm": 1.0}
    fine = {"param_norm": {"a": 1.0}, "activation_rms": good, "largest_logit": 3.0, "grad_norm": {"a": [1.0, 2.0]}}
    assert first_bad_layer(fine | seen) == where


# ---- spikes ----


def test_a_limit_needs_losses_and_is_robust():
    assert spike_limit([3.0] * 15, 6.0) == math.inf
    assert spike_limit([3.0] * 16, 6.0) == pytest.approx(3.0 + 6 * 3e-3)
    steady = [3.0, 3.1] * 20
    assert spike_limit([*steady, 50.0], 6.0) == pytest.approx(spike_limit(steady, 6.0), abs=0.5)


def spiking_run(token_set, **changes) -> RunConfig:
    run = tiny_run("transformer++", token_set.path, steps=40, checkpoint_every=6, keep_checkpoints=4, log_every=1)
    return dataclasses.replace(run, spike_sigmas=1.5, on_spike="rewind", evaluate=False, **changes)


def with_batches(monkeypatch, choose) -> None:
    """Replaces batches: `choose`, given the example where the data stand and a shape, returns other tokens or None."""
    real = loop._batches

    def batches(config, program, token_set, start):
        rows = real(config, program, token_set, start)
        own = type(rows).__next__

        class Strange:
            state = property(lambda self: rows.state)
            counts = property(lambda self: rows.counts)
            close = lambda self, *_: rows.close()
            __enter__ = lambda self: self
            __exit__ = lambda self, *_: rows.close()

            def __next__(self):
                at, tokens = rows.state, own(rows)
                strange = choose(at, tokens.shape)
                return tokens if strange is None else program.place(strange)

        return Strange()

    monkeypatch.setattr(loop, "_batches", batches)


def rare(at: int, shape: tuple[int, ...]) -> np.ndarray:
    """Tokens that the text does not have: their loss is high."""
    return np.random.default_rng(at).integers(200, 257, shape, np.int32)


def with_spike(monkeypatch, first: int, last: int) -> None:
    """Batches read while the data stand between two examples are of rare tokens."""
    with_batches(monkeypatch, lambda at, shape: rare(at, shape) if first <= at < last else None)


def test_a_spike_is_undone_past_its_batches_and_again_after_a_kill(token_set, tmp_path, monkeypatch):
    config = spiking_run(token_set)
    with_spike(monkeypatch, 25 * 4, 28 * 4)  # steps 26 to 28
    result = train(config, tmp_path / "whole", token_set)
    assert result["rewinds"] == 1
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert "loss spike: 3 losses in a row above" in log
    assert "rewound to step 24; goes on with example 112" in log
    rows = read_metrics(tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert all(row["loss"] < 4.5 for row in rows[24:])

    # Killed after the spike was seen, and before the next checkpoint: the same decision comes again.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "result.json").unlink()
    for later in (30, 36, 40):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / str(later))
    again = train(config, tmp_path / "killed", token_set)
    assert timeless(again) == timeless(result)
    assert [timeless(row) for row in read_metrics(tmp_path / "killed")] == [timeless(row) for row in rows]


def test_a_spike_is_only_logged_unless_the_run_is_to_go_back(token_set, tmp_path, monkeypatch):
    config = spiking_run(token_set)
    with_spike(monkeypatch, 25 * 4, 30 * 4)
    logged = dataclasses.replace(config, on_spike="log")
    assert train(logged, tmp_path / "logged", token_set)["rewinds"] == 0
    assert (tmp_path / "logged" / "log.txt").read_text().count("loss spike:") == 1
    assert max(row["loss"] for row in read_metrics(tmp_path / "logged")[25:30]) > 5
    late = dataclasses.replace(config, checkpoint_every=0)
    assert train(late, tmp_path / "late", token_set)["rewinds"] == 0
    assert "there is no checkpoint before the spike" in (tmp_path / "late" / "log.txt").read_text()


def test_impossible_settings_are_refused():
    for wrong in ({"skip_nonfinite": -1}, {"spike_sigmas": -1.0}, {"on_spike": "rewind"}, {"on_spike": "sing"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            RunConfig("x", **wrong)


def test_the_columns_are_only_there_if_they_were_asked_for(token_set, tmp_path):
    config = tiny_run("matmul-free", token_set.path, evaluate=False)
    result = train(config, tmp_path, token_set)
    assert not {"skipped_steps", "rewinds"} & result.keys()
    assert "skipped" not in json.dumps(read_metrics(tmp_path))


TOGETHER = """
import dataclasses, json, shutil, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, pytest
from mmfree_jax import distributed
from mmfree_jax.config import MeshConfig
from mmfree_jax.data import TokenSet
from mmfree_jax.training import loop, step
from tests.training.test_anomalies import rare, spiking_run, timeless, with_batches

token_set, out, index, address = TokenSet.open(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
distributed.join(distributed.Group(address, 2, index), 120)
patch = pytest.MonkeyPatch()
real = step._gradients

def gradients(graphdef, key, params, tokens_BT):
    factor = jnp.where((tokens_BT == 7).all(), jnp.nan, 1.0)
    return jax.tree.map(lambda a: a * factor, real(graphdef, key, params, tokens_BT))

def choose(at, shape):
    if at in (72, 76):  # steps 19 and 20
        return np.full(shape, 7, np.int32)
    return rare(at, shape) if 25 * 4 <= at < 28 * 4 else None

patch.setattr(step, "_gradients", gradients)
with_batches(patch, choose)
run = dataclasses.replace(spiking_run(token_set), skip_nonfinite=3, keep_checkpoints=9, mesh=MeshConfig(data=2))
rewound, before_spike = [], loop._before_spike

def noted(*arguments):
    found = before_spike(*arguments)
    rewound.append([found[1].step, found[1].data])
    return found

patch.setattr(loop, "_before_spike", noted)
found = [timeless(loop.train(run, out / "whole", token_set, check_first=False))]

def kill():
    shutil.copytree(out / "whole", out / "killed")
    (out / "killed" / "result.json").unlink()
    for later in (24, 30, 36, 40):  # so that it comes to all of it again
        shutil.rmtree(out / "killed" / "checkpoints" / str(later))

distributed.first_does(kill)
found.append(timeless(loop.train(run, out / "killed", token_set, check_first=False)))
print(json.dumps([*found, rewound]))
"""


@pytest.mark.slow
def test_two_processes_decide_the_same_and_again_after_a_kill(token_set, tmp_path):
    """Steps 19 and 20 are not finite, and a spike comes at step 26."""
    address, environment = f"127.0.0.1:{free_port()}", {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags()}
    begin = lambda index: subprocess.Popen(
        [sys.executable, "-c", TOGETHER, str(token_set.path), str(tmp_path), str(index), address],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    ended = finish([begin(0), begin(1)])
    assert [status for status, *_ in ended] == [0, 0], ended
    first, second = (json.loads(said.splitlines()[-1]) for _, said, _ in ended)
    assert first == second
    whole, killed, rewound = first
    assert rewound == [[24, 112]] * 2
    assert killed == whole
    assert (whole["skipped_steps"], whole["rewinds"]) == (2, 1)
    rows, again = ([timeless(row) for row in read_metrics(tmp_path / name)] for name in ("whole", "killed"))
    assert again == rows
    assert [row["step"] for row in rows] == list(range(1, 41))
    log = (tmp_path / "killed" / "log.txt").read_text()
    assert "step 19: loss nan and gradient norm nan, not applied; batch and state are in anomalies/19" in log
    assert log.count("rewound to step 24; goes on with example 112") == 1
    assert np.load(tmp_path / "whole" / "anomalies" / "19" / "batch.npy").tolist() == [[7] * 33] * 4
