"""Small models to serve, which tests of inference share."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmfree_jax.config import FAMILIES
from mmfree_jax.inference.model import ServedModel, serve_model
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.presets import model_preset

TOKENS = np.random.default_rng(0).integers(0, 300, (2, 12)).astype(np.int32)


def made(family: str, **changes) -> LanguageModel:
    """A small model with padding of its vocabulary, gains that differ from one and floors that are not zero."""
    sizes = {"vocab": 320, "tokenizer_vocab": 300, "width": 96, "glu_width": 200, "depth": 2}
    if FAMILIES[family][0] == "attention":
        sizes |= {"heads": 4, "kv_heads": 2}
    model = LanguageModel(dataclasses.replace(model_preset(family, "tiny"), **(sizes | changes)), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if "gain" in path or "lower_bounds" in path:
            leaf[...] = jnp.asarray(1 + rng.standard_normal(leaf.shape) / 8, jnp.float32)
    return model


def logits(model) -> np.ndarray:
    """Of all positions, read in two pieces."""
    state = model.start(2, 12)
    first, state = model.extend(TOKENS[:, :7], state)
    second, _ = model.extend(TOKENS[:, 7:], state)
    return np.concatenate([first, second], axis=1)[..., :300]


@functools.cache
def served(family: str) -> ServedModel:
    """`made`, packed in memory."""
    return serve_model(made(family))
