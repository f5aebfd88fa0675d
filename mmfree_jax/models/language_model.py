"""One language model for every family: embedding, scan over blocks, remat, head, loss and decoding state."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mmfree_jax.architecture import ModelConfig, Remat, scales
from mmfree_jax.models.attention import Attention, rotary
from mmfree_jax.models.layers import GLU, Context, Initializer, Projection, RMSNorm, param, recipe_of
from mmfree_jax.models.mlgru import MLGRU, floors
from mmfree_jax.models.rwkv4 import RWKV4
from mmfree_jax.ops.bit_linear import quantise_kernel
from mmfree_jax.ops.cross_entropy import Head, Losses, embed, head_logits, head_loss, head_nats, largest_logits
from mmfree_jax.ops.glu import residual
from mmfree_jax.ops.ternary import Quantised, wide

# A family is a token mixer and a kind of linear layer (`config.FAMILIES`): a new mixer is one file and one line here.
MIXERS: dict[str, Any] = {"mlgru": MLGRU, "attention": Attention, "rwkv4": RWKV4}
# What the backward pass keeps of a block under each policy of `remat`, by the names that ops and modules give to what
# they compute (`checkpoint_name`); "none" keeps whatever autodiff needs. Policies go by name, not by operation: JAX's
# own, such as `dots_saveable`, know dot_general only, and neither codes nor the state of a recurrence.
RESIDUAL_NAMES: dict[str, tuple[str, ...]] = {
    # recomputes norms, gates and attention, but no matmul or recurrence
    "products": ("projection", "gate_up", "residual", "state", "codes", "per_token"),
    # also recomputes the GLU's gate and up, the widest arrays of a block
    "mixer": ("projection", "residual", "state", "codes", "per_token"),
    # keeps the integer codes of the inputs of ternary layers, and recomputes the products
    "codes": ("residual", "state", "codes", "per_token"),
    # keeps the residual stream at the block's start, and recomputes everything else
    "full": (),
}


def document_starts(segments_BT: jax.Array, before_B: jax.Array | None = None) -> jax.Array:
    """Mark first tokens of documents: true at a row's first token and where the id differs from the token before.

    `before_B` is the id of the token before the first, when the row continues one.
    """
    first_B1 = jnp.ones_like(segments_BT[:, :1], bool)
    if before_B is not None:
        first_B1 = segments_BT[:, :1] != before_B[:, None]
    return jnp.concatenate([first_B1, segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that decoding remembers of the tokens read so far.

    `mixers`: each layer's state, stacked with layers in front. `position_B`: how many tokens of each row, int32; rows
    that begin with padding start below zero, so that their first token lies at zero. `segment_B`: the document that
    each row's last token belongs to.
    """

    mixers: Any
    position_B: jax.Array
    segment_B: jax.Array


def context_after(
    state: DecodeState, tokens_BT: jax.Array, segments_BT: jax.Array | None, config: ModelConfig, dtype: Any
) -> Context:
    """Return what mixers may know about tokens that follow a state; without segments each row's document continues."""
    if segments_BT is None:
        segments_BT = jnp.broadcast_to(state.segment_B[:, None], tokens_BT.shape)
    positions_BT = state.position_B[:, None] + jnp.arange(tokens_BT.shape[1])
    turn = rotary(config, positions_BT, dtype)
    return Context(document_starts(segments_BT, state.segment_B), segments_BT, turn, positions_BT)


def state_after(state: DecodeState, mixers: Any, context: Context) -> DecodeState:
    """Return the state after the tokens of a context, whose mixers' states are `mixers`."""
    assert context.segments_BT is not None
    return DecodeState(mixers, state.position_B + context.segments_BT.shape[1], context.segments_BT[:, -1])


class Block(nnx.Module):
    """Pre-norm residual block: x + c mixer(norm(x)), then x + c glu(norm(x)), with c of `architecture.Scales`."""

    def __init__(self, config: ModelConfig, layer: jax.Array, *, rngs: nnx.Rngs, param_dtype: Any):
        kwargs = {"rngs": rngs, "param_dtype": param_dtype}
        # Under mup each branch is divided by the relative depth (CompleteP), else this is 1 and is not multiplied by.
        self.scale = scales(config).residual
        self.mixer_norm = RMSNorm(config.width, config.norm_eps, param_dtype)
        self.mixer = MIXERS[config.mixer](config, layer, **kwargs)
        self.glu_norm = RMSNorm(config.width, config.norm_eps, param_dtype)
        self.glu = GLU(config, **kwargs)

    def __call__(
        self, x_BTD: jax.Array, context: Context, floor_D: jax.Array | None, state: Any
    ) -> tuple[jax.Array, Any]:
        """[B, T, D] -> [B, T, D], and the mixer's state after the last token."""
        y_BTD, state = self.mixer(self.mixer_norm(x_BTD), context, floor_D, state)
        x_BTD = residual(x_BTD, y_BTD, self.scale, "residual")
        return residual(x_BTD, self.glu(self.glu_norm(x_BTD)), self.scale), state


