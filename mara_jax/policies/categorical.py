"""A free categorical policy: one logit an outcome, exact draws and exact gradients."""

import itertools
import math

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
    drawn. The function is inverted in two levels, blocks of about sqrt(a) outcomes and then inside one. Both
    are written out as additions, comparisons and selections, which compilers fuse and vectorise over draws and
    runs, where they walk through a cumulative sum, a search or a gather one element at a time. So the program
    grows with the outcomes: this is meant for up to about a thousand.

    Args:
        key: random key.
        logp_a: log-probabilities (nats).
        count: number of independent draws (static).

    Returns:
        Outcome indices.
    """
    size = math.isqrt(logp_a.shape[-1])
    weight_nk = jnp.pad(jnp.exp(logp_a), (0, -logp_a.shape[-1] % size)).reshape(-1, size)
    # within_kn[j]: the mass of the first j + 1 outcomes of every block; the last is the blocks' own mass.
    within_kn = list(itertools.accumulate(weight_nk[:, j] for j in range(size)))
    mass_n = within_kn[-1]
    below_n = list(itertools.accumulate(mass_n[i] for i in range(mass_n.shape[0])))
    point_m = jax.random.uniform(key, (count,), dtype=logp_a.dtype) * below_n[-1]
    passed_nm = [below <= point_m for below in below_n[:-1]]

    def of_block(value_n):
        """Its entry for the block that each draw falls into."""
        chosen_m = value_n[0]
        for passed_m, value in zip(passed_nm, value_n[1:], strict=True):
            chosen_m = jnp.where(passed_m, value, chosen_m)
        return chosen_m

    rest_m = point_m - of_block([jnp.zeros_like(mass_n[0]), *below_n[:-1]])
    whole_m = of_block(mass_n)
    # Rounding may leave a rest as large as its block: an outcome is passed only while some mass lies behind it.
    inside_m = [(within_m <= rest_m) & (within_m < whole_m) for within_m in map(of_block, within_kn[:-1])]
    zero_m = jnp.zeros(count, jnp.int32)
    # A dot product, which the compiler computes once: it would fuse and repeat a sum in each use of the draws.
    return jnp.stack([sum(passed_nm, zero_m), sum(inside_m, zero_m)], axis=-1) @ jnp.array([size, 1], jnp.int32)


def exact_gradient(
    logits_a: Float[Array, " a"],
    ref_logp_a: Float[Array, " a"],
    reward_a: Float[Array, " a"],
    beta: Scalar,
    direction: Direction = "reverse",
) -> Float[Array, " a"]:
    """Gradient of E[R] - beta KL (Eq. 2 or 5) in the logits, in closed form.

    Reverse: p (A - p.A) with A = R - beta (log p - log ref). Forward: p (R - p.R) + beta (ref - S p), S the sum of
    the reference.

    Args:
        logits_a: the policy's logits.
        ref_logp_a: reference log-probabilities (nats); above -inf for "reverse", not necessarily normalised for
            "forward".
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
