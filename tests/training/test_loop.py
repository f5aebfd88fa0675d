"""Runs: resumed, branched, split over devices and accumulated, they compute the same thing."""

import contextlib
import dataclasses
import errno
import json
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax import checkpoint
from mmfree_jax.checkpoint import CheckpointError, Checkpoints
from mmfree_jax.config import Branch, ConfigError, OptimConfig
from mmfree_jax.data.building.token_writer import write_token_set
from mmfree_jax.data.tokenizers.tokenizer import byte_tokenizer
from mmfree_jax.errors import describe
from mmfree_jax.files import read_json
from mmfree_jax.run_folder import read_run, with_corpus
from mmfree_jax.training import loop
from mmfree_jax.training.interrupt import Interrupted
from mmfree_jax.training.loop import train
from mmfree_jax.training.metrics import Diverged
from mmfree_jax.training.step import make_program, program_key
from tests.conftest import MAIN_FAMILIES, read_metrics, sentences, tiny_run
from tests.training.stopping import stop_after

NUMBERS = ("loss", "loss_se", "bpb", "train_loss", "N", "D", "flops", "val_tokens")


def numbers(result: dict) -> dict:
    return {key: result[key] for key in NUMBERS}


def curve(folder) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in read_metrics(folder)]


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_a_run_learns_and_leaves_what_it_promises(family, token_set, tmp_path):
    config = tiny_run(family, token_set.path, steps=60, checkpoint_every=25, milestones=(30,), diagnose_every=30)
    result = train(config, tmp_path, token_set)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == sorted({*range(2, 61, 2), 25})
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert result["loss"] == pytest.approx(rows[-1]["loss"], abs=0.3)
    tokens_per_byte = len(token_set.split("valid")) / token_set.text_bytes("valid")
    assert result["bpb"] == pytest.approx(result["loss"] / np.log(2) * tokens_per_byte)
    assert result["val_tokens"] == len(token_set.split("valid")) - 1
    assert read_json(tmp_path / "result.json") == result
    assert json.loads((tmp_path / "config.json").read_text())["model"]["width"] == 16
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [30, 50, 60]
    assert list((tmp_path / "tb").glob("events.*"))
    assert train(config, tmp_path, token_set) == result  # a finished run is not run again


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_a_run_stopped_at_any_step_resumes_to_the_same_numbers(family, token_set, tmp_path):
    config = tiny_run(family, token_set.path)
    whole = train(config, tmp_path / "whole", token_set)
    folder = tmp_path / "stopped"
    attempts = 0
    while not (folder / "result.json").exists():
        attempts += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mmfree_jax.training.loop.Diagnostics", stop_after(3))
            if attempts < 5:
                with pytest.raises(Interrupted) as stop:
                    train(config, folder, token_set)
                assert stop.value.status == 75
            else:
                train(config, folder, token_set)
    assert attempts == 5  # four times three steps of the twelve, then the evaluation
    assert numbers(read_json(folder / "result.json")) == numbers(whole)
    assert curve(folder) == curve(tmp_path / "whole")
    assert read_json(folder / "result.json")["attempts"] == 5


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed_stops_a_run_that_is_saved_unless_it_was_told_not_to_care(
    ignored, token_set, tmp_path, monkeypatch
):
    """As `nohup` tells it."""
    config = tiny_run("matmul-free", token_set.path, evaluate=False)
    monkeypatch.setattr("mmfree_jax.training.loop.Diagnostics", stop_after(3, signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        if ignored:
            train(config, tmp_path, token_set)
            return
        with pytest.raises(Interrupted) as stop:
            train(config, tmp_path, token_set)
        assert stop.value.status == 75
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_logs_written_after_the_last_checkpoint_are_cut_off_on_resume(token_set, tmp_path):
    """As after SIGKILL: the logs are ahead of the checkpoint, by a torn line too."""
    config = tiny_run("matmul-free", token_set.path)
    whole = train(config, tmp_path / "a", token_set)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "result.json").unlink()
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "12")
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert numbers(train(config, tmp_path / "b", token_set)) == numbers(whole)
    assert curve(tmp_path / "b") == curve(tmp_path / "a")
    assert "resume" in (tmp_path / "b" / "log.txt").read_text()
    assert (tmp_path / "b" / "log.txt").read_text().count("finished") == 1


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_a_branch_equals_the_whole_run_it_stands_for(family, token_set, tmp_path):
    """Trunk to step 8, then the decay 8..12, against the same 12 steps in one go: equal to the last bit."""
    whole = tiny_run(family, token_set.path)
    flat = dataclasses.replace(whole.optim, decay_steps=0)
    trunk = dataclasses.replace(whole, name="trunk", steps=10, milestones=(8,), optim=flat, evaluate=False)
    branch = dataclasses.replace(whole, name="branch", branch=Branch("trunk", 8))
    expected = train(whole, tmp_path / "whole", token_set)
    assert train(trunk, tmp_path / "trunk", token_set)["loss"] is None
    found = train(branch, tmp_path / "branch", token_set)
    assert numbers(found) == numbers(expected)
    assert found["cluster"] == "trunk"
    assert found["attempts"] == 1  # its own, not those of its trunk
    assert [row["step"] for row in read_metrics(tmp_path / "branch")] == [10, 12]


