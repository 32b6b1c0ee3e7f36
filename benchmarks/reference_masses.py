"""Where MARA over answers ends when the answers' masses come from n samples of the reference.

  python benchmarks/reference_masses.py            the table: n = 4, 16, 64 and 2, 5, 15 answers, two references
  python benchmarks/reference_masses.py --train    one cell again, by training with sampled gradients

Prints one JSON object a line. A reference gives a quarter of its completions no answer (reward 0); the rest, all of
reward 1, go to answer k in proportion to 2^-k ("geometric") or 1/k ("zipf"). Its n samples are drawn before training
and give the masses (`augment.answer_log_mass`); an answer that is not among them counts as half a sample, or, by the
earlier rule "floor", as 1/256 of the largest answer. Training then maximises a fixed objective, whose optimum is known
in closed form: each answer's share is proportional to its true mass over the estimated one. Distances are total
variations of the distribution over answers and "none". All counts of n samples are enumerated where there are at most
MOST_COUNTS of them, and drawn otherwise.
"""

import argparse
import functools
import itertools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mara_jax.core import advantages, augment, objectives, targets
from mara_jax.policies import categorical

SAMPLES, ANSWERS, BETAS = (4, 16, 64), (2, 5, 15), (0.05, 0.1)
INVALID, THRESHOLD = 0.25, 0.8
MOST_COUNTS, DRAWS, CHUNK = 50_000, 100_000, 10_000


def reference(name: str, answers: int) -> np.ndarray:
    """Probability of each answer, then of none."""
    rank = np.arange(1, answers + 1)
    share = 2.0**-rank if name == "geometric" else 1.0 / rank
    return np.append((1 - INVALID) * share / share.sum(), INVALID)


def all_counts(n: int, classes: int) -> np.ndarray:
    """Every way to count n samples of so many classes."""
    bars = np.array(list(itertools.combinations(range(n + classes - 1), classes - 1)))
    edges = np.concatenate([np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), n + classes - 1)], axis=1)
    return np.diff(edges, axis=1) - 1


def possible_counts(n: int, ref: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, bool]:
    """Counts of n samples of the reference, the probability of each, and whether they are all that can be."""
    if math.comb(n + len(ref) - 1, n) > MOST_COUNTS:
        return np.random.default_rng(seed).multinomial(n, ref, size=DRAWS), np.full(DRAWS, 1 / DRAWS), False
    counts = all_counts(n, len(ref))
    log_factorial = np.cumsum(np.log(np.maximum(np.arange(n + 1), 1)))
    log_orders = log_factorial[n] - log_factorial[counts].sum(axis=1)
    return counts, np.exp(log_orders + counts @ np.log(ref)), True


def signal(counts_pc, ref_logp_c, beta, rule: str):
    """Reward and reference log-prob of every outcome after MARA, [p, c], for prompts with these counts of samples."""
    classes = counts_pc.shape[1]
    n = int(counts_pc[0].sum())
    answer_c = np.append(np.arange(classes - 1), -1)
    answer_pn = jnp.asarray([np.repeat(answer_c, count_c) for count_c in counts_pc])
    assert answer_pn.shape[1] == n
    return _signal(answer_pn, jnp.asarray(ref_logp_c), beta, rule)


@functools.partial(jax.jit, static_argnames="rule")
def _signal(answer_pn, ref_logp_c, beta, rule: str):
    prompts, answers = answer_pn.shape[0], ref_logp_c.shape[0] - 1
    seen_pn = jnp.where(answer_pn >= 0, 1.0, 0.0)
    log_mass_pa = augment.answer_log_mass(seen_pn, answer_pn, answers, beta, THRESHOLD)
    unseen_p = augment.unseen_log_mass(seen_pn, beta, THRESHOLD)
    if rule == "floor":
        unseen_p = jnp.max(log_mass_pa, axis=-1) - math.log(256)
    reward_c = jnp.where(jnp.arange(answers + 1) < answers, 1.0, 0.0)
    answer_c = jnp.append(jnp.arange(answers), -1)
    of_prompts = [jnp.tile(x, (prompts, 1)) for x in (reward_c, ref_logp_c, answer_c)]
    return augment.mara_answers(*of_prompts, log_mass_pa, beta=beta, threshold=THRESHOLD, unseen_log_mass=unseen_p)


