"""Experience replay: the best completions of earlier steps, some of which are added to each update.

They were drawn by older policies, and those with high rewards were chosen: only losses that are a squared gap to
log ref + R / beta take them (`Objective.replays`). docs/chemistry_methods.md says what that does to the objective.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mara_jax.parallel import hosts
from mara_jax.sampling.rollout import Rollout
from mara_jax.train.scoring import GroupScores

_STREAM = 7  # beside (seed, step), of the draws: no other stream of numpy's has it


class Remembered(NamedTuple):
    """A completion: its tokens with the end token, its reward and its answer."""

    tokens: tuple[int, ...]
    reward: float
    answer: str | None


class Replay:
    """The best completions of each prompt so far, no two of equal tokens.

    Args:
      count: how many are drawn for each prompt of a step; best: how many are remembered; seed: of the draws.

    Source: `Experience` of mol_opt's REINVENT (24 drawn of the 100 best).
    """

    def __init__(self, count: int, best: int, seed: int) -> None:
        self.count, self.best, self.seed = count, best, seed
        self.memory: dict[int, list[Remembered]] = {}

    def drawn(self, ids: np.ndarray, done: int) -> list[list[Remembered]] | None:
        """Completions for each prompt of the step after `done` steps, without repeats, in proportion to their reward.

        A function of the memory, the seed and the step. None where a prompt of the step has not yet more than `count`
        of positive reward.
        """
        groups = []
        for place, number in enumerate(ids.tolist()):
            known = [one for one in self.memory.get(number, []) if one.reward > 0]
            if len(known) <= self.count:
                return None
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, done, _STREAM, place])))
            rewards = np.array([one.reward for one in known])
            chosen = random.choice(len(known), self.count, replace=False, p=rewards / rewards.sum())
            groups.append([known[index] for index in chosen.tolist()])
        return groups

    def add(self, ids: np.ndarray, completions: Rollout, scores: GroupScores) -> None:
        """Remembers a step's completions that are among the best; of equal rewards the earlier ones."""
        tokens_pgt, lengths_pg, finished_pg = (
            hosts.gather(x) for x in (completions.tokens, completions.lengths, completions.finished)
        )
        for row, number in enumerate(ids.tolist()):
            known = {one.tokens: one for one in self.memory.get(number, [])}
            for sample, (reward, answer) in enumerate(zip(scores.reward[row], scores.answer[row], strict=True)):
                if finished_pg[row, sample]:
                    tokens = tuple(tokens_pgt[row, sample, : lengths_pg[row, sample]].tolist())
                    known.setdefault(tokens, Remembered(tokens, float(reward), answer))
            self.memory[number] = sorted(known.values(), key=lambda one: -one.reward)[: self.best]

    def state(self) -> list[Any]:
        """The memory as plain data, which JSON keeps exactly."""
        return [[number, [list(one) for one in known]] for number, known in self.memory.items()]

    def restore(self, state: Sequence[Any]) -> None:
        """Takes the place of the one that gave this state."""
        self.memory = {
            int(number): [Remembered(tuple(tokens), float(reward), answer) for tokens, reward, answer in known]
            for number, known in state
        }


def joined(completions: Rollout, replayed: Sequence[Sequence[Remembered]]) -> Rollout:
    """Completions with those of the memory behind them in each group; of the latter tokens and lengths alone."""
    tokens_pgt, lengths_pg = hosts.gather(completions.tokens), hosts.gather(completions.lengths)
    more = np.zeros((len(replayed), len(replayed[0]), tokens_pgt.shape[-1]), tokens_pgt.dtype)
    lengths = np.array([[len(one.tokens) for one in group] for group in replayed], lengths_pg.dtype)
    for row, group in enumerate(replayed):
        for place, one in enumerate(group):
            more[row, place, : len(one.tokens)] = one.tokens
    return completions._replace(
        tokens=hosts.shard_groups(np.concatenate([tokens_pgt, more], axis=1)),
        lengths=hosts.shard_groups(np.concatenate([lengths_pg, lengths], axis=1)),
    )


def joined_scores(scores: GroupScores, replayed: Sequence[Sequence[Remembered]]) -> GroupScores:
    """The scores of these groups, without columns."""
    reward = np.array([[one.reward for one in group] for group in replayed], np.float32)
    answer = [[*own, *(one.answer for one in group)] for own, group in zip(scores.answer, replayed, strict=True)]
    return GroupScores(np.concatenate([scores.reward, reward], axis=1), answer, {})
