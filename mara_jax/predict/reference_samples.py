"""Samples of a reference policy, from a file of rows, a configuration, a run directory, or a toy problem."""

import csv
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from mara_jax import config, tasks
from mara_jax.core import forecast, method_rules
from mara_jax.policies.policy import Policy
from mara_jax.predict.prediction import LARGEST, ReferenceSamples, Settings
from mara_jax.toy import problems
from mara_jax.train import answer_classes, inputs, optim, reference
from mara_jax.train import workdir as workdirs
from mara_jax.train.metrics import Display
from mara_jax.train.prompts import EncodedPrompts
from mara_jax.train.reference_samples import BEFORE_TRAINING, FILE
from mara_jax.train.setup import Setup


def read_file(path: pathlib.Path, answers: tuple[str, ...] = (), prompt: int | None = None) -> ReferenceSamples:
    """Reads the samples in a CSV (with a header) or JSONL file.

    Args:
      path: the file.
      answers: names of all answers, those without a sample included; by default the names in the file.
      prompt: only the rows of this prompt are read; a row without that field belongs to prompt 0. None: the rows of the
        only prompt.

    Raises:
      ValueError: one line naming the file, the row and what is wrong with it.
    """
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path} is neither .csv nor .jsonl: give a file of ref_logp, reward, answer in one of these")
    try:
        text = path.read_text(encoding="utf-8-sig")  # a CSV from a spreadsheet may begin with a byte-order mark
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    lines = _csv(text, path) if path.suffix == ".csv" else text.splitlines()
    rows = [_row(line, f"{path}, row {number}") for number, line in enumerate(lines, 1) if line]
    if not rows:
        raise ValueError(f"{path} holds no rows: nothing to predict from")
    rows = _rows_of_prompt(rows, prompt, path)
    names = answers or tuple(sorted({name for _, _, name, _ in rows if name is not None}))
    unknown = sorted({name for _, _, name, _ in rows if name is not None} - set(names))
    if unknown:
        raise ValueError(f"{path} has the answer {unknown[0]!r}, which the task lacks: it has {', '.join(names)}")
    ref_logp = None if any(row[0] is None for row in rows) else np.array([row[0] for row in rows], np.float64)
    answer = np.array([-1 if row[2] is None else names.index(row[2]) for row in rows])
    return ReferenceSamples(np.array([row[1] for row in rows], np.float64), answer, ref_logp, names)


def _csv(text: str, path: pathlib.Path) -> csv.DictReader:
    lines = csv.DictReader(text.splitlines())
    header = lines.fieldnames
    if header and not {"reward", "answer"} <= set(header):
        raise ValueError(
            f"{path}: the header {','.join(header)!r} lacks reward or answer: the first line must name the columns "
            "ref_logp,reward,answer with commas between"
        )
    return lines


def _rows_of_prompt(rows: list, prompt: int | None, path: pathlib.Path) -> list:
    """The rows of one prompt: a prediction is about one reference distribution."""
    present = sorted({row[3] for row in rows})
    named = ", ".join(map(str, present[:8])) + (", ..." if len(present) > 8 else "")
    if prompt is None and len(present) > 1:
        raise ValueError(f"{path} has rows of the prompts {named}: choose one with --prompt={present[0]}")
    if prompt is not None and prompt not in present:
        raise ValueError(f"--prompt={prompt}: {path} holds no rows of it, only of {named}")
    return [row for row in rows if prompt in (None, row[3])]


def _prompt(value: Any, where: str) -> int:
    try:
        number = float(0 if value in (None, "") else value)
    except (TypeError, ValueError):
        number = -1.0
    if number < 0 or not number.is_integer():
        raise ValueError(f"{where}: prompt={value!r} must be a whole number from 0, or left out")
    return int(number)


def _row(line: Any, where: str) -> tuple[float | None, float, str | None, int]:
    if isinstance(line, str):
        try:
            line = json.loads(line)
        except json.JSONDecodeError:
            raise ValueError(f"{where} is not JSON") from None
    if not isinstance(line, dict) or not {"reward", "answer"} <= line.keys():
        raise ValueError(f"{where} lacks reward or answer: every row needs ref_logp, reward, answer")
    numbers: list[float | None] = []
    for name in ("ref_logp", "reward"):
        value = line.get(name)
        try:
            numbers.append(None if value in (None, "") else float(value))
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {name}={value!r} is not a number") from None
    ref_logp, reward = numbers
    if reward is None or not abs(reward) <= LARGEST:
        raise ValueError(f"{where}: reward={line['reward']!r} must be a finite number, at most {LARGEST:g} either way")
    if ref_logp is not None and not -np.inf < ref_logp <= 1e-3:
        raise ValueError(f"{where}: ref_logp={ref_logp} is not the log of a probability (nats, at most 0)")
    name = line["answer"]
    return ref_logp, reward, None if name in (None, "") else str(name), _prompt(line.get("prompt"), where)


def settings_of(run: config.Run) -> Settings:
    """The prediction's settings for the objective of a configuration.

    Raises:
      ValueError: a method whose optimum samples do not determine.
    """
    refuse_moving_threshold(run, "a prediction")
    if method_rules.forecast_method(run.algorithm) is None:
        raise ValueError(
            f"algorithm.method={run.algorithm.method!r} {method_rules.describe(run.algorithm)}: its optimum cannot be "
            "predicted from samples; add --config.algorithm.method=vanilla or mara to predict theirs"
        )
    objective = reference.objective_of(run.algorithm)
    return Settings(*objective._replace(beta=max(objective.beta, forecast.LEAST_BETA)))


