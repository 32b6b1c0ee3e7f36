"""Where rivals of MARA must end on one categorical, derived without enumerating any group.

Every function returns log-probabilities (nats), -inf for an outcome that is lost.
"""

import math
from collections.abc import Callable

import jax
import numpy as np

from mara_jax.core import rivals, targets


def separable(signal: Callable[[np.ndarray], np.ndarray], outcomes: int = 5) -> np.ndarray:
    """The distribution at which a signal that falls with each outcome's own probability is the same for all.

    Every objective whose expected gradient is p (s(p) - p.s), s of one outcome depending on its own probability
    alone, ends there; an outcome whose signal stays below that of the others even at zero is lost.

    Args:
        signal: probabilities [a] -> signals [a], falling in each (reward units).
        outcomes: number of outcomes.

    Returns:
        Log-probabilities (nats).
    """
    tiny = np.full(outcomes, -700.0)
    at_zero = signal(np.exp(tiny))

    def shares(level):
        low, high = tiny, np.zeros(outcomes)
        for _ in range(80):
            middle = (low + high) / 2
            above = signal(np.exp(middle)) > level
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        return np.where(at_zero > level, np.exp((low + high) / 2), 0.0)

    low, high = -1e4, 1e4
    for _ in range(90):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle).sum() > 1 else (low, middle)
    with np.errstate(divide="ignore"):
        return np.log(shares(high))


def copies_optimum(
    ref_logp: np.ndarray, reward: np.ndarray, beta: float, group: int, worth: Callable[[int], float], paired: bool
) -> np.ndarray:
    """Optimum where a reward is multiplied by what the number of its copies in the group is worth.

    Without a baseline the copies among the other g - 1 samples count. With leave-one-out a sample's effect on
    its twins' rewards is taken off again, as they stand in its baseline: what is left is the worth among g - 2
    others.

    Args:
        ref_logp: reference log-probabilities (nats).
        reward: reward of each outcome.
        beta: regularisation strength of a reverse KL beside it, 0 or more.
        group: samples in a group.
        worth: of the number of other copies, 0 to group - 1; it must fall.
        paired: whether the baseline is leave-one-out instead of none.

    Returns:
        Log-probabilities (nats).
    """
    others = group - 2 if paired else group - 1
    copies = np.arange(others + 1)
    ways = np.array([math.comb(others, m) * worth(m) for m in range(others + 1)])

    def signal(p):
        mean_worth = (p[:, None] ** copies * (1 - p[:, None]) ** (others - copies)) @ ways
        return reward * mean_worth - beta * (np.log(p) - ref_logp)

    return separable(signal, len(reward))


def restricted(ref_logp: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The reference restricted to some outcomes: where RAFT ends, and any objective without a penalty on equals.

    Args:
        ref_logp: reference log-probabilities (nats).
        kept: whether each outcome is kept.

    Returns:
        Log-probabilities (nats).
    """
    masked = np.where(kept, ref_logp, -np.inf)
    return masked - np.logaddexp.reduce(masked)


def best_of_n(ref_logp: np.ndarray, good: np.ndarray, group: int) -> np.ndarray:
    """The best of g samples of the reference, with rewards of 0 and 1: bad only if all g are.

    Args:
        ref_logp: reference log-probabilities (nats).
        good: whether the reward of each outcome is 1.
        group: samples in a group.

    Returns:
        Log-probabilities (nats).
    """
    ref = np.exp(ref_logp)
    all_bad = ref[~good].sum() ** group
    return np.log(ref * np.where(good, (1 - all_bad) / ref[good].sum(), all_bad / ref[~good].sum()))


def grpo_optimum(ref_logp: np.ndarray, good: np.ndarray, beta: float, group: int) -> np.ndarray:
    """Where GRPO ends on one categorical with rewards of 0 and 1: forward KL with a slope of its own.

    At success probability s the reward 1 counts as `rivals.group_std_slope(s)`; s is the root at which the
    forward-KL optimum of that reward has success probability s.

    Args:
        ref_logp: reference log-probabilities (nats).
        good: whether the reward of each outcome is 1.
        beta: weight of the k3 penalty.
        group: samples in a group.

    Returns:
        Log-probabilities (nats).
    """

    @jax.jit
    def optimum(success):
        return targets.forward_kl(ref_logp, rivals.group_std_slope(success, group) * good, beta)

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.exp(optimum(middle))[good].sum() > middle else (low, middle)
    return np.asarray(optimum(low))


def reinvent_elsewhere(ref_logp: np.ndarray, reward: np.ndarray, beta: float, sampler_logp: np.ndarray) -> np.ndarray:
    """Where REINVENT's loss ends on samples that are not its own: q (log ref + R / beta - log pi) ∝ pi.

    Args:
        ref_logp: reference log-probabilities (nats).
        reward: reward of each outcome.
        beta: 1 / sigma.
        sampler_logp: log-probabilities q of what draws the samples (nats).

    Returns:
        Log-probabilities (nats); right where the constant is above 0, which large rewards see to.
    """
    augmented = ref_logp + reward / beta
    return separable(lambda p: np.exp(sampler_logp) * np.maximum(augmented - np.log(p), -1.0) / p, len(reward))
