"""What each number of a run may be by itself; what several may be together is config's to say."""

from collections.abc import Callable
from functools import reduce
from math import inf
from typing import Any, NamedTuple

LARGEST = 2**31 - 1  # what an array of 32-bit integers holds


class Limit(NamedTuple):
    """A test of a value, and what it must be in words."""

    holds: Callable[[Any], bool]
    words: str


COUNT = Limit(lambda v: 1 <= v <= LARGEST, f"must be from 1 to {LARGEST}")
FROM_ZERO = Limit(lambda v: 0 <= v <= LARGEST, f"must be from 0 to {LARGEST}")
POSITIVE = Limit(lambda v: 0 < v < inf, "must be positive and finite")
NOT_NEGATIVE = Limit(lambda v: 0 <= v < inf, "must be finite and not negative")
SHARE = Limit(lambda v: 0 <= v <= 1, "must be a share, from 0 to 1")
DECAY = Limit(lambda v: 0 <= v < 1, "must be at least 0 and below 1")
RANGE = Limit(lambda v: 0 <= v[0] <= v[1] <= 1, "must be two shares, the lower one first")
# Rewards are about 1: what is far beyond leaves nothing of one of the two in float32.
BETA = Limit(lambda v: 0 <= v <= 1e6, "must not be negative, nor above 1e6")
REWARD = Limit(lambda v: -1e6 <= v <= 1e6, "must be a finite reward, at most 1e6 either way")

LIMITS: dict[str, Limit] = {
    "steps": COUNT,
    "seed": FROM_ZERO,
    "show_samples": FROM_ZERO,
    "algorithm.beta": BETA,
    "algorithm.threshold": REWARD,
    "algorithm.clip": NOT_NEGATIVE,
    "algorithm.truncate": Limit(lambda v: v == 0 or 1 <= v < inf, "must be 0 (no weights) or at least 1 and finite"),
    "policy.layers": COUNT,
    "policy.embed": COUNT,
    "lora.rank": FROM_ZERO,
    "lora.alpha": POSITIVE,
    "task.share_of_ones": SHARE,
    "task.malformed": SHARE,
    "warmup.steps": FROM_ZERO,
    "warmup.batch": COUNT,
    "warmup.learning_rate": POSITIVE,
    "warmup.check_every": COUNT,
    "warmup.check_samples": COUNT,
    "warmup.max_steps": FROM_ZERO,
    "warmup.valid_range": RANGE,
    "warmup.ones_range": RANGE,
    "warmup.measure_samples": COUNT,
    "rollout.prompts_per_step": COUNT,
    "rollout.group_size": COUNT,
    "rollout.max_new_tokens": COUNT,
    "rollout.temperature": POSITIVE,
    "rollout.top_p": Limit(lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
    "rollout.length_buckets": FROM_ZERO,
    "rollout.slots": FROM_ZERO,
    "optimiser.learning_rate": POSITIVE,
    "optimiser.warmup_steps": FROM_ZERO,
    "optimiser.decay_steps": FROM_ZERO,
    "optimiser.b1": DECAY,
    "optimiser.b2": DECAY,
    "optimiser.eps": POSITIVE,
    "optimiser.max_grad_norm": NOT_NEGATIVE,
    "optimiser.micro_batches": COUNT,
    "optimiser.updates": COUNT,
    "checkpoint.every": COUNT,
    "checkpoint.keep": COUNT,
    "profile.first": COUNT,
    "profile.steps": FROM_ZERO,
    "toy.batch": COUNT,
    "toy.learning_rate": POSITIVE,
    "sweep.seeds": COUNT,
    "sweep.chunk": COUNT,
}


def check(run: Any, defaults: Any, *names: str) -> None:
    """Refuses the first number that is past its limit.

    Args:
      run: nested dataclasses; fields that it lacks are passed over.
      defaults: the same with its default values, which the refusal names.
      names: dotted fields to look at; all of `LIMITS` where there are none.

    Raises:
      ValueError: one line.
    """
    for name in names or LIMITS:
        value, limit = _at(run, name), LIMITS[name]
        if value is not None and not limit.holds(value):
            raise ValueError(f"{name}={value} {limit.words}: try {_at(defaults, name)}")


def _at(run: Any, name: str) -> Any:
    return reduce(lambda node, part: getattr(node, part, None), name.split("."), run)
