"""Exact KL divergences, the estimators k1, k2 and k3, and which KL each use of an estimator optimises."""

from typing import Literal, NamedTuple

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from mara_jax.core import bounded


def reverse(logp: Float[Array, "*batch a"], ref_logp: Float[Array, "*batch a"]) -> Float[Array, "*batch"]:
    """Exact KL(pi || ref) over the last axis.

    Args:
        logp: log-probabilities of the policy (nats), -inf where zero.
        ref_logp: log-probabilities of the reference (nats).

    Returns:
        The divergence (nats); infinite where the policy has mass that the reference has not.

    Raises:
        AssertionError: last axes of different lengths.
    """
    logp, ref_logp = jnp.asarray(logp), jnp.asarray(ref_logp)
    chex.assert_equal_shape_suffix([logp, ref_logp], 1)
    seen = logp > -jnp.inf
    inner = jnp.where(seen, logp, 0.0) - jnp.where(seen, ref_logp, 0.0)
    return jnp.sum(jnp.where(seen, jnp.exp(jnp.where(seen, logp, 0.0)) * inner, 0.0), axis=-1)


def forward(logp: Float[Array, "*batch a"], ref_logp: Float[Array, "*batch a"]) -> Float[Array, "*batch"]:
    """Exact KL(ref || pi) over the last axis.

    Args:
        logp: log-probabilities of the policy (nats).
        ref_logp: log-probabilities of the reference (nats), -inf where zero.

    Returns:
        The divergence (nats); infinite where the reference has mass that the policy has not.
    """
    return reverse(ref_logp, logp)


def k1(logp: Float[Array, "*n"], ref_logp: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """log pi - log ref of a sample of pi: its mean is KL(pi || ref).

    Args:
        logp: log-probability of each sample under the policy (nats).
        ref_logp: the same under the reference.

    Returns:
        One estimate a sample (nats), of either sign.
    """
    return logp - ref_logp


def k2(logp: Float[Array, "*n"], ref_logp: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Half the squared log-ratio of a sample of pi: a biased value whose own gradient is the reverse KL's.

    Args:
        logp: log-probability of each sample under the policy (nats).
        ref_logp: the same under the reference.

    Returns:
        One estimate a sample (nats squared), never negative.
    """
    return jnp.square(logp - ref_logp) / 2


def k3(logp: Float[Array, "*n"], ref_logp: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """ref/pi - 1 - log(ref/pi) of a sample: its mean is KL(pi || ref), its own gradient the forward KL's.

    Args:
        logp: log-probability of each sample under the policy (nats).
        ref_logp: the same under the reference.

    Returns:
        One estimate a sample (nats), never negative; ref/pi is bounded, value and gradient, see `core.bounded`.
    """
    return bounded.expm1(ref_logp - logp) + (logp - ref_logp)


class Effective(NamedTuple):
    """The regulariser that a use of an estimator has in expectation.

    `name` is one of "none", "reverse", "forward", "reverse_minus_forward", "square_minus_reverse",
    "part_of_reverse", "neither"; `sentence` describes it.
    """

    name: str
    sentence: str


Estimator = Literal["k1", "k2", "k3", "k1_ratio"]
Placement = Literal["reward", "loss"]
Level = Literal["sequence", "token"]

# An estimator and its place, by the name that configurations have for them.
PLACED: dict[str, tuple[Estimator, Placement]] = {
    "k1_in_reward": ("k1", "reward"),
    "k3_in_reward": ("k3", "reward"),
    "k1_in_loss": ("k1", "loss"),
    "k2_in_loss": ("k2", "loss"),
    "k3_in_loss": ("k3", "loss"),
}

# By enumeration of small policies, on samples of the policy itself; tests/core/test_placements.py checks each row.
_EFFECTIVE: dict[tuple[str, str, str], Effective] = {
    ("k1", "loss", "sequence"): Effective(
        "none", "k1 as a loss term has gradient zero in expectation: nothing is regularised"
    ),
    ("k1", "loss", "token"): Effective(
        "none", "k1 as a loss term has gradient zero in expectation: nothing is regularised"
    ),
    ("k2", "loss", "sequence"): Effective(
        "reverse", "k2 of the whole string as a loss term optimises the reverse KL(pi || ref), exactly"
    ),
    ("k2", "loss", "token"): Effective(
        "part_of_reverse",
        "k2 summed token by token as a loss term optimises only each token's own share of the reverse"
        " KL(pi || ref): exact for one token, tens of per cent off on strings",
    ),
    ("k3", "loss", "sequence"): Effective(
        "forward", "k3 of the whole string as a loss term optimises the forward KL(ref || pi), not reverse"
    ),
    ("k3", "loss", "token"): Effective(
        "neither",
        "k3 summed token by token as a loss term optimises neither KL on strings, the forward KL(ref || pi)"
        " where there is only one token",
    ),
    ("k1", "reward", "sequence"): Effective(
        "reverse", "k1 of the whole string in the reward, detached, optimises reverse KL(pi || ref), exactly"
    ),
    ("k1", "reward", "token"): Effective(
        "part_of_reverse",
        "k1 in the reward with each token credited its own k1 only optimises just that share of the reverse"
        " KL(pi || ref): exact for one token, tens of per cent off on strings",
    ),
    ("k2", "reward", "sequence"): Effective(
        "square_minus_reverse",
        "k2 in the reward optimises half the mean squared log-ratio minus reverse KL(pi || ref): not a KL",
    ),
    ("k2", "reward", "token"): Effective(
        "neither", "k2 in the reward with each token credited its own k2 only optimises no KL at all"
    ),
    ("k3", "reward", "sequence"): Effective(
        "reverse_minus_forward",
        "k3 in the reward optimises the reverse KL(pi || ref) minus the forward KL(ref || pi), which can push"
        " away from the reference",
    ),
    ("k3", "reward", "token"): Effective(
        "neither",
        "k3 in the reward with each token credited its own k3 only optimises neither KL on strings, reverse"
        " minus forward KL where there is only one token",
    ),
    ("k1_ratio", "loss", "sequence"): Effective(
        "reverse",
        "k1 of the whole string times the live ratio pi/pi_sampled as a loss term optimises the reverse"
        " KL(pi || ref), exactly",
    ),
}


def effective(estimator: Estimator, placement: Placement, level: Level) -> Effective:
    """The KL that an estimator in the reward or in the loss optimises, on samples of the policy itself.

    Args:
        estimator: "k1", "k2", "k3", or "k1_ratio" (k1 times the differentiable ratio pi/pi_sampled of the completion).
        placement: "reward" (detached, and part of the signal that multiplies grad log pi) or "loss" (differentiated
            itself).
        level: "sequence" for the estimator of whole completions (in the reward, giving each token the sum from that
            token on is equivalent), "token" where each token has only its own estimate.

    Returns:
        A name and a sentence.

    Raises:
        ValueError: for a combination that is not in the table.
    """
    try:
        return _EFFECTIVE[estimator, placement, level]
    except KeyError:
        known = ", ".join("/".join(row) for row in _EFFECTIVE)
        raise ValueError(f"no such use of a KL estimator: {estimator}/{placement}/{level}; known are {known}") from None
