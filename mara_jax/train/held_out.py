"""Evaluations of a run: its policy on held-out prompts, before the first step, every so many, and after the last."""

import dataclasses
import json
import pathlib
import time
from typing import Any

from mara_jax import tasks
from mara_jax.config import COVERAGE, LanguageRun
from mara_jax.parallel import hosts
from mara_jax.policies.policy import Policy
from mara_jax.tasks.base import Prompt, Task
from mara_jax.train import best_checkpoint, evaluation, metrics, reference
from mara_jax.train import workdir as workdirs
from mara_jax.train.best_checkpoint import Covered, Score
from mara_jax.train.checkpoint import Checkpoints
from mara_jax.train.prompts import LONG_PROMPTS_CURE, EncodedPrompts, PromptTooLongError
from mara_jax.train.setup import Setup
from mara_jax.train.trackers import Trackers

FILE = "evaluation.jsonl"  # in WORKDIR: a row an evaluation
FOLDER = "evaluation"  # the measures of each prompt, a file an evaluation
FIELDS = ("step", "reward", "pass@1")  # of every row
MOST_OWN_PROMPTS = 256  # of a task that is evaluated on the prompts that it is trained on


def make_task(cfg: LanguageRun, task: Task) -> Task | None:
    """The task of the held-out prompts: the run's with another file, or the run's own; None without evaluations.

    Raises:
      ValueError, OSError: one line; a file that cannot be used, a task without files, or too many prompts.
    """
    where = cfg.evaluation.prompts
    if not cfg.evaluation.every:
        return None
    if not where:
        if len(task) > MOST_OWN_PROMPTS:
            raise ValueError(
                f"evaluation.every={cfg.evaluation.every} without evaluation.prompts evaluates all {len(task)} prompts "
                f"of training, more than {MOST_OWN_PROMPTS}: name a file of held-out prompts in evaluation.prompts"
            )
        return task
    if not isinstance(getattr(cfg.task, "prompts", None), str):
        raise ValueError(
            f"evaluation.prompts={where!r}: the task {task.name!r} reads no file of prompts: leave evaluation.prompts "
            "empty, and it is evaluated on its own prompts"
        )
    other: Any = dataclasses.replace(cfg.task, prompts=where)  # pyright: ignore[reportCallIssue]
    try:
        return tasks.make(dataclasses.replace(cfg, task=other))
    except (ValueError, OSError) as error:
        raise ValueError(f"evaluation.prompts={where!r}: {error}") from error


def encoded(cfg: LanguageRun, policy: Policy, held_out: Task) -> list[list[int]]:
    """Token ids of each of the held-out prompts.

    Raises:
      ValueError: one line; a prompt that cannot be encoded, or leaves no room for a completion.
    """
    try:
        return list(EncodedPrompts(cfg, policy, held_out))
    except PromptTooLongError as error:
        words = str(error).removesuffix(LONG_PROMPTS_CURE)
        raise ValueError(f"evaluation.prompts={cfg.evaluation.prompts!r}: {words}, or leave that prompt out") from error


def describe(cfg: LanguageRun, task: Task, held_out: Task) -> list[str]:
    """Lines that say what evaluations are made on, and warn of prompts that training uses, too."""
    size = f"{len(held_out)} prompts, {cfg.evaluation.samples} completions each, every {cfg.evaluation.every} steps"
    if held_out is task:
        return [f"evaluation: the prompts of training: {size}"]
    lines = [f"evaluation: {cfg.evaluation.prompts}: {size}"]
    known = {_key(held_out.prompt(number)) for number in range(len(held_out))}
    shared = len(known & {_key(task.prompt(number)) for number in range(len(task))})
    if shared:
        lines.append(f"WARNING: {shared} of {len(known)} prompts of evaluation.prompts are prompts of training, too")
    return lines