def refuse_moving_threshold(run: config.Run, what: str) -> None:
    """Refuses a run whose threshold moves, where one number is needed.

    Args:
      what: needs it, in words.

    Raises:
      ValueError: one line.
    """
    if method_rules.moves_threshold(run.algorithm):
        raise ValueError(
            f"algorithm.threshold_percentile={run.algorithm.threshold_percentile:g} moves the threshold with the "
            f"policy, and {what} is of one constant threshold: with --run or --rollouts give --threshold=R "
            "(mara/threshold in metrics.jsonl has what it was), with --config "
            "--config.algorithm.threshold_percentile=0 --config.algorithm.threshold=R; what it says holds while the "
            "threshold is near R"
        )


def at_constant_threshold(run: config.LanguageRun, threshold: float) -> config.LanguageRun:
    """The run with a constant threshold in place of one that moves."""
    usual = config.Algorithm()
    constant = dataclasses.replace(
        run.algorithm,
        threshold=threshold,
        threshold_percentile=usual.threshold_percentile,
        threshold_window=usual.threshold_window,
    )
    return dataclasses.replace(run, algorithm=constant)


def from_toy(run: config.ToyRun) -> ReferenceSamples:
    """Every outcome of a toy problem, with its exact probability under the reference."""
    problem = problems.PROBLEMS[f"figure{run.toy.figure}"]()
    outcomes = len(problem.reward)
    return ReferenceSamples(
        problem.reward, np.arange(outcomes), problem.ref_logp, tuple(str(i) for i in range(outcomes)), exact=True
    )


def from_config(run: config.LanguageRun, count: int | None = None, prompt: int = 0) -> ReferenceSamples:
    """Samples of the reference policy that a configuration produces, warm-up included: the same as in its run.

    Args:
      run: the configuration.
      count: number of samples; by default `reference.samples`, or 256.
      prompt: index of the task's prompt.

    Raises:
      ValueError: unusable weights, warm-up settings or prompt index.
    """
    task = tasks.make(run)
    _refuse_counted_scores(task)
    policy, params = reference.load_base(run, task)
    _prompts(run, policy, task, prompt)  # before the warm-up
    if run.warmup.steps:
        reference.check_demonstrations(run, policy, task)
        with Display(run.steps) as display:
            params = reference.warm_up(run, policy, params, task, display)
    return _sample(run, policy, params, task, count, prompt)


def from_run(
    workdir: pathlib.Path, count: int | None = None, prompt: int = 0
) -> tuple[ReferenceSamples, config.LanguageRun]:
    """The samples that measured a run's reference policy, or new ones where `count` is larger than their number.

    Args:
      workdir: the run directory.
      count: number of samples; by default those that the run saved.
      prompt: index of the task's prompt.

    Returns:
      The samples, and the run's configuration.

    Raises:
      ValueError, FileNotFoundError: a folder without a run of a language model, or without its reference policy yet.
    """
    run = workdirs.read_run(workdir, "--run")
    task, path = tasks.make(run), workdir / FILE
    if path.is_file():
        saved = read_file(path, task.answer_set(prompt) or (), prompt)
        if count is None or count <= len(saved.reward):
            assert saved.ref_logp is not None
            samples = saved._replace(
                reward=saved.reward[:count], answer=saved.answer[:count], ref_logp=saved.ref_logp[:count]
            )
            return samples._replace(equal_strings=task.answers_have_equally_many_strings), run
    _refuse_counted_scores(task)
    weights = str(workdir / "reference") if run.warmup.steps else inputs.pinned(workdir, run)
    if run.warmup.steps and not (workdir / "reference").is_dir():
        raise FileNotFoundError(f"{weights} does not exist: the run has not finished its warm-up")
    inputs.check(workdir, inputs.of_files(run, weights, inputs.REFERENCE if run.warmup.steps else inputs.WEIGHTS))
    policy, params = reference.load(weights, run.policy)
    return _sample(run, policy, params, task, count, prompt), run


def _refuse_counted_scores(task: tasks.Task) -> None:
    """Refuses to draw samples for a task that counts its scores, or remembers them.

    Raises:
      ValueError: one line.
    """
    if task.keeps_state:
        raise ValueError(
            f"the task {task.name!r} keeps a state of its scores: samples of the reference policy would each cost one, "
            "and be judged by what came before; give --rows=FILE (samples), or --rollouts=WORKDIR (of a run)"
        )


def _sample(
    run: config.LanguageRun, policy: Policy, params: Any, task: tasks.Task, count: int | None, prompt: int
) -> ReferenceSamples:
    prompts = _prompts(run, policy, task, prompt)
    if len(task) > 1:
        print(f"prompt {prompt} of {len(task)}: {task.prompt(prompt)!r:.200}")
    classes = answer_classes.opened(run, task, None)
    setup = Setup(run, task, policy, params, prompts, optim.make(run.optimiser), classes=classes)
    count = count or run.reference.samples or BEFORE_TRAINING
    (samples,) = reference.draw_samples(setup, [prompt], "measure", count)
    answers = reference.answers_of(task, prompt, samples)
    known, equal_strings = samples.indexed(answers), task.answers_have_equally_many_strings
    return ReferenceSamples(known.reward, known.answer, samples.logp, answers, equal_strings=equal_strings)


def _prompts(run: config.LanguageRun, policy: Policy, task: tasks.Task, prompt: int) -> EncodedPrompts:
    if prompt >= len(task):
        raise ValueError(f"--prompt={prompt}: the task has {len(task)}, counted from 0")
    prompts = EncodedPrompts(run, policy, task)
    prompts[prompt]  # refuses one that does not fit
    return prompts
