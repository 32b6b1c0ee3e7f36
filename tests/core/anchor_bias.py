"""The bias of an anchor taken from the batch, exactly: run this file to print the table of docs/objectives.md.

Groups of N draws from a categorical are enumerated as counts with their multinomial probabilities, so that the
expected gradient, and the distribution at which it vanishes, need no sampling at any N.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from mara_jax.core import advantages, augment, targets

REF_LOGP = np.log([0.60, 0.30, 0.05, 0.04, 0.01])
REWARD = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
BETA, THRESHOLD = 0.1, 0.8
OUTCOMES = len(REWARD)


class Groups:
    """All groups of `size` draws, as rows in ascending order, with what the augmentation makes of each."""

    def __init__(self, size: int, anchor: str):
        rows = np.array(list(itertools.combinations_with_replacement(range(OUTCOMES), size)))
        self.rows = rows
        self.counts = np.stack([(rows == a).sum(-1) for a in range(OUTCOMES)], -1)
        self.log_orders = special.gammaln(size + 1) - special.gammaln(self.counts + 1).sum(-1)
        given = {} if anchor == "batch" else {"anchor_reward": REWARD[0], "anchor_ref_logp": REF_LOGP[0]}
        with jax.enable_x64(True):
            augmented = augment.mara(REWARD[rows], REF_LOGP[rows], beta=BETA, threshold=THRESHOLD, **given)[0]
        self.signal = np.asarray(augmented) + BETA * REF_LOGP[rows]

    def expected_signal(self, logp: np.ndarray, baseline: str) -> np.ndarray:
        """Mean advantage of each outcome, given that a sample is that outcome, less the mean over all."""
        probability = np.exp(self.log_orders + self.counts @ logp)
        with jax.enable_x64(True):
            advantage = np.asarray(advantages.BY_NAME[baseline](jnp.asarray(self.signal - BETA * logp[self.rows])))
        weight = probability[:, None] * advantage / self.rows.shape[1]
        share = np.array([weight[self.rows == a].sum() for a in range(OUTCOMES)])
        return (share - np.exp(logp) * share.sum()) / np.exp(logp)

    def gradient(self, logp: np.ndarray, baseline: str) -> np.ndarray:
        """Expected gradient in the logits."""
        return np.exp(logp) * self.expected_signal(logp, baseline)

    def stationary(self, baseline: str) -> np.ndarray:
        """The distribution at which the expected gradient vanishes, by natural-gradient steps from uniform."""
        logp = np.full(OUTCOMES, -np.log(OUTCOMES))
        for _ in range(4000):
            step = self.expected_signal(logp, baseline)
            logp = special.log_softmax(logp + 0.2 / BETA * step)
            if np.abs(step).max() < 1e-10:
                break
        return logp


def table(sizes=(1, 2, 3, 4, 8, 16)) -> list[dict]:
    """One row for each baseline and group size."""
    with jax.enable_x64(True):
        target = np.asarray(targets.mara(REF_LOGP, REWARD, BETA, THRESHOLD))
    uniform = np.full(OUTCOMES, -np.log(OUTCOMES))
    rows = []
    for baseline, size in itertools.product(("none", "leave_one_out"), sizes):
        if baseline == "leave_one_out" and size == 1:
            continue
        groups, truth = Groups(size, "batch"), Groups(size, "all")
        end, want = groups.stationary(baseline), truth.gradient(uniform, baseline)
        error = np.linalg.norm(groups.gradient(uniform, baseline) - want) / np.linalg.norm(want)
        distance = np.abs(np.exp(end) - np.exp(target)).sum() / 2
        left = np.abs(groups.expected_signal(end, baseline)).max()
        rows.append(
            {"baseline": baseline, "size": size, "error": error, "end": np.exp(end), "distance": distance, "left": left}
        )
    return rows


if __name__ == "__main__":
    print("| baseline | N | gradient off at uniform | stationary distribution | total variation to Eq. 13 |")
    print("|---|---|---|---|---|")
    for row in table():
        end = " ".join(f"{p:.3f}" for p in row["end"])
        print(f"| {row['baseline']} | {row['size']} | {row['error']:.3f} | {end} | {row['distance']:.3f} | {row['left']:.1e}")