def test_a_branch_without_its_trunk_names_what_is_missing(token_set, tmp_path):
    config = tiny_run("matmul-free", token_set.path, branch=Branch("nowhere", 8))
    with pytest.raises(CheckpointError, match=r"nowhere/checkpoints does not exist"):
        train(config, tmp_path / "b", token_set)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_accumulation_changes_nothing_but_rounding(family, token_set, tmp_path):
    config = tiny_run(family, token_set.path, steps=4, optim=OptimConfig(lr=1e-3, warmup_steps=1))
    split = dataclasses.replace(config, optim=dataclasses.replace(config.optim, accumulate=2))
    train(config, tmp_path / "one", token_set)
    train(split, tmp_path / "two", token_set)
    one, two = (np.array(curve(tmp_path / name))[:, 1] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=2e-4)


def test_a_diverging_run_says_so(token_set, tmp_path):
    config = tiny_run("transformer++", token_set.path, optim=OptimConfig(lr=1e30, warmup_steps=0, clip=0.0))
    with pytest.raises(Diverged, match=r"lower optim\.lr"):
        train(config, tmp_path, token_set)
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize(("log_every", "logged"), [(1, [1, 2, 3, 4]), (3, [3, 4]), (0, [4])])
def test_a_run_that_diverges_logs_the_steps_before(log_every, logged, token_set, tmp_path, monkeypatch):
    """The fifth loss is not a number."""
    config = tiny_run("transformer++", token_set.path, log_every=log_every, checkpoint_every=0, evaluate=False)
    program = make_program(program_key(config, None))

    def step(state, tokens_BT, rates):
        state, metrics = program.train_step(state, tokens_BT, rates)
        return state, {**metrics, "loss": jnp.where(state.step == 5, jnp.nan, metrics["loss"])}

    monkeypatch.setattr(loop, "make_program", lambda key: dataclasses.replace(program, train_step=step))
    with pytest.raises(Diverged, match=r"loss nan and gradient norm [\d.e+]+ at step 5"):
        train(config, tmp_path, token_set)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == logged
    assert [row["tokens"] for row in rows] == [step * 4 * 32 for step in logged]
    assert all(np.isfinite(row["loss"]) for row in rows)
    log = (tmp_path / "log.txt").read_text()
    assert "ended by Diverged: transformer++-tiny: loss nan" in log
    assert "Traceback" not in log


def test_an_error_that_nobody_foresaw_leaves_its_traceback_in_the_log(token_set, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda *_: {}["optimizer"])
    with pytest.raises(KeyError) as failed:
        train(tiny_run("matmul-free", token_set.path), tmp_path, token_set)
    log = (tmp_path / "log.txt").read_text()
    assert "ended by KeyError: 'optimizer'\nTraceback" in log
    assert describe(failed.value) == f"KeyError: 'optimizer' (traceback: {tmp_path / 'log.txt'}; --debug shows it)"


def test_a_finished_run_is_returned_from_a_disk_that_cannot_be_written(token_set, tmp_path, monkeypatch):
    config = tiny_run("matmul-free", token_set.path, steps=6)
    result = train(config, tmp_path, token_set)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / ".lock"))

    monkeypatch.setattr(loop, "locked", read_only)
    assert train(config, tmp_path, token_set) == result
    with pytest.raises(OSError, match="Read-only"):
        train(dataclasses.replace(config, seed=1), tmp_path, token_set)


def test_a_folder_with_another_run_is_refused(token_set, tmp_path):
    config = tiny_run("matmul-free", token_set.path, steps=6)
    train(config, tmp_path, token_set)
    with pytest.raises(ConfigError, match=r"holds another run \(optim.lr is 0.01, not 0.5\)"):
        train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=0.5)), tmp_path, token_set)


