"""The training loop: a straight line from a config to a result.json."""

import contextlib
import dataclasses
import functools
import json
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmfree_jax import distributed, flops
from mmfree_jax.checkpoint import Checkpoints, restore
from mmfree_jax.config import RunConfig, require, to_json
from mmfree_jax.data import Batches, Counts, TokenSet, batches
from mmfree_jax.data.reading.verified import verify_once
from mmfree_jax.devices import GENERATOR, check_settings, peak_memory_bytes
from mmfree_jax.errors import logged
from mmfree_jax.evaluation.loss import Scores, evaluate, score_lines
from mmfree_jax.files import locked, read_json, write_json
from mmfree_jax.ops.fast import verification
from mmfree_jax.run_folder import (
    changes,
    check_data,
    claim,
    differences,
    note_corpus,
    with_corpus,
    with_saved_choices,
)
from mmfree_jax.sharding import batch_sharding, idle_devices
from mmfree_jax.training.anomalies import SUSTAINED, Anomalies
from mmfree_jax.training.diagnostics import Diagnostics
from mmfree_jax.training.identity import code_version, identity
from mmfree_jax.training.interrupt import Interrupted, StopFlag, exit_status, stop_flag
from mmfree_jax.training.metrics import Interval, Log, Progress, RunLog, SilentLog
from mmfree_jax.training.optim import rates
from mmfree_jax.training.profiling import Profile
from mmfree_jax.training.retry import Retry
from mmfree_jax.training.self_check import self_check
from mmfree_jax.training.step import Program, TrainState, concrete, make_program, program_key
from mmfree_jax.training.watchdog import Watchdog
from mmfree_jax.weights import load_params, model_config, with_choices_of

HANGS = "waiting for a step: a device or a collective operation hangs"


def train(
    config: RunConfig, folder: Path, token_set: TokenSet, profile_steps: range = range(0), check_first: bool = True
) -> dict[str, Any]:
    """Train `config` in `folder`, or resume what is there, and return the row of result.json.

    A finished run returns its row at once. `profile_steps`: steps whose trace is written to `folder`/profile.
    `check_first`: compare a step with the reference (`training.self_check`) before the first one. Raises SelfCheckError
    if they differ; ConfigError (the folder holds another run, the corpus does not fit); TokenSetError (it is damaged);
    CheckpointError (none can be read, or the last one not be written); Diverged; PeerLost; or Interrupted, after a
    signal, once the state has been saved, or the result if the signal came after the last step.
    """
    check_settings()
    config = completed_config(config, folder, token_set)
    if (folder / "result.json").exists() and not changes(config, folder):
        return read_json(folder / "result.json")  # nothing is written, because the disk may be read-only by now
    check_data(config, token_set)
    verify_once(token_set)
    profile = Profile(folder / "profile", profile_steps, config.steps)
    with contextlib.ExitStack() as stack:

        def take() -> None:
            stack.enter_context(locked(folder, wait_s=30))
            claim(config, folder)
            if not (folder / "result.json").exists():
                note_corpus(config, token_set, folder)

        distributed.first_does(take)
        if (folder / "result.json").exists():
            return read_json(folder / "result.json")
        if distributed.is_first():
            stack.enter_context(logged(folder / "log.txt", ignored=Interrupted))
        watchdog = stack.enter_context(Watchdog(config.name, folder, config.stall_minutes * 60))
        with stop_flag() as stop, distributed.naming_lost_peers():
            return _train(config, folder, token_set, stop, profile, check_first, watchdog)


def completed_config(config: RunConfig, folder: Path, token_set: TokenSet) -> RunConfig:
    """Fill in what a config leaves open: what its corpus holds, what was chosen when the run began, the precision.

    Raises ConfigError if the model's vocabulary is not that of the corpus.
    """
    config = with_saved_choices(with_corpus(config, token_set), folder)
    return dataclasses.replace(config, precision=concrete(config.precision))


