"""The language model against a second implementation, and what every family must have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import reference
from models.families import (
    ABLATIONS,
    CONFIGS,
    family,
    in_float64,
    logits,
    model,
    plain_model,
    replace,
    tokens,
)

from mmfree_jax.config import FAMILIES, ModelConfig
from mmfree_jax.models.mlgru import floors

SOME = pytest.mark.parametrize("name", [*FAMILIES, "single-norm", "scale-per-channel", "tied"])
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)


def expected(built, ids):
    config, weights = built.config, reference.state_dict(built)
    if config.mixer == "mlgru":
        return reference.matmul_free(weights, np.asarray(ids), config.depth)
    return reference.transformer(weights, np.asarray(ids), config.depth, config.heads)


@pytest.mark.parametrize("name", ["matmul-free", "transformer++"])
def test_float32_logits_of_a_shallow_model_are_the_references(name):
    built = model(family(name, width=64, glu_width=192))
    ids = tokens(built.config)
    np.testing.assert_allclose(logits(built, ids), expected(built, ids), atol=1e-5)


@pytest.mark.parametrize("name", ["matmul-free", "transformer++"])
def test_float64_logits_of_a_deep_model_are_the_references(name):
    with jax.enable_x64(True):
        built = in_float64(family(name, width=64, glu_width=192, depth=8))
        ids = tokens(built.config, time=48)
        np.testing.assert_allclose(logits(built, ids), expected(built, ids), atol=1e-9)


@SOME
def test_a_logit_depends_on_no_later_token(name):
    built = model(CONFIGS[name])
    x_BTD = jax.random.normal(jax.random.key(0), (1, 12, built.config.width))
    outputs = lambda x_BTD: _hidden_of(built, x_BTD)[0].sum(-1)
    rate = jax.jit(jax.jacrev(outputs))(x_BTD)[:, 0]  # [T out, T in, D]
    influence = np.abs(rate).max(-1)
    assert (np.triu(influence, 1) == 0).all()
    assert (np.diag(influence) > 0).all()
    assert (influence[-1] > 0).all(), "the last token should see every earlier one"


def _hidden_of(built, x_BTD):
    """The blocks applied to embeddings given directly."""
    ids = jnp.arange(x_BTD.shape[1])[None]
    graph, params = nnx.split(built)
    table = jnp.zeros(params["embedding"].shape).at[ids[0]].set(x_BTD[0])
    params["embedding"] = params["embedding"].replace(table)
    return nnx.merge(graph, params).hidden(ids)


@SOME
def test_loss_and_its_gradients_are_those_of_the_plain_cross_entropy(name):
    built = model(CONFIGS[name])
    graph, params = nnx.split(built)
    ids = tokens(built.config, time=18)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    mask = jnp.arange(17)[None] < jnp.array([[17], [9]])

    def plain(params):
        logits = nnx.merge(graph, params)(inputs)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], 2)[..., 0]
        return (nats * mask).sum(), nats

    @jax.jit
    def fused(params):
        def loss(params):
            total, count, _ = nnx.merge(graph, params).loss(inputs, targets, mask)
            return total, count

        return jax.value_and_grad(loss, has_aux=True)(params), nnx.merge(graph, params).nats(inputs, targets)

    ((total, count), gradient), own_nats = fused(params)
    (expected, nats), right = jax.jit(jax.value_and_grad(plain, has_aux=True))(params)
    np.testing.assert_allclose(total, expected, rtol=2e-5)
    assert count == 17 + 9
    assert (total.dtype, count.dtype, total.shape) == (jnp.float32, jnp.float32, ())
    np.testing.assert_allclose(own_nats, nats, atol=2e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(right), strict=True):
        scale = float(jnp.abs(b).max())
        assert scale > 0, f"{jax.tree_util.keystr(path)} gets no gradient"
        np.testing.assert_allclose(a, b, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("name", ["transformer++", "matmul-free"])
def test_remat_and_unroll_change_no_gradient(name):
    config = CONFIGS[name]
    ids = tokens(config, time=18)

    def gradient(**kwargs):
        graph, params = nnx.split(plain_model(config, **kwargs))
        loss = lambda params: nnx.merge(graph, params).loss(ids[:, :-1], ids[:, 1:])[0]
        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    plain = gradient()
    for kwargs in ({"remat": "products"}, {"remat": "mixer"}, {"remat": "codes"}, {"remat": "full", "unroll": 2}):
        for a, b in zip(gradient(**kwargs), plain, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", ["transformer++", "matmul-free"])
def test_remat_mixer_keeps_nothing_as_wide_as_the_glu(name):
    config = CONFIGS[name]
    ids = tokens(config, time=18)

    def wide_values(remat):
        graph, params = nnx.split(plain_model(config, remat=remat))
        loss = lambda params: nnx.merge(graph, params).loss(ids[:, :-1], ids[:, 1:])[0]
        kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params))
        return [a.shape for a in kept if a.shape[-2:] == (17, config.glu_width) and a.dtype == jnp.float32]

    assert wide_values("products")
    assert not wide_values("mixer")


@EVERY_FAMILY
def test_bfloat16_activations_keep_float32_logits_and_weights(name):
    config = CONFIGS[name]
    low, full = (plain_model(config, dtype=t) for t in (jnp.bfloat16, jnp.float32))
    ids = tokens(config)
    assert jax.eval_shape(low.hidden, ids).dtype == jnp.bfloat16
    low_BTV, full_BTV = logits(low, ids), logits(full, ids)
    assert low_BTV.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(low))} == {jnp.dtype(jnp.float32)}
    assert 0 < float(jnp.abs(low_BTV - full_BTV).mean()) < 0.2 * float(full_BTV.std())


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_switch_changes_the_logits(name):
    """Every ablation computes something that its family's plain form does not."""
    base = replace(CONFIGS[CONFIGS[name].family], heads=CONFIGS[name].heads)
    other, plain = (logits(model(config), tokens(base)) for config in (CONFIGS[name], base))
    assert float(jnp.abs(other - plain).max()) > 1e-3


