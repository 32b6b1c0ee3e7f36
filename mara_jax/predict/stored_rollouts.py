"""The completions that a run has stored, as groups in the order of training, with its samples of the reference."""

import collections
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mara_jax import config, tasks
from mara_jax.train import groups, reference_samples, rollouts
from mara_jax.train import workdir as workdirs
from mara_jax.train.population import report

COLUMNS = tuple(name for name in rollouts.COLUMNS if name != "completion")  # completions are long, and not looked at


class ReferenceScores(NamedTuple):
    """A run's samples of the reference policy under one prompt: reward [n], and answers, None for none."""

    reward: np.ndarray
    answer: list[str | None]


class Stored(NamedTuple):
    """k groups of g completions, those of a step side by side.

    run: its configuration; step, prompt_id [k]; text: of each prompt; reward [k, g]; answer, nested lists; logp and
    ref_logp [k, g] of whole completions under the policy that drew them and under the reference policy (nats); finished
    [k, g]; reference: of the prompts whose samples the run has kept, equally many of each; leaves_out_truncated:
    whether completions without an end token are left out of the update.
    """

    run: config.LanguageRun
    step: np.ndarray
    prompt_id: np.ndarray
    text: dict[int, str]
    reward: np.ndarray
    answer: list[list[str | None]]
    logp: np.ndarray
    ref_logp: np.ndarray
    finished: np.ndarray
    reference: dict[int, ReferenceScores]
    leaves_out_truncated: bool = False


def read(workdir: pathlib.Path, prompt: int | None = None) -> Stored:
    """Reads what a run has stored; writes nothing.

    Args:
      workdir: of the run.
      prompt: only its groups; by default those of all prompts.

    Raises:
      ValueError, FileNotFoundError: one line; no run, no stored completions, damaged ones, or ones that are no samples
        of the run's policies.
    """
    run = workdirs.read_run(workdir, "--rollouts")
    _check_run(workdir, run)
    table = rollouts.read(workdir, columns=COLUMNS)
    columns = {name: table[name].to_numpy() for name in COLUMNS if name not in ("prompt", "answer")}
    count, group_size = table.num_rows, 1 + int(columns["sample"].max())
    if count % group_size or np.any(columns["sample"] != np.arange(count) % group_size):
        raise ValueError(f"{workdir / rollouts.FOLDER} has a group that is not whole: groups are of {group_size}")
    arrays = {name: _numbers(workdir, columns, name).reshape(-1, group_size) for name in ("reward", "logp", "ref_logp")}
    answer_n = table["answer"].to_pylist()
    prompts, first_row = np.unique(columns["prompt_id"], return_index=True)
    stored = Stored(
        run,
        columns["step"][::group_size],
        columns["prompt_id"][::group_size],
        {int(prompt): table["prompt"][int(row)].as_py() for prompt, row in zip(prompts, first_row, strict=True)},
        answer=[answer_n[first : first + group_size] for first in range(0, count, group_size)],
        finished=columns["finished"].reshape(-1, group_size),
        reference=_reference(_reference_path(workdir)),
        leaves_out_truncated=_leaves_out_truncated(run),
        **arrays,
    )
    return stored if prompt is None else _of_prompt(stored, prompt)


def _check_run(workdir: pathlib.Path, run: config.LanguageRun) -> None:
    folder = workdir / rollouts.FOLDER
    if not run.rollout.save:
        raise ValueError(
            f"{folder}: the run has rollout.save=False, so that no completions were stored: set it to True"
        )
    if not any(folder.glob("step_*.parquet")):
        raise FileNotFoundError(f"{folder} holds no step yet: the run has not finished its first one")
    if groups.equal_groups(run) != "keep":
        raise ValueError(
            f"{workdir} drew groups of equal rewards again (rollout.equal_groups={groups.equal_groups(run)}): what is "
            "stored was chosen by its rewards, so that weights do not make it samples of the reference policy; use a "
            "run with rollout.equal_groups=keep, or --run"
        )


def _leaves_out_truncated(run: config.LanguageRun) -> bool:
    """As the task has it; by its field `truncated` where the task's files have gone since the run."""
    try:
        return tasks.make(run).leaves_out_truncated
    except (ValueError, OSError):
        return getattr(run.task, "truncated", "") == "mask"


def _numbers(workdir: pathlib.Path, columns: dict[str, np.ndarray], name: str) -> np.ndarray:
    value_n = columns[name].astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(value_n))
    if len(bad):
        step = columns["step"][bad[0]]
        raise ValueError(f"{workdir / rollouts.FOLDER}: {name} of step {step} is {value_n[bad[0]]}: delete that file")
    return value_n


def _of_prompt(stored: Stored, prompt: int) -> Stored:
    chosen = np.flatnonzero(stored.prompt_id == prompt)
    if not len(chosen):
        present = sorted(stored.text)
        named = ", ".join(map(str, present[:8])) + (", ..." if len(present) > 8 else "")
        raise ValueError(f"--prompt={prompt}: the stored completions are of the prompts {named}")
    names = ("step", "prompt_id", "reward", "logp", "ref_logp", "finished")
    return stored._replace(
        text={prompt: stored.text[prompt]},
        answer=[stored.answer[k] for k in chosen],
        **{name: getattr(stored, name)[chosen] for name in names},
    )


def _reference_path(workdir: pathlib.Path) -> pathlib.Path:
    """The file of a run's samples; members of a population share its own where samples are drawn on first use."""
    path, population = workdir / reference_samples.FILE, workdir.absolute().parent.parent
    shared = not path.is_file() and (population / report.FILE).is_file()
    return population / reference_samples.FILE if shared else path


def _reference(path: pathlib.Path) -> dict[int, ReferenceScores]:
    """Samples of each prompt that has as many as any; a kill may have cut the file short."""
    rows: dict[int, list[dict[str, Any]]] = collections.defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            rows[row["prompt"]].append({name: row[name] for name in ("reward", "answer")})
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    most = max(map(len, rows.values()), default=0)
    return {
        prompt: ReferenceScores(np.array([row["reward"] for row in own], np.float64), [row["answer"] for row in own])
        for prompt, own in rows.items()
        if len(own) == most
    }