def test_a_single_document_of_held_out_text_gives_no_standard_error(tmp_path):
    texts, card = {"train": sentences(9, 0), "valid": sentences(1, 1)}, {"name": "a", "description": "a", "sources": []}
    one = write_token_set(tmp_path / "one", texts, byte_tokenizer(), card)
    result = train(tiny_run("matmul-free", one.path), tmp_path, one)
    assert result["loss"] > 0
    assert result["loss_se"] is None
    assert "loss_se" not in (tmp_path / "log.txt").read_text()


def test_saving_is_no_part_of_the_time_of_training(token_set, tmp_path, monkeypatch):
    save = Checkpoints.save

    def slowly(*arguments):
        time.sleep(2)
        save(*arguments)

    monkeypatch.setattr(Checkpoints, "save", slowly)
    config = tiny_run("matmul-free", token_set.path, steps=8, checkpoint_every=2, evaluate=False)
    result = train(config, tmp_path, token_set)
    assert 0 < result["seconds"] < 2
    assert all(row["tokens_per_s"] is None or row["tokens_per_s"] > 4 * 32 for row in read_metrics(tmp_path))


class Clock:
    """Stands for the clock and the energy counter: every step takes a second and two joules, a compilation 100."""

    now = 0.0
    restarted = 0.0

    def restart(self):
        Clock.restarted = Clock.now

    def joules(self):
        return 2 * (Clock.now - Clock.restarted)


@pytest.mark.parametrize("stops", [(), (3,), (1, 1, 2), (4, 7)])
def test_seconds_and_joules_are_those_of_all_steps_however_often_a_run_is_stopped(
    stops, token_set, tmp_path, monkeypatch
):
    """`stops`: after how many steps each process but the last gets SIGTERM, between two rows of metrics."""
    config = tiny_run("matmul-free", token_set.path, log_every=0, checkpoint_every=0, evaluate=False)
    monkeypatch.setattr("mmfree_jax.training.metrics.EnergyMeter", Clock)
    monkeypatch.setattr("mmfree_jax.training.metrics.time.perf_counter", lambda: Clock.now)
    for steps in (*stops, 0):

        class Stepper(stop_after(steps)):
            def before(self, *_):
                super().before()
                Clock.now += 100 if self.seen == 1 else 1

        monkeypatch.setattr("mmfree_jax.training.loop.Diagnostics", Stepper)
        with pytest.raises(Interrupted) if steps else contextlib.nullcontext():
            train(config, tmp_path, token_set)
    result = read_json(tmp_path / "result.json")
    assert (result["seconds"], result["joules"]) == (12, 24)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(token_set, tmp_path, capsys):
    config = tiny_run("matmul-free", token_set.path)
    result, before = train(config, tmp_path, token_set), curve(tmp_path)
    (tmp_path / "result.json").unlink()
    (tmp_path / "checkpoints" / "12" / "state" / "_METADATA").unlink()
    assert numbers(train(config, tmp_path, token_set)) == numbers(result)
    assert curve(tmp_path) == before
    says = (
        "the checkpoint of step 12 is damaged (state/_METADATA is missing) and set aside as damaged-12: the run goes "
    )
    says += "on from step 10"
    assert says in (tmp_path / "log.txt").read_text()
    assert capsys.readouterr().err == f"matmul-free-tiny: {says}\n"


def test_a_run_without_any_good_checkpoint_stops_every_time(token_set, tmp_path):
    config = tiny_run("matmul-free", token_set.path)
    train(config, tmp_path, token_set)
    (tmp_path / "result.json").unlink()
    rows = read_metrics(tmp_path)
    for step in (10, 12):
        (tmp_path / "checkpoints" / str(step) / "state" / "_METADATA").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"has no checkpoint that is not damaged \(step 12: .*; step 10: "):
            train(config, tmp_path, token_set)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="although one of step 12 was written"):
        train(config, tmp_path, token_set)
    assert read_metrics(tmp_path) == rows


