"""Weights measured on a file of prompts: what `evaluate run` prints and writes, of one model or of several."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.markup import escape

from mara_jax import tasks
from mara_jax.config import LanguageRun
from mara_jax.evaluate import drawing, models, models_page, page, prompt_measures
from mara_jax.evaluate.models import FILE, Model
from mara_jax.evaluate.prompt_measures import Likeness
from mara_jax.tasks import prompts
from mara_jax.tasks.base import Task, text_of
from mara_jax.train import evaluation, sampled
from mara_jax.train import workdir as workdirs
from mara_jax.train.tables import NumberTable

COMPLETIONS_AT_ONCE = 512


class Settings(NamedTuple):
    """What is measured and how: flags of the command, under their names."""

    weights: str
    prompts: str
    reward: str
    reward_model: str
    answer: str
    samples: int
    max_new_tokens: int
    threshold: float
    failure: str
    chat: str
    seed: int
    equivalence: str = "rouge1"
    similarity: float = 0.0
    embedder: str = ""


def run(settings: Settings, out: pathlib.Path, console: Console) -> None:
    """Samples, scores, prints, and writes evaluation.json, .html, .png and .svg into OUT.

    Of several weights, separated by commas, each has these files in OUT/NAME, and OUT those of all of them together.

    Raises:
      ValueError, OSError: one line, for weights, prompts or functions that cannot be used.
    """
    several = _several(settings.weights)
    names = models.names_of(several)
    likeness = prompt_measures.likeness_of(settings.equivalence, settings.similarity, settings.embedder)
    config = prompts.Config(
        prompts=settings.prompts,
        reward=settings.reward,
        reward_model=settings.reward_model,
        answer=settings.answer,
        failure=settings.failure,
    )
    task = tasks.make(LanguageRun(task=config))
    if note := repeated(task):
        print(note, file=sys.stderr)
    if len(several) == 1:
        _measured("", settings, task, likeness, out, console)
        return
    evaluated = [
        _measured(name, settings._replace(weights=weights), task, likeness, out / name, console)
        for name, weights in zip(names, several, strict=True)
    ]
    show(evaluated, console)
    write(evaluated, out)


def repeated(task: Task) -> str:
    """A line about prompts that stand in the file several times; "" where there are none."""
    different = len({text_of(task.prompt(number)) for number in range(len(task))})
    if different == len(task):
        return ""
    return (
        f"WARNING: {len(task) - different} of {len(task)} prompts repeat an earlier one: they are measured again, "
        "and intervals, which take prompts as independent, are too narrow"
    )


def _several(weights: str) -> list[str]:
    """The weights that a flag names: one path, whatever it holds, or several between commas."""
    if pathlib.Path(weights).exists():
        return [weights]
    several = [part.strip() for part in weights.split(",")]
    if not all(several):
        raise ValueError(f"--weights={weights} names nothing between two commas: write A,B,C")
    return several


def _measured(
    name: str, settings: Settings, task: Task, likeness: Likeness, out: pathlib.Path, console: Console
) -> Model:
    """Measures one model, and writes its own files."""
    policy = sampled.load(settings.weights, settings.chat)
    if policy.warning():
        print(policy.warning(), file=sys.stderr)
    encoded = policy.encode([task.prompt(number) for number in range(len(task))], settings.max_new_tokens)
    out.mkdir(parents=True, exist_ok=True)
    at_once = max(1, COMPLETIONS_AT_ONCE // settings.samples)
    samples = settings.samples
    sizes = evaluation.Sizes(samples, settings.max_new_tokens, settings.threshold, at_once, samples)
    key = jax.random.key(settings.seed)
    groups = evaluation.draw(task, policy.policy, policy.params, encoded, key, sizes)
    measured = evaluation.summary(groups, settings.threshold)
    measured = prompt_measures.extended(measured, groups, settings.threshold, settings.seed, likeness)
    result = {"settings": settings._asdict()} | measured
    page.write(out / page.FILE, result, groups, drawing.draw(out / drawing.FILE, result))
    workdirs.replace(out / FILE, evaluation.as_json(result))  # the last: where it is, the others are
    console.print(_table(measured, len(task), settings))
    return Model(name, name, result, groups)


def show(evaluated: Sequence[Model], console: Console, markdown: bool = False) -> None:
    """Prints what differs between models and which are Pareto-best; of a single prompt the latter alone."""
    if len(evaluated[0].result["prompts"]) > 1:
        rows = models.differences(evaluated)
        shown = models.compared(evaluated, rows)
        console.print(shown.markdown if markdown else shown.table, markup=not markdown)
        for line in models.verdicts(evaluated, rows):
            console.print(line, markup=False)
    best = ", ".join(models.front(evaluated))
    console.print(f"Pareto-best of {models.QUALITY} and {models.diversity_of(evaluated)}: {best}", markup=False)


def write(evaluated: Sequence[Model], out: pathlib.Path) -> None:
    """Writes the evaluation.json, .html, .png and .svg of several models."""
    out.mkdir(parents=True, exist_ok=True)
    rows = models.differences(evaluated) if len(evaluated[0].result["prompts"]) > 1 else []
    models_page.write(out / page.FILE, evaluated, rows, drawing.pareto(out / drawing.FILE, evaluated))
    workdirs.replace(out / FILE, evaluation.as_json(models.as_result(evaluated, rows)))


def _table(measured: dict[str, Any], count: int, settings: Settings) -> NumberTable:
    title = f"{escape(settings.weights)}: {count} prompts, {settings.samples} completions each"
    intervals = measured["intervals"]
    headers = ("", "mean", f"{100 * measured['bootstrap']['level']:g} % interval") if intervals else ("", "mean")
    shown = NumberTable.with_headers(*headers, title=title)
    for name, value in measured["metrics"].items():
        shown.add_row(name, f"{value:.3f}", *(["{:.3f} to {:.3f}".format(*intervals[name])] if intervals else []))
    shown.caption = escape(page.rules(measured["texts"]))
    return shown
