"""A check before a run: does its step compute what the definitions say, on this device and mesh, at these shapes?"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.tree_util import keystr, tree_leaves_with_path

from mmfree_jax.config import ConfigError, MeshConfig
from mmfree_jax.devices import backend
from mmfree_jax.files import sha256
from mmfree_jax.ops.fast import verification
from mmfree_jax.sharding import batch_sharding
from mmfree_jax.training.step import ProgramKey, concrete, make_program

# A copy of the model with two layers and all other sizes unchanged takes a micro-batch (two where the step accumulates)
# through the step's own program and through the reference: XLA in float32 without integer gradients on one device (with
# several processes on the run's mesh), a row at a time. Kernels, compilers, meshes and orders of summation may round
# differently. How much of the deviation rounding explains is measured too: XLA in the step's own precision, with
# integer gradients where the step has them, is compared with the reference in the same way. A larger deviation stops
# the run.
#
# The check costs two or three compilations of a two-layer step (docs/kernels.md has measurements), and only the first
# time: the outcome is kept beside the compiled programs.

DEPTH = 2
LOSS = "the loss"
QUICKLY = {"cpu": {"xla_backend_optimization_level": 0}, "gpu": {"xla_gpu_autotune_level": 0}}  # compiler options
FLOORS = {"float32": 0.02, "bfloat16": 0.1}  # relative errors of gradients that always pass, because codes flip
LOSS_FLOORS = {"float32": 1e-3, "bfloat16": 0.01}  # relative errors of the loss that always pass
MARGIN, MOST = 4.0, 0.5  # rounding explains MARGIN times the error of XLA in the step's precision, and MOST at most

_passed: set[str] = set()


class SelfCheckError(ConfigError):
    """A training step does not compute what the reference computes."""


def self_check(key: ProgramKey, batch: int, time: int, vocab: int) -> None:
    """Compare the step of a run with the reference. Every process of the run has to call this.

    batch: rows of a step, on all devices. time: targets of a row. vocab: tokens that occur. Raises SelfCheckError, in
    one line that names the parameter whose gradient deviates most.
    """
    parts = min(2, key.optim.accumulate)
    rows = batch // key.optim.accumulate * parts
    small = dataclasses.replace(key, model=dataclasses.replace(key.model, depth=DEPTH))
    depends = [repr(small), rows, time, _sources()]
    outcome, name = verification.outcome_file("self_check", depends), json.dumps(depends)
    known = np.array(name in _passed or (outcome is not None and outcome.exists()))
    # The comparison is a program on the mesh, so all processes run it or none. Only some may have found an outcome.
    if known if jax.process_count() == 1 else np.all(multihost_utils.process_allgather(known)):
        return
    deviations = compare(key, rows, parts, time, vocab)
    excess = lambda found, explained: np.inf if np.isnan(found) else found / explained
    worst, (found, explained) = max(deviations.items(), key=lambda item: float(excess(*item[1])))
    if not excess(found, explained) <= 1:
        served = ", ".join(sorted({use.split()[0] for use in verification.record()["served"]})) or "none"
        raise SelfCheckError(
            f"self-check: {worst} deviates by {found:.3g} from the float32 reference, where rounding explains "
            f"{explained:.2g} (kernels in use: {served}). Nothing was trained. Try --kernels off (in an experiment "
            "kernels='off'); `train --no-self-check` trains without this check"
        )
    _passed.add(name)
    verification.store(outcome, {"deviations": deviations})


def compare(
    key: ProgramKey, rows: int, parts: int, time: int, vocab: int, *, tuned: bool = True
) -> dict[str, tuple[float, float]]:
    """Compare the loss, and the gradient to each parameter of the two-layer copy, with the reference.

    Returns for each the relative error of the step's own program, and how much of it rounding explains.
    rows: of all `parts` micro-batches together. tuned: compile the step's own program as the step is compiled; XLA's
    search for the fastest products can take minutes on a GPU.
    """
    precision = concrete(key.precision)
    in_parts = lambda parts: dataclasses.replace(key.optim, accumulate=parts)
    small = dataclasses.replace(key.model, depth=DEPTH)
    unroll = min(key.unroll, DEPTH)
    own = dataclasses.replace(key, model=small, optim=in_parts(parts), unroll=unroll, precision=precision)
    # The reference goes row by row: neither a mesh, nor a kernel's tile, nor the order of a sum over rows can be wrong
    # in both.
    # One process cannot compute on a device alone while the others wait, so the reference is on the whole mesh then.
    mesh = MeshConfig() if jax.process_count() == 1 else key.mesh
    slow = dataclasses.replace(own, mesh=mesh, kernels="off", remat="none", gather="int8")
    slow = dataclasses.replace(slow, optim=in_parts(rows // mesh.batch_shards))
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (rows, time + 1), dtype=np.int32)
    if key.separator is not None:
        tokens = np.where(rng.uniform(size=tokens.shape) < 1 / 64, np.int32(key.separator), tokens)

    exactly = dataclasses.replace(slow, precision="float32", model=dataclasses.replace(small, gradient_bits=0))
    keys = (own, exactly) if slow == exactly else (own, exactly, slow)
    found, exact, *rounded = _results(keys, tokens, tuned)
    norm = lambda a: jnp.sqrt(jnp.sum(jnp.square(a.astype(jnp.float32))))
    norms = jax.jit(lambda a, b: jax.tree.map(lambda a, b: (norm(a - b), norm(b)), a, b))
    errors = [jax.device_get(norms(one, exact)) for one in (found, *rounded)]  # |found - exact| and |exact| of each
    total = np.sqrt(sum(float(size) ** 2 for name, (_, size) in errors[0].items() if name != LOSS))
    deviations = {}
    for name, (_, size) in errors[0].items():
        # Some gradients are nearly zero, and their relative errors mean nothing: they are measured against all.
        unit = float(size) + (0 if name == LOSS else 1e-4 * total)
        error, *rounding = (float(one[name][0]) / unit for one in errors)
        floor = (LOSS_FLOORS if name == LOSS else FLOORS)[precision]
        deviations[name] = error, max([floor, *(min(MOST, MARGIN * one) for one in rounding)])
    return deviations


def _results(keys: Sequence[ProgramKey], tokens: np.ndarray, tuned: bool) -> list[dict[str, jax.Array]]:
    """The loss of a two-layer model and its gradients by each program, all with the same weights.

    The first program is the step's, compiled like the step if `tuned`; the others run once, so they are compiled with
    less optimisation. All are compiled in parallel.
    """
    programs = [make_program(key) for key in keys]
    with jax.set_mesh(programs[0].mesh):
        params = programs[0].init(jax.random.key(0)).params
    lowered = [_lowered(key, tokens.shape) for key in keys]
    quickly: dict[str, int] = QUICKLY.get(backend(), {})
    options = [{} if tuned else quickly, *[quickly] * (len(keys) - 1)]
    with ThreadPoolExecutor(len(keys)) as pool:
        compiled = list(pool.map(lambda one, how: one.compile(how), lowered, options))
    results = []
    for program, run in zip(programs, compiled, strict=True):
        place = jax.tree.map(lambda a: a.sharding, program.abstract_state.params)
        with jax.set_mesh(program.mesh):
            loss, grads = run(jax.device_put(params, place), program.place(tokens))
        # To where the second program, the reference, has its results: arrays are compared in one place.
        grads = jax.device_put(grads, jax.tree.map(lambda a: a.sharding, programs[1].abstract_state.params))
        loss = jax.device_put(loss, jax.sharding.NamedSharding(programs[1].mesh, jax.sharding.PartitionSpec()))
        name = lambda path: f"the gradient to {keystr(path, simple=True, separator='.')}"
        results.append({LOSS: loss, **{name(path): g for path, g in tree_leaves_with_path(grads)}})
    return results


def _lowered(key: ProgramKey, shape: tuple[int, ...]) -> jax.stages.Lowered:
    """Lower a program's gradients for tokens [B, T+1]. In float32 without TensorFloat-32, so products are exact."""
    program = make_program(key)
    params = program.abstract_state.params
    batch = jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(program.mesh))
    precision = jax.default_matmul_precision("highest") if key.precision == "float32" else contextlib.nullcontext()
    with jax.set_mesh(program.mesh), precision:
        verification.prepare(lambda: jax.eval_shape(program.gradients, params, batch))
        return program.gradients.lower(params, batch)


@functools.cache
def _sources() -> str:
    """A digest of the code that computes a step."""
    root = Path(__file__).parents[1]
    patterns = (
        "models/*.py",
        "ops/**/*.py",
        "training/*.py",
        "data/reading/documents.py",
        "architecture.py",
        "sharding.py",
    )
    return sha256(file for pattern in patterns for file in sorted(root.glob(pattern)))