def test_a_save_that_fails_is_tried_again_soon_and_changes_no_row(token_set, tmp_path, monkeypatch):
    """The checkpoint of step 5 and its first retry fail; the second retry, two steps later, comes in between rows."""
    config = tiny_run("matmul-free", token_set.path, keep_checkpoints=9, log_every=5)
    whole = train(config, tmp_path / "whole", token_set)
    write, tried = checkpoint.write_checksums, []

    def full(folder, *parts):
        tried.append(int(folder.name))
        if len(tried) <= 2:
            shutil.rmtree(folder)
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        write(folder, *parts)

    monkeypatch.setattr(checkpoint, "write_checksums", full)
    slow = lambda *a: (time.sleep(0.3), False)[1]  # so that the thread has failed before the next step ends
    monkeypatch.setattr("mmfree_jax.training.loop.Diagnostics.after", slow)
    found = train(config, tmp_path / "full", token_set)
    assert tried == [5, 7, 9, 10, 12]
    assert numbers(found) == numbers(whole)
    assert curve(tmp_path / "full") == curve(tmp_path / "whole")
    log = (tmp_path / "full" / "log.txt").read_text()
    assert re.findall(r"the checkpoint of step (\d+) was not written: .*No space left", log) == ["5", "7"]
    for step in (10, 12):
        shutil.rmtree(tmp_path / "full" / "checkpoints" / str(step))
    (tmp_path / "full" / "result.json").unlink()
    assert numbers(train(config, tmp_path / "full", token_set)) == numbers(whole)
    assert curve(tmp_path / "full") == curve(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_notice_of_preemption_saves_the_run_at_the_end_of_its_step(number, token_set, tmp_path, monkeypatch):
    config = tiny_run("matmul-free", token_set.path, evaluate=False)
    monkeypatch.setattr("mmfree_jax.training.loop.Diagnostics", stop_after(3, number))
    with pytest.raises(Interrupted) as stop:
        train(config, tmp_path, token_set)
    assert stop.value.status == 75
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_run_that_took_too_much_memory_goes_on_with_less(token_set, tmp_path, monkeypatch):
    """What such a run is told to change may be changed; what is finished keeps what it was computed with."""
    config = tiny_run("matmul-free", token_set.path)
    whole = train(config, tmp_path, token_set)
    (tmp_path / "result.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "12")
    less = dataclasses.replace(config, remat="full", optim=dataclasses.replace(config.optim, accumulate=2))
    again = train(less, tmp_path, token_set)
    assert again["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert train(config, tmp_path, token_set) == again
    assert read_run(tmp_path / "config.json") == dataclasses.replace(with_corpus(less, token_set), precision="float32")


def test_a_changed_corpus_is_refused(token_set, tmp_path):
    config = tiny_run("matmul-free", token_set.path)
    train(config, tmp_path / "run", token_set)
    (tmp_path / "run" / "result.json").unlink()
    texts = {"train": sentences(250, 2), "valid": sentences(25, 3)}
    card = {"name": "other", "description": "made up", "sources": []}
    other = write_token_set(tmp_path / "other", texts, byte_tokenizer(), card)
    with pytest.raises(ConfigError, match=r"its data are .*corpus0/tiny \(\w{16}\), not .*/other \("):
        train(config, tmp_path / "run", other)


def test_data_that_does_not_fit_is_refused_before_anything_is_written(token_set, tmp_path):
    config = tiny_run("matmul-free", token_set.path)
    long = dataclasses.replace(config, data=dataclasses.replace(config.data, sequence=1 << 20))
    with pytest.raises(ConfigError, match="longer than the train split"):
        train(long, tmp_path / "run", token_set)
    for change, why in (
        ({"vocab": 256}, "model.vocab=256 is smaller than the 257 tokens of the corpus: set model.vocab to 257"),
        ({"vocab": 257 + 1024}, "or set model.tokenizer_vocab=257, if so much padding is meant"),
        ({"vocab": 300, "tokenizer_vocab": 258}, "model.tokenizer_vocab=258, but the corpus has 257 tokens"),
    ):
        wrong = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
        with pytest.raises(ConfigError, match=re.escape(why)):
            train(wrong, tmp_path / "run", token_set)
    assert not (tmp_path / "run").exists()


class Guarded:
    """Stands for Diagnostics: from the third step to the last, transfers that nobody asked for are errors."""

    def __init__(self, config, *_):
        self.last, self.guard = config.steps - 1, jax.transfer_guard("disallow")

    def before(self, step, *_):
        if step == 2:
            self.guard.__enter__()

    def after(self, step, _):
        if step == self.last:
            self.guard.__exit__(None, None, None)


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_the_loop_transfers_nothing_but_batches_rates_and_metrics(family, token_set, tmp_path, monkeypatch):
    monkeypatch.setattr("mmfree_jax.training.loop.Diagnostics", Guarded)
    train(tiny_run(family, token_set.path), tmp_path / "run", token_set)

    class Careless(Guarded):
        def after(self, step, state):
            if step == 3:
                state.step + np.int32(1)  # an implicit copy of a number to the device
            super().after(step, state)

    monkeypatch.setattr("mmfree_jax.training.loop.Diagnostics", Careless)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"), jax.transfer_guard("allow"):
        train(tiny_run(family, token_set.path), tmp_path / "careless", token_set)
