"""Verification: a kernel serves only where it has been checked."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mmfree_jax.devices import backend
from mmfree_jax.files import read_json, sha256, write_json
from mmfree_jax.ops.fast import checks
from mmfree_jax.ops.fast.checks import Outcome, Use
from mmfree_jax.ops.fast.kernels import architecture
from mmfree_jax.tracing import during

# The first use of a kernel at a shape, in a type, on a kind of device compares it with float64 (`checks`). The outcome
# is stored in a folder, so that later processes do not check again. Where a kernel deviates or fails, XLA serves, a
# warning names the kernel, and `record` says so for the run's log and result.
#
# `prepare` traces a program once to find its uses and checks the new ones. The processes of a run then agree: what one
# of them refuses, all refuse. A use that was not prepared is checked when the trace reaches it.

THREADS = 8  # checks at the same time: XLA and ptxas compile in parallel, lowering holds Python's lock
# Whose change makes outcomes void, with those of the kernels themselves.
CHECKED_SOURCES = ("ternary.py", "fused_recurrence.py", "attention.py", "checks/*.py")
LONGEST_REASON = 300  # characters of an exception's message

_assumed: ContextVar[bool] = ContextVar("kernels_assumed", default=False)
_collected: ContextVar[set[Use] | None] = ContextVar("collected", default=None)
_outcomes: dict[Use, Outcome] = {}
_refused_elsewhere: set[Use] = set()


def kernels_assumed(assumed: bool = True) -> Any:
    """Use every kernel that supports its shape, unchecked, in what is traced inside. Also a decorator.

    For programs that are compiled for an absent Hopper GPU or TPU, or interpreted.
    """
    return during(_assumed, assumed)


def possible() -> bool:
    """Whether kernels can run on this device, or are assumed to."""
    return _assumed.get() or is_hopper() or is_tpu()


@functools.cache
def is_hopper() -> bool:
    """Whether kernels can run here: an NVIDIA GPU of compute capability 9.0, and jax 0.11 or later."""
    if jax.default_backend() != "gpu" or jax.__version_info__ < (0, 11):
        return False
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def is_tpu() -> bool:
    """Whether kernels can run here: a TPU."""
    return jax.default_backend() == "tpu"


def serves(use: Use) -> bool:
    """Whether a kernel is right at a use: checked now, if it never was. Asked while a program is traced."""
    if _assumed.get():
        return True
    collected = _collected.get()
    if collected is not None:
        if use in _outcomes and not _passed(use):
            return False
        collected.add(use)
        return True
    if use not in _outcomes and jax.process_count() > 1:
        # This process cannot ask the others here, and all have to trace the same program.
        warnings.warn(f"{use} was not checked before this program was traced; XLA serves", stacklevel=2)
        return False
    _check([use])
    return _passed(use)


# Why a separate trace: a use that is met while the program is traced for good is checked there and then, alone, and in
# that process only. `prepare` collects all uses first, checks them in parallel, and lets the processes agree.
def prepare(trace: Callable[[], Any]) -> None:
    """Check all kernels that a program would use, before it is traced for good.

    trace: traces the program without computing (`lambda: jax.eval_shape(step, ...)`). Every process of a run has to
    call this with the same program. JAX keeps the trace, so the next one is free unless a kernel was refused.
    """
    if not (is_hopper() or is_tpu()):
        return
    while True:
        uses: set[Use] = set()
        with during(_collected, uses):
            trace()
        new = sorted(use for use in uses if use not in _outcomes)
        _check(new)
        if jax.process_count() > 1 and new:
            # All processes have to compile the same program: what any of them refuses, all refuse. They met the same
            # uses, and in the same order, so the answers line up.
            mine = np.array([not _outcomes[use].passed for use in new])
            any_refuses = multihost_utils.process_allgather(mine).any(axis=0)
            _refused_elsewhere.update(use for use, refused in zip(new, any_refuses, strict=True) if refused)
        if all(_passed(use) for use in uses):
            return
        # The cached trace contains refused kernels. A new one may ask for other kernels: check again.
        jax.clear_caches()


def record() -> dict[str, list[str]]:
    """Return the uses that this process met, in words: served by a kernel, and refused, with the reason."""
    served, refused = [], []
    for use, outcome in _outcomes.items():
        if _passed(use):
            served.append(str(use))
        else:
            refused.append(f"{use}: " + ("refused by another process" if outcome.passed else outcome.worst))
    return {"served": sorted(served), "refused": sorted(refused)}


def _passed(use: Use) -> bool:
    return use not in _refused_elsewhere and _outcomes[use].passed


def _check(uses: Iterable[Use]) -> None:
    """Find the outcomes of uses that have none yet, in the folder or by checks.

    The checks run in new threads, which have no surrounding trace, mesh or setting: so they compute at once, even while
    a program is being traced.
    """
    new = [use for use in uses if use not in _outcomes]
    if not new:
        return
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(_outcome, new))
    with ThreadPoolExecutor(1) as pool:  # a check that failed beside others may only have lacked memory: again, alone
        failed = [use for use, outcome in zip(new, found, strict=True) if outcome.error]
        again = dict(zip(failed, pool.map(_outcome, failed), strict=True))
    for use, outcome in (dict(zip(new, found, strict=True)) | again).items():
        _outcomes[use] = outcome
        if not outcome.passed:
            warnings.warn(f"kernel refused, XLA serves: {use}: {outcome.worst}", stacklevel=2)


def _outcome(use: Use) -> Outcome:
    """Return the outcome kept in the folder, or check now and keep the outcome.

    An exception refuses the kernel, but it is not kept: the next process tries again.
    """
    path = outcome_file("kernels", [str(use), _sources()])
    if path is not None and path.exists():
        return Outcome({name: float(text) for name, text in read_json(path)["deviations"].items()})
    try:
        outcome = checks.check(use)
    except Exception as error:  # of many kinds: a compiler's, a driver's, Pallas' own
        return Outcome({}, error=f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST_REASON]}")
    # As text, for JSON has neither NaN nor infinity.
    deviations = {name: str(deviation) for name, deviation in outcome.deviations.items()}
    store(path, {"use": str(use), "environment": environment(), "deviations": deviations})
    return outcome


def outcome_file(group: str, depends: list[Any]) -> Path | None:
    """Return the file that keeps an outcome, beside the compiled programs; None where JAX keeps none.

    Its name is a digest of what the outcome depends on, and of the environment.
    """
    folder = getattr(jax.config, "jax_compilation_cache_dir", None)  # `devices.use_compile_cache` sets it
    if not folder:
        return None
    key = hashlib.sha256(json.dumps([*depends, environment()]).encode()).hexdigest()[:24]
    return Path(folder) / group / f"{key}.json"


def store(path: Path | None, outcome: dict[str, Any]) -> None:
    """Write an outcome as JSON. Where there is no folder or it cannot be written, the next process checks again."""
    if path is None:
        return
    with contextlib.suppress(OSError):  # a read-only or full disk: JAX does without its cache there, too
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, outcome)


@functools.cache
def environment() -> list[str]:
    """Return what compiles and runs kernels, with versions; the platform's includes that of CUDA's assembler."""
    import jaxlib

    device = jax.local_devices()[0]
    libraries = sorted(
        f"{one.name} {one.version}"
        for one in (importlib.metadata.distributions() if backend() == "gpu" else ())
        if str(one.name).startswith("nvidia-cudnn")
    )
    return [jax.__version__, jaxlib.__version__, device.device_kind, device.client.platform_version, *libraries]


@functools.cache
def _sources() -> str:
    """A digest of the source of kernels and checks."""
    fast = Path(__file__).parent
    patterns = (f"{architecture()}/*.py", *CHECKED_SOURCES)
    return sha256(file for pattern in patterns for file in sorted(fast.glob(pattern)))
