"""The groups of completions of a step: sampled, and sampled again where all rewards of a group are equal."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.config import LanguageRun
from mara_jax.core import method_rules
from mara_jax.policies import lora
from mara_jax.sampling import logprobs, rollout
from mara_jax.train import programs, reference, scoring
from mara_jax.train.prompts import fitting, other_ids
from mara_jax.train.setup import Setup
from mara_jax.train.state import State

MOST_REDRAWS = 3  # of a group whose rewards are all equal; what then is still equal stays


class Groups(NamedTuple):
    """Completions of p prompts.

    ids: [p] of the prompts; too_long: how many of them stand for a prompt that does not fit the model's context;
    redrawn: how many groups were sampled again.
    """

    completions: rollout.Rollout
    ids: np.ndarray
    too_long: int = 0
    redrawn: int = 0

    def counts(self, cfg: LanguageRun) -> dict[str, int]:
        """What is logged of it, where the config asks for replacements."""
        counts = {"prompts/too_long": self.too_long} if cfg.rollout.long_prompts == "replace" else {}
        return counts | ({"groups/redrawn": self.redrawn} if equal_groups(cfg) != "keep" else {})


def rollout_key(cfg: LanguageRun, stream: str, done: int) -> jax.Array:
    """The random key of a step's rollout, of the policy ("rollout") or of the reference policy ("reference")."""
    return jax.random.fold_in(reference.stream(cfg.seed, stream), done)


def policy_params(setup: Setup, state: State) -> Any:
    """All parameters of the policy: those that are trained, or the reference's with the trained adapter."""
    return lora.attached(setup.policy.architecture, setup.ref_params, state.params)


def start_rollout(setup: Setup, params: Any, ids: np.ndarray, key: jax.Array, redraw: int = 0) -> rollout.Pending:
    """Dispatches the sampling of a group of completions of each prompt.

    Args:
      redraw: each number gives other samples of the same prompts.
    """
    sizes = setup.cfg.rollout
    earlier = redraw * len(ids) + earlier_groups(ids)
    sampling = rollout.sampling_params(len(ids), temperature=1.0)
    tokens, first_sample = [setup.prompts[i] for i in ids], earlier * sizes.group_size
    prompts = rollout.place_prompts(setup.policy, tokens, sizes.group_size, sampling, ids, first_sample)
    sampled = programs.rollout_program(setup.cfg, setup.policy, params, prompts, key)()
    return rollout.Pending(setup.policy, prompts, sampled)


def earlier_groups(ids: np.ndarray) -> np.ndarray:
    """[p] How many groups of its prompt come before each: a prompt that a step uses twice has two groups of different
    samples, as random numbers belong to (prompt, sample)."""
    return np.array([np.sum(ids[:i] == number) for i, number in enumerate(ids)])


def varied(setup: Setup, state: State, groups: Groups, done: int) -> Groups:
    """The step's groups, or those of equal rewards drawn again, where the method (DAPO) or the config asks for it.

    `rollout.equal_groups` says of which prompts: "redraw" of the same, "replace" of others. Such groups are drawn up to
    MOST_REDRAWS times. Completions are scored once more for each draw.
    """
    asked = equal_groups(setup.cfg)
    if asked == "keep":
        return groups
    for redraw in range(1, MOST_REDRAWS + 1):
        equal_p = np.ptp(score(setup, groups.completions, groups.ids, done).reward, axis=1) == 0
        if not equal_p.any():
            break
        ids = groups.ids
        if asked == "replace":
            others = fitting(
                setup.cfg, setup.prompts, other_ids(setup.cfg, len(setup.prompts), ids, done, redraw), done
            )
            ids = np.where(equal_p, others.ids, ids)
        params, key = policy_params(setup, state), rollout_key(setup.cfg, "rollout", done)
        again = rollout.collect(start_rollout(setup, params, ids, key, redraw))
        completions = rollout.replaced(groups.completions, again, equal_p)
        groups = Groups(completions, ids, groups.too_long, groups.redrawn + int(equal_p.sum()))
    return groups


def score(setup: Setup, completions: rollout.Rollout, ids: np.ndarray, done: int) -> scoring.GroupScores:
    """The task's verdict on the completions of the step after `done` steps."""
    ref_logp_pg = None
    if setup.task.reads_ref_logp:
        prompt_tokens, lengths = completions.prompt_tokens, completions.prompt_lengths
        arrays = prompt_tokens, lengths, completions.tokens, completions.lengths
        ref_logp_pg = sequence_logp(setup.policy.architecture, setup.ref_params, *arrays)
    return scoring.score(setup.task, ids, completions, done + 1, ref_logp_pg)


@functools.partial(jax.jit, static_argnames=("arch",))
def sequence_logp(arch, params, prompt_tokens_ps, prompt_lengths_p, tokens_pgt, lengths_pg) -> jax.Array:
    """Log-probs [p, g] of whole completions (nats)."""
    logp_pgt = logprobs.completion_logps(arch, params, prompt_tokens_ps, prompt_lengths_p, tokens_pgt)
    return jnp.sum(logp_pgt * logprobs.mask(lengths_pg, tokens_pgt.shape[-1]), axis=-1)


def equal_groups(cfg: LanguageRun) -> str:
    """What happens to groups of equal rewards: "keep", "redraw" or "replace"."""
    if cfg.rollout.equal_groups != "auto":
        return cfg.rollout.equal_groups
    return "redraw" if method_rules.rows(cfg.algorithm)[1].redraws_equal_groups else "keep"
