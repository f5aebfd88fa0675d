"""Schedules by their definition, and which parameters decay."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmfree_jax.config import FAMILIES, ModelConfig, OptimConfig
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.presets import run_preset
from mmfree_jax.training.optim import DECAYED, learning_rate, make_optimizer, rates, role_of
from mmfree_jax.training.step import make_program, program_key


def curve(steps=100, **changes):
    config = OptimConfig(**{"lr": 1.0, "warmup_steps": 10, **changes})
    return np.array([learning_rate(config, steps, t) for t in range(steps)])


def test_wsd_warms_up_stays_and_falls_linearly_to_its_floor():
    r = curve(decay_steps=20, final_lr=0.1)
    np.testing.assert_allclose(r[:10], np.arange(1, 11) / 10)
    assert (r[10:81] == 1).all()
    np.testing.assert_allclose(np.diff(r[80:]), -0.9 / 20)
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=10, decay_steps=20, final_lr=0.1), 100, 100) == 0.1


def test_a_decay_branch_and_its_trunk_agree_before_the_decay():
    """A trunk may be longer or shorter than the branch: before the decay the rate depends on the step alone."""
    trunk, branch = curve(steps=160), curve(steps=100, decay_steps=30)
    assert (trunk[:70] == branch[:70]).all()


def test_cosine_halving_is_the_cosine_until_mid_run_and_half_of_it_after():
    cosine, halved = curve(schedule="cosine", final_lr=0.1), curve(schedule="cosine-halving", final_lr=0.1)
    assert (cosine[:50] == halved[:50]).all()
    assert (cosine[50:] == 2 * halved[50:]).all()
    assert cosine[10] == 1
    assert cosine[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))


def test_two_stage_falls_linearly_and_from_mid_run_on_has_two_thirds_and_no_weight_decay():
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule="two-stage")
    r = curve(schedule="two-stage")
    np.testing.assert_allclose(np.diff(r[10:50]), -1 / 90)
    np.testing.assert_allclose(r[50:], 2 / 3 * (100 - np.arange(50, 100)) / 90)
    assert [rates(config, 100, t).decay for t in (0, 49, 50, 99)] == [1, 1, 0, 0]
    assert rates(OptimConfig(), 100, 99).decay == 1


EXPECTED_ROLES = {
    "embedding": "embedding", "head": "head", "gates": "matrix", "out": "matrix", "gate_up": "matrix", "down": "matrix",
    "query": "matrix", "key_value": "matrix", "receptance": "matrix", "key": "matrix", "value": "matrix",
    "lower_bounds": "lower_bounds", "decay": "gain", "bonus": "gain", "mix": "gain",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_its_role_and_only_matrices_embedding_and_head_decay(family):
    mixer, linear = FAMILIES[family]
    config = ModelConfig(mixer=mixer, linear=linear, vocab=32, width=16, depth=2, glu_width=32)
    params = nnx.state(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))), nnx.Param)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = {tuple(str(k.key) for k in path if hasattr(k, "key")): role_of(path) for path in paths}
    assert {"matrix", "embedding", "head", "gain"} <= set(found.values())
    for names, role in found.items():
        module = names[-1] if names[-1] in EXPECTED_ROLES else names[-2]
        assert role == ("gain" if names[-1] == "gain" else EXPECTED_ROLES[module]), names
        assert (role in DECAYED) == (names[-1] in ("kernel", "embedding")), names


def written_out_adamw(p, gradients, config, *, clip, factor, scale, decays, rate):
    """Parameters after AdamW on `gradients`, in float64: dictionaries of arrays by name."""
    m, v = ({k: np.zeros_like(a) for k, a in p.items()} for _ in range(2))
    for t, g in enumerate(gradients, start=1):
        norm = math.sqrt(sum((a**2).sum() for a in g.values()))
        g = {k: a * min(1, clip / norm) * scale[k] for k, a in g.items()}
        m = {k: config.beta1 * m[k] + (1 - config.beta1) * g[k] for k in p}
        v = {k: config.beta2 * v[k] + (1 - config.beta2) * g[k] ** 2 for k in p}
        corrected = {k: (m[k] / (1 - config.beta1**t), np.sqrt(v[k] / (1 - config.beta2**t))) for k in p}
        step = {k: factor[k] * mean / (root + config.eps) for k, (mean, root) in corrected.items()}
        p = {k: p[k] - rate * (step[k] + config.weight_decay * decays[k] * p[k]) for k in p}
    return p


NAMES = ("embedding", "head/kernel", "blocks/kernel", "blocks/gain", "lower_bounds", "norm/gain")


def tree_of(arrays):
    """{"a/b": array} -> an nnx.State of float32 arrays."""
    tree: dict = {}
    for name, array in arrays.items():
        *folders, last = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[last] = jnp.float32(array)
    return nnx.State(tree)


def flat(tree):
    return {"/".join(k.key for k in path): np.asarray(a) for path, a in jax.tree_util.tree_leaves_with_path(tree)}


def trained(config, model, p, gradients, rate, decay=1.0):
    """The same by `make_optimizer`."""
    optimizer, params = make_optimizer(config, model), tree_of(p)
    state = optimizer.init(params)
    for g in gradients:
        updates, state = optimizer.update(tree_of(g), state, params, decay=decay)
        params = jax.tree.map(lambda a, u: a - rate * u, params, updates)
    return flat(params)


def parameters_and_gradients(steps=5, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: {name: rng.normal(size=(3, 4)) for name in NAMES}
    return draw(), [draw() for _ in range(steps)]


@pytest.mark.parametrize("decay", [1.0, 0.0])
@pytest.mark.parametrize("mup", [False, True])
def test_updates_match_adamw_with_factors_written_out_in_float64(mup, decay):
    """Under mup at 4 x the width and 3 x the depth: CompleteP's table 1, epsilon and weight decay too."""
    config = OptimConfig(
        clip=0.5, beta1=0.8, beta2=0.9, eps=1e-2, embedding_lr=2.0, head_lr=3.0, gain_lr=0.5, bounds_lr=0.25
    )
    base = {"parametrisation": "mup", "base_width": 4, "base_depth": 2} if mup else {}
    model = ModelConfig(width=16, depth=6, glu_width=32, **base)
    p, gradients = parameters_and_gradients()
    wider, deeper = (4, 3) if mup else (1, 1)
    chosen = dict(zip(NAMES, (2.0, 3.0, 1 / wider, 0.5, 0.25, 0.5), strict=True))
    epsilon = dict(zip(NAMES, (wider, wider, wider * deeper, wider * deeper, wider * deeper, wider), strict=True))
    decays = dict(zip(NAMES, (decay, decay, decay, 0, 0, 0), strict=True))
    expected = written_out_adamw(p, gradients, config, clip=0.5, factor=chosen, scale=epsilon, decays=decays, rate=0.01)
    for name, array in trained(config, model, p, gradients, 0.01, decay).items():
        np.testing.assert_allclose(array, expected[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_muon_steps_along_the_orthogonal_factor_with_the_size_of_adamws():
    """Singular vectors from NumPy's SVD in float64; the iteration leaves singular values between 0.6 and 1.3."""
    config = OptimConfig(optimizer="muon", clip=0, weight_decay=0.1, momentum=0.9)
    rng = np.random.default_rng(1)
    shape = (2, 3, 12, 20)
    p = {"blocks/kernel": rng.normal(size=shape), "head/kernel": rng.normal(size=(12, 20))}
    g = [{k: rng.normal(size=a.shape) for k, a in p.items()} for _ in range(2)]
    moved = trained(config, ModelConfig(width=12, glu_width=20), p, g[:1], 1.0)
    update = (p["blocks/kernel"] * (1 - 0.1) - moved["blocks/kernel"]) / (0.2 * math.sqrt(20))
    U, _, Vt = np.linalg.svd(g[0]["blocks/kernel"], full_matrices=False)  # Nesterov's first step is along the gradient
    inner = U.swapaxes(-1, -2) @ update @ Vt.swapaxes(-1, -2)
    values = np.diagonal(inner, axis1=-2, axis2=-1)
    assert 0.6 < values.min() <= values.max() < 1.3
    np.testing.assert_allclose(inner - values[..., None] * np.eye(12), 0, atol=2e-3)
    assert 0.15 < np.sqrt(np.mean((update * 0.2 * math.sqrt(20)) ** 2)) < 0.25
    adam = trained(OptimConfig(clip=0, weight_decay=0.1), ModelConfig(width=12, glu_width=20), p, g, 0.01)
    both = trained(config, ModelConfig(width=12, glu_width=20), p, g, 0.01)
    np.testing.assert_allclose(both["head/kernel"], adam["head/kernel"], rtol=1e-6)


def test_muon_remembers_by_nesterovs_rule():
    """After gradients g1, g2 the direction is that of momentum (momentum g1 + g2) + g2."""
    config = OptimConfig(optimizer="muon", clip=0, weight_decay=0.0, momentum=0.9)
    model = ModelConfig(width=8, glu_width=8)
    rng = np.random.default_rng(2)
    p, first, second = ({"blocks/kernel": rng.normal(size=(1, 8, 8))} for _ in range(3))
    after = [trained(config, model, p, gradients, 1.0)["blocks/kernel"] for gradients in ([first], [first, second])]
    ahead = 0.9 * (0.9 * first["blocks/kernel"] + second["blocks/kernel"]) + second["blocks/kernel"]
    alone = trained(config, model, p, [{"blocks/kernel": ahead}], 1.0)["blocks/kernel"]
    np.testing.assert_allclose(after[1] - after[0], alone - p["blocks/kernel"], atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_under_mup_wider_matrices_take_smaller_steps(optimizer):
    config = OptimConfig(optimizer=optimizer, clip=0, weight_decay=0.0)
    p, gradients = parameters_and_gradients(1)
    wide, base = (
        trained(config, ModelConfig(parametrisation="mup", base_width=16, base_depth=24, width=w), p, gradients, 1.0)
        for w in (64, 16)
    )
    for name in NAMES:
        ratio = np.linalg.norm(wide[name] - p[name]) / np.linalg.norm(base[name] - p[name])
        expected = {"adamw": 1 / 4, "muon": 1 / 2}[optimizer] if name == "blocks/kernel" else 1
        assert ratio == pytest.approx(expected, rel=1e-4), name


def test_schedules_share_one_program_and_optimizers_and_parametrisations_do_not():
    run = run_preset("matmul-free-tiny")
    key = lambda **changes: program_key(dataclasses.replace(run, optim=OptimConfig(**changes)), None)
    assert key() == key(schedule="two-stage", lr=1.0) == key(schedule="cosine", warmup_steps=3, final_lr=0.1)
    assert len({key(), key(optimizer="muon"), key(gain_lr=2.0), key(weight_decay=0.0)}) == 4
    wider = dataclasses.replace(run.model, parametrisation="mup", base_width=64, base_depth=4)
    assert program_key(dataclasses.replace(run, model=wider), None) != program_key(run, None)


def test_the_second_stage_stops_weight_decay_in_the_compiled_step():
    """With a rate so small that Adam's steps vanish beside the decay, weights shrink in the first stage only."""
    run = run_preset("transformer++-tiny")
    optim = OptimConfig(lr=1e-2, schedule="two-stage", warmup_steps=0, weight_decay=1e4, beta1=0.0, eps=1e4)
    program = make_program(program_key(dataclasses.replace(run, optim=optim), None))
    tokens = program.place(np.zeros((16, 129), np.int32))
    with jax.set_mesh(program.mesh):
        sizes = []
        state = program.init(jax.random.key(0))
        for step in (0, 1, 2, 3):
            sizes.append(float(jnp.abs(state.params["embedding"][...]).mean()))
            now = jax.tree.map(np.float32, rates(dataclasses.replace(optim, lr=1e-5), 4, step))
            state, _ = program.train_step(state, tokens, jax.device_put(now))
        sizes.append(float(jnp.abs(state.params["embedding"][...]).mean()))
    np.testing.assert_allclose(np.divide(sizes[1:], sizes[:-1]), [0.9, 0.925, 1, 1], rtol=1e-4)
