"""Profiler traces of some steps of a run: `train --profile FROM:TO`."""

import contextlib
import re
from pathlib import Path
from typing import Any

import jax

from mmfree_jax.config import require


def step_range(text: str) -> range:
    """Parse `FROM:TO`, the steps FROM to TO - 1, or an empty text: no steps. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    require(not text or found is not None, f"profile={text!r}: must be FROM:TO, two step numbers")
    steps = range(int(found[1]), int(found[2])) if found else range(0)
    require(not text or len(steps) > 0, f"profile={text!r}: TO must be larger than FROM")
    return steps


class Profile(contextlib.AbstractContextManager):
    """Writes a trace of `steps` to `folder`, for TensorBoard's profiler or Perfetto, also if the run ends before."""

    def __init__(self, folder: Path, steps: range, end: int):
        """Raises ConfigError for steps that all come after the `end` of the run."""
        require(not steps or steps.start < end, f"profile={steps.start}:{steps.stop}: the run has {end} steps")
        self.folder, self.steps, self._running = folder, steps, False

    def before(self, step: int) -> None:
        """Start at the first of the steps, or at the first one that a resumed run takes."""
        if step in self.steps and not self._running:
            jax.profiler.start_trace(str(self.folder))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Stop once the last of the steps has been computed."""
        # Steps are only queued by the host: without waiting, the trace would end before the device has computed them.
        if self._running and step + 1 >= self.steps.stop:
            jax.block_until_ready(results)
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
