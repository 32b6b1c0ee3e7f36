"""Folders that are gone while a run writes there: one line names them, and what is left of checkpoints is whole."""

import errno
import os
import pathlib
import shutil

import pytest
from test_killed import RUN

from mara_jax import main
from mara_jax.train import checkpoint, disk, integrity, loop


@pytest.mark.parametrize(
    ("missing", "name", "lost"),
    [
        ("run", "run/modes.part", "run"), ("run", "run/rollouts/a.part", "run"),
        ("run/rollouts", "run/rollouts/a.part", "run/rollouts"), ("run/a", "run/a/b/c", "run/a"),
        ("", "run/rollouts/a.part", None), ("", "weights/config.json", None),
    ],
)  # fmt: skip
def test_the_outermost_folder_that_is_gone_is_named(tmp_path, monkeypatch, missing, name, lost):
    """Of the run's own: a missing file elsewhere is an error of its own. Workdirs are often relative."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "rollouts").mkdir(parents=True)
    if missing:
        shutil.rmtree(tmp_path / missing, ignore_errors=True)
    for error in (
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name),
        FileNotFoundError(f"[Errno 2] Failed to open local file '{tmp_path / name}'. Detail: [errno 2] No such file"),
    ):
        assert disk.gone(error, pathlib.Path("run")) == (None if lost is None else tmp_path / lost)
    assert disk.gone(PermissionError(errno.EACCES, "Permission denied", name), pathlib.Path("run")) is None


@pytest.mark.slow
@pytest.mark.parametrize("part", ["checkpoints", "rollouts", "evaluation", ""])
def test_a_run_whose_folder_is_gone_ends_in_one_line_and_goes_on_when_it_is_back(monkeypatch, capsys, tmp_path, part):
    """Moved away in the second of three steps, and put back."""
    workdir, away, update = tmp_path / "run", tmp_path / "away", loop.update
    flags = ["main", *RUN, "--config.steps=3", f"--workdir={workdir}"]

    def moving(setup, state, batches):
        if int(state.step) == 1:
            (workdir / part).rename(away)
        return update(setup, state, batches)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "update", moving)
        assert main.main(flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{workdir / part} is gone" in said
    assert workdir.exists() == bool(part)
    if workdir.exists() and part != "checkpoints":
        assert checkpoint.saved_steps(workdir) == [1]
    shutil.rmtree(workdir / part, ignore_errors=True)
    away.rename(workdir / part)
    assert integrity.damage(workdir / "checkpoints" / "1") is None
    assert main.main(flags) == 0 and "resuming after step 1" in capsys.readouterr().out