def _train(
    config: RunConfig,
    folder: Path,
    token_set: TokenSet,
    stop: StopFlag,
    profile: Profile,
    check_first: bool,
    watchdog: Watchdog,
) -> dict[str, Any]:
    key = program_key(config, token_set.end_of_document)
    program = make_program(key)
    milestones = (*config.milestones, config.steps)
    held_out_loss = lambda params: evaluate(program.nats, program.mesh, params, token_set, config.data.sequence)

    with Checkpoints(folder / "checkpoints", config.keep_checkpoints, milestones) as checkpoints:
        data = config.data
        # The self-check compiles a two-layer copy of the step; the kernels' check compiles each new kernel.
        # Both checks come before the state is made, because they need the device's memory too.
        program.prepare((data.batch, data.sequence + 1), diagnosed=config.diagnose_every > 0)
        if check_first:
            self_check(key, data.batch, data.sequence, token_set.vocab_size)
        state, progress, marks = _begin(config, folder, program, checkpoints, token_set)
        retry = Retry()
        agreed = distributed.AgreedStop(program.mesh)
        log_of_process = RunLog(folder, marks) if distributed.is_first() else SilentLog()
        with log_of_process as log, contextlib.ExitStack() as readers, jax.set_mesh(program.mesh), profile:
            # Continues at the example where the state stands.
            rows = readers.enter_context(_batches(config, program, token_set, progress.data))
            _describe(config, program, log, progress)
            _tell(config, log, checkpoints.news)
            kernels = verification.record()
            for use in kernels["served"]:
                log.event(f"kernel serves: {use}")
            for use in kernels["refused"]:
                log.event(f"kernel refused, XLA serves: {use}")
            interval = Interval(config, progress, progress.counts, log)
            diagnostics = Diagnostics(config, program, log, interval)
            anomalies = Anomalies(config, program, folder, log)
            scores: Scores | None = None  # of the last step taken, if that was evaluated

            # JAX only queues work: the host runs ahead of the device. Whatever needs a result (logs, evaluation,
            # saving) waits for it, and stops the clocks meanwhile.
            while (step := progress.step) < config.steps:
                with watchdog.during("waiting for a batch: the reader of the data is stalled"):
                    tokens_BT = interval.timed_next(rows)
                now = jax.tree.map(np.float32, rates(config.optim, config.steps, step))
                everywhere = program.repeat(now)
                profile.before(step)
                diagnostics.before(step, state, tokens_BT, everywhere)
                with watchdog.during(HANGS) if interval.compiled else contextlib.nullcontext():
                    state, metrics = program.train_step(state, tokens_BT, everywhere)
                    profile.after(step, metrics)
                    # Metrics are fetched only now, when this step is queued: the device never waits for the host.
                    if config.log_every and step % config.log_every == 0:
                        interval.flush()
                interval.add(step, metrics, float(now.learning), rows.counts)
                if anomalies.after(interval, step, state, tokens_BT, everywhere, metrics):
                    found = _before_spike(checkpoints, program, progress, step, rows.state)
                    if found is None:
                        log.event("there is no checkpoint before the spike: the run goes on")
                    else:
                        state, progress, marks = found
                        log.rewind(marks)
                        log.event(f"rewound to step {progress.step}; goes on with example {progress.data}")
                        rows.close()
                        rows = readers.enter_context(_batches(config, program, token_set, progress.data))
                        interval = Interval(config, progress, progress.counts, log)
                        diagnostics = Diagnostics(config, program, log, interval)
                        continue

                diagnosed, scores = diagnostics.after(step, state), None
                if config.eval_every and (step + 1) % config.eval_every == 0:
                    interval.pause()
                    scores = held_out_loss(state.params)
                    interval.note(held_out_loss=scores["loss"], held_out_bpb=scores["bpb"])
                if diagnosed or scores:
                    interval.flush()
                    interval.resume()

                progress.step, progress.data = step + 1, rows.state
                every = config.checkpoint_every
                due = step + 1 in milestones or (every > 0 and (step + 1) % every == 0)
                _tell(config, log, checkpoints.news)
                # All processes must save after the same step, so a signal to one of them is shared first.
                with watchdog.during(HANGS):
                    stopping, again = agreed(stop.signal, retry.due(checkpoints.failed, step + 1))
                if stopping or due or again:
                    interval.flush() if due else interval.hold()
                    # Branches need a milestone's own step, and after a signal there is no later one.
                    save = checkpoints.save_now if stopping or step + 1 in milestones else checkpoints.save
                    with watchdog.during("writing a checkpoint: the storage does not answer"):
                        save(state, functools.partial(_meta, config, token_set, progress, log), step + 1)
                    progress.held = []
                    interval.resume()
                if stopping:
                    _tell(config, log, checkpoints.news)
                    log.event(f"stopped by signal {stopping} after step {step + 1}; saved")
                    place = f"stopped after step {step + 1}, saved in {folder}"
                    raise Interrupted(exit_status(stopping), f"{config.name}: {place}")

            scores = (scores or held_out_loss(state.params)) if config.evaluate else {}
            log.event(f"finished after {config.steps} steps" + "".join(f", {line}" for line in score_lines(scores)))

    result = result_row(config, token_set, progress, scores)
    distributed.first_does(lambda: write_json(folder / "result.json", result))
    # A signal during the evaluation must not be lost, or a worker would begin its next run. SIGALRM comes too late.
    stopping = agreed(stop.signal)[0] or agreed(None)[0]
    if stopping and stopping != signal.SIGALRM:
        raise Interrupted(exit_status(stopping), f"{config.name}: finished, in {folder}; stopped after that")
    return result


