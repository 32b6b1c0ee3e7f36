"""The root-mean-square norm, with a gradient that keeps its input and one number a row, neither its output nor more."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mara_jax.policies import products
from mara_jax.policies.parameters import wide
from mara_jax.policies.products import Remade


def remade(x: jax.Array, scale: jax.Array, eps: float, settled: bool = False) -> Remade:
    """x over the root of its mean square along the last axis, times scale; computed in float32 (or wider).

    args: x: [..., d]; scale: [d]; settled: nothing goes on with the gradient of x before that of scale is there, which
        nobody reads before the optimiser: XLA would put it off, and keep all that it is made of until then.
    returns: the normed x, for matmuls that do not keep it.
    """
    both: Any = _norm(x, scale, eps, settled)
    y, inverse = both
    return Remade(y, _again, (x, inverse, scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _norm(x, scale, eps, settled):
    """The normed x and, wide, one over each row's root mean square [..., 1], to which no gradient flows."""
    broad = x.astype(wide(x.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(broad * broad, axis=-1, keepdims=True) + eps)
    return _scaled(x, inverse, scale), inverse


def _scaled(x, inverse, scale):
    return (x.astype(inverse.dtype) * inverse * scale.astype(inverse.dtype)).astype(x.dtype)


def _again(gradient, x, inverse, scale):
    return _scaled(products.after(x, gradient), inverse, scale)


def _norm_fwd(x, scale, eps, settled):
    both: Any = _norm(x, scale, eps, settled)
    return both, (x, both[1], scale)


def _norm_bwd(eps, settled, saved, g):
    x, inverse, scale = saved
    g = g[0].astype(inverse.dtype)
    unit = products.after(x, g).astype(inverse.dtype) * inverse
    d_scale = jnp.sum(g * unit, axis=tuple(range(g.ndim - 1)))
    g *= scale.astype(g.dtype)
    d_x = inverse * (g - unit * jnp.mean(g * unit, axis=-1, keepdims=True))
    both = d_x.astype(x.dtype), d_scale.astype(scale.dtype)
    return jax.lax.optimization_barrier(both) if settled else both


_norm.defvjp(_norm_fwd, _norm_bwd)
