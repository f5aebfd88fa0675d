"""Where an array came from: what lets an op fuse with the ops before it, while models stay plain calls."""

import weakref
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import jax
from jax.extend.core import get_opaque_trace_state

# A BitLinear is fastest where it computes what stands before it itself: the block's norm, the output gate or SwiGLU
# become part of its one pass over memory, and its backward pass recomputes them instead of keeping their result. In
# the model these are calls of their own, as in the paper: `bit_linear(rms_norm(x))`. So `rms_norm`, `gated_norm` and
# `swiglu` compute their result as usual and also note here what it was made of; a BitLinear looks its input up, and
# if it finds a note, it reads the sources instead. Nobody uses the result then, and the compiler removes it. A
# result that reaches the BitLinear changed, by a factor or a constraint, is another array without a note: slower,
# never wrong.
#
# The residual needs a little more. A stream x is read twice, by the norm and by `residual(x, y)`, so two gradients
# to it have to be added, which costs a pass over memory of its own. A BitLinear that reads x therefore also returns
# x unchanged, and `residual` takes that copy (`latest`) in place of x: by the chain rule its gradient then arrives
# in the BitLinear's backward kernel, which adds it on the way. A block has one such stream at a time, so one is
# remembered.
#
# Notes hold sources, never results, so they go when results go; arrays outside of a trace have none.

Kind = Literal["plain", "norm", "gated", "swiglu"]


class Origin(NamedTuple):
    """What an array [..., D] was made of; `gain` [D] is that of the norm in it.

    plain: the one source itself. norm: RMSNorm of it. gated: RMSNorm of the first times silu of the second. swiglu:
    silu of the first times the second.
    """

    kind: Kind
    sources: tuple[jax.Array, ...]
    gain: jax.Array | None = None
    eps: float | None = None


class Sum(NamedTuple):
    """What a residual stream was made of: stream + factor * addend."""

    stream: jax.Array
    addend: jax.Array
    factor: float


class _Stream(NamedTuple):
    read: weakref.ref  # the stream that a BitLinear has read
    copy: jax.Array  # what it returned of it
    trace: Any  # in which the copy may be used


_notes: dict[int, tuple[weakref.ref, Origin | Sum]] = {}
_stream: ContextVar[_Stream | None] = ContextVar("stream", default=None)


def note(result: jax.Array, origin: Origin | Sum) -> jax.Array:
    """Note the origin of a result, and return the result."""
    if isinstance(result, jax.core.Tracer):
        key = id(result)
        _notes[key] = weakref.ref(result, lambda _: _notes.pop(key, None)), origin
    return result


def origin(x: jax.Array) -> Origin:
    """Return what x was made of; x itself, plain, where that is not known."""
    found = _noted(x)
    if not isinstance(found, Origin):
        return Origin("plain", (x,))
    first, *others = found.sources
    return found._replace(sources=(latest(first), *others))


def sum_of(x: jax.Array) -> Sum | None:
    """Return the residual stream and what was added to it to make x, if x was made so.

    A kernel that reads x can then add both itself. In training nothing asks: the sum is kept for the backward pass.
    """
    found = _noted(x)
    return found if isinstance(found, Sum) else None


def _noted(x: jax.Array) -> Origin | Sum | None:
    reference, found = _notes.get(id(x), (None, None))
    return None if reference is None or reference() is not x else found


def can_hand_on(x: jax.Array) -> bool:
    """Whether a copy of x can be handed on: unless another stream is waiting for its residual in this trace."""
    stream = _stream.get()
    free = stream is None or stream.copy is x or stream.read() is None or stream.trace != _trace()
    return free and isinstance(x, jax.core.Tracer)


def hand_on(x: jax.Array, copy: jax.Array) -> None:
    """Let whoever uses the stream x next use this copy of it."""
    stream = _stream.get()
    start = stream.read if stream is not None and stream.copy is x else weakref.ref(x)
    _stream.set(_Stream(start, copy, _trace()))


def latest(x: jax.Array, last: bool = False) -> jax.Array:
    """Return the copy of the stream x that was handed on last, or x; after its `last` use it is forgotten."""
    stream = _stream.get()
    if stream is None or stream.read() is not x or stream.trace != _trace():
        return x
    if last:
        _stream.set(None)
    return stream.copy


def _trace() -> Any:
    return get_opaque_trace_state(convention="flax")
