"""Matrix products in the forms that XLA's CPU compiler multiplies fast; elsewhere they are what they say."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding

# XLA multiplies by Eigen on a CPU, whose blocks suit results of about so many columns whatever the rows. Wider ones go
# at half the rate for some numbers of rows (2,016 x 256 by 256 x 1,024 on one core with 512 KB of L2 cache: 43 GFLOP/s;
# 2,048 rows: 75; any number of rows by 256 x 256: 75 to 80), and at two thirds of it in sums over rows.
COLUMNS = 256
MOST_PIECES = 16  # each is an operation of its own to compile


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
        # One of each piece that the gradient may be made of.
        gradient = jnp.sum(gradient[(0,) * (gradient.ndim - 1)][at :: COLUMNS // 2])
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
    return by_kernel(x, kernel_df, 0)


def _matmul_fwd(make, kept, x, kernel_df):
    return by_kernel(x, kernel_df, 0), (kept, kernel_df)


def _matmul_bwd(make, saved, g):
    kept, kernel_df = saved
    d_x = by_kernel(g, kernel_df, 1)
    # After d_x: the optimiser overwrites a kernel, which XLA copies where its last use is not known to come first.
    return None, d_x, over_rows(make(d_x, *kept), g, after=first(d_x))


_remade_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def by_kernel(x: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
    """x [..., c] by a kernel whose `axis` has the c contracted positions: [..., the other axis].

    In pieces all of it becomes NaN where the first number of x or of a piece is infinite.
    """
    product = lambda kernel: jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (axis,)), ((), ())))  # noqa: E731
    count = pieces(kernel.shape[1 - axis]) if one_cpu() else 1
    if count == 1:
        return product(kernel)
    made = [x]
    for piece in jnp.split(kernel, count, 1 - axis):
        # One after the other, and none before x: XLA would cut all pieces first.
        made.append(product(piece + (0 * first(made[-1])).astype(piece.dtype)))
    return jnp.concatenate(made[1:], -1)


def over_rows(x: jax.Array, y: jax.Array, dtype=None, after: jax.Array | None = None) -> jax.Array:
    """The sum over rows of the outer products of x [..., d] and y [..., f] of one dtype: [d, f], in dtype (theirs
    unless told).

    after: a number that it waits for on one CPU; where that is infinite the sum may become NaN.
    """
    sums = lambda x, y: jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=dtype)  # noqa: E731
    sides = [x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])]
    wide = int(sides[0].shape[1] <= sides[1].shape[1])  # which is cut, and which axis of the result
    count = pieces(sides[wide].shape[1]) if one_cpu() else 1
    if count == 1:
        made = sums(*sides)
        return made if after is None or not one_cpu() else made + (0 * after).astype(made.dtype)
    size = sides[wide].shape[1] // count

    def add_piece(i, made):
        cut = list(sides)
        cut[wide] = jax.lax.dynamic_slice_in_dim(sides[wide], i * size, size, 1)
        return jax.lax.dynamic_update_slice_in_dim(made, sums(*cut), i * size, wide)

    # A loop is a single operation: of many XLA would put some off, and keep what they are made of. It writes over all
    # that it begins with, a number made late: XLA would make room for the zeros of all layers first.
    begin = jnp.full((sides[0].shape[1], sides[1].shape[1]), first(y) if after is None else after, dtype or x.dtype)
    return jax.lax.fori_loop(0, count, add_piece, begin)


def first(x: jax.Array) -> jax.Array:
    """The first number of an array, 0 of an empty one."""
    return x[(0,) * x.ndim] if x.size else jnp.zeros((), x.dtype)


def pieces(width: int) -> int:
    """The fewest equal pieces of at most COLUMNS; 1 where they would be many, small, or so few that they gain little
    for the arrays that XLA keeps for them."""
    count = next(n for n in range(-(-width // COLUMNS), width + 1) if width % n == 0)
    return count if 3 < count <= MOST_PIECES and width // count >= COLUMNS // 2 else 1


def few_rows(kernel_oi: jax.Array, x: jax.Array, dtype=None) -> jax.Array:
    """x [..., i] times a kernel stored as [o, i]: [..., o], as fast as XLA's CPU matmul goes for few rows.

    With the many outputs as its rows and the few rows of x as its columns a matmul runs 1.2 to 2 times as fast as the
    other way round. The barriers keep XLA from folding the transpositions of the small sides into it, where they cost
    more than all they save.
    """
    x_ic = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    out_oc = jnp.matmul(kernel_oi.astype(x.dtype), x_ic, preferred_element_type=dtype or x.dtype)
    return jax.lax.optimization_barrier(out_oc).T.reshape(*x.shape[:-1], -1)
