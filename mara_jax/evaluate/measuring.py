"""Weights measured on a file of prompts: what `evaluate run` prints and writes."""

import pathlib
import sys
from typing import Any, NamedTuple

import jax
from rich.markup import escape

from mara_jax import tasks
from mara_jax.config import LanguageRun
from mara_jax.evaluate import drawing, page, prompt_measures
from mara_jax.tasks import prompts
from mara_jax.train import evaluation, sampled
from mara_jax.train.tables import NumberTable

FILE = "evaluation.json"
COMPLETIONS_AT_ONCE = 512


class Settings(NamedTuple):
    """What is measured and how: flags of the command, under their names."""

    weights: str
    prompts: str
    reward: str
    answer: str
    samples: int
    max_new_tokens: int
    threshold: float
    failure: str
    chat: str
    seed: int


def run(settings: Settings, out: pathlib.Path) -> NumberTable:
    """Samples, scores and writes evaluation.json, .html, .png and .svg into OUT; returns the table to print.

    Raises:
      ValueError, OSError: one line, for weights, prompts or functions that cannot be used.
    """
    config = prompts.Config(
        prompts=settings.prompts, reward=settings.reward, answer=settings.answer, failure=settings.failure
    )
    task = tasks.make(LanguageRun(task=config))
    out.mkdir(parents=True, exist_ok=True)
    policy = sampled.load(settings.weights, settings.chat)
    if policy.warning():
        print(policy.warning(), file=sys.stderr)
    encoded = policy.encode([task.prompt(number) for number in range(len(task))], settings.max_new_tokens)
    at_once = max(1, COMPLETIONS_AT_ONCE // settings.samples)
    samples = settings.samples
    sizes = evaluation.Sizes(samples, settings.max_new_tokens, settings.threshold, at_once, samples)
    key = jax.random.key(settings.seed)
    groups = evaluation.draw(task, policy.policy, policy.params, encoded, key, sizes)
    measured = evaluation.summary(groups, settings.threshold)
    measured = prompt_measures.extended(measured, groups, settings.threshold, settings.seed)
    result = {"settings": settings._asdict()} | measured
    (out / FILE).write_text(evaluation.as_json(result))
    page.write(out / page.FILE, result, groups, drawing.draw(out / drawing.FILE, result))
    return _table(measured, len(task), settings)


def _table(measured: dict[str, Any], count: int, settings: Settings) -> NumberTable:
    title = f"{escape(settings.weights)}: {count} prompts, {settings.samples} completions each"
    intervals = measured["intervals"]
    headers = ("", "mean", f"{100 * measured['bootstrap']['level']:g} % interval") if intervals else ("", "mean")
    shown = NumberTable.with_headers(*headers, title=title)
    for name, value in measured["metrics"].items():
        shown.add_row(name, f"{value:.3f}", *(["{:.3f} to {:.3f}".format(*intervals[name])] if intervals else []))
    return shown
