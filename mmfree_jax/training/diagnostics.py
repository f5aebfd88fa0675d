"""Diagnostics of a run every `diagnose_every` steps: norms, activations and logits, histograms, flips of ternary codes.

A run is the same to the last bit with and without diagnostics, so a loss spike can be diagnosed afterwards: copy the
folder, remove result.json and every checkpoint after the spike, and run the same command on the copy with
`--diagnose-every 1`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.config import RunConfig
from mmfree_jax.ops.ternary import Quantised, quantise_weights
from mmfree_jax.training.metrics import Interval, Log
from mmfree_jax.training.optim import Rates
from mmfree_jax.training.step import Program, TrainState

# Diagnostics go into the row of metrics.jsonl under `diagnostics` (`training.step` describes the entries) and into
# TensorBoard. A diagnosed step costs about one step more: `inspect` recomputes its gradient and a forward pass, and
# there is a pass over the weights and their codes. One more program has to be compiled.

HISTOGRAM_SAMPLES = 20_000  # of a parameter's values: enough for a picture, small enough to fetch


class Diagnostics:
    """Diagnoses a step every `diagnose_every` steps.

    Logs what `step.Program.inspect` returns, weight histograms, and for ternary layers the share of zeros, the mean
    scale and the share of codes that this optimizer step has flipped.
    """

    def __init__(self, config: RunConfig, program: Program, log: Log, interval: Interval):
        self.every, self.log, self.interval, self.inspect = config.diagnose_every, log, interval, program.inspect
        self.read = jax.jit(lambda params: ternary_codes(nnx.merge(program.graphdef, params)))
        some = lambda a: a.reshape(-1)[:: max(1, a.size // HISTOGRAM_SAMPLES)]  # always the same subset of the values
        self.sample = jax.jit(lambda params: jax.tree.map(some, params), out_shardings=NamedSharding(program.mesh, P()))
        self.codes: dict[str, jax.Array] = {}
        self.seen: dict[str, Any] = {}  # of the step under way; empty if it is not diagnosed

    def before(self, step: int, state: TrainState, tokens_BT: jax.Array, rates: Rates) -> None:
        """Inspect the next step, if it is due, before its state is donated. The clocks stand still meanwhile."""
        # The codes of before are kept on the device, int8, to be compared after the step: a byte a ternary weight.
        if self.every and (step + 1) % self.every == 0:
            self.interval.pause()
            self.codes = {name: codes for name, (codes, _) in self.read(state.params).items()}
            self.seen = jax.device_get(self.inspect(state, tokens_BT, rates))
            self.interval.resume()

    def after(self, step: int, state: TrainState) -> bool:
        """Compare the codes with those before the step, and add everything to the row of this step.

        Returns whether the step was due; if it was, the clocks stand still.
        """
        if not self.seen:
            return False
        self.interval.pause()
        scalars: dict[str, float] = {}
        for name, (codes, scale) in self.read(state.params).items():
            scalars[f"zeros/{name}"] = float(jnp.mean(codes == 0))
            scalars[f"flips/{name}"] = float(jnp.mean(codes != self.codes[name]))
            scalars[f"scale/{name}"] = float(jnp.mean(scale))
        self.interval.note(diagnostics=self.seen)
        self.codes, self.seen = {}, {}
        values, _ = jax.tree_util.tree_flatten_with_path(self.sample(state.params))
        name = lambda path: "weights" + jax.tree_util.keystr(path, simple=True, separator="/")
        self.log.diagnostics(step + 1, scalars, {name(path): np.asarray(leaf) for path, leaf in values})
        return True


def ternary_codes(model: nnx.Module) -> dict[str, Quantised]:
    """Return codes (int8, in the kernel's shape) and scales of every ternary layer, by the layer's path."""
    found = {}
    for path, module in nnx.iter_modules(model):
        recipe, kernel = getattr(module, "recipe", None), getattr(module, "kernel", None)
        if recipe is not None and recipe.ternary and kernel is not None:
            found["/".join(map(str, path))] = quantise_weights(kernel[...], recipe.scale_axes, recipe.best_scale)
    return found
