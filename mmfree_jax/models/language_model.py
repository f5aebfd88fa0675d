"""One language model for every family: embedding, scan over blocks, remat, head, loss and decoding state."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.config import ModelConfig, Remat
from mmfree_jax.models.attention import Attention, rotary
from mmfree_jax.models.glu import GLU
from mmfree_jax.models.layers import Context, Projection, RMSNorm, gain, normal, recipe
from mmfree_jax.models.mlgru import MLGRU, floors
from mmfree_jax.models.rwkv4 import RWKV4
from mmfree_jax.ops.bit_linear import bit_linear
from mmfree_jax.ops.cross_entropy import head_losses, head_nats, largest_logits, without_padding
from mmfree_jax.ops.embedding import embed
from mmfree_jax.ops.prologue import Prologue
from mmfree_jax.ops.ternary import Quantised, wide
from mmfree_jax.ops.ternary_weights import quantise_kernel
from mmfree_jax.parametrisation import scales
from mmfree_jax.sharding import constrain, gathered, partitioned

MIXERS: dict[str, Any] = {"mlgru": MLGRU, "attention": Attention, "rwkv4": RWKV4}
KEPT: dict[str, tuple[str, ...]] = {  # names that ops and modules give to what they compute
    "products": ("projection", "gate_up", "residual", "state", "codes", "per_token"),
    "mixer": ("projection", "residual", "state", "codes", "per_token"),
    "codes": ("residual", "state", "codes", "per_token"),
    "full": (),
}


def remat_policy(remat: Remat) -> Callable[[Any], Any]:
    """Wraps the body of the scan over layers: what the backward pass keeps of each block, and what it makes again.

    none: keeps whatever autodiff needs. products: makes norms, gates and attention again, no product or recurrence.
    mixer: as products, but makes the GLU's gate and up again, the widest that a block has. codes: of ternary layers
    keeps the integer codes that went in, and makes the products again with those. full: keeps the residual stream at
    the block's start and makes all else again.
    """
    if remat == "none":
        return lambda body: body
    policy = jax.checkpoint_policies.save_only_these_names(*KEPT[remat])
    return lambda body: jax.checkpoint(body, policy=policy)


def document_starts(segments_BT: jax.Array, before_B: jax.Array | None = None) -> jax.Array:
    """True at each row's first token and wherever the document id differs from the token before.

    `before_B` is the id of the token before the first, when the row continues one.
    """
    first_B1 = jnp.ones_like(segments_BT[:, :1], bool)
    if before_B is not None:
        first_B1 = segments_BT[:, :1] != before_B[:, None]
    return jnp.concatenate([first_B1, segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that is kept of the tokens read so far.

    `mixers`: each layer's state, stacked with layers in front. `position`: how many tokens, an int32 scalar.
    `segment_B`: the document that each row's last token belongs to.
    """

    mixers: Any
    position: jax.Array
    segment_B: jax.Array


class Block(nnx.Module):
    """Pre-norm residual block: x + c mixer(norm(x)), then x + c glu(norm(x)), with c of `parametrisation`."""

    def __init__(self, config: ModelConfig, layer: jax.Array, *, rngs: nnx.Rngs, param_dtype: Any):
        kwargs = {"rngs": rngs, "param_dtype": param_dtype}
        self.ternary = config.linear == "ternary"
        self.residual = scales(config).residual
        self.mixer_norm = RMSNorm(config.width, config.norm_eps, param_dtype)
        self.mixer = MIXERS[config.mixer](config, layer, **kwargs)
        self.glu_norm = RMSNorm(config.width, config.norm_eps, param_dtype)
        self.glu = GLU(config, **kwargs)

    def __call__(self, x_BTD: jax.Array, context: Context, floor_D: jax.Array | None, state: Any) -> tuple:
        """[B, T, D] -> [B, T, D] and the mixer's state after the last token."""
        y_BTD, state, u_BTD = self.mixer(self._normed(self.mixer_norm, x_BTD), context, floor_D, state)
        x_BTD = checkpoint_name(self._added(x_BTD, u_BTD, y_BTD), "residual")
        y_BTD, u_BTD = self.glu(self._normed(self.glu_norm, x_BTD))
        return self._added(x_BTD, u_BTD, y_BTD), state

    def _added(self, x_BTD: jax.Array, u_BTD: jax.Array | Prologue, y_BTD: jax.Array) -> jax.Array:
        """x + c y, with x out of the prologue in which a ternary layer handed it on."""
        x_BTD = u_BTD.sources[0] if isinstance(u_BTD, Prologue) else x_BTD
        y_BTD = y_BTD if self.residual == 1 else y_BTD * self.residual
        return constrain(x_BTD + y_BTD, "batch", "time", None)

    def _normed(self, norm: RMSNorm, x_BTD: jax.Array) -> jax.Array | Prologue:
        """Ternary layers take the norm unevaluated; dense ones share its value."""
        return norm.deferred(x_BTD) if self.ternary else norm(x_BTD)


