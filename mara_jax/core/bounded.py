"""Exponentials of log-ratios that cannot overflow: they stop growing at LARGEST nats.

A ratio of probabilities has mean 1 under its denominator, so that on samples of the denominator it exceeds exp(30) with
a probability below 1e-13 (Markov's inequality). Ratios beyond come from a sampler that is not what it is said to be, or
from an augmented reference; a weight of exp(30) then outweighs all others as one of exp(300) would. What is smaller is
unchanged to the last bit. Square sums of gradients with such weights, as Adam and norms have them, stay in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST = 30.0  # nats, in float32
LARGEST_FLOAT64 = 300.0  # nats: there the exact optima of objectives are computed, some of them that far away


def _bounded(log_ratio: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """min(log_ratio, the bound of its dtype)."""
    return jnp.minimum(log_ratio, LARGEST_FLOAT64 if jnp.result_type(log_ratio) == jnp.float64 else LARGEST)


@jax.custom_jvp
def exp(log_ratio: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """exp(min(log_ratio, LARGEST)), which is its own derivative too: beyond the bound a gradient keeps its direction.

    Args:
        log_ratio: log of one probability over another (nats).

    Returns:
        The ratio, at most exp(LARGEST) (float64: exp(LARGEST_FLOAT64)); NaN stays NaN.
    """
    return jnp.exp(_bounded(log_ratio))


@exp.defjvp
def _exp_jvp(primals, tangents):
    ratio = exp(*primals)
    return ratio, ratio * tangents[0]


@jax.custom_jvp
def expm1(log_ratio: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """expm1(min(log_ratio, LARGEST)), whose derivative is `exp`, exact where the ratio is near 1.

    Args:
        log_ratio: log of one probability over another (nats).

    Returns:
        The ratio less 1; NaN stays NaN.
    """
    return jnp.expm1(_bounded(log_ratio))


@expm1.defjvp
def _expm1_jvp(primals, tangents):
    excess = expm1(*primals)
    return excess, (excess + 1) * tangents[0]
