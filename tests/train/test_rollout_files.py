"""Files of rollouts as a resumed run finds them: whole, lost, cut short, and what somebody else has put beside them."""

import os
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest

from mara_jax.train import metrics, rollouts

TASK = SimpleNamespace(prompt=lambda number: f"prompt {number}")


def written(workdir: pathlib.Path, steps: int) -> pathlib.Path:
    """A folder with the files of so many steps, of one prompt with two completions each."""
    files = rollouts.Rollouts(workdir, TASK, 0, keeps=True)  # pyright: ignore[reportArgumentType]
    scores = SimpleNamespace(reward=np.ones((1, 2)), answer=[["a", "b"]])
    arrays = {name: np.zeros((1, 2)) for name in ("logp", "ref_logp", "finished")}
    for step in range(1, steps + 1):
        files.write(step, np.zeros(1, int), [["a", "b"]], scores, arrays)  # pyright: ignore[reportArgumentType]
    return workdir / rollouts.FOLDER


def resumed(workdir: pathlib.Path, steps_done: int) -> rollouts.Rollouts:
    return rollouts.Rollouts(workdir, TASK, steps_done, keeps=True)  # pyright: ignore[reportArgumentType]


def test_lost_and_cut_files_are_named(tmp_path):
    folder = written(tmp_path, 6)
    assert resumed(tmp_path, 6).lost == []
    os.truncate(folder / "step_000002.parquet", 100)
    (folder / "step_000003.parquet").unlink()
    os.truncate(folder / "step_000004.parquet", 0)
    os.truncate(folder / "step_000006.parquet", 100)  # behind the restored step: it is made again
    assert resumed(tmp_path, 5).lost == [2, 3, 4]
    assert not (folder / "step_000006.parquet").exists()


@pytest.mark.parametrize("name", ["notes.txt", ".ipynb_checkpoints", "step_2 (copy).parquet"])
def test_what_is_no_step_is_left_alone(tmp_path, name):
    folder = written(tmp_path, 3)
    (folder / name).write_text("somebody's")
    (folder / "step_000003.part").write_text("half")
    assert resumed(tmp_path, 2).lost == []
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["step_000001.parquet", "step_000002.parquet", name]
    )
    assert rollouts.read(tmp_path).num_rows == 4


def test_many_steps_are_named_by_the_first():
    assert metrics.first_of([4]) == "4"
    assert metrics.first_of(list(range(1, 10))) == "1, 2, 3, 4, 5, 6, 7, 8, ..."
