"""The counts are those of the real models: their leaves, and the products in their traced programs."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from models.families import CONFIGS

from mmfree_jax.config import FAMILIES
from mmfree_jax.flops import decode_state_bytes, forward_flops, parameters, train_flops, train_flops_per_token
from mmfree_jax.models.language_model import LanguageModel
from mmfree_jax.ops.fast import choice
from mmfree_jax.presets import SIZES, model_preset

SEQUENCE = 32


def dots(jaxpr, times=1):
    """Multiplications and additions of every dot_general in a program, loops unrolled."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = 1
            for axis in contracted:
                depth *= eqn.invars[0].aval.shape[axis]
            total += times * 2 * depth * eqn.outvars[0].aval.size
        inside = times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times
        total += sum(dots(sub, inside) for sub in jaxprs_in_params(eqn.params))
    return total


def abstract(config, **kwargs):
    graph, params = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0), **kwargs)))
    loss = lambda params, ids: nnx.merge(graph, params).loss(ids, ids)[0]
    return loss, params, jax.ShapeDtypeStruct((2, SEQUENCE), jnp.int32)


@pytest.mark.parametrize(("size", "total"), [("370m", 374_108_160), ("1.3b", 1_364_779_008), ("2.7b", 2_702_357_504)])
def test_matmul_free_totals_are_the_released_checkpoints(size, total):
    assert parameters(model_preset("matmul-free", size)).total == total


@pytest.mark.parametrize("name", CONFIGS)
def test_totals_are_the_models_leaves(name):
    state = nnx.state(nnx.eval_shape(lambda: LanguageModel(CONFIGS[name], rngs=nnx.Rngs(0))))
    assert parameters(CONFIGS[name]).total == sum(leaf.size for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_presets_of_one_size_have_the_same_matrices_and_build(family, size):
    config = model_preset(family, size)
    state = nnx.state(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    assert config.family == family
    assert parameters(config).N == parameters(model_preset("matmul-free", size)).N
    assert parameters(config).total == sum(leaf.size for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", CONFIGS)
def test_products_are_those_of_the_traced_forward_and_training_programs(name, monkeypatch):
    monkeypatch.setattr(choice, "attention_form", lambda *_: "full")  # the form on CPU recomputes its scores
    config = CONFIGS[name]
    loss, params, ids = abstract(config)
    forward, training = jax.make_jaxpr(loss)(params, ids), jax.make_jaxpr(jax.grad(loss))(params, ids)
    per_token = forward_flops(config, 1, SEQUENCE)
    assert dots(forward.jaxpr) == per_token.products * ids.size
    assert dots(training.jaxpr) == train_flops(config, 1, SEQUENCE).products * ids.size


@pytest.mark.parametrize("family", FAMILIES)
def test_totals_agree_with_the_compilers_own_count(family, monkeypatch):
    """Within 12 %: the compiler prices an exponential, a comparison or a copy by its own table, and loops once."""
    monkeypatch.setattr(choice, "attention_form", lambda *_: "full")
    config = CONFIGS[family].__class__(**{**vars(CONFIGS[family]), "width": 64, "glu_width": 192, "vocab": 512})
    loss, params, ids = abstract(config, unroll=config.depth)
    counted = jax.jit(loss).lower(params, ids).cost_analysis()["flops"] / ids.size
    assert counted == pytest.approx(forward_flops(config, 1, SEQUENCE).total, rel=0.12)


def test_causal_attention_counts_the_visible_pairs():
    config = model_preset("transformer++", "370m")
    square = 3 * forward_flops(config, 1, 2048).attention
    assert square == 3 * 4 * 24 * 1024 * 2048
    assert train_flops_per_token(config, 2048).attention == pytest.approx(square / 2, rel=1e-3)
    assert train_flops_per_token(model_preset("matmul-free", "370m"), 2048).attention == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_state_has_the_counted_bytes(family):
    config, capacity = CONFIGS[family], 24
    built = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    state = jax.eval_shape(lambda: built.start(1, capacity)).mixers
    assert decode_state_bytes(config, capacity) == sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))
