"""WORKDIR/rollouts: the completions of each step, one Parquet file a step, with rewards, answers and log-probs."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from mara_jax.tasks.base import Task
from mara_jax.train.scoring import GroupScores

FOLDER = "rollouts"
_END = b"PAR1"  # the last bytes of a Parquet file
COLUMNS = "step prompt_id prompt sample completion reward answer logp ref_logp finished".split()


class Rollouts:
    """Writes the files of a run; those of steps behind the restored one are removed, as the run makes them again.

    Files of other names are left alone.

    keeps: whether this process writes.
    """

    def __init__(self, workdir: pathlib.Path, task: Task, steps_done: int, keeps: bool) -> None:
        self.folder, self.task, self.keeps = workdir / FOLDER, task, keeps
        self.lost: list[int] = []  # steps up to the restored one whose file is not there, or was cut short
        if not keeps:
            return
        self.folder.mkdir(exist_ok=True)
        for path in [*self.folder.glob("step_*.part"), *_files(self.folder)]:
            if path.suffix == ".part" or _step(path) > steps_done:
                path.unlink()
        whole = {_step(path) for path in _files(self.folder) if _is_whole(path)}
        self.lost = [step for step in range(1, steps_done + 1) if step not in whole]

    def write(
        self, step: int, ids: np.ndarray, texts: list[list[str]], scores: GroupScores, arrays: dict[str, np.ndarray]
    ) -> None:
        """Writes the file of a step, whole or not at all.

        Args:
          step: its number; ids: [p] of its prompts; texts: [p][g]; arrays: [p, g] each, by the names of their columns.
        """
        if not self.keeps:
            return
        from pyarrow import parquet, table

        count, group_size = scores.reward.shape
        task_prompts = [_as_text(self.task.prompt(int(number))) for number in ids]
        columns: dict[str, Any] = {
            "step": np.full(count * group_size, step, np.int32),
            "prompt_id": np.repeat(ids.astype(np.int64), group_size),
            "prompt": [prompt for prompt in task_prompts for _ in range(group_size)],
            "sample": np.tile(np.arange(group_size, dtype=np.int32), count),
            "completion": [text for group in texts for text in group],
            "reward": scores.reward.ravel(),
            "answer": [answer for group in scores.answer for answer in group],
        } | {name: array.ravel() for name, array in arrays.items()}
        path = self.folder / f"step_{step:06d}.parquet"
        part = path.with_suffix(".part")
        parquet.write_table(table(columns), part)
        part.replace(path)


def read(workdir: pathlib.Path, first: int = 1, last: int | None = None, columns: Sequence[str] | None = None) -> Any:
    """The completions of a run's steps, from `first` to `last`, as one Arrow table.

    Args:
      workdir: of the run.
      first: the first step.
      last: the last one; by default all that there are.
      columns: only these are read; by default all.

    Raises:
      FileNotFoundError: the run has written none.
      ValueError: a file that is damaged, or lacks a column.
    """
    from pyarrow import concat_tables

    files = [path for path in _files(workdir / FOLDER) if first <= _step(path)]
    files = [path for path in files if last is None or _step(path) <= last]
    if not files:
        raise FileNotFoundError(f"{workdir / FOLDER} holds no rollouts of these steps")
    # A step in which no completion has an answer has a column of nulls without a type.
    return concat_tables([_read_step(path, columns) for path in files], promote_options="default")


def _read_step(path: pathlib.Path, columns: Sequence[str] | None) -> Any:
    from pyarrow import ArrowException, parquet

    try:
        names = parquet.read_schema(path).names
        missing = [name for name in COLUMNS if name not in names]
        step = None if missing else parquet.read_table(path, columns=None if columns is None else list(columns))
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and the other steps can be read") from error
    if missing:
        raise ValueError(f"{path} lacks the column {missing[0]}: a step's file has {', '.join(COLUMNS)}")
    return step


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of steps, in order."""
    named = sorted(folder.glob("step_*.parquet"))
    return [path for path in named if path.stem.removeprefix("step_").isdigit() and path.is_file()]


def _is_whole(path: pathlib.Path) -> bool:
    """Whether a Parquet file ends as each one does; what is cut short, or empty after a power failure, does not."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(_END)))
        return file.read() == _END


def _step(path: pathlib.Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _as_text(prompt: Any) -> str:
    """A prompt as it stands in the column: chat messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(list(prompt), ensure_ascii=False)
