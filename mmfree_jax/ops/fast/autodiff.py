"""Functions with a backward pass of their own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


# Why own backward passes at all: autodiff through a quantiser would keep what it needs not (float copies of codes,
# masks of the clips), and would compute the straight-through gradient as x + stop_gradient(q - x), an addition over the
# whole array. A custom_vjp says what is kept, and in which type.
def own_backward(forward: Callable, backward: Callable, static: tuple[int, ...] = ()) -> Callable:
    """Return the function whose value is the first result of `forward` and whose gradient is what `backward` returns.

    forward(*args) -> (value, residuals); backward(*static args, residuals, gradient) -> gradients to the other args.
    """
    function = jax.custom_vjp(lambda *args: forward(*args)[0], nondiff_argnums=static)
    function.defvjp(forward, backward)
    return function


def own_backward_of_used(forward: Callable, backward: Callable) -> Callable:
    """As `own_backward` with a static first argument, but `backward` learns which results nobody used.

    The value of `forward` is (results, copy). The gradient to results that nobody used is zero, that to the copy None:
    there is nothing to add then, and no array of zeros to read.
    """

    def symbolic_forward(static: Any, *primals: Any) -> tuple:
        return forward(static, *jax.tree.map(lambda primal: primal.value, primals))

    def symbolic_backward(static: Any, residuals: Any, gradients: Any) -> Any:
        is_zero = lambda d: isinstance(d, SymbolicZero)
        dresults, dcopy = gradients
        full = lambda d: jnp.zeros(d.shape, d.dtype) if is_zero(d) else d
        dresults = jax.tree.map(full, dresults, is_leaf=is_zero)
        return backward(static, residuals, (dresults, None if is_zero(dcopy) else dcopy))

    # With symbolic zeros JAX hands over a marker for a gradient that is zero by construction, instead of an array of
    # zeros.
    function = jax.custom_vjp(lambda *args: forward(*args)[0], nondiff_argnums=(0,))
    function.defvjp(symbolic_forward, symbolic_backward, symbolic_zeros=True)
    return function
