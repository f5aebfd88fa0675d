"""The model as a first version would be written: what the optimised step is compared with.

Fake quantisation with gradients by autodiff, all scores and logits at once, no recomputation. It is the model itself
with its ops by their definitions; only the recurrence is a parallel prefix, as no first version on a GPU would go step
by step.
"""

import jax

from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.ops.fast.choice import definitions, kernels_allowed


def loss(model: LanguageModel, tokens_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Compute the mean cross-entropy in nats."""
    with definitions(but=("recurrence",)), kernels_allowed(False):
        found = model.loss(tokens_BT, targets_BT)
        return found.total / found.targets
