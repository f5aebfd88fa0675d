"""The model that serves: the modules of `models/` with packed weights in place of latent ones, one layer after another.

Layers are not stacked here, as they are for training: a scan would copy the weights of each layer out of the stack for
every token.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmfree_jax.architecture import ModelConfig, require, scales
from mmfree_jax.inference.packed import packed_tensors, read_packed, served_config
from mmfree_jax.models.language_model import Block, DecodeState, LanguageModel, context_after, state_after
from mmfree_jax.models.layers import Projection, RMSNorm, recipe_of
from mmfree_jax.ops.bit_linear import Recipe, linear
from mmfree_jax.ops.fast.choice import forward_only
from mmfree_jax.ops.packed import Layout, Packed, aligned
from mmfree_jax.ops.served_linear import PackedWeights, RowWeights, row_product
from mmfree_jax.ops.ternary import wide
from mmfree_jax.sharding import path_name


class ServedProjection(nnx.Module):
    """`models.layers.Projection` with weights as a file holds them."""

    def __init__(self, recipe: Recipe, weights: PackedWeights | RowWeights):
        self.recipe = recipe
        self._weights = nnx.data(weights)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """[..., D] -> one [..., F] for each group."""
        return linear(self.recipe, x, self._weights)

    def weights(self) -> PackedWeights | RowWeights:
        """Return its arrays, as the ops take them."""
        return self._weights


Place = Literal["device", "host"]  # where an embedding lies


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class HostTable:
    """An embedding [V, D] that stays with the host, where it may be a mapped file: a device asks for the rows it needs.

    That saves its memory, and costs a round trip to the host for every token.
    """

    rows_VD: np.ndarray

    def lookup(self, tokens_BT: jax.Array, dtype: np.dtype) -> jax.Array:
        """Look up rows from a traced program, [B, T, D] as `dtype`."""
        shape = jax.ShapeDtypeStruct((*tokens_BT.shape, self.rows_VD.shape[1]), dtype)
        return jax.pure_callback(lambda tokens: self.rows_VD[np.asarray(tokens)].astype(dtype), shape, tokens_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A language model for inference; `extend` reads tokens, and a state holds what it has read.

    Activations are `dtype`. The vocabulary has no padding.
    """

    config: ModelConfig = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    # [V, D]; on a CPU the bits of bfloat16 as uint16, or XLA would hold all of it in float32 too.
    embedding: jax.Array | HostTable
    blocks: tuple[Block, ...]
    floors: tuple[jax.Array, ...] | None  # of each layer's forget gate
    norm: RMSNorm
    head: Packed | jax.Array  # packed, or [V, D]; the embedding where they are tied
    head_gain: jax.Array | None

    def start(self, batch: int, capacity: int = 0) -> DecodeState:
        """Return the state before the first token of `batch` sequences; `capacity` as in `LanguageModel.start`."""
        mixers = tuple(block.mixer.start(batch, capacity, self.config, self.dtype) for block in self.blocks)
        return DecodeState(mixers, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))

    def extend(
        self,
        tokens_BT: jax.Array,
        state: DecodeState,
        *,
        segments_BT: jax.Array | None = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, DecodeState]:
        """Read on from a state: logits [B, T, V] in at least float32 and the state after; as `LanguageModel.extend`."""
        with forward_only():
            return self._extend(tokens_BT, state, segments_BT, last_only)

    def hidden(self, tokens_BT: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        """Compute the normed output of the last block on whole windows, [B, T, D]; as `LanguageModel.hidden`."""
        with forward_only():
            return self._stream(tokens_BT, self.start(*tokens_BT.shape), segments_BT, False)[0]

    def nats(self, tokens_BT: jax.Array, targets_BT: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        """Compute the cross-entropy of each target in nats, [B, T], in at least float32; as `LanguageModel.nats`."""
        x_BTD = self.hidden(tokens_BT, segments_BT=segments_BT)

        def of_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:  # logits of all rows could fill the memory
            x_TD, targets_T = row
            with forward_only():
                logits_TV = self.logits(x_TD[None])[0]
            hit_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
            return jax.nn.logsumexp(logits_TV, axis=-1) - hit_T

        return jax.lax.map(of_row, (x_BTD, targets_BT))

    def _extend(self, tokens_BT: jax.Array, state: DecodeState, segments_BT: jax.Array | None, last_only: bool):
        x_BTD, after = self._stream(tokens_BT, state, segments_BT, last_only)
        return self.logits(x_BTD), after

    def _stream(self, tokens_BT: jax.Array, state: DecodeState, segments_BT: jax.Array | None, last_only: bool):
        """Normed output of the last block, of the last token only if `last_only`, and the state after the tokens."""
        context = context_after(state, tokens_BT, segments_BT, self.config, self.dtype)
        x_BTD, mixers = _embedded(self.embedding, tokens_BT, self.dtype), []
        for layer, (block, mixer) in enumerate(zip(self.blocks, state.mixers, strict=True)):
            x_BTD, mixer = block(x_BTD, context, None if self.floors is None else self.floors[layer], mixer)
            mixers.append(mixer)
        x_BTD = self.norm(x_BTD[:, -1:] if last_only else x_BTD)
        return x_BTD, state_after(state, tuple(mixers), context)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Compute logits [B, T, V] of normed hidden states, in at least float32."""
        gain_D, factor, exact = self.head_gain, scales(self.config).logits, wide(self.dtype)
        if factor != 1:  # where nothing undoes it, as in models.language_model.LMHead
            x_BTD, gain_D = (x_BTD * factor, None) if gain_D is None else (x_BTD, gain_D * factor)
        if isinstance(self.head, Packed):
            recipe = recipe_of(self.config, ("embed", "vocab"))
            return linear(recipe, x_BTD, PackedWeights((self.head,), gain_D))[0].astype(exact)
        return row_product(x_BTD, self.head, exact)


def _embedded(table_VD: jax.Array | HostTable, tokens_BT: jax.Array, dtype: np.dtype) -> jax.Array:
    """Look up rows of a table, [B, T, D] as `dtype`."""
    if isinstance(table_VD, HostTable):
        return table_VD.lookup(tokens_BT, dtype)
    rows_BTD = table_VD[tokens_BT]
    if rows_BTD.dtype == jnp.uint16:
        rows_BTD = jax.lax.bitcast_convert_type(rows_BTD, jnp.bfloat16)
    return rows_BTD.astype(dtype)


def load_packed(folder: Path, dtype: str = "float32", embedding: Place = "device") -> ServedModel:
    """Open a packed folder, mapped: a CPU computes with the file's pages, another device gets a copy.

    dtype: of the activations. embedding: "host" leaves it in the mapped file (`HostTable`). Raises PackedError, and
    ConfigError for an embedding on the host that is the head too.
    """
    facts, arrays = read_packed(folder)
    return served(facts["model"], arrays, facts["layout"], dtype, embedding)


def serve_model(
    model: LanguageModel,
    *,
    stored: Any = "float32",
    layout: Layout = "planes",
    dtype: str = "float32",
    embedding: Place = "device",
) -> ServedModel:
    """Pack a model in memory; `stored` and `layout` as `packed_tensors`, the rest as `load_packed`."""
    arrays = {t.name: np.asarray(t.make()).astype(t.dtype) for t in packed_tensors(model, stored, layout)}
    return served(served_config(model.config), arrays, layout, dtype, embedding)


def served(
    config: ModelConfig, arrays: dict[str, np.ndarray], layout: Layout, dtype: str, embedding: Place = "device"
) -> ServedModel:
    """Build a model of the arrays of `packed_tensors`."""
    tied = embedding == "host" and config.tie_embeddings
    require(not tied, "the embedding of this model is its head too, which the device computes with: not on the host")
    kind = np.dtype(jnp.dtype(dtype))
    put = lambda name: jax.device_put(arrays[name])
    make = lambda: Block(config, jnp.zeros((), jnp.int32), rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    template = nnx.split(nnx.eval_shape(make))
    blocks = tuple(_block(nnx.merge(*template), arrays, layer, layout) for layer in range(config.depth))
    floors = tuple(map(jax.device_put, arrays["floors"])) if "floors" in arrays else None
    norm = RMSNorm(config.width, config.norm_eps, jnp.float32)
    norm.gain[...] = put("norm.gain")
    head: Packed | jax.Array
    if "head.codes" in arrays:
        head = Packed(_placed(arrays["head.codes"][0, 0], layout), jax.device_put(arrays["head.scale"][0]), layout)
    else:
        head = put("embedding" if config.tie_embeddings else "head.kernel")
    gain = put("head.gain") if "head.gain" in arrays else None
    return ServedModel(config, kind, _table(arrays["embedding"], embedding), blocks, floors, norm, head, gain)


def _table(rows_VD: np.ndarray, place: Place) -> jax.Array | HostTable:
    if place == "host":
        return HostTable(rows_VD)
    bits = rows_VD.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
    return jax.device_put(rows_VD.view(np.uint16) if bits else rows_VD)


def _placed(bytes_FI: np.ndarray, layout: Layout) -> jax.Array:
    """Put packed codes on the device. A CPU computes with a mapped file's own bytes; a GPU needs aligned rows."""
    return jax.device_put(aligned(bytes_FI) if layout == "trits" and jax.default_backend() != "cpu" else bytes_FI)


def _block(block: Block, arrays: dict[str, np.ndarray], layer: int, layout: Layout) -> Block:
    """Fill a block of `models/` that has shapes only with one layer's arrays; its projections become those above."""
    for path, module in list(nnx.iter_modules(block)):
        for name, child in vars(module).items():
            if isinstance(child, Projection):
                full = ".".join(["blocks", *map(str, path), name])
                setattr(module, name, _projection(child, full, arrays, layer, layout))
    graph, state = nnx.split(block)
    fill = lambda path, a: a if isinstance(a, jax.Array) else arrays[f"blocks.{path_name(path)}"][layer]
    return nnx.merge(graph, jax.device_put(jax.tree.map_with_path(fill, state)))


def _projection(
    module: Projection, name: str, arrays: dict[str, np.ndarray], layer: int, layout: Layout
) -> ServedProjection:
    if not module.recipe.ternary:
        kernel = arrays[f"{name}.kernel"][layer]
        rows_FD = tuple(map(jax.device_put, kernel if module.groups else [kernel]))
        return ServedProjection(module.recipe, RowWeights(rows_FD))
    codes_GFI, scale_GF = arrays[f"{name}.codes"][layer], arrays[f"{name}.scale"][layer]
    pairs = zip(codes_GFI, scale_GF, strict=True)
    codes = tuple(Packed(_placed(q, layout), jax.device_put(s[None]), layout) for q, s in pairs)
    gain = jax.device_put(arrays[f"{name}.gain"][layer]) if f"{name}.gain" in arrays else None
    return ServedProjection(module.recipe, PackedWeights(codes, gain))
