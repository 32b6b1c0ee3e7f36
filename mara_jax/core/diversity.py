"""How diverse a policy's answers are: entropy, shares with intervals, distances, trends; pure functions."""

import math

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from mara_jax.core import augment

WINDOW = 8  # batches whose answer counts are pooled (Figure 7)


def entropy_bits(counts: ArrayLike) -> float:
    """Entropy of the empirical distribution that counts define.

    Args:
      counts: [a] count (or mass) of each answer class.

    Returns:
      Bits, from 0 to log2(a); 0 where nothing was counted: no diversity was seen.

    Source:
      The diversity measure of the 1-2 task (Figure 7, right), for any number of answers.
    """
    counts = np.asarray(counts, np.float64)
    seen = counts[counts > 0]
    if seen.size == 0:
        return 0.0
    share = seen / seen.sum()
    return float(abs(np.sum(share * np.log2(share))))  # the sum is never positive; abs also turns -0 into 0


def pooled_counts(counts_ta: ArrayLike, window: int = WINDOW) -> np.ndarray:
    """Counts summed over each step and those before it.

    Args:
      counts_ta: [t, a] counts of a batch's answers, step by step.
      window: how many consecutive batches are summed; the first steps have fewer.

    Returns:
      [t, a].
    """
    total_ta = np.cumsum(np.asarray(counts_ta, np.float64), axis=0)
    before_ta = np.zeros_like(total_ta)
    before_ta[window:] = total_ta[:-window] if len(total_ta) > window else 0
    return total_ta - before_ta


def shares(counts: ArrayLike, total: float | None = None) -> np.ndarray:
    """Each class's share of `total` (by default of the counts' own sum), [a]; nan where the total is 0."""
    counts = np.asarray(counts, np.float64)
    total = counts.sum() if total is None else total
    return counts / total if total else np.full(counts.shape, np.nan)


def interval(count: float, total: float) -> tuple[float, float]:
    """Wilson's 95 % interval for a share seen `count` times in `total` samples; (0, 1) for no samples."""
    if not total:
        return 0.0, 1.0
    low, high = augment.wilson_interval(jnp.float32(count), int(total))
    return float(low), float(high)


def total_variation(share_p: ArrayLike, share_q: ArrayLike) -> float:
    """Half the summed absolute difference of two distributions over the same classes: 0 equal, 1 disjoint.

    Args:
      share_p: [a] probabilities.
      share_q: [a] probabilities.

    Returns:
      A number from 0 to 1, or nan where a share is unknown.
    """
    return float(np.abs(np.asarray(share_p, np.float64) - np.asarray(share_q, np.float64)).sum() / 2)


def coverage(logp_a: ArrayLike, good_a: ArrayLike) -> np.ndarray:
    """Effective share of the good outcomes that a policy gives: exp(entropy over the good ones) / their number.

    Args:
      logp_a: [..., a] log-probabilities (nats).
      good_a: [..., a] whether an outcome is good; broadcast against logp_a.

    Returns:
      [...] 1 where all good outcomes are equally likely, 1 / count where there is only one; nan without a good one.
    """
    logp_a = np.asarray(logp_a, np.float64)
    good_a = np.broadcast_to(good_a, logp_a.shape)
    mass_a = np.where(good_a, np.exp(logp_a), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        share_a = mass_a / mass_a.sum(-1, keepdims=True)
        entropy = -np.sum(np.where(share_a > 0, share_a * np.log(share_a), 0.0 * share_a), axis=-1)
        return np.exp(entropy) / good_a.sum(-1)


def gap(counts: ArrayLike, log_optimum: ArrayLike) -> dict[str, float]:
    """How far sampled answers are from a known optimum, and from equally many of each.

    The classes are the answers and, last, none: completions of one class are pooled, so each KL here is at most
    that between the distributions over whole completions.

    Args:
      counts: [a + 1] completions that gave each answer, then those that gave none.
      log_optimum: [a + 1] log-mass of each class at the objective's optimum (nats), finite.

    Returns:
      `kl_to_optimum` KL(pi || G) and `kl_from_optimum` KL(G || pi) in nats, where a class without a completion counts
      as half a completion; `tv_optimum` and `tv_uniform`, total variation of the plain shares to G and to equal shares
      of all answers. All nan where there are no completions.
    """
    counts, log_optimum = np.asarray(counts, np.float64), np.asarray(log_optimum, np.float64)
    if not counts.sum():
        return dict.fromkeys(("kl_to_optimum", "kl_from_optimum", "tv_optimum", "tv_uniform"), float("nan"))
    smoothed = np.where(counts > 0, counts, 0.5)
    log_share, optimum = np.log(smoothed / smoothed.sum()), np.exp(log_optimum)
    uniform = np.append(np.full(len(counts) - 1, 1 / (len(counts) - 1)), 0.0)
    return {
        "kl_to_optimum": float(np.exp(log_share) @ (log_share - log_optimum)),
        "kl_from_optimum": float(optimum @ (log_optimum - log_share)),
        "tv_optimum": total_variation(counts / counts.sum(), optimum),
        "tv_uniform": total_variation(counts / counts.sum(), uniform),
    }


def pass_at_k(count: int, good: int, k: int) -> float:
    """Probability that at least one of k samples is good, unbiased from `count` samples of which `good` are.

    Args:
      count: n samples; good: c of them; k: from 1 to n.

    Returns:
      1 - C(n - c, k) / C(n, k).

    Raises:
      ValueError: k is not between 1 and n, or c not between 0 and n.

    Source:
      Chen et al., arXiv 2107.03374, section 2.1.
    """
    if not (1 <= k <= count and 0 <= good <= count):
        raise ValueError(f"pass@{k} of {count} samples, {good} of them good: choose k from 1 to {count}")
    return 1 - math.comb(count - good, k) / math.comb(count, k)


def slope(series: ArrayLike) -> float:
    """Slope of the least-squares line through a series, per step; nan for fewer than two finite values.

    Args:
      series: [t] one value a step; values that are not finite are left out, their steps still count.

    Returns:
      The series' unit per step.
    """
    value = np.asarray(series, np.float64)
    step = np.arange(value.size)[np.isfinite(value)]
    value = value[np.isfinite(value)]
    if len(value) < 2:
        return float("nan")
    centred = step - step.mean()
    return float(centred @ value / (centred @ centred))
