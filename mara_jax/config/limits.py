"""The ranges of numbers that fields of a config may have."""

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

LARGEST = 2**31 - 1  # what an array of 32-bit integers holds


class Limit(NamedTuple):
    """A test of a value, and what the value must be, in words."""

    holds: Callable[[Any], bool]
    words: str


COUNT = Limit(lambda v: 1 <= v <= LARGEST, "at least 1 and below 2**31")
FROM_ZERO = Limit(lambda v: 0 <= v <= LARGEST, "at least 0 and below 2**31")
POSITIVE = Limit(lambda v: 0 < v < 3e38, "positive and finite in float32")
NOT_NEGATIVE = Limit(lambda v: 0 <= v < inf, "at least 0 and finite")
SHARE = Limit(lambda v: 0 <= v <= 1, "a share, from 0 to 1")
DECAY = Limit(lambda v: 0 <= v < 1, "at least 0 and below 1")
SHARES = Limit(lambda v: 0 <= v[0] <= v[1] <= 1, "two shares, the lower one first")
CAP = Limit(lambda v: v == 0 or 1 <= v < inf, "0 (no weights) or at least 1 and finite")
PERCENTILE = Limit(lambda v: 0 <= v <= 99.9, "at least 0 (a constant threshold) and at most 99.9")
WINDOW = Limit(lambda v: 1 <= v <= 1000, "at least 1 and at most 1000")
FIGURE = Limit(lambda v: v in (2, 4, 5, 6), "2, 4, 5 or 6")
MESH_SIZE = Limit(lambda v: v == -1 or 1 <= v <= LARGEST, "at least 1, or -1 for the devices that are left")
# Rewards are about 1: a value far beyond leaves nothing of one of the two in float32.
BETA = Limit(lambda v: 0 <= v <= 1e6, "at least 0 and at most 1e6")
REWARD = Limit(lambda v: -1e6 <= v <= 1e6, "a finite reward, at most 1e6 either way")
BETAS = Limit(lambda v: all(0 < beta <= 1e6 for beta in v), "numbers above 0 and at most 1e6")
REWARDS = Limit(lambda v: all(-1e6 <= reward <= 1e6 for reward in v), "finite rewards, at most 1e6 either way")
RATES = Limit(lambda v: all(0 < rate < 3e38 for rate in v), "positive numbers, finite in float32")
SEED_OR_OWN = Limit(lambda v: -1 <= v <= LARGEST, "at least 0 and below 2**31, or -1")
TOY_REWARDS = Limit(lambda v: all(-1e6 <= reward <= 1 for reward in v), "finite numbers, at most 1")
