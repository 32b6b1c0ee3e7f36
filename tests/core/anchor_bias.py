"""The bias of an anchor taken from the batch, exactly; run this file to print docs/objectives.md's table.

Groups of N draws from a categorical are enumerated as counts with their multinomial probabilities, so that
the expected gradient, and the distribution at which it vanishes, need no sampling at any N.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from mara_jax.core import advantages, augment, targets

REF_LOGP = np.log([0.60, 0.30, 0.05, 0.04, 0.01])
REWARD = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
THRESHOLD = 0.8
OUTCOMES = len(REWARD)


class Groups:
    """All groups of `size` draws, as rows in ascending order, with what the augmentation makes of each."""

    def __init__(self, size: int, anchor: str, beta: float):
        self.beta = beta
        rows = np.array(list(itertools.combinations_with_replacement(range(OUTCOMES), size)))
        self.rows = rows
        self.counts = np.stack([(rows == a).sum(-1) for a in range(OUTCOMES)], -1)
        self.log_orders = special.gammaln(size + 1) - special.gammaln(self.counts + 1).sum(-1)
        given = {} if anchor == "batch" else {"anchor_reward": REWARD[0], "anchor_ref_logp": REF_LOGP[0]}
        with jax.enable_x64(True):
            augmented = augment.mara(REWARD[rows], REF_LOGP[rows], beta=beta, threshold=THRESHOLD, **given)[0]
        self.signal = np.asarray(augmented) + beta * REF_LOGP[rows]

    def expected_signal(self, logp: np.ndarray, baseline: str) -> np.ndarray:
        """Mean advantage of each outcome, given that a sample is that outcome, less the mean over all."""
        probability = np.exp(self.log_orders + self.counts @ logp)
        with jax.enable_x64(True):
            advantage = np.asarray(advantages.BY_NAME[baseline](jnp.asarray(self.signal - self.beta * logp[self.rows])))
        weight = probability[:, None] * advantage / self.rows.shape[1]
        share = np.array([weight[self.rows == a].sum() for a in range(OUTCOMES)])
        return (share - np.exp(logp) * share.sum()) / np.exp(logp)

    def gradient(self, logp: np.ndarray, baseline: str) -> np.ndarray:
        """Expected gradient in the logits."""
        return np.exp(logp) * self.expected_signal(logp, baseline)

    def stationary(self, baseline: str) -> np.ndarray:
        """The distribution at which the expected gradient vanishes, by natural gradients from uniform."""
        logp = np.full(OUTCOMES, -np.log(OUTCOMES))
        for _ in range(4000):
            step = self.expected_signal(logp, baseline)
            logp = special.log_softmax(logp + 0.2 / self.beta * step)
            if np.abs(step).max() < 1e-10:
                break
        return logp


def distance(logp: np.ndarray, beta: float) -> float:
    """Total variation to Eq. 13."""
    with jax.enable_x64(True):
        target = np.asarray(targets.mara(REF_LOGP, REWARD, beta, THRESHOLD))
    return float(np.abs(np.exp(logp) - np.exp(target)).sum() / 2)


def gradient_error(size: int, baseline: str, beta: float) -> float:
    """How far the expected gradient at the uniform policy is from that of the anchor over the good set."""
    uniform = np.full(OUTCOMES, -np.log(OUTCOMES))
    got, want = (Groups(size, anchor, beta).gradient(uniform, baseline) for anchor in ("batch", "all"))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def main() -> None:
    columns = "baseline", "N", "gradient off", "beta .1: stationary point", "distance"
    print("| " + " | ".join((*columns, "beta 1: stationary point", "distance")) + " |")
    print("|---|---|---|---|---|---|---|")
    for baseline, size in itertools.product(("none", "leave_one_out"), (1, 2, 3, 4, 8, 16)):
        if baseline == "leave_one_out" and size == 1:
            continue
        cells = [f"{gradient_error(size, baseline, 0.1):.3f} / {gradient_error(size, baseline, 1.0):.3f}"]
        for beta in (0.1, 1.0):
            end = Groups(size, "batch", beta).stationary(baseline)
            cells += [" ".join(f"{p:.3f}" for p in np.exp(end)), f"{distance(end, beta):.3f}"]
        print(f"| {baseline} | {size} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
