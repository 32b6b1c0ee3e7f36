"""The small autoregressive policy trained with sampled MARA; run this file for a table of benchmarks/RESULTS.md."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mara_jax.audit import enumeration
from mara_jax.core import advantages, augment, objectives, targets
from mara_jax.policies import categorical

BETA, THRESHOLD, STEPS = 0.2, 0.8, 3000


def problem():
    """Strings ending in token 2 or after three; rewards 0 or 1, half each; a skewed reference."""
    all_strings = enumeration.strings(end=2)
    with jax.ensure_compile_time_eval():
        ref_logp = np.asarray(enumeration.string_logp(enumeration.random_logits(5), all_strings))
    reward = (np.random.default_rng(6).uniform(size=len(ref_logp)) < 0.5).astype(np.float32)
    return all_strings, ref_logp, reward


@functools.partial(jax.jit, static_argnames=("anchor", "baseline", "group"))
def train(seed, *, anchor: str, baseline: str, group: int):
    """Log-probabilities of all strings after training from the reference, Adam with a falling step size."""
    all_strings, ref_logp, reward = problem()
    mask_nt = jnp.asarray(all_strings.mask)
    z = int(np.argmax(np.where(reward >= THRESHOLD, ref_logp, -np.inf)))
    given = {"anchor_reward": reward[z], "anchor_ref_logp": ref_logp[z]} if anchor == "all" else {}
    tx = optax.adam(optax.cosine_decay_schedule(3e-2, STEPS))
    prompts = 64 // group  # the same number of strings a step whatever the group

    def step(carry, key):
        params, opt_state = carry
        drawn = categorical.sample(key, enumeration.string_logp(params, all_strings), 64).reshape(prompts, group)
        reward_pg, ref_logp_pg = augment.mara(
            jnp.asarray(reward)[drawn], jnp.asarray(ref_logp)[drawn], beta=BETA, threshold=THRESHOLD, **given
        )

        def loss(params):
            logp_pgt = enumeration.token_logp(params, all_strings)[drawn]
            return objectives.reverse_kl(
                logp_pgt, mask_nt[drawn], ref_logp_pg, reward_pg,
                beta=BETA, advantage=advantages.BY_NAME[baseline],
            )[0]  # fmt: skip

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        return (params + updates, opt_state), None

    params = jnp.asarray(enumeration.random_logits(5), jnp.float32)
    keys = jax.random.split(jax.random.key(seed), STEPS)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    return enumeration.string_logp(params, all_strings)


def distance(logp) -> float:
    """Total variation to the optimum of Eq. 13."""
    _, ref_logp, reward = problem()
    target = targets.mara(ref_logp, reward, BETA, THRESHOLD)
    return float(jnp.sum(jnp.abs(jnp.exp(logp) - jnp.exp(target))) / 2)


def main() -> None:
    _, ref_logp, _ = problem()
    print("reference itself", round(distance(ref_logp), 3))
    for anchor in ("all", "batch"):
        for baseline, group in (
            ("none", 4),
            ("none", 64),
            ("leave_one_out", 2),
            ("leave_one_out", 4),
            ("leave_one_out", 64),
        ):
            ends = [distance(train(seed, anchor=anchor, baseline=baseline, group=group)) for seed in range(3)]
            print(anchor, baseline, group, [round(d, 3) for d in ends])


if __name__ == "__main__":
    main()
