"""A free categorical policy: one logit an outcome, exact draws and exact gradients."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mara_jax.core import kl
from mara_jax.core.targets import Direction, Scalar, check_direction


def log_probs(logits_a: Float[Array, " a"]) -> Float[Array, " a"]:
    """Log-probabilities of the outcomes.

    Args:
        logits_a: one logit an outcome (nats, up to a constant).

    Returns:
        Normalised log-probabilities (nats).
    """
    return jax.nn.log_softmax(logits_a)


def sample(key: PRNGKeyArray, logp_a: Float[Array, " a"], count: int) -> Int[Array, " n"]:
    """Draw outcomes by inverting the distribution function, exact to the spacing of the uniform draw.

    One uniform a draw, where a Gumbel draw needs one an outcome; an outcome of probability zero is never
    drawn.

    Args:
        key: random key.
        logp_a: log-probabilities (nats).
        count: number of independent draws (static).

    Returns:
        Outcome indices.
    """
    cumulative_a = jnp.cumsum(jnp.exp(logp_a))
    # Scaled by the sum as rounded, so that rounding never points past the last outcome.
    uniform_n = jax.random.uniform(key, (count,), dtype=logp_a.dtype) * cumulative_a[-1]
    drawn_n = jnp.searchsorted(cumulative_a, uniform_n, side="right", method="compare_all")
    last = jnp.searchsorted(cumulative_a, cumulative_a[-1], side="left")
    return jnp.minimum(drawn_n, last)


def objective(
    logits_a: Float[Array, " a"],
    ref_logp_a: Float[Array, " a"],
    reward_a: Float[Array, " a"],
    beta: Scalar,
    direction: Direction = "reverse",
) -> Float[Array, ""]:
    """E[R] - beta KL, summed over every outcome (Eq. 2 or 5).

    Args:
        logits_a: the policy's logits.
        ref_logp_a: reference log-probabilities (nats); for "forward" they need not be normalised.
        reward_a: reward of each outcome.
        beta: regularisation strength.
        direction: "reverse" for KL(pi || ref), "forward" for KL(ref || pi).

    Returns:
        The objective (reward units).

    Raises:
        ValueError: for an unknown direction.
    """
    check_direction(direction)
    logp_a = log_probs(logits_a)
    divergence = (kl.reverse if direction == "reverse" else kl.forward)(logp_a, ref_logp_a)
    return jnp.sum(jnp.exp(logp_a) * reward_a) - beta * divergence


def exact_gradient(
    logits_a: Float[Array, " a"],
    ref_logp_a: Float[Array, " a"],
    reward_a: Float[Array, " a"],
    beta: Scalar,
    direction: Direction = "reverse",
) -> Float[Array, " a"]:
    """Gradient of `objective` in the logits, in closed form.

    Reverse: p (A - p.A) with A = R - beta (log p - log ref). Forward: p (R - p.R) + beta (ref - S p), S the
        sum of
    the reference.

    Args:
        logits_a: the policy's logits.
        ref_logp_a: reference log-probabilities (nats); above -inf for "reverse".
        reward_a: reward of each outcome.
        beta: regularisation strength.
        direction: "reverse" or "forward".

    Returns:
        One derivative an outcome (reward units a nat); they sum to zero.

    Raises:
        ValueError: for an unknown direction.
    """
    check_direction(direction)
    logp_a = log_probs(logits_a)
    p_a = jnp.exp(logp_a)
    signal_a = reward_a - beta * kl.k1(logp_a, ref_logp_a) if direction == "reverse" else reward_a
    gradient_a = p_a * (signal_a - jnp.sum(p_a * signal_a))
    if direction == "reverse":
        return gradient_a
    ref_a = jnp.exp(ref_logp_a)
    return gradient_a + beta * (ref_a - jnp.sum(ref_a) * p_a)
