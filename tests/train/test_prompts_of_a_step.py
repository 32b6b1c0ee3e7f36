"""Which prompts a step uses: functions of (seed, step), prompts that are too long among them."""

import dataclasses

import numpy as np
import pytest
import small_tokenizers

from mara_jax import config
from mara_jax.config import LanguageRun, Rollout
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.tasks.base import Score, Task
from mara_jax.train import prompts

RUN = LanguageRun(policy=config.Policy(chat=False), rollout=Rollout(max_new_tokens=8, long_prompts="replace"))


class Letters(Task):
    """Prompts of so many letters; each letter is a token."""

    def __init__(self, *counts: int) -> None:
        self.counts = counts

    def __len__(self) -> int:
        return len(self.counts)

    def prompt(self, index: int) -> str:
        return "x" * self.counts[index]

    def score(self, prompt_index, texts, finished) -> Score:
        raise NotImplementedError


def encoded(task: Task, run: LanguageRun = RUN) -> prompts.EncodedPrompts:
    arch = transformer.Architecture("qwen2", 300, 16, 1, heads=2, kv_heads=1, head_dim=8, mlp=16, max_positions=20)
    tokenizer = small_tokenizers.byte_level()
    return prompts.EncodedPrompts(run, Policy(arch, tokenizer, (2,), 0, {}, "random"), task)


def test_long_prompts_are_replaced_by_a_function_of_seed_step_and_position():
    """Of 12 positions 8 are the completion's at most: prompts of 12 tokens fit, of 13 do not."""
    few = encoded(Letters(12, 13, 3, 99))
    ids = np.array([0, 1, 2, 3, 1])
    once = prompts.fitting(RUN, few, ids, 4)
    assert once.replaced == 3 and set(once.ids.tolist()) <= {0, 2} and once.ids[[0, 2]].tolist() == [0, 2]
    again = prompts.fitting(RUN, few, ids, 4)
    assert np.array_equal(again.ids, once.ids)
    # A position does not depend on the others, and other steps and seeds choose others.
    for position, number in enumerate(ids):
        alone = prompts.fitting(RUN, few, np.where(np.arange(5) == position, number, 0), 4).ids[position]
        assert alone == once.ids[position]
    others = [
        prompts.fitting(dataclasses.replace(RUN, seed=seed), few, ids, step).ids for seed in (0, 1) for step in range(9)
    ]
    assert len({one.tobytes() for one in others}) > 3


def test_long_prompts_end_the_run_unless_they_are_replaced():
    run = dataclasses.replace(RUN, rollout=dataclasses.replace(RUN.rollout, long_prompts="error"))
    ids = np.array([1])
    assert prompts.fitting(run, encoded(Letters(12, 13), run), ids, 0).ids.tolist() == [1]
    with pytest.raises(ValueError, match=r"use at most 7, or set rollout\.long_prompts=replace"):
        encoded(Letters(12, 13), run)[1]
    with pytest.raises(ValueError, match=r"after prompt . of 1. tokens"):  # none fits
        prompts.fitting(RUN, encoded(Letters(13, 14)), ids, 0)


def test_other_prompts_than_a_step_has_used():
    ids = np.array([3, 7])
    draws = [prompts.other_ids(RUN, 10, ids, 0, redraw) for redraw in (1, 2, 3)]
    assert all(len(set(one.tolist())) == 2 and not set(one.tolist()) & {3, 7} for one in draws)
    assert len({one.tobytes() for one in draws}) == 3
    np.testing.assert_array_equal(prompts.other_ids(RUN, 10, ids, 0, 1), draws[0])
    assert prompts.other_ids(RUN, 2, np.array([0, 1]), 0, 1).shape == (2,)  # there are no others