class LanguageModel(nnx.Module):
    """Every family of `config.FAMILIES` (see docs/models.md for the equations).

    Parameters are `param_dtype` and carry logical axis names; those of the blocks are stacked with layers in front.
    Leaves named `kernel` and `embedding` are matrices, all others gains and floors. Activations are `dtype`; norms,
    quantisers, recurrences and the loss compute in at least float32.

    `remat` says what the backward pass keeps of a block (`RESIDUAL_NAMES`), `unroll` how many blocks one iteration of
    the scan holds.
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
        init = nnx.initializers.normal(config.init_std)
        self.embedding = param((V, D), param_dtype, "vocab", "embed", init=init, rngs=rngs)
        bounds = lambda: param((L, D), param_dtype, "layers", "norm", init=nnx.initializers.zeros, rngs=rngs)
        self.lower_bounds = bounds() if config.mixer == "mlgru" and config.lower_bounds else None
        # One block whose parameters have layers in front, not a list of blocks: the forward pass is a scan over them,
        # and compiles as one block does, however deep the model is. `transform_metadata` gives the parameters' new axis
        # its logical name.
        block = lambda rngs, layer: Block(config, layer, rngs=rngs, param_dtype=param_dtype)
        stacked = nnx.vmap(nnx.transform_metadata(block, partition="layers"))
        self.blocks = stacked(rngs.split(L), jnp.arange(L))
        self.norm = RMSNorm(D, config.norm_eps, param_dtype)
        self.head = LMHead(config, init=init, rngs=rngs, param_dtype=param_dtype)

    def __call__(self, tokens_BT: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        """Compute logits of the next token, [B, T, V], in at least float32; those of padding are the lowest finite
        number.

        `segments_BT` are document ids: neither state nor attention crosses from one to another. Padding is a
        document of its own, so left-padded rows are segments such as 0 0 0 1 1 1.
        """
        x_BTD = self.hidden(tokens_BT, segments_BT=segments_BT)
        return head_logits(*self.head(x_BTD, self.embedding[...]))

    def loss(
        self,
        tokens_BT: jax.Array,
        targets_BT: jax.Array,
        mask_BT: jax.Array | None = None,
        *,
        segments_BT: jax.Array | None = None,
        z_loss: float = 0.0,
    ) -> Losses:
        """Sum the targets' cross-entropies in nats, and count them; scalars in at least float32.

        mask_BT weighs the targets (0 leaves one out); z_loss is described at `cross_entropy.head_loss`.
        """
        x_BTD = self.hidden(tokens_BT, segments_BT=segments_BT)
        return head_loss(*self.head(x_BTD, self.embedding[...]), targets_BT, mask_BT, z_loss)

    def nats(self, tokens_BT: jax.Array, targets_BT: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        """Compute the cross-entropy of each target in nats, [B, T], in at least float32. For evaluation."""
        x_BTD = self.hidden(tokens_BT, segments_BT=segments_BT)
        return head_nats(*self.head(x_BTD, self.embedding[...]), targets_BT)

    def hidden(self, tokens_BT: jax.Array, *, segments_BT: jax.Array | None = None) -> jax.Array:
        """Compute the normed output of the last block, [B, T, D] of `dtype`."""
        return self.norm(self._stream(tokens_BT, segments_BT)[0])

    def activations(self, tokens_BT: jax.Array, *, segments_BT: jax.Array | None = None) -> dict[str, jax.Array]:
        """Describe a forward pass: root mean squares of the residual stream after the embedding (`embedding` []), each
        block (`blocks` [L]) and the last norm (`norm` []); and the largest logit's magnitude (`largest_logit` []).
        """
        rms = lambda x_BTD: jnp.sqrt(jnp.mean(jnp.square(x_BTD.astype(wide(x_BTD.dtype)))))
        x_BTD, blocks_L, _ = self._stream(tokens_BT, segments_BT, describe=rms)
        normed_BTD = self.norm(x_BTD)
        return {
            "embedding": rms(embed(self.embedding[...], tokens_BT, self.dtype)),
            "blocks": blocks_L,
            "norm": rms(normed_BTD),
            "largest_logit": jnp.max(largest_logits(*self.head(normed_BTD, self.embedding[...]))),
        }

    def residuals(self, tokens_BT: jax.Array) -> jax.Array:
        """Compute the residual stream after the embedding and after each block, [L + 1, B, T, D]."""
        blocks_LBTD = self._stream(tokens_BT, describe=lambda x_BTD: x_BTD)[1]
        return jnp.concatenate([embed(self.embedding[...], tokens_BT, self.dtype)[None], blocks_LBTD])

    def _stream(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        state: DecodeState | None = None,
        describe: Callable[[jax.Array], Any] = lambda x_BTD: None,
    ) -> tuple[jax.Array, Any, DecodeState | None]:
        """Run embedding and blocks, on whole windows or on from a state.

        Returns the last block's output before the norm, `describe` of each block's output, stacked over layers, and the
        state after the tokens (None without one).
        """
        if state is None:
            starts_BT = None if segments_BT is None else document_starts(segments_BT)
            context = Context(starts_BT, segments_BT, rotary(self.config, jnp.arange(tokens_BT.shape[1]), self.dtype))
        else:
            context = context_after(state, tokens_BT, segments_BT, self.config, self.dtype)

        # The residual stream is what the scan carries. With each step come the parameters, floor and state of one
        # layer; stacked for the result are states and descriptions. None is a tree without leaves, which costs nothing.
        def body(x_BTD, layer):
            block, floor_D, mixer_state = layer
            x_BTD, after = block(x_BTD, context, floor_D, mixer_state)
            return x_BTD, (describe(x_BTD), None if state is None else after)

        if state is None and self.remat != "none":  # decoding has no backward pass
            kept = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES[self.remat])
            body = jax.checkpoint(body, policy=kept)
        x_BTD = embed(self.embedding[...], tokens_BT, self.dtype)
        floors_LD = None if self.lower_bounds is None else floors(self.lower_bounds[...])
        layers = (self.blocks, floors_LD, None if state is None else state.mixers)
        x_BTD, (described, mixers) = jax.lax.scan(body, x_BTD, layers, unroll=self.unroll)
        return x_BTD, described, None if state is None else state_after(state, mixers, context)

    def make_codes(self) -> tuple:
        """Quantise all ternary weights, for `use_codes` of models with the same parameters."""
        projections = [module for _, module in nnx.iter_modules(self.blocks) if isinstance(module, Projection)]
        return tuple(layer.stacked_codes() for layer in projections), self.head.make_codes(self.embedding[...])

    def use_codes(self, codes: tuple) -> None:
        """Take codes instead of quantising the weights at each use; gradients go to the weights all the same."""
        projections = [module for _, module in nnx.iter_modules(self.blocks) if isinstance(module, Projection)]
        layers, self.head.codes = codes
        for layer, own in zip(projections, layers, strict=True):
            layer.codes = nnx.data(own)

    def start(self, batch: int, capacity: int = 0) -> DecodeState:
        """Return the state before the first token of `batch` sequences.

        `capacity` is how many tokens, padding included, an attention cache can hold; recurrent mixers need none.
        """
        one = self.blocks.mixer.start(batch, capacity, self.config, self.dtype)
        mixers = jax.tree.map(lambda a: jnp.broadcast_to(a, (self.config.depth, *a.shape)), one)
        return DecodeState(mixers, jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))

    def extend(
        self, tokens_BT: jax.Array, state: DecodeState, *, segments_BT: jax.Array | None = None, last_only: bool = False
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
        x_BTD, _, after = self._stream(tokens_BT, segments_BT, state)
        assert after is not None
        # A prompt needs the logits of its last token only; those of all would be the largest array of the program.
        x_BTD = self.norm(x_BTD[:, -1:] if last_only else x_BTD)
        return head_logits(*self.head(x_BTD, self.embedding[...])), after


class LMHead(nnx.Module):
    """The language-model head: a projection of its own, or with `tie_embeddings` the transposed embedding."""

    def __init__(self, config: ModelConfig, *, init: Initializer, rngs: nnx.Rngs, param_dtype: Any):
        shape, axes = (config.width, config.vocab), ("embed", "vocab")
        ternary = config.linear == "ternary" and not config.dense_head
        self.vocab, self.scale = config.tokenizer_vocab, scales(config).logits
        # Gradients to logits are small differences of probabilities: they are never quantised.
        self.recipe = recipe_of(config, axes)._replace(ternary=ternary, gradient_bits=0, columns=self.vocab)
        self.kernel = None if config.tie_embeddings else param(shape, param_dtype, *axes, init=init, rngs=rngs)
        self.gain = param((config.width,), param_dtype, "norm") if ternary and config.linear_norm else None
        self.codes: Quantised | None = nnx.data(None)  # of the kernel, where quantised ahead of its use

    def __call__(self, x_BTD: jax.Array, table_VD: jax.Array) -> tuple[Head, jax.Array]:
        """Return the head as the ops take it, and its input, [B, T, D].

        The factor on the logits goes where nothing undoes it: into the gain, or without a norm into the input. Absmax
        codes do not change with it.
        """
        kernel_DV = table_VD.T if self.kernel is None else self.kernel[...]
        gain_D = None if self.gain is None else self.gain[...]
        if self.scale != 1:
            x_BTD, gain_D = (x_BTD * self.scale, None) if gain_D is None else (x_BTD, gain_D * self.scale)
        return Head(self.recipe, kernel_DV, gain_D, self.codes, self.vocab), x_BTD

    def make_codes(self, table_VD: jax.Array) -> Quantised | None:
        """Quantise the kernel, for `codes`; None for a dense head."""
        if not self.recipe.ternary:
            return None
        kernel_DV = table_VD.T if self.kernel is None else self.kernel[...]
        return quantise_kernel(self.recipe, kernel_DV[None])[0]
