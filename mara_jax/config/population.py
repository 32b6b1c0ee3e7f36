"""The members of a population: the product of its axes, each a run of its own."""

import dataclasses
import itertools
from typing import NamedTuple

from mara_jax.config import limits
from mara_jax.config.schema import LanguageRun, Population

AXES = ("methods", "anchors", "kls", "betas", "thresholds", "learning_rates")


class Member(NamedTuple):
    """One run of a population, and the name of its folder."""

    name: str
    run: LanguageRun


def is_population(run: LanguageRun) -> bool:
    """Whether a run has several members, or asks for a population of one."""
    return bool(run.population.seeds or any(getattr(run.population, axis) for axis in AXES))


def members(run: LanguageRun) -> list[Member]:
    """Every run of a population, seeds innermost; a run without axes is its only member.

    All of them draw the samples of the reference policy by the same seed, so that they share these, and differ by what
    the axes say alone.
    """
    from mara_jax.core import method_rules  # brings jax, which importing a config does without

    axes, algorithm = run.population, run.algorithm
    shared = dataclasses.replace(run.reference, seed=run.seed if run.reference.seed < 0 else run.reference.seed)
    runs = []
    for method, anchor, kl, beta, threshold, rate, number in itertools.product(
        axes.methods or (algorithm.method,),
        axes.anchors or (algorithm.anchor,),
        axes.kls or (algorithm.kl,),
        axes.betas or (algorithm.beta,),
        axes.thresholds or (algorithm.threshold,),
        axes.learning_rates or (run.optimiser.learning_rate,),
        range(max(axes.seeds, 1)),
    ):
        own = dataclasses.replace(algorithm, method=method, anchor=anchor, kl=kl, beta=beta, threshold=threshold)  # pyright: ignore
        if axes.anchors and anchor != axes.anchors[0] and method_rules.rows(own)[0].anchor is None:
            continue  # a method without an anchor is there once
        runs.append(
            dataclasses.replace(
                run,
                seed=run.seed + number,
                algorithm=own,
                reference=shared,
                optimiser=dataclasses.replace(run.optimiser, learning_rate=rate),
                population=Population(),
            )
        )
    return [Member(name_of(one, axes), one) for one in runs]


def name_of(member: LanguageRun, axes: Population) -> str:
    """The method, what the axes set, and the seed: mara-beta0.1-seed0."""
    algorithm = member.algorithm
    parts = [algorithm.method]
    parts += [algorithm.anchor] if axes.anchors else []
    parts += [algorithm.kl] if axes.kls else []
    parts += [f"beta{algorithm.beta:g}"]
    parts += [f"threshold{algorithm.threshold:g}"] if axes.thresholds else []
    parts += [f"lr{member.optimiser.learning_rate:g}"] if axes.learning_rates else []
    return "-".join([*parts, f"seed{member.seed}"])


def refuse_repeated(run: LanguageRun) -> None:
    """Refuses axes that name a value twice, and seeds beyond the largest.

    Raises:
      ValueError: one line.
    """
    for axis in AXES:
        values = getattr(run.population, axis)
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"population.{axis} names {value} twice: name each value once")
    names = [member.name for member in members(run)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two members of the population are called {name}: choose values that differ by more")
    if run.seed + run.population.seeds - 1 > limits.LARGEST:
        raise ValueError(
            f"seed={run.seed} with population.seeds={run.population.seeds} goes past {limits.LARGEST}: lower the seed"
        )
