"""muP: at the base nothing changes, and what its factors do to outputs, codes and the movement of activations."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmfree_jax.architecture import Scales, scales
from mmfree_jax.config import FAMILIES, ConfigError, ModelConfig, OptimConfig
from mmfree_jax.coordinates import exponents, model_at, movement
from mmfree_jax.ops.bit_linear import Recipe, Weights, bit_linear
from mmfree_jax.ops.ternary import quantise_weights
from mmfree_jax.training.optim import gradient_factor, rate_factor
from tests.models.families import CONFIGS, family, logits, plain_model, tokens


def at(config: ModelConfig, width: int, depth: int, **changes) -> ModelConfig:
    """The same model as muP with another base."""
    return dataclasses.replace(config, parametrisation="mup", base_width=width, base_depth=depth, **changes)


def test_the_factors_are_those_of_the_table():
    """CompleteP's table 1 (alpha = 1) at 8 x the width and 3 x the depth; attention as in muP's table 8."""
    config = at(family("transformer++", width=64, depth=6, heads=4), 8, 2, base_head=4)
    assert scales(config) == Scales(2, std=1 / math.sqrt(8), residual=1 / 3, logits=1 / 8, scores=0.5)
    assert rate_factor(config, "matrix") == 1 / 8
    assert rate_factor(config, "matrix", "muon") == 1 / math.sqrt(8)
    assert {rate_factor(config, role) for role in ("embedding", "head", "gain", "lower_bounds")} == {1.0}
    assert (gradient_factor(config, True), gradient_factor(config, False)) == (24, 8)


def test_at_the_base_it_is_the_standard_parametrisation():
    config = CONFIGS["transformer++"]
    based = at(config, config.width, config.depth)
    ids = tokens(config)
    np.testing.assert_array_equal(logits(plain_model(config), ids), logits(plain_model(based), ids))
    assert {rate_factor(based, role) for role in ("matrix", "embedding", "head", "gain", "lower_bounds")} == {1.0}


@pytest.mark.parametrize("name", ["transformer++", "bitnet", "matmul-free", "single-norm", "tied"])
def test_factors_of_the_forward_pass_can_be_folded_into_the_weights(name):
    """Residual, logit and score factors move into W_o, W_down, the head and W_q: ternary layers are linear in scale."""
    config = at(CONFIGS[name], 4, 1, **({"base_head": 2} if CONFIGS[name].mixer == "attention" else {}))
    ids, built = tokens(config), plain_model(config)
    factors = scales(config)
    assert factors.logits == 1 / 4
    assert factors.residual == 1 / 2
    expected = logits(built, ids)

    def folded(path, leaf):
        names = {getattr(key, "key", None) for key in path}
        if "kernel" not in names:
            return leaf
        if "head" in names:
            return leaf * factors.logits
        if names & {"out", "down"}:
            return leaf * factors.residual
        return leaf * factors.scores if "query" in names else leaf

    plain = dataclasses.replace(config, parametrisation="standard", base_width=0, base_depth=0, base_head=0)
    graph = nnx.graphdef(nnx.eval_shape(lambda: plain_model_of(plain)))
    params = jax.tree_util.tree_map_with_path(folded, nnx.state(built, nnx.Param))
    found = logits(nnx.merge(graph, params), ids)
    if config.tie_embeddings:
        found = found * factors.logits  # the table is the embedding too, and cannot be scaled
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def plain_model_of(config):
    from mmfree_jax.models.language_model import LanguageModel

    return LanguageModel(config, rngs=nnx.Rngs(0))


def test_a_ternary_layers_codes_do_not_depend_on_the_scale_of_its_weights_and_its_output_is_linear_in_it():
    rng = np.random.default_rng(0)
    w = jnp.float32(rng.normal(size=(1, 64, 32)))
    x = jnp.float32(rng.normal(size=(5, 64)))
    codes = quantise_weights(w, (-2, -1)).codes
    apply = lambda w: bit_linear(Recipe(bits=8), x, Weights(w, jnp.ones(64)))
    for scale in (0.125, 0.5, 8.0):  # powers of two: exact
        np.testing.assert_array_equal(quantise_weights(scale * w, (-2, -1)).codes, codes)
        np.testing.assert_array_equal(apply(scale * w)[0], scale * apply(w)[0])


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_a_small_update_moves_ternary_weights_on_average_like_dense_ones(width):
    """E[change of m T(w / m)] = 2 m f(m / 2) = 0.59 of the update for Gaussian weights, at any width or scale."""
    rng = np.random.default_rng(1)
    std = width**-0.5
    w = rng.normal(0, std, (width, 4096))
    step = 0.02 * std
    value = lambda a: (q := quantise_weights(jnp.float32(a), (-2, -1))).codes * np.asarray(q.scale)
    change = np.mean(np.asarray(value(w + step)) - np.asarray(value(w)))
    scale = np.sqrt(2 / np.pi)  # m / std
    expected = 2 * scale * np.exp(-(scale**2) / 8) / np.sqrt(2 * np.pi)
    assert expected == pytest.approx(0.588, abs=1e-3)
    noise = np.sqrt(step * scale * std / w.size) / step
    assert change / step == pytest.approx(expected, abs=max(0.01, 4 * noise))


RATE = {"dense": 4e-3, "ternary": 4e-3}


@functools.cache
def moved(name: str, parametrisation: str, width: int, optimizer: str = "adamw") -> np.ndarray:
    optim = OptimConfig(optimizer=optimizer, lr=RATE[FAMILIES[name][1]])
    return movement(model_at(name, parametrisation, width, base=32, depth=2), optim, steps=4)


def growth(name: str, parametrisation: str, optimizer: str = "adamw") -> np.ndarray:
    """Exponent of the change of each layer in the width, from 32 to 128."""
    rows = [moved(name, "standard", 32, optimizer), moved(name, parametrisation, 128, optimizer)]
    return exponents((32, 128), np.stack(rows))


@pytest.mark.parametrize("name", FAMILIES)
def test_coordinate_check_under_mup_no_activation_grows_with_the_width(name):
    """Dense layers keep their size. In ternary ones the noise of the codes that flip, n^(-1/4), dies out."""
    slopes = growth(name, "mup")
    assert slopes.max() < 0.1
    assert slopes.min() > (-0.15 if FAMILIES[name][1] == "dense" else -0.5)


@pytest.mark.parametrize("name", ["transformer++", "matmul-free"])
def test_coordinate_check_under_the_standard_parametrisation_activations_grow(name):
    assert growth(name, "standard")[1:].min() > 0.3


@pytest.mark.slow
def test_coordinate_check_of_muon():
    assert np.abs(growth("transformer++", "mup", "muon")).max() < 0.2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"parametrisation": "mup"}, "base_width=0: parametrisation=mup needs it"),
        ({"base_width": 64}, "parametrisation=standard has no base"),
        ({"parametrisation": "mup", "base_width": 8, "base_depth": 1, "base_head": 8}, "has no heads"),
        ({"parametrisation": "mu"}, "choose one of standard, mup"),
    ],
)
def test_impossible_parametrisations_are_named(changes, says):
    with pytest.raises(ConfigError, match=says):
        ModelConfig(**changes)
