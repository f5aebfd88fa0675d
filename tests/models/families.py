"""Small configs of every family and ablation, and models of them whose gains and floors are not at their start."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
from flax import nnx

from mmfree_jax.config import FAMILIES, ModelConfig
from mmfree_jax.models.language_model import LanguageModel

SHAPE = {"vocab": 61, "width": 16, "depth": 2, "glu_width": 24}
FAMILY_SWITCHES = {"transformer++": {"heads": 2}, "bitnet": {"heads": 2, "linear_norm": False, "sublayer_norm": True}}
ABLATIONS = {
    "paper-gate": ("matmul-free", {"output_gate": "paper"}),
    "no-floors": ("matmul-free", {"lower_bounds": False}),
    "single-norm": ("matmul-free", {"linear_norm": False}),
    "sublayer-norm": ("hgrn", {"sublayer_norm": True}),
    "dense-head": ("matmul-free", {"dense_head": True}),
    "4-bit": ("matmul-free", {"activation_bits": 4}),
    "no-activation-codes": ("matmul-free", {"activation_bits": 0}),
    "scale-per-channel": ("matmul-free", {"weight_scale": "channel"}),
    "best-scale": ("matmul-free", {"weight_scale": "optimal"}),
    "tied": ("matmul-free", {"tie_embeddings": True}),
    "tied-dense": ("transformer++", {"tie_embeddings": True}),
    "grouped-queries": ("transformer++", {"heads": 4, "kv_heads": 2}),
    "squared-relu": ("bitnet", {"activation": "relu2"}),
    "two-glu-scales": ("matmul-free", {"joint_glu": False}),
    "bitnet-double-norm": ("bitnet", {"linear_norm": True, "sublayer_norm": False}),
}


def family(name: str, **changes) -> ModelConfig:
    """A small config of a family."""
    mixer, linear = FAMILIES[name]
    return ModelConfig(mixer=mixer, linear=linear, **{**SHAPE, **FAMILY_SWITCHES.get(name, {}), **changes})


CONFIGS = {name: family(name) for name in FAMILIES} | {
    name: family(base, **changes) for name, (base, changes) in ABLATIONS.items()
}


@functools.lru_cache(maxsize=64)
def model(config: ModelConfig, seed: int = 0, **kwargs) -> LanguageModel:
    """A model with noise on every gain and floor, so that a norm applied in the wrong place changes the outcome."""
    build = lambda key: LanguageModel(config, rngs=nnx.Rngs(key), **kwargs)

    def jitter(path, leaf):
        key = jax.random.fold_in(jax.random.key(seed + 1), zlib.crc32(jax.tree_util.keystr(path).encode()))
        matrix = any(getattr(p, "key", None) in ("kernel", "embedding") for p in path)
        return leaf if matrix else leaf + 0.3 * jax.random.normal(key, leaf.shape, leaf.dtype)

    make = lambda key: jax.tree_util.tree_map_with_path(jitter, nnx.state(build(key)))
    params = jax.jit(make)(jax.random.key(seed))
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0)))), params)


def plain_model(config: ModelConfig, **kwargs) -> LanguageModel:
    """A model as it is initialised."""
    build = lambda key: LanguageModel(config, rngs=nnx.Rngs(key), **kwargs)
    params = jax.jit(lambda key: nnx.state(build(key)))(jax.random.key(0))
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: build(jax.random.key(0)))), params)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, params, ids, kwargs):
    return nnx.merge(graph, params)(ids, **kwargs)


def logits(built: LanguageModel, ids: jax.Array, **kwargs) -> jax.Array:
    """Logits from one compiled program: eager calls compile every operation on its own."""
    return _logits(*nnx.split(built), ids, kwargs)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _extend(graph, params, ids, state, segments, last_only):
    return nnx.merge(graph, params).extend(ids, state, segments_BT=segments, last_only=last_only)


def extend(built: LanguageModel, ids: jax.Array, state, segments=None, last_only: bool = False):
    """`built.extend`, compiled once for each shape."""
    return _extend(*nnx.split(built), ids, state, segments, last_only)


def tokens(config: ModelConfig, batch: int = 2, time: int = 17, seed: int = 3) -> jax.Array:
    """Random tokens."""
    return jax.random.randint(jax.random.key(seed), (batch, time), 0, config.vocab)


def in_float64(config: ModelConfig) -> LanguageModel:
    """`model` with float64 parameters and activations; call under `jax.enable_x64(True)`."""
    graph, params = nnx.split(model(config))
    built = nnx.merge(graph, jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params))
    built.dtype = jnp.dtype(jnp.float64)
    return built


def replace(config: ModelConfig, **changes) -> ModelConfig:
    """The config with other values."""
    return dataclasses.replace(config, **changes)
