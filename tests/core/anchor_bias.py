"""The bias of an anchor taken from the group, exactly; run this file to print a table of benchmarks/RESULTS.md.

Five outcomes of one token. The expected gradient, and the distribution at which it vanishes, come from all groups.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.audit import enumeration, fixed_point
from mara_jax.core import advantages, augment, diversity, objectives, targets

REF_LOGP = np.log([0.60, 0.30, 0.05, 0.04, 0.01])
REWARD = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
THRESHOLD = 0.8
OUTCOMES = enumeration.outcomes(len(REWARD))
UNIFORM = np.zeros((1, len(REWARD)))


@functools.cache
def gradient(size: int, anchor: str, baseline: str):
    """(logits [1, a], beta) -> expected gradient of the objective; anchor "group", or "all" for the whole good set."""
    groups = enumeration.groups(len(REWARD), size)
    fixed = {} if anchor == "group" else {"anchor_reward": REWARD[0], "anchor_ref_logp": REF_LOGP[0]}

    def of_logits(params, beta):
        def loss(logp_a1, index):
            reward, ref_logp = (jnp.asarray(x)[index][None] for x in (REWARD, REF_LOGP))
            reward, ref_logp = augment.mara(reward, ref_logp, beta=beta, threshold=THRESHOLD, **fixed)
            logp = logp_a1[index][None]
            settings = {"beta": beta, "advantage": advantages.BY_NAME[baseline]}
            return objectives.reverse_kl(logp, jnp.ones_like(logp), ref_logp, reward, **settings)[0]

        return -enumeration.expected_gradient(loss, params, OUTCOMES, groups)

    return of_logits


@functools.cache
def end(size: int, anchor: str, baseline: str, beta: float) -> np.ndarray:
    """Log-probabilities of the distribution at which the expected gradient vanishes, followed from uniform."""
    with jax.enable_x64(True):
        point = fixed_point.find(fixed_point.flow(gradient(size, anchor, baseline), OUTCOMES), UNIFORM, beta)
    assert point.is_attractor
    return point.logp


def distance(logp: np.ndarray, beta: float) -> float:
    """Total variation to Eq. 13."""
    with jax.enable_x64(True):
        target = targets.mara(REF_LOGP, REWARD, beta, THRESHOLD)
    return diversity.total_variation(np.exp(logp), np.exp(target))


def gradient_error(size: int, baseline: str, beta: float) -> float:
    """How far the expected gradient at the uniform policy is from that of the anchor over the good set."""
    with jax.enable_x64(True):
        got, want = (jax.jit(gradient(size, anchor, baseline))(UNIFORM, beta) for anchor in ("group", "all"))
        return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def main() -> None:
    columns = "baseline", "N", "gradient off", "beta .1: stationary point", "distance"
    print("| " + " | ".join((*columns, "beta 1: stationary point", "distance")) + " |")
    print("|---|---|---|---|---|---|---|")
    for baseline, size in itertools.product(("none", "leave_one_out"), (1, 2, 3, 4, 8, 16)):
        if baseline == "leave_one_out" and size == 1:
            continue
        cells = [f"{gradient_error(size, baseline, 0.1):.3f} / {gradient_error(size, baseline, 1.0):.3f}"]
        for beta in (0.1, 1.0):
            logp = end(size, "group", baseline, beta)
            cells += [" ".join(f"{p:.3f}" for p in np.exp(logp)), f"{distance(logp, beta):.3f}"]
        print(f"| {baseline} | {size} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
