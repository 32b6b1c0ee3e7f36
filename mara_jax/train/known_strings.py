"""Masses of answers from the strings of them that are known: what the policy drew, and what the task lists beside it.

For tasks whose scores are counted, so that samples of the reference policy would cost (`Task.lists_strings`): the
reference policy's log-probability of a string costs no score. As strings are added, masses grow and the objective of
MARA over answers moves; each is a lower bound of the answer's mass.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mara_jax.config import Algorithm
from mara_jax.policies import encoding
from mara_jax.policies.policy import Policy
from mara_jax.sampling import rollout
from mara_jax.train import groups
from mara_jax.train.replay import Remembered
from mara_jax.train.scoring import GroupScores
from mara_jax.train.setup import Setup

_DIGEST = 8  # bytes by which a string is recognised
_WIDTHS = 16  # strings are padded to multiples of so many tokens


class Good(NamedTuple):
    """A good completion: its answer, its reward, its text, and its tokens with the one that ended it."""

    answer: str
    reward: float
    text: str
    tokens: tuple[int, ...]


class KnownStrings:
    """Log-masses (nats) of the answers of each prompt, summed over different strings.

    A string y of reward R has the mass ref(y) exp(R / beta), for the forward KL ref(y), as in `core.augment`.

    Attributes:
      log_mass: by prompt and answer; counted: digests of the strings in it, and of the texts whose other strings are.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.beta = algorithm.beta if algorithm.kl == "reverse" else math.inf
        self.log_mass: dict[int, dict[str, float]] = {}
        self.counted: set[str] = set()

    def missing(self, setup: Setup, number: int, good: Sequence[Good]) -> list[Good]:
        """The strings of a prompt that these completions add: themselves, and others of the same answer and reward.

        Args:
          number: of the prompt.
          good: its good completions of a step.
        """
        new = {one.tokens: one for one in good}
        for one in {one.text: one for one in good}.values():
            if self._is_new(number, one.text):
                others = setup.task.other_strings(number, one.text)
                width = setup.cfg.rollout.max_new_tokens
                for tokens in completion_ids(setup.policy, setup.cfg.policy.chat, others, width):
                    new.setdefault(tokens, one._replace(tokens=tokens))
        return [one for one in new.values() if self._is_new(number, one.tokens)]

    def _is_new(self, number: int, string: str | tuple[int, ...]) -> bool:
        """Whether a string was not counted before; it is from now on."""
        digest = hashlib.blake2b(repr((number, string)).encode(), digest_size=_DIGEST).hexdigest()
        new = digest not in self.counted
        self.counted.add(digest)
        return new

    def add(self, number: int, strings: Sequence[Good], ref_logp: Sequence[float]) -> None:
        """Adds strings of a prompt to the masses of their answers; ref_logp: [n] under the reference policy (nats)."""
        masses = self.log_mass.setdefault(number, {})
        for one, logp in zip(strings, ref_logp, strict=True):
            masses[one.answer] = float(np.logaddexp(masses.get(one.answer, -np.inf), logp + one.reward / self.beta))

    def state(self) -> dict[str, Any]:
        """Masses and digests, as plain data that JSON keeps exactly."""
        rows = [[number, answer, x] for number, masses in self.log_mass.items() for answer, x in masses.items()]
        return {"log_mass": rows, "counted": sorted(self.counted)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes the place of the one that gave this state."""
        self.log_mass, self.counted = {}, set(state["counted"])
        for number, answer, value in state["log_mass"]:
            self.log_mass.setdefault(int(number), {})[str(answer)] = float(value)


def completion_ids(policy: Policy, chat: bool, texts: Sequence[str], width: int) -> list[tuple[int, ...]]:
    """Texts as whole completions, with the token that ends one.

    Those that the policy cannot give are left out: what its tokenizer does not write back as it was, and what is longer
    than `width` tokens.
    """
    if not texts:
        return []
    closing = encoding.closing_id(policy.tokenizer, chat)
    end = closing if closing in policy.eos_ids else policy.eos_ids[0]
    rows = policy.tokenizer(list(texts), add_special_tokens=False).input_ids
    decoded = encoding.decode_completions(policy.tokenizer, rows)
    return [
        (*row, end) for row, text, again in zip(rows, texts, decoded, strict=True) if again == text and len(row) < width
    ]


def good_completions(
    completions: rollout.Rollout, scores: GroupScores, row: int, threshold: float | np.floating
) -> list[Good]:
    """The good completions of one prompt of a step."""
    tokens_gt, lengths_g = np.asarray(completions.tokens[row]), np.asarray(completions.lengths[row])
    good = []
    for sample, (answer, reward) in enumerate(zip(scores.answer[row], scores.reward[row], strict=True)):
        if answer is not None and reward >= threshold:
            tokens = tuple(tokens_gt[sample, : lengths_g[sample]].tolist())
            good.append(Good(answer, float(reward), completions.text[row][sample], tokens))
    return good


def good_replayed(policy: Policy, replayed: Sequence[Remembered], threshold: float | np.floating) -> list[Good]:
    """The good ones among completions of earlier steps; where the threshold has fallen, some of them for the first
    time."""
    good = [one for one in replayed if one.answer is not None and np.float32(one.reward) >= threshold]
    texts = encoding.decode_completions(policy.tokenizer, [one.tokens[:-1] for one in good])
    return [Good(str(one.answer), one.reward, text, tuple(one.tokens)) for one, text in zip(good, texts, strict=True)]


def log_masses(
    setup: Setup,
    completions: rollout.Rollout,
    ids: np.ndarray,
    scores: GroupScores,
    threshold: float | np.floating,
    replayed: Sequence[Sequence[Remembered]] | None = None,
) -> list[dict[str, float]]:
    """The log-masses of the answers of each prompt of a step, good completions of the step included; in nats.

    Args:
      threshold: from which reward on a completion is good in this step; replayed: what the update has besides.
    """
    store = setup.known_strings
    assert store is not None, "a run whose method reads masses of listed strings has a store of them"
    for row, number in enumerate(ids.tolist()):
        good = good_completions(completions, scores, row, threshold)
        if replayed is not None:
            good += good_replayed(setup.policy, replayed[row], threshold)
        new = store.missing(setup, number, good)
        store.add(number, new, ref_logp(setup, completions, row, [one.tokens for one in new]))
    return [store.log_mass.get(number, {}) for number in ids.tolist()]


def ref_logp(setup: Setup, completions: rollout.Rollout, row: int, strings: Sequence[tuple[int, ...]]) -> list[float]:
    """[n] log-probs (nats) of whole completions of one prompt of a step under the reference policy."""
    _, group_size, longest = completions.tokens.shape
    widths = [min(longest, -(-len(one) // _WIDTHS) * _WIDTHS) for one in strings]
    logp = np.zeros(len(strings))
    for width in sorted(set(widths)):
        places = [place for place, own in enumerate(widths) if own == width]
        for first in range(0, len(places), group_size):
            part = places[first : first + group_size]
            logp[part] = _ref_logp(setup, completions, row, [strings[place] for place in part], width)
    return logp.tolist()


def _ref_logp(
    setup: Setup, completions: rollout.Rollout, row: int, strings: Sequence[tuple[int, ...]], width: int
) -> np.ndarray:
    """The same of strings of at most `width` tokens, and no more than a group has.

    Always as many rows as a group: there is one program a width, and a string's number does not depend on the others.
    """
    group_size = completions.tokens.shape[1]
    tokens = np.full((1, group_size, width), setup.policy.pad_id, np.int32)
    lengths = np.ones((1, group_size), np.int32)
    for place, one in enumerate(strings):
        tokens[0, place, : len(one)], lengths[0, place] = one, len(one)
    prompt = completions.prompt_tokens[row : row + 1], completions.prompt_lengths[row : row + 1]
    logp = groups.sequence_logp(setup.policy.architecture, setup.ref_params, *prompt, tokens, lengths)
    return np.asarray(logp)[0, : len(strings)]


def by_index(masses_p: Sequence[Mapping[str, float]], scores: GroupScores, index_pg: np.ndarray) -> np.ndarray:
    """[p, g] log-masses of answers by their index in the batch, -inf where there is no answer, or none of its strings
    was ever good.

    Args:
      masses_p: of each prompt's answers; index_pg: the answers' indices, below g, -1 for none.
    """
    masses_pa = np.full(index_pg.shape, -np.inf, np.float32)
    for row, (masses, answers) in enumerate(zip(masses_p, scores.answer, strict=True)):
        for answer, index in zip(answers, index_pg[row].tolist(), strict=True):
            if answer is not None:
                masses_pa[row, index] = masses.get(answer, -np.inf)
    return masses_pa
