"""What a run shows of its weights now and then: histograms, and how its ternary codes behave."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.config import RunConfig
from mmfree_jax.ops.ternary import Quantised, quantise_weights
from mmfree_jax.training.metrics import Log
from mmfree_jax.training.step import Program, TrainState

HISTOGRAM_SAMPLES = 20_000  # of a parameter's values: enough for a picture, small enough to fetch


class Diagnostics:
    """Every `diagnose_every` steps: weight histograms, and for ternary layers the share of zeros, the mean scale and
    the share of codes that this one optimizer step flipped."""

    def __init__(self, config: RunConfig, program: Program, log: Log):
        self.every, self.log = config.diagnose_every, log
        self.read = jax.jit(lambda params: ternary_codes(nnx.merge(program.graphdef, params)))
        self.sample = jax.jit(samples, out_shardings=NamedSharding(program.mesh, P()))
        self.codes: dict[str, jax.Array] = {}

    def before(self, step: int, state: TrainState) -> None:
        """Remember the codes that the step about to run starts from (its state will be donated)."""
        if self._due(step):
            self.codes = {name: codes for name, (codes, _) in self.read(state.params).items()}

    def after(self, step: int, state: TrainState) -> None:
        """Compare with the codes before, and log."""
        if not self._due(step):
            return
        scalars: dict[str, float] = {}
        for name, (codes, scale) in self.read(state.params).items():
            scalars[f"zeros/{name}"] = float(jnp.mean(codes == 0))
            scalars[f"flips/{name}"] = float(jnp.mean(codes != self.codes[name]))
            scalars[f"scale/{name}"] = float(jnp.mean(scale))
        self.codes = {}
        self.log.diagnostics(step + 1, scalars, histograms(self.sample(state.params)))

    def _due(self, step: int) -> bool:
        return self.every > 0 and (step + 1) % self.every == 0


def ternary_codes(model: nnx.Module) -> dict[str, Quantised]:
    """Codes (int8, in the kernel's shape) and scales of every ternary layer, by the layer's path."""
    found = {}
    for path, module in nnx.iter_modules(model):
        recipe, kernel = getattr(module, "recipe", None), getattr(module, "kernel", None)
        if recipe is not None and kernel is not None:
            found["/".join(map(str, path))] = quantise_weights(kernel[...], recipe.scale_axes)
    return found


def samples(params: Any) -> Any:
    """A fixed subset of each parameter's values."""
    return jax.tree.map(lambda a: a.reshape(-1)[:: max(1, a.size // HISTOGRAM_SAMPLES)], params)


def histograms(values: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree by their path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(values)
    return {"weights" + jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(a) for path, a in leaves}
