"""Reward models: a transformer with a score head, loaded or begun, and its scores of completions in batches."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax import hf
from mara_jax.parallel import hosts, sharding
from mara_jax.policies import encoding, parameters
from mara_jax.policies.encoding import Prompt
from mara_jax.policies.policy import Policy
from mara_jax.policies.scores import compiled_scores
from mara_jax.tasks.base import LearnedReward
from mara_jax.train import placement, shape

TOKENS_AT_ONCE = 1 << 14  # of a call, padding included
MOST_ROWS = 32  # of a call: among more, lengths differ more, and so need more padding
LEAST_WIDTH = 32  # rows are padded to this, or to a power of two times it or times one and a half of it


class RewardModel(NamedTuple):
    """A model whose architecture has a score head, with its tokenizer and its parameters."""

    policy: Policy
    params: Any

    def encode(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[list[int]]:
        """Token ids of n conversations; errors as of `encoding.encode_answered`."""
        return encoding.encode_answered(self.policy.tokenizer, prompts, completions, pad_of(self.policy))

    def scores(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Scores of n sequences of token ids, on the devices of the layout in use; every process has all rows.

        Equal sequences are computed once, so that rounding does not set them apart.

        Returns:
          [n] float32 in reward units.
        """
        place = {row: number for number, row in enumerate(dict.fromkeys(map(tuple, rows)))}
        different, out = list(place), np.zeros(len(place), np.float32)
        for numbers, tokens_bt, lengths_b in batches(different, sharding.shard_count("rows")):
            arrays = hosts.shard_rows(tokens_bt), hosts.shard_rows(lengths_b)
            scores_b = hosts.gather(compiled_scores(self.policy.architecture, self.params, *arrays))
            out[numbers] = scores_b[: len(numbers)]
        return out[[place[tuple(row)] for row in rows]]

    def scores_of(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | str]:
        """Scores of completions, of which each process gives its own and gets those back.

        Returns:
          [n] A number (reward units), or a text that says why there is none: the sequence is too long.
        """
        mine = hosts.raise_on_all_processes(lambda: self.encode(prompts, completions))
        most = self.policy.architecture.max_positions
        parts = hosts.gather_json([row if len(row) <= most else [] for row in mine])
        everyone = [row for part in parts for row in part if row]
        scores = iter(self.scores(everyone).tolist()) if everyone else iter([])
        scored = [[next(scores) if row else 0.0 for row in part] for part in parts]
        own = scored[jax.process_index() if hosts.several_processes() else 0]
        return [
            score if len(row) <= most else f"{len(row)} tokens with its prompt, but {self.policy.source} reads {most}"
            for score, row in zip(own, mine, strict=True)
        ]


def pad_of(policy: Policy) -> int | None:
    """The padding token by which transformers finds a sequence's last token."""
    return policy.config.get("pad_token_id")


def padded(rows: Sequence[Sequence[int]], count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as arrays: tokens [count, width], lengths [count], int32; rows beyond those given have one token."""
    tokens_bt, lengths_b = np.zeros((count, width), np.int32), np.ones(count, np.int32)
    for place, row in enumerate(rows):
        tokens_bt[place, : len(row)], lengths_b[place] = row, len(row)
    return tokens_bt, lengths_b


def batches(rows: Sequence[Sequence[int]], shards: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Rows of ids in padded batches, the shortest first, of few shapes.

    Args:
      shards: the number of rows of a batch is a multiple of it.

    Yields:
      numbers of its rows [n], tokens [b, t], lengths [b]; b is at least n.
    """
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    first = 0
    while first < len(order):
        left = len(order) - first
        count = rows_at_once(left, lambda count, first=first: width_of(rows, order[first : first + count]))
        numbers = order[first : first + count]
        count = -(-count // shards) * shards
        yield numbers, *padded([rows[number] for number in numbers], count, width_of(rows, numbers))
        first += len(numbers)


def rows_at_once(left: int, width: Callable[[int], int]) -> int:
    """How many rows a call scores, a power of two.

    Args:
      left: rows to be scored; width: the padded length of so many of them.
    """
    count = min(MOST_ROWS, 1 << (left - 1).bit_length())
    while count > 1 and count * width(count) > TOKENS_AT_ONCE:
        count //= 2
    return count


def padded_width(longest: int) -> int:
    """The padded length of rows of which the longest has so many tokens: LEAST_WIDTH times 1, 2, 3, 4, 6, 8, 12, ..."""
    wide = LEAST_WIDTH << max(0, -(-longest // LEAST_WIDTH) - 1).bit_length()
    narrower = wide * 3 // 4
    return narrower if longest <= narrower and wide > 2 * LEAST_WIDTH else wide


def width_of(rows: Sequence[Sequence[int]], numbers: Sequence[int]) -> int:
    """The padded length of some rows."""
    return padded_width(max(len(rows[number]) for number in numbers))


@functools.lru_cache(maxsize=2)
def _loaded(learned: LearnedReward, layout: sharding.Layout | None) -> RewardModel:
    policy, params = hf.load(learned.where, layout=layout, **shape.reward_choices(learned.compute_dtype))
    if policy.tokenizer is None:
        raise ValueError(f"{learned.where} has no tokenizer: put its tokenizer.json beside the weights")
    return RewardModel(policy, placement.reference(policy.architecture, params))


def loaded(learned: LearnedReward) -> RewardModel:
    """The reward model that a task names, on the devices of the layout in use; read once for all of a run's tasks.

    Raises:
      ValueError, FileNotFoundError: as of `hf.load`; a directory without a score head, with several labels, or without
        a tokenizer.
    """
    return _loaded(learned, sharding.current())


def begun(policy: Policy, params: Any, key: jax.Array) -> tuple[Policy, Any]:
    """A language model with a new score head in the place of its LM head; a reward model stays as it is.

    Returns:
      The policy, and its parameters: those given, and a head drawn with variance 1 / width.
    """
    arch = policy.architecture
    if arch.score_head:
        return policy, params
    arch = dataclasses.replace(arch, score_head=True)
    (row,) = [row for row in parameters.table(arch) if row.path == parameters.SCORE]
    kernel = row.std * jax.random.normal(key, row.shape, jnp.float32)
    params = {name: tree for name, tree in params.items() if name != "head"}
    parameters.put(params, parameters.SCORE, kernel)
    # transformers reads from it where a padded sequence ends.
    config = policy.config | {"pad_token_id": policy.pad_id}
    return dataclasses.replace(policy, architecture=arch, config=config), params
