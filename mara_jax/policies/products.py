"""Matrix products in the forms that XLA's CPU compiler multiplies fast; elsewhere they are what they say."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding

# On a CPU the sum over rows of x.T dy goes up to twice as fast with the narrower side first, as long as the result,
# which is then turned, stays in the cache: measured for widths from 128 to 8,192.
NARROW = 512


class Remade(NamedTuple):
    """An array that no matmul keeps for its gradient: the backward pass makes it anew from what is kept anyway.

    make: (the gradient by the array, *kept) -> the array, by way of `after`; kept: arrays, to which no gradient flows.
    """

    array: jax.Array
    make: Callable[..., jax.Array]
    kept: tuple[Any, ...]


def one_cpu() -> bool:
    """Whether programs are for a CPU without a mesh."""
    return sharding.platform() == "cpu" and sharding.current() is None


def after(x: jax.Array, gradient: jax.Array, at: int = 0) -> jax.Array:
    """x, but not before the gradient, an array of its shape: what is made from it in the backward pass waits, too.

    Without it XLA takes what is made anew for the forward pass's and keeps that. An optimization_barrier says the same,
    but XLA:CPU drops barriers before it schedules. Without a mesh a CPU waits for a single number of the gradient:
    XLA then makes the sum where it is used, which saves a pass over both arrays. (Where that number is infinite all
    of x becomes NaN, as the gradients after it would.) at: there, which number of the first row; what waits for
    different ones XLA makes apart, and stores nothing that they share.
    """
    if gradient.size and one_cpu():
        gradient = gradient[(0,) * (gradient.ndim - 1) + (at,)]
    return x + (0 * gradient).astype(x.dtype)


def matmul(x: jax.Array | Remade, kernel_df: jax.Array) -> jax.Array:
    """x [..., d] by a kernel [d, f]; its gradient by the kernel is made by `over_rows`.

    jax's own rule contracts all leading axes at once: XLA:CPU then writes both sides turned first, in strided loops
    that compute the activation's derivative again.
    """
    if isinstance(x, Remade):
        return _remade_matmul(x.make, x.kept, x.array, kernel_df)
    return _remade_matmul(_as_kept, (x,), x, kernel_df)


def _as_kept(gradient, x):
    del gradient
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _remade_matmul(make, kept, x, kernel_df):
    return x @ kernel_df


def _matmul_fwd(make, kept, x, kernel_df):
    return x @ kernel_df, (kept, kernel_df)


def _matmul_bwd(make, saved, g):
    kept, kernel_df = saved
    d_x = jax.lax.dot_general(g, kernel_df, (((g.ndim - 1,), (1,)), ((), ())))
    return None, d_x, over_rows(make(d_x, *kept), g)


_remade_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def over_rows(x: jax.Array, y: jax.Array, dtype=None) -> jax.Array:
    """The sum over rows of the outer products of x [..., d] and y [..., f]: [d, f], in dtype (x's unless told)."""
    x_rd, y_rf = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    rows = (((0,), (0,)), ((), ()))
    if sharding.platform() == "cpu" and y_rf.shape[1] < x_rd.shape[1] and y_rf.shape[1] <= NARROW:
        turned_fd = jax.lax.dot_general(y_rf, x_rd, rows, preferred_element_type=dtype)
        return jax.lax.optimization_barrier(turned_fd).T
    return jax.lax.dot_general(x_rd, y_rf, rows, preferred_element_type=dtype)


def few_rows(kernel_oi: jax.Array, x: jax.Array, dtype=None) -> jax.Array:
    """x [..., i] times a kernel stored as [o, i]: [..., o], as fast as XLA's CPU matmul goes for few rows.

    With the many outputs as its rows and the few rows of x as its columns a matmul runs 1.2 to 2 times as fast as the
    other way round. The barriers keep XLA from folding the transpositions of the small sides into it, where they cost
    more than all they save.
    """
    x_ic = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    out_oc = jnp.matmul(kernel_oi.astype(x.dtype), x_ic, preferred_element_type=dtype or x.dtype)
    return jax.lax.optimization_barrier(out_oc).T.reshape(*x.shape[:-1], -1)