class LanguageModel(nnx.Module):
    """Every family of `config.FAMILIES` (see docs/models.md for the equations).

    Parameters are `param_dtype` and carry logical axis names; those of the blocks are stacked with layers in front.
    Leaves named `kernel` and `embedding` are matrices, all others gains and floors. Activations are `dtype`; norms,
    quantisers, recurrences and the loss compute in at least float32.

    `remat` is what the backward pass keeps of a block (`remat_policy`), `unroll` how many blocks one iteration of the
    scan holds.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: Remat = "none",
        unroll: int = 1,
    ):
        self.config, self.dtype, self.remat, self.unroll = config, jnp.dtype(dtype), remat, unroll
        V, D, L = config.vocab, config.width, config.depth
        init = normal(config.init_std)
        self.embedding = nnx.Param(partitioned(init, "vocab", "embed")(rngs.params(), (V, D), param_dtype))
        zeros = partitioned(nnx.initializers.zeros, "layers", "norm")
        has_floors = config.mixer == "mlgru" and config.lower_bounds
        self.lower_bounds = nnx.Param(zeros(rngs.params(), (L, D), param_dtype)) if has_floors else None

        def block(rngs: nnx.Rngs, layer: jax.Array) -> Block:
            return Block(config, layer, rngs=rngs, param_dtype=param_dtype)

        stacked = nnx.vmap(nnx.transform_metadata(block, partition="layers"))
        self.blocks = stacked(rngs.split(L), jnp.arange(L))
        self.norm = RMSNorm(D, config.norm_eps, param_dtype)
        self.head = Head(config, init=init, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, tokens_BT: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        """Logits of the next token, [B, T, V], in at least float32; those of padding are the lowest finite number.

        `segments_BT` are document ids: neither state nor attention crosses from one to another. Padding is a
        document of its own, so left-padded rows are segments such as 0 0 0 1 1 1.
        """
        x_BTD = self.hidden(tokens_BT, segments_BT=segments_BT)
        return constrain(self.head.logits(x_BTD, self.embedding[...]), "batch", "time", "vocab")

    def loss(
        self,
        tokens_BT: jax.Array,
        targets_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        *,
        segments_BT: jax.Array | None = None,
        z_loss: float = 0.0,
    ) -> tuple[jax.Array, jax.Array]:
        """Sum of the targets' cross-entropies in nats, and how many targets there are; scalars in at least float32.

        mask_BT weighs the targets (0 leaves one out); z_loss is described at `cross_entropy.head_loss`.
        """
        total, _ = self.losses(tokens_BT, targets_BT, mask_BT, segments_BT=segments_BT, z_loss=z_loss)
        count = targets_BT.size if mask_BT is None else jnp.sum(mask_BT.astype(total.dtype))
        return total, jnp.asarray(count, total.dtype)

    def losses(
        self,
        tokens_BT: jax.Array,
        targets_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        *,
        segments_BT: jax.Array | None = None,
        z_loss: float = 0.0,
    ) -> tuple[jax.Array, jax.Array]:
        """The sum that `loss` returns, and the part of it that is the z-loss. Only the sum has a gradient."""
        x_BTD = self.hidden(tokens_BT, segments_BT=segments_BT)
        operands = self.head.operands(x_BTD, self.embedding[...])
        return head_losses(
            self.head.recipe,
            *operands,
            targets_BT,
            mask_BT,
            kernel=self.head.codes,
            vocab=self.config.tokenizer_vocab,
            z_loss=z_loss,
        )

    def nats(self, tokens_BT: jax.Array, targets_BT: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        """Cross-entropy of each target in nats, [B, T], in at least float32. Chunked, for evaluation."""
        x_BTD = self.hidden(tokens_BT, segments_BT=segments_BT)
        operands = self.head.operands(x_BTD, self.embedding[...])
        return head_nats(self.head.recipe, *operands, targets_BT, vocab=self.config.tokenizer_vocab)

    def hidden(self, tokens_BT: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        """Normed output of the last block, [B, T, D] of `dtype`."""
        return self.norm(self._stream(tokens_BT, segments_BT, lambda _: None)[0])

    def activations(self, tokens_BT: jax.Array, *, segments_BT: jax.Array | None = None) -> dict[str, jax.Array]:
        """Statistics of a forward pass: root mean squares of the residual stream after the embedding (`embedding` []),
        each block (`blocks` [L]) and the last norm (`norm` []); and the largest logit's magnitude (`largest_logit` []).
        """
        rms = lambda x_BTD: jnp.sqrt(jnp.mean(jnp.square(x_BTD.astype(wide(x_BTD.dtype)))))
        x_BTD, blocks_L = self._stream(tokens_BT, segments_BT, rms)
        normed_BTD = self.norm(x_BTD)
        operands = self.head.operands(normed_BTD, self.embedding[...])
        largest_BT = largest_logits(self.head.recipe, *operands, vocab=self.config.tokenizer_vocab)
        return {
            "embedding": rms(self._embed(tokens_BT)),
            "blocks": blocks_L,
            "norm": rms(normed_BTD),
            "largest_logit": jnp.max(largest_BT),
        }

    def _stream(
        self, tokens_BT: jax.Array, segments_BT: jax.Array | None, look: Callable[[jax.Array], Any]
    ) -> tuple[jax.Array, Any]:
        """Output of the last block, before the norm, and `look` of each block's output, stacked over layers."""
        starts_BT = None if segments_BT is None else document_starts(segments_BT)
        context = Context(starts_BT, segments_BT, self._rotary(jnp.arange(tokens_BT.shape[1])))

        def body(x_BTD, layer):
            block, floor_D = layer
            x_BTD = block(x_BTD, context, floor_D, None)[0]
            return x_BTD, look(x_BTD)

        body = remat_policy(self.remat)(body)
        return jax.lax.scan(body, self._embed(tokens_BT), (self.blocks, self._floors()), unroll=self.unroll)

    def make_codes(self) -> tuple:
        """Codes of all ternary weights, for `use_codes` of models with the same parameters."""
        return tuple(layer.stacked_codes() for layer in self._projections()), self.head.make_codes(self.embedding[...])

    def use_codes(self, codes: tuple) -> None:
        """Take codes in place of quantising the weights at each use; gradients go to the weights all the same."""
        layers, self.head.codes = codes
        for layer, own in zip(self._projections(), layers, strict=True):
            layer.codes = nnx.data(own)

    def _projections(self) -> list[Projection]:
        return [module for _, module in nnx.iter_modules(self.blocks) if isinstance(module, Projection)]

    def residuals(self, tokens_BT: jax.Array) -> jax.Array:
        """The residual stream after the embedding and after each block, [L + 1, B, T, D], to look at."""
        context = Context(None, None, self._rotary(jnp.arange(tokens_BT.shape[1])))

        def body(x_BTD, layer):
            x_BTD = layer[0](x_BTD, context, layer[1], None)[0]
            return x_BTD, x_BTD

        x_BTD = self._embed(tokens_BT)
        return jnp.concatenate([x_BTD[None], jax.lax.scan(body, x_BTD, (self.blocks, self._floors()))[1]])

    def start(self, batch: int, capacity: int = 0) -> DecodeState:
        """The state before the first token of `batch` sequences.

        `capacity` is how many tokens, padding included, an attention cache can hold; recurrent mixers need none.
        """
        one = self.blocks.mixer.start(batch, capacity, self.config, self.dtype)
        mixers = jax.tree.map(lambda a: jnp.broadcast_to(a, (self.config.depth, *a.shape)), one)
        return DecodeState(mixers, jnp.zeros((), jnp.int32), jnp.zeros(batch, jnp.int32))

    def extend(
        self,
        tokens_BT: jax.Array,
        state: DecodeState,
        *,
        segments_BT: jax.Array | None = None,
        last_only: bool = False,
    ) -> tuple[jax.Array, DecodeState]:
        """Read on from a state: a whole prompt, a piece of one, or one token.

        Args:
            tokens_BT: the next tokens.
            state: from `start` or an earlier call.
            segments_BT: document ids, as in `__call__`; None continues each row's document. Left-padded prompts of
                different lengths are segments such as 0 0 1 1.
            last_only: logits of the last token only, [B, 1, V].

        Returns:
            logits [B, T, V] in at least float32 and the state after the tokens. Beyond the cache's capacity all
            logits are NaN.
        """
        B, T = tokens_BT.shape
        if segments_BT is None:
            segments_BT = jnp.broadcast_to(state.segment_B[:, None], (B, T))
        turn = self._rotary(state.position + jnp.arange(T))
        context = Context(document_starts(segments_BT, state.segment_B), segments_BT, turn, state.position)

        def body(x_BTD, layer):
            block, floor_D, mixer_state = layer
            return block(x_BTD, context, floor_D, mixer_state)

        layers = (self.blocks, self._floors(), state.mixers)
        x_BTD, mixers = jax.lax.scan(body, self._embed(tokens_BT), layers, unroll=self.unroll)
        x_BTD = self.norm(x_BTD[:, -1:] if last_only else x_BTD)
        after = DecodeState(mixers, state.position + T, segments_BT[:, -1])
        return self.head.logits(x_BTD, self.embedding[...]), after

    def _floors(self) -> jax.Array | None:
        return None if self.lower_bounds is None else floors(self.lower_bounds[...])

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        return embed(self.embedding[...], tokens_BT, self.dtype)

    def _rotary(self, positions_T: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        if self.config.mixer != "attention":
            return None
        return rotary(positions_T, self.config.width // self.config.heads, self.config.rope_theta, self.dtype)


class Head(nnx.Module):
    """The language-model head: a projection of its own, or with `tie_embeddings` the transposed embedding."""

    def __init__(self, config: ModelConfig, *, init: Any, rngs: nnx.Rngs, param_dtype: Any):
        axes = ("embed", "vocab")
        shape = (config.width, config.vocab)
        make = lambda: nnx.Param(partitioned(init, *axes)(rngs.params(), shape, param_dtype))
        ternary = config.linear == "ternary" and not config.dense_head
        self.vocab = config.tokenizer_vocab
        self.recipe = recipe(config, axes)._replace(gradient_bits=0, columns=self.vocab) if ternary else None
        self.scale = scales(config).logits
        self.kernel = None if config.tie_embeddings else make()
        has_norm = self.recipe is not None and config.linear_norm
        self.gain = gain((config.width,), param_dtype) if has_norm else None
        self.codes: Quantised | None = nnx.data(None)  # of the kernel, where they are made ahead of its use

    def make_codes(self, table_VD: jax.Array) -> Quantised | None:
        """Codes for `self.codes`; None for a dense head."""
        kernel_DV = table_VD.T if self.kernel is None else self.kernel[...]
        return None if self.recipe is None else quantise_kernel(self.recipe, kernel_DV[None])[0]

    def operands(self, x_BTD: jax.Array, table_VD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Input [B, T, D], kernel [D, V] and the gain of the head's own norm, if it has one.

        The factor on the logits goes where nothing undoes it: into the gain, or without a norm into the input. Absmax
        codes do not change with it.
        """
        kernel_DV = table_VD.T if self.kernel is None else self.kernel[...]
        gain_D = None if self.gain is None else self.gain[...]
        if self.scale == 1:
            return x_BTD, kernel_DV, gain_D
        if gain_D is None:
            return x_BTD * self.scale, kernel_DV, None
        return x_BTD, kernel_DV, gain_D * self.scale

    def logits(self, x_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, V] in at least float32."""
        x_BTD, kernel_DV, gain_D = self.operands(x_BTD, table_VD)
        exact = wide(x_BTD.dtype)
        if self.recipe is None:
            kernel_DV = gathered(kernel_DV.astype(x_BTD.dtype), ("embed", "vocab"))
            return without_padding(jnp.matmul(x_BTD, kernel_DV, preferred_element_type=exact), self.vocab)
        return without_padding(bit_linear(self.recipe, x_BTD, kernel_DV[None], gain_D)[0].astype(exact), self.vocab)