def _batches(config: RunConfig, program: Program, token_set: TokenSet, start: int) -> Batches:
    """The batches of a run from example `start` on. Each process reads the rows that its devices hold."""
    data, place = config.data, batch_sharding(program.mesh)
    rows = distributed.own_rows(place, data.batch)
    return batches(
        token_set,
        sequence=data.sequence,
        batch=data.batch,
        seed=data.seed,
        start=start,
        rows=rows,
        put=functools.partial(distributed.put_rows, sharding=place, batch=data.batch, rows=rows),
        counting=distributed.counted_rows(place, data.batch),
        separate=data.separate_documents,
    )


def _begin(
    config: RunConfig, folder: Path, program: Program, checkpoints: Checkpoints, token_set: TokenSet
) -> tuple[TrainState, Progress, dict[str, int]]:
    """Where to start. In this order: the folder's newest checkpoint, the branch point, `init`, random weights."""
    checkpoints.check_not_lost()
    if not checkpoints.steps and config.branch is None:
        with jax.set_mesh(program.mesh):
            state = program.init(jax.random.key(config.seed, impl=GENERATOR))
        state = _with_weights(state, config, program) if config.init else state
        return state, Progress(attempts=1), {}
    if checkpoints.steps:
        where, (state, meta) = folder, checkpoints.restore(program.abstract_state)
    else:
        assert config.branch is not None
        where = folder.parent / config.branch.run / "checkpoints"
        state, meta = restore(where, program.abstract_state, config.branch.step)
    require(
        meta["corpus"] == token_set.fingerprint,
        f"{where} was trained on corpus {meta['corpus']}, but this one is {token_set.fingerprint}: give that one (the "
        "embedded corpus changes with the packages that it is made of), or start again in a new folder",
    )
    progress = _progress(meta)
    progress.attempts = progress.attempts + 1 if checkpoints.steps else 1
    return state, progress, meta["marks"] if checkpoints.steps else {}


def _progress(meta: dict[str, Any]) -> Progress:
    """The progress in a checkpoint."""
    return Progress(**meta["progress"] | {"counts": Counts(**meta["progress"]["counts"])})


def _before_spike(
    checkpoints: Checkpoints, program: Program, progress: Progress, step: int, reached: int
) -> tuple[TrainState, Progress, dict[str, int]] | None:
    """Go back to the last checkpoint before a spike that is seen at 0-based step `step`; None if there is none.

    The run then goes on with example `reached`, past those that led to the spike. Later checkpoints are deleted first:
    a run that is killed here comes to the same spike again, and to the same decision.
    """
    begin = step + 1 - SUSTAINED  # steps done before the first one of the spike
    checkpoints.wait()
    if not any(one <= begin for one in checkpoints.steps):
        return None
    checkpoints.delete_after(begin)
    state, meta = checkpoints.restore(program.abstract_state)
    before = _progress(meta)
    before.data, before.rewinds, before.attempts = reached, progress.rewinds + 1, progress.attempts
    return state, before, meta["marks"]


def _with_weights(state: TrainState, config: RunConfig, program: Program) -> TrainState:
    """Replace the parameters of `state` by those of the model `config.init`."""
    path = Path(config.init)
    found = with_choices_of(model_config(path), config.model)
    require(
        found == config.model,
        f"init={config.init} holds another architecture ({differences(found, config.model)})",
    )
    for random in jax.tree.leaves(state.params):
        random.delete()  # before loading, or the devices would hold both
    return dataclasses.replace(state, params=load_params(path, program.abstract_state.params))