def optima(ref: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities at the optimum of MARA with the true masses, and of vanilla."""
    reward, answer = np.append(np.ones(len(ref) - 1), 0.0), np.append(np.arange(len(ref) - 1), -1)
    mara = targets.mara_answers(np.log(ref), reward, answer, beta, THRESHOLD)
    return np.exp(mara), np.exp(targets.reverse_kl(np.log(ref), reward, beta))


def ends(counts: np.ndarray, ref: np.ndarray, beta: float, rule: str) -> np.ndarray:
    """Where training ends for each row of counts: probability of each answer, then of none."""
    rows = []
    for start in range(0, len(counts), CHUNK):
        reward_pc, ref_hat_pc = signal(counts[start : start + CHUNK], np.log(ref), beta, rule)
        rows.append(np.exp(targets.reverse_kl(ref_hat_pc, reward_pc, beta)))
    return np.concatenate(rows)


def total_variation(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.abs(p - q).sum(axis=-1) / 2


def cell(name: str, n: int, answers: int, beta: float, rule: str) -> dict[str, Any]:
    """Means and 5 % and 95 % quantiles over the reference's samples of the distances to both optima."""
    ref = reference(name, answers)
    counts, weight, exact = possible_counts(n, ref)
    mara, vanilla = optima(ref, beta)
    reached = ends(counts, ref, beta, rule)
    to_mara, to_vanilla = total_variation(reached, mara), total_variation(reached, vanilla)
    unseen = (counts[:, :-1] == 0).sum(axis=1)
    return {
        "benchmark": "reference_masses",
        **{"reference": name, "samples": n, "answers": answers, "beta": beta, "unseen_counts_as": rule},
        **{"counts": len(counts), "enumerated": exact},
        **_summary("tv_mara", to_mara, weight),
        **_summary("tv_vanilla", to_vanilla, weight),
        "tv_mara_vanilla": float(total_variation(mara, vanilla)),
        "nearer_to_mara": float(weight @ (to_mara < to_vanilla)),
        "nearer_than_vanilla": float(weight @ (to_mara < total_variation(mara, vanilla))),
        "unseen_answers": float(weight @ unseen),
    }


def _summary(name: str, value: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    order = np.argsort(value)
    below = np.cumsum(weight[order])
    low, high = (float(value[order][np.searchsorted(below, level * below[-1])]) for level in (0.05, 0.95))
    return {name: float(weight @ value), f"{name}_low": low, f"{name}_high": high}


def train(name: str, n: int, answers: int, beta: float, *, prompts: int, steps: int, group: int) -> dict[str, Any]:
    """One cell by training: a free policy for each prompt, sampled groups, leave-one-out and Adam with a falling rate.

    Each prompt has the same reference, and n samples of it of its own.
    """
    ref = reference(name, answers)
    counts = np.random.default_rng(1).multinomial(n, ref, size=prompts)
    reward_pc, ref_hat_pc = signal(counts, np.log(ref), beta, "half")
    tx = optax.adam(optax.cosine_decay_schedule(3e-2, steps))

    def step(carry, key):
        logits_pc, opt_state = carry
        logp_pc = jax.nn.log_softmax(logits_pc)
        outcome_pg = jax.vmap(lambda k, logp_c: categorical.sample(k, logp_c, group))(
            jax.random.split(key, prompts), logp_pc
        )
        reward_pg, ref_pg = (jnp.take_along_axis(x, outcome_pg, axis=1) for x in (reward_pc, ref_hat_pc))

        def loss(logits_pc):
            logp_pg = jnp.take_along_axis(jax.nn.log_softmax(logits_pc), outcome_pg, axis=1)
            one_pg1 = jnp.ones((*logp_pg.shape, 1))
            settings = {"beta": beta, "advantage": advantages.leave_one_out}
            return objectives.reverse_kl(logp_pg[..., None], one_pg1, ref_pg, reward_pg, **settings)[0]

        updates, opt_state = tx.update(jax.grad(loss)(logits_pc), opt_state)
        return (logits_pc + updates, opt_state), None

    start = jnp.tile(jnp.log(jnp.asarray(ref, jnp.float32)), (prompts, 1))
    keys = jax.random.split(jax.random.key(0), steps)
    (logits_pc, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((start, tx.init(start)))
    trained = np.exp(jax.nn.log_softmax(logits_pc))
    (mara, vanilla), closed = optima(ref, beta), ends(counts, ref, beta, "half")
    return {
        "benchmark": "reference_masses_trained",
        **{"reference": name, "samples": n, "answers": answers, "beta": beta},
        **{"prompts": prompts, "steps": steps, "group": group},
        "tv_mara": float(total_variation(trained, mara).mean()),
        "tv_mara_of_closed_form": float(total_variation(closed, mara).mean()),
        "tv_vanilla": float(total_variation(trained, vanilla).mean()),
        "tv_vanilla_of_closed_form": float(total_variation(closed, vanilla).mean()),
        "tv_trained_closed_form": float(total_variation(trained, closed).mean()),
        "tv_trained_closed_form_largest": float(total_variation(trained, closed).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train one cell, instead of the table")
    options = parser.parse_args()
    if options.train:
        print(json.dumps(train("geometric", 16, 5, 0.1, prompts=64, steps=4000, group=16)), flush=True)
        return
    for name, beta, answers, n in itertools.product(("geometric", "zipf"), BETAS, ANSWERS, SAMPLES):
        for rule in ("half", "floor"):
            print(json.dumps(cell(name, n, answers, beta, rule)), flush=True)


if __name__ == "__main__":
    main()
