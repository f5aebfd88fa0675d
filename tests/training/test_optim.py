"""Schedules by their definition, and which parameters decay."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mmfree_jax.config import FAMILIES, ModelConfig, OptimConfig
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.training.optim import decay_mask, learning_rate, make_optimizer


def rates(steps=100, **changes):
    config = OptimConfig(**{"lr": 1.0, "warmup_steps": 10, **changes})
    return np.array([learning_rate(config, steps, t) for t in range(steps)])


def test_wsd_warms_up_stays_and_falls_linearly_to_its_floor():
    r = rates(decay_steps=20, final_lr=0.1)
    np.testing.assert_allclose(r[:10], np.arange(1, 11) / 10)
    assert (r[10:81] == 1).all()
    np.testing.assert_allclose(np.diff(r[80:]), -0.9 / 20)
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=10, decay_steps=20, final_lr=0.1), 100, 100) == 0.1


def test_a_decay_branch_and_its_trunk_agree_before_the_decay():
    """A trunk may be longer or shorter than the branch: before the decay the rate depends on the step alone."""
    trunk, branch = rates(steps=160), rates(steps=100, decay_steps=30)
    assert (trunk[:70] == branch[:70]).all()


def test_cosine_halving_is_the_cosine_until_mid_run_and_half_of_it_after():
    cosine, halved = rates(schedule="cosine", final_lr=0.1), rates(schedule="cosine-halving", final_lr=0.1)
    assert (cosine[:50] == halved[:50]).all()
    assert (cosine[50:] == 2 * halved[50:]).all()
    assert cosine[10] == 1
    assert cosine[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))


@pytest.mark.parametrize("family", ["transformer++", "matmul-free", "bitnet", "hgrn"])
def test_matrices_decay_and_gains_and_bounds_do_not(family):
    mixer, linear = FAMILIES[family]
    config = ModelConfig(mixer=mixer, linear=linear, vocab=32, width=16, depth=2, glu_width=32)
    params = nnx.state(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))), nnx.Param)
    mask = {jax.tree_util.keystr(path): on for path, on in jax.tree_util.tree_leaves_with_path(decay_mask(params))}
    assert any(mask.values())
    for path, on in mask.items():
        assert on == ("kernel" in path or "embedding" in path), path


def test_update_matches_adamw_written_out_in_float64():
    config = OptimConfig(clip=0.5, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer = make_optimizer(config)
    rng = np.random.default_rng(0)
    p = {"kernel": rng.normal(size=(3, 4)), "gain": rng.normal(size=4)}
    params = jax.tree.map(jnp.float32, p)
    state = optimizer.init(params)
    m = v = {k: np.zeros_like(a) for k, a in p.items()}
    for t in range(1, 6):
        g = {k: rng.normal(size=a.shape) for k, a in p.items()}
        norm = math.sqrt(sum((a**2).sum() for a in g.values()))
        updates, state = optimizer.update(jax.tree.map(jnp.float32, g), state, params)
        g = {k: a * min(1, 0.5 / norm) for k, a in g.items()}
        m = {k: 0.8 * m[k] + 0.2 * g[k] for k in p}
        v = {k: 0.9 * v[k] + 0.1 * g[k] ** 2 for k in p}
        for k in p:
            step = m[k] / (1 - 0.8**t) / (np.sqrt(v[k] / (1 - 0.9**t)) + 1e-6) + (0.1 * p[k] if k == "kernel" else 0)
            np.testing.assert_allclose(updates[k], step, rtol=2e-5, atol=1e-6)
            p[k] = p[k] - 0.01 * step
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.01 * u, updates))
