"""What the members of a population did over training, as Figures 7 and 8 show it for the 1-2 task.

Everything is read from the members' own directories; shares and entropies pool the answers of diversity.WINDOW batches.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mara_jax.core import diversity
from mara_jax.train import report
from mara_jax.train.population import report as of_members

MARGIN = 0.1  # bits: a run that ends so near to one answer, or to equal shares of all, is counted (Figure 7)


class Curves(NamedTuple):
    """One member over training.

    share, bits, reward: [t] share of the first answer among the valid ones, entropy of the answers, mean reward, each
    over the last batches up to a step; most: bits of equal shares of all answers; forecast: bits of the member's
    optimum as predicted before training, None where it is not known; distance: total variation of the last answers'
    shares to that optimum, None likewise.
    """

    name: str
    kind: str
    beta: float
    seed: int
    share: np.ndarray
    bits: np.ndarray
    reward: np.ndarray
    most: float
    forecast: float | None
    distance: float | None


def read(workdir: pathlib.Path) -> list[Curves]:
    """The members of a population that have made a step.

    Raises:
      FileNotFoundError: there is no population.
      ValueError: its prompts do not share a set of answers.
    """
    path = workdir / of_members.FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: name the workdir of a population (docs/population.md)")
    members = json.loads(path.read_text())["members"]
    begun = [one for one in members if _has_begun(workdir, one)]
    if not begun:
        raise ValueError(f"{workdir}: no member has made a step yet: wait for the first")
    labels = of_members.labels(begun)
    return [
        _curves(one, label, report.read(workdir / one["workdir"])) for one, label in zip(begun, labels, strict=True)
    ]


def _has_begun(workdir: pathlib.Path, member: dict[str, Any]) -> bool:
    path = workdir / member["workdir"] / "metrics.jsonl"
    return path.exists() and path.stat().st_size > 0


def _curves(member: dict[str, Any], label: str, record: report.Record) -> Curves:
    if not record.answers:
        raise ValueError(
            f"{record.workdir}: no set of answers that all prompts share was measured before training, and these "
            "figures need one: see population.png"
        )
    counts_ta = diversity.pooled_counts(record.counts_ta)
    total_t = counts_ta.sum(axis=1)
    share_t = np.where(total_t > 0, counts_ta[:, 0] / np.maximum(total_t, 1), np.nan)
    reward_t = record.series("reward/mean")
    optimum = None if record.optimum_of_own is None else record.optimum(record.optimum_of_own)
    reached = record.reached
    known = optimum is not None and reached is not None
    return Curves(
        member["name"],
        label,
        member["beta"],
        member["seed"],
        share_t,
        np.array([diversity.entropy_bits(counts_a) for counts_a in counts_ta]),
        np.array([np.nanmean(reward_t[max(0, t - diversity.WINDOW + 1) : t + 1]) for t in range(len(reward_t))]),
        float(np.log2(len(record.answers))),
        optimum.entropy_bits if optimum is not None else None,
        diversity.total_variation(reached.answer_shares, optimum.answer_shares) if known else None,  # pyright: ignore
    )


class Checkpoint(NamedTuple):
    """A step of the members of one kind and beta: means over their seeds, with standard errors (0 for one seed)."""

    kind: str
    beta: float
    step: int
    seeds: int
    reward: float
    reward_error: float
    bits: float
    bits_error: float


def checkpoints(members: Sequence[Curves], every: int = diversity.WINDOW) -> list[Checkpoint]:
    """Every so many steps of each kind and beta, averaged over seeds; the last step is one of them."""
    points = []
    for kind, beta in dict.fromkeys((one.kind, one.beta) for one in members):
        own = [one for one in members if (one.kind, one.beta) == (kind, beta)]
        last = min(len(one.bits) for one in own)
        for step in sorted({*range(every, last + 1, every), last}):
            reward, bits = (np.array([getattr(one, name)[step - 1] for one in own]) for name in ("reward", "bits"))
            points.append(Checkpoint(kind, beta, step, len(own), *_mean_and_error(reward), *_mean_and_error(bits)))
    return points


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(np.mean(values)), error


def front(points: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Those that no other beats in reward and entropy alike, by rising entropy."""
    ordered = sorted(points, key=lambda one: (-one.bits, -one.reward))
    best, kept = -np.inf, []
    for one in ordered:
        if one.reward > best:
            best, kept = one.reward, [*kept, one]
    return kept[::-1]


def counts(members: Sequence[Curves]) -> list[dict[str, Any]]:
    """How many members of each kind and beta end with nearly one answer, or with nearly equal ones."""
    rows = []
    for kind, beta in dict.fromkeys((one.kind, one.beta) for one in members):
        own = [one for one in members if (one.kind, one.beta) == (kind, beta)]
        ends = [float(one.bits[-1]) for one in own]
        row = {"kind": kind, "beta": beta, "members": len(ends)}
        row |= {"one": sum(end < MARGIN for end in ends), "equal": sum(end > own[0].most - MARGIN for end in ends)}
        rows.append(row | {"bits": float(np.mean(ends))})
    return rows


def as_json(members: Sequence[Curves]) -> dict[str, Any]:
    """All numbers that the figures show."""
    return {
        "window": diversity.WINDOW,
        "members": [
            one._asdict() | {name: [float(x) for x in getattr(one, name)] for name in ("share", "bits", "reward")}
            for one in members
        ],
        "checkpoints": [point._asdict() for point in checkpoints(members)],
        "counts": counts(members),
    }