def _meta(config: RunConfig, token_set: TokenSet, progress: Progress, log: Log) -> dict[str, Any]:
    """What a checkpoint holds besides the state."""
    return {
        "config": json.loads(to_json(config)),
        "fingerprint": config.fingerprint(),
        "corpus": token_set.fingerprint,
        "progress": dataclasses.asdict(progress),
        "marks": log.mark(),
    }


def _tell(config: RunConfig, log: Log, news: list[str]) -> None:
    """Write lines that somebody should read to log.txt and to stderr, and empty the list."""
    while news:  # a thread may add some
        line = news.pop(0)
        log.event(line)
        if distributed.is_first():
            print(f"{config.name}: {line}", file=sys.stderr, flush=True)


def _describe(config: RunConfig, program: Program, log: Log, progress: Progress) -> None:
    devices = jax.devices()
    log.event(
        f"{'start' if progress.attempts == 1 else 'resume'} {config.name} at step {progress.step} of {config.steps} "
        f"on {config.mesh.devices} x {devices[0].device_kind} (jax {jax.__version__}, code {code_version()})"
    )
    for line in filter(None, (idle_devices(config.mesh), *program.replicated)):
        log.event(line)
    if progress.attempts == 1:
        log.describe("config", to_json(config))


def result_row(config: RunConfig, token_set: TokenSet, progress: Progress, scores: Scores) -> dict[str, Any]:
    """Return the row of the runs table. `loss` is null for a run that was not evaluated (a trunk).

    D, U and FLOPs are counted, the trunk's included; `batch_tokens`, `warmup_tokens` and `decay_tokens` are positions.
    """
    size, counts = flops.parameters(config.model), progress.counts
    data, optim = config.data, config.optim

    def of_all_steps(measured: float | None) -> float | None:
        # Steps that could not be timed count as the mean of the others. A run that shares its device has no times.
        timed = progress.step - progress.uncounted
        return None if measured is None or progress.shared or timed <= 0 else measured * progress.step / timed

    spent = flops.train_flops(config.model, config.positions, counts.pairs)
    return {
        "run_id": config.name,
        "family": config.model.family,
        "N": size.N,
        "N_nonemb": size.N_nonemb,
        "N_total": size.total,
        "D": counts.targets,
        "U": counts.unique,
        "D_rule": "targets",
        "loss": scores.get("loss"),
        "loss_se": scores.get("loss_se"),
        "bpb": scores.get("bpb"),
        "val_set": f"{token_set.sets[0].fingerprint}:valid",
        "val_tokens": scores.get("tokens"),
        "tokenizer": token_set.vocab_hash,
        "vocab": token_set.vocab_size,
        "seq_len": data.sequence,
        "flops": spent.products,
        "flops_rule": "exact products" + ", attention within documents" * data.separate_documents,
        "loss_unit": "nats",
        "embedding_counted": False,
        **{f"flops_{name}": count for name, count in dataclasses.asdict(spent).items()},
        "schedule": {"constant": "const", "cosine-halving": "cosine"}.get(optim.schedule, optim.schedule),
        "ended": True,
        "lr": optim.lr,
        "batch_tokens": data.tokens_per_step,
        "warmup_tokens": optim.warmup_steps * data.tokens_per_step,
        "decay_tokens": optim.decay_steps * data.tokens_per_step,
        "weight_decay": optim.weight_decay,
        "seed": config.seed,
        "cluster": config.branch.run if config.branch else config.name,
        "width": config.model.width,
        "depth": config.model.depth,
        "precision": concrete(config.precision),
        "train_loss": progress.train_loss,
        "seconds": of_all_steps(progress.seconds),
        "joules": of_all_steps(progress.joules),
        "peak_memory_bytes": None if progress.shared else peak_memory_bytes(),
        "attempts": progress.attempts,
        **({"skipped_steps": progress.skipped} if config.skip_nonfinite else {}),
        **({"rewinds": progress.rewinds} if config.spike_sigmas else {}),
        "device": jax.devices()[0].device_kind,
        "devices": config.mesh.devices,
        "kernels": "; ".join(verification.record()["served"]) or "none",
        "kernels_refused": "; ".join(verification.record()["refused"]) or None,
        **identity(config, token_set),
        "fingerprint": config.fingerprint(),
    }
