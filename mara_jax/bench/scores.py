"""How long a reward model takes to score a step's completions, beside the phases that `speed` times."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from mara_jax.bench import phases
from mara_jax.bench.speed import clock
from mara_jax.parallel import sharding
from mara_jax.plan import work
from mara_jax.policies import parameters
from mara_jax.policies.parameters import Architecture
from mara_jax.policies.scores import compiled_scores
from mara_jax.tasks.base import LearnedReward, Prompt
from mara_jax.train import reward_model
from mara_jax.train.setup import Setup


class Asked(NamedTuple):
    """A reward model, and the prompts of a step as its task has them."""

    learned: LearnedReward
    prompts: Sequence[Prompt]


def measure(asked: Asked, setup: Setup, repeats: int) -> dict[str, Any]:
    """Times the scores of a rollout's completions by their texts, tokenizing included.

    Args:
      setup: of the rollout, drawn by the policy as it begins.
      repeats: timed calls after one that compiles; the median is reported.

    Returns:
      `where`, `parameters`, `completions` and `tokens`, of the sequences that differ; `seconds`, `all_seconds`,
      `tokens_per_s`, `flops`, padding among them, `flops_least` and `gflops_per_s`.
    """
    texts = phases.sample_completions(setup, setup.ref_params, 0).text
    prompts = [prompt for prompt, group in zip(asked.prompts, texts, strict=True) for _ in group]
    completions, model = [text for group in texts for text in group], reward_model.loaded(asked.learned)
    rows = list(dict.fromkeys(map(tuple, model.encode(prompts, completions))))
    spent = []
    for _ in range(repeats + 1):
        start = clock()
        model.scores_of(prompts, completions)
        spent.append(clock() - start)
    arch, seconds = model.policy.architecture, statistics.median(spent[1:])
    flops = counted(arch, model.params, rows)
    return {
        "where": asked.learned.where,
        "parameters": parameters.count(arch),
        "completions": len(rows),
        "tokens": sum(map(len, rows)),
        "seconds": seconds,
        "all_seconds": spent[1:],
        "tokens_per_s": sum(map(len, rows)) / seconds,
        "flops": flops,
        "flops_least": least(arch, rows),
        "gflops_per_s": flops / seconds / 1e9,
    }


def counted(arch: Architecture, params: Any, rows: Sequence[Sequence[int]]) -> int:
    """FLOPs of the calls that score these rows, from their jaxprs."""
    calls = reward_model.batches(rows, sharding.shard_count("rows"))
    return sum(
        work.flops(compiled_scores, arch, params, jnp.asarray(tokens_bt), jnp.asarray(lengths_b))
        for _, tokens_bt, lengths_b in calls
    )


def least(arch: Architecture, rows: Sequence[Sequence[int]]) -> int:
    """The analytic least: a forward pass of each row through the layers, without padding."""
    # As the reference's pass over prompts whose completions have one token, which no layer reads.
    return work.least(arch, list(map(len, rows)), [[1]] * len(rows)).reference