def test_initial_values_are_those_of_the_papers_code():
    config = ModelConfig(vocab=512, width=256, depth=4, glu_width=512)
    built = plain_model(config)
    std = lambda param: float(jnp.std(param[...]))
    bound = 2**-2.5 * (6 / 512) ** 0.5
    for kernel in (built.blocks.mixer.gates.kernel, built.blocks.mixer.out.kernel):
        np.testing.assert_allclose(std(kernel), bound / 3**0.5, rtol=0.02)
        assert float(jnp.abs(kernel[...]).max()) <= bound
    for kernel in (built.embedding, built.head.kernel, built.blocks.glu.gate_up.kernel):
        np.testing.assert_allclose(std(kernel), 0.02, rtol=0.02)
    np.testing.assert_allclose(std(built.blocks.glu.down.kernel), 0.02 / 8**0.5, rtol=0.02)
    layers = jnp.arange(4)[:, None] / 4
    np.testing.assert_allclose(floors(built.lower_bounds[...]), jnp.broadcast_to(layers, (4, 256)), atol=1e-6)


def test_transformer_initial_values_are_gpt2s():
    built = plain_model(family("transformer++", vocab=512, width=128, depth=8))
    for kernel in (built.blocks.mixer.query.kernel, built.blocks.mixer.key_value.kernel, built.head.kernel):
        np.testing.assert_allclose(float(jnp.std(kernel[...])), 0.02, rtol=0.02)
    for kernel in (built.blocks.mixer.out.kernel, built.blocks.glu.down.kernel):
        np.testing.assert_allclose(float(jnp.std(kernel[...])), 0.02 / 4, rtol=0.03)


@EVERY_FAMILY
def test_layers_start_different_and_every_parameter_has_axis_names(name):
    built = plain_model(CONFIGS[name])
    kernel = built.blocks.mixer.out.kernel[...]
    assert float(jnp.abs(kernel[0] - kernel[1]).max()) > 0
    for path, param in jax.tree.leaves_with_path(nnx.state(built), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        names = nnx.get_partition_spec(nnx.State({"p": param}))["p"]
        assert len(names.get_value()) == param[...].ndim, jax.tree_util.keystr(path)
