"""Before a run begins: does its step compute what the definitions say, on this device and mesh, at these shapes?

A copy of the model with two layers and all other sizes unchanged takes a micro-batch (two where the step accumulates)
by the step's own path, and by the reference: XLA in float32 on one device, a row at a time. What lies between the two,
be it a kernel, a compiler, a mesh or an order of sums, may round differently. How much rounding explains is measured as
well, by the same comparison of XLA in the step's own precision. A deviation beyond that stops the run.

This costs two or three compilations of a two-layer step (seconds on a CPU, about twenty on a GPU at 1.3B) and the first
time only: the outcome is kept beside the compiled programs.
"""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.tree_util import keystr, tree_leaves_with_path

from mmfree_jax.config import ConfigError, MeshConfig
from mmfree_jax.files import write_json
from mmfree_jax.ops.fast import choice
from mmfree_jax.training.step import ProgramKey, concrete, make_program

DEPTH = 2
LOSS = "the loss"
FLOORS = {"float32": 0.02, "bfloat16": 0.1}  # relative errors of gradients that are always let pass: codes flip
LOSS_FLOORS = {"float32": 1e-3, "bfloat16": 0.01}  # of the loss, relative
MARGIN, MOST = 4.0, 0.5  # rounding explains at most so many times what it does without kernels, and no more than MOST

_passed: set[str] = set()


class SelfCheckError(ConfigError):
    """The step computes something else than the reference."""


def self_check(key: ProgramKey, batch: int, time: int, vocab: int) -> None:
    """Compare the step of a run with the reference. Every process of the run has to call this.

    batch: rows of a step, on all devices. time: targets of a row. vocab: tokens that occur. Raises SelfCheckError, in
    one line that names the parameter whose gradient deviates most.
    """
    parts = min(2, key.optim.accumulate)
    rows = batch // key.optim.accumulate * parts
    name = _name(key, rows, time)
    if _all_processes(name in _passed or _kept(name)):
        return
    deviations = compare(key, rows, parts, time, vocab)
    worst, (found, explained) = max(deviations.items(), key=lambda item: float(_excess(*item[1])))
    if not _excess(found, explained) <= 1:
        served = ", ".join(sorted({use.split()[0] for use in choice.record()["served"]})) or "none"
        raise SelfCheckError(
            f"self-check: {worst} deviates by {found:.3g} from the float32 reference, where rounding explains "
            f"{explained:.2g} (kernels that serve: {served}). Nothing was trained. --kernels off may be right here; "
            "--no-self-check trains all the same"
        )
    _passed.add(name)
    if path := _path(name):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"deviations": deviations})


def compare(key: ProgramKey, rows: int, parts: int, time: int, vocab: int) -> dict[str, tuple[float, float]]:
    """For the loss and the gradient to each parameter of the two-layer copy: the relative error of the step's own path,
    and how much rounding explains."""
    precision = concrete(key.precision)
    in_parts = lambda parts: dataclasses.replace(key.optim, accumulate=parts)
    small = dataclasses.replace(key.model, depth=DEPTH)
    own = dataclasses.replace(key, model=small, optim=in_parts(parts), unroll=min(key.unroll, DEPTH))
    # A device of another process cannot be computed on alone.
    mesh = MeshConfig() if jax.process_count() == 1 else key.mesh
    slow = dataclasses.replace(own, mesh=mesh, kernels="off", remat="none", gather="int8")
    slow = dataclasses.replace(slow, optim=in_parts(rows // mesh.batch_shards))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (rows, time + 1), dtype=np.int32)
    if key.separator is not None:
        tokens = np.where(rng.uniform(size=tokens.shape) < 1 / 64, np.int32(key.separator), tokens)

    with jax.set_mesh(make_program(own).mesh):
        params = make_program(own).init(jax.random.key(0)).params
    found = _gradients(own, params, tokens)
    with jax.default_matmul_precision("highest"):
        exact = _gradients(dataclasses.replace(slow, precision="float32"), params, tokens)
    rounded = found if precision == "float32" else _gradients(slow, params, tokens)
    total = np.sqrt(sum(np.sum(g**2) for name, g in exact.items() if name != LOSS))

    def judged(name: str) -> tuple[float, float]:
        size = np.linalg.norm(exact[name]) + (0 if name == LOSS else 1e-4 * total)  # some gradients are nearly zero
        error = lambda a: float(np.linalg.norm(a[name] - exact[name]) / size)
        floor = (LOSS_FLOORS if name == LOSS else FLOORS)[precision]
        return error(found), floor if precision == "float32" else max(floor, min(MOST, MARGIN * error(rounded)))

    return {name: judged(name) for name in exact}


def _gradients(key: ProgramKey, params: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The loss of a two-layer model and its gradients, whole on this host."""
    program = make_program(key)
    with jax.set_mesh(program.mesh):
        params = jax.device_put(params, jax.tree.map(lambda a: a.sharding, program.abstract_state.params))
        batch = program.place(tokens)
        choice.prepare(lambda: jax.eval_shape(program.gradients, params, batch))
        results = program.gradients(params, batch)
        if jax.process_count() > 1:
            results = multihost_utils.process_allgather(results, tiled=True)
    loss, grads = jax.tree.map(lambda a: np.asarray(a, np.float64), results)
    name = lambda path: f"the gradient to {keystr(path, simple=True, separator='.')}"
    return {LOSS: loss, **{name(path): g for path, g in tree_leaves_with_path(grads)}}


def _excess(found: float, explained: float) -> float:
    """How many times the explained error was found; infinite where it is no number."""
    return np.inf if np.isnan(found) else found / explained


def _all_processes(flag: bool) -> bool:
    """Whether this is true in every process of the run: all have to take the same path."""
    return bool(np.all(multihost_utils.process_allgather(np.array(flag)))) if jax.process_count() > 1 else flag


def _kept(name: str) -> bool:
    path = _path(name)
    return path is not None and path.exists()


def _path(name: str) -> Path | None:
    folder = choice.kept_in()
    return None if folder is None else folder / "self_check" / f"{name}.json"


def _name(key: ProgramKey, rows: int, time: int) -> str:
    """A digest of what the outcome depends on."""
    depends = [repr(dataclasses.replace(key, model=dataclasses.replace(key.model, depth=DEPTH))), rows, time]
    return hashlib.sha256(json.dumps([*depends, choice.environment(), _sources()]).encode()).hexdigest()[:24]


@functools.cache
def _sources() -> str:
    """A digest of the code that computes a step."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for pattern in ("models/*.py", "ops/**/*.py", "training/*.py", "sharding.py"):
        for file in sorted(root.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()