def _key(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else tuple((one["role"], one["content"]) for one in prompt)


def table_of(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """The file with the measures of each prompt after `step` steps."""
    return workdir / FOLDER / f"step_{step:06d}.json"


def score_of(workdir: pathlib.Path, row: dict[str, Any], measure: str, samples: int) -> Score | None:
    """What a measure compares of an evaluation that is there; None where what it needs is not.

    Args:
      row: of evaluation.jsonl; samples: completions of each prompt.
    """
    path, prompts = table_of(workdir, row["step"]), []
    if measure == COVERAGE and path.is_file():
        prompts = json.loads(path.read_text(encoding="utf-8"))["prompts"]
    return best_checkpoint.score(measure, row, prompts, samples)


class Evaluations:
    """Makes, writes and shows the evaluations of a run; those of steps behind the restored one are made again.

    Random numbers are those of a stream of its own, the same at every evaluation: two of them differ by what the policy
    has learned, and training draws what it draws without them.
    """

    def __init__(
        self,
        setup: Setup,
        workdir: pathlib.Path,
        steps_done: int,
        checkpoints: Checkpoints,
        display: metrics.Display,
        trackers: Trackers,
    ) -> None:
        self.setup, self.checkpoints, self.display, self.trackers = setup, checkpoints, display, trackers
        self.workdir, self.log = workdir, None
        if setup.held_out is None:
            return
        keeps = hosts.is_process_zero()
        self.log = metrics.Log(workdir / FILE, steps_done, keeps, FIELDS)
        if keeps:
            folder = workdir / FOLDER
            folder.mkdir(exist_ok=True)
            for path in folder.glob("step_*"):
                if path.suffix == ".part" or int(path.stem.removeprefix("step_")) > steps_done:
                    path.unlink()
        self.measured = set(hosts.on_process_zero(lambda: [row["step"] for row in self._rows()]))
        checkpoints.scores.update(self._scores())

    def _rows(self) -> list[dict[str, Any]]:
        return self.log.rows if self.log is not None else []

    def _scores(self) -> dict[int, Score]:
        """What `checkpoint.best` compares of the evaluations that are there, by their steps; on every process."""
        cfg = self.setup.cfg
        if not cfg.checkpoint.best:
            return {}
        scores = hosts.on_process_zero(
            lambda: [
                [row["step"], score_of(self.workdir, row, cfg.checkpoint.best, cfg.evaluation.samples)]
                for row in self._rows()
            ]
        )
        return {
            step: Covered(*one) if isinstance(one, list | tuple) else one for step, one in scores if one is not None
        }

    def due(self, step: int) -> bool:
        """Whether an evaluation belongs to the state after `step` steps, and is still to be made."""
        if self.setup.held_out is None or step in self.measured:
            return False
        return step == self.setup.cfg.steps or step % self.setup.cfg.evaluation.every == 0

    def measure(self, step: int, params: Any) -> None:
        """Measures the policy after `step` steps, where that is due.

        Args:
          params: all parameters of the policy, as from `lora.attached`.

        Raises:
          ValueError: logits that are not finite, or a reward that fails.
        """
        setup, held_out = self.setup, self.setup.held_out
        if held_out is None or self.log is None or not self.due(step):
            return
        started, key = time.perf_counter(), reference.stream(setup.cfg.seed, "evaluation")
        drawn = evaluation.draw(held_out.task, setup.policy, params, held_out.prompts, key, sizes(setup.cfg))
        if setup.classes is not None:
            columns = zip(*((group.prompt, group.answer, group.reward) for group in drawn), strict=True)
            names = setup.classes.apart(*map(list, columns))
            drawn = [group._replace(answer=own) for group, own in zip(drawn, names, strict=True)]
        measured = evaluation.summary(drawn, setup.cfg.algorithm.threshold)
        row = {"step": step} | measured["metrics"] | {"time/evaluation_s": time.perf_counter() - started}
        if hosts.is_process_zero():
            workdirs.write_json(table_of(self.workdir, step), {"step": step} | measured)
        self.log.write(row)
        self.trackers.write(row, "evaluation/")
        self.measured.add(step)
        best = setup.cfg.checkpoint.best
        if best:
            of = best_checkpoint.score(best, row, measured["prompts"], setup.cfg.evaluation.samples)
            assert of is not None, "checks refuse a measure that evaluations lack"
            self.checkpoints.scores[step] = of
        self.display.evaluation(row)

    def close(self) -> None:
        """Closes evaluation.jsonl."""
        if self.log is not None:
            self.log.close()


def sizes(cfg: LanguageRun) -> evaluation.Sizes:
    """As many rows at once as a rollout has, in its own shape where there are at least as many samples as in a group:
    so that the program of rollouts serves evaluations, too, and its memory is enough."""
    together = min(cfg.rollout.group_size, cfg.evaluation.samples)
    return evaluation.Sizes(
        cfg.evaluation.samples,
        cfg.rollout.max_new_tokens,
        cfg.algorithm.threshold,
        prompts_at_once=cfg.rollout.prompts_per_step * cfg.rollout.group_size // together,
        samples_at_once=together,
        slots=cfg.rollout.slots,
    )
