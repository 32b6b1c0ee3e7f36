"""A task's prompts as token ids, encoded when they are used."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from mara_jax import config
from mara_jax.config import LanguageRun
from mara_jax.policies import encoding
from mara_jax.policies.policy import Policy
from mara_jax.tasks.base import Prompt, Task

CHECKED = 1000  # prompts that are encoded before a run begins, to see whether they fit
MOST_TRIES = 1000  # to find a prompt that fits the model's context
LONG_PROMPTS_CURE = ", or set rollout.long_prompts=replace"


class PromptTooLongError(ValueError):
    """A prompt that leaves too little of the model's context for a completion."""


class EncodedPrompts(Sequence[list[int]]):
    """Token ids of each prompt of a task, in the chat template where the config asks for it; indexed from 0."""

    def __init__(self, run: LanguageRun, policy: Policy, task: Task) -> None:
        self.run, self.policy, self.task = run, policy, task

    def __len__(self) -> int:
        return len(self.task)

    def __iter__(self) -> Iterator[list[int]]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> list[int]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The tokens of one prompt.

        Raises:
          PromptTooLongError: it leaves too little of the model's context for a completion.
          ValueError: it cannot be encoded.
        """
        ids = self.encode([self.task.prompt(int(number))])[0]
        most, new = self.policy.architecture.max_positions, self.run.rollout.max_new_tokens
        if len(ids) + new > most:
            cure = f"use at most {most - len(ids)}" if len(ids) < most else "choose a model with a longer context"
            raise PromptTooLongError(
                f"rollout.max_new_tokens={new} after prompt {number} of {len(ids)} tokens makes {len(ids) + new}, but "
                f"{self.policy.source} has {most} positions: {cure}{LONG_PROMPTS_CURE}"
            )
        return ids

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Others as the task's prompts are encoded."""
        return encode(self.run.policy, self.policy.tokenizer, prompts)


def encode(cfg: config.Policy, tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Prompts as token ids, in the chat template where the config says so; errors as of `encoding.encode_prompts`."""
    return encoding.encode_prompts(tokenizer, prompts, cfg.chat, cfg.system, config.template_options(cfg))


def ended_by_turns(policy: Policy, chat: bool) -> Policy:
    """The policy with the token that closes a turn of its chat template, if any, among those that end a completion."""
    turn = encoding.end_of_turn(policy.tokenizer) if chat else None
    return policy if turn is None else dataclasses.replace(policy, eos_ids=tuple(sorted({*policy.eos_ids, turn})))


def endings(policy: Policy, chat: bool) -> str:
    """In words, what ends a completion; a warning where nothing does, or where the chat template has no end of turn."""
    tokens = [str(policy.tokenizer.convert_ids_to_tokens(token)) for token in policy.eos_ids]
    turn = encoding.end_of_turn(policy.tokenizer) if chat else None
    unclosed = "the chat template closes a turn with no special token of the tokenizer"
    if not tokens:
        return (
            f"WARNING: nothing will end a completion, each runs to rollout.max_new_tokens: {policy.source} names no "
            f"end token{f', and {unclosed}' if chat else ''}; set eos_token_id in generation_config.json"
        )
    if chat and turn is None:
        return f"WARNING: completions end at {', '.join(tokens)} alone: {unclosed}, so an answer may run on"
    return f"completions end at {', '.join(tokens)}"


def ids_of_step(cfg: LanguageRun, prompts: int, done: int) -> np.ndarray:
    """Which of `prompts` prompts the step after `done` steps uses: a function of (seed, step)."""
    order = grain.MapDataset.range(prompts).seed(cfg.seed).shuffle().repeat()
    count = cfg.rollout.prompts_per_step
    return np.array([order[done * count + i] for i in range(count)])


def refuse_long(cfg: LanguageRun, encoded: EncodedPrompts) -> None:
    """Refuses prompts that do not fit before anything is written: the first step's, and the first CHECKED of all.

    Raises:
      PromptTooLongError: naming the first; with `rollout.long_prompts=replace` where no prompt can be found that fits.
    """
    first = fitting(cfg, encoded, ids_of_step(cfg, len(encoded), 0), 0).ids.tolist()
    for number in [*first, *(range(min(len(encoded), CHECKED)) if cfg.rollout.long_prompts == "error" else ())]:
        encoded[number]


def other_ids(cfg: LanguageRun, prompts: int, ids: np.ndarray, done: int, redraw: int) -> np.ndarray:
    """As many prompts as `ids`, not those where there are others: a function of (seed, step, redraw)."""
    drawn = _random(cfg, done, 0, redraw).integers(prompts, size=16 * len(ids) + 64).tolist()
    used = set(ids.tolist())
    unused = [number for number in dict.fromkeys(drawn) if number not in used]
    return np.array([*unused, *drawn][: len(ids)])


def _random(cfg: LanguageRun, done: int, purpose: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([cfg.seed, done, purpose, number])))


class Fitting(NamedTuple):
    """ids [p] of prompts that fit the model's context; replaced: how many are others than those asked for."""

    ids: np.ndarray
    replaced: int


def fitting(cfg: LanguageRun, encoded: Sequence[list[int]], ids: np.ndarray, done: int) -> Fitting:
    """A step's prompts; with `rollout.long_prompts=replace` those too long for the model's context are replaced by
    others, a function of (seed, step, position).

    Raises:
      PromptTooLongError: none of MOST_TRIES others fits.
    """
    if cfg.rollout.long_prompts == "error":
        return Fitting(ids, 0)
    chosen = np.array(ids)
    for position in range(len(ids)):
        random = _random(cfg, done, 1, position)
        for tries in range(MOST_TRIES):
            try:
                encoded[int(chosen[position])]
                break
            except PromptTooLongError:
                if tries + 1 == MOST_TRIES:
                    raise
                chosen[position] = random.integers(len(encoded))
    return Fitting(chosen, int(np.sum(chosen != ids)))
