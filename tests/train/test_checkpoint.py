"""What a resumed run must not lose, and what a run that was killed or found no room may begin again."""

import contextlib
import errno
import gc
import json
import resource
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from mara_jax.config import Checkpoint
from mara_jax.train import checkpoint, disk, integrity
from mara_jax.train.state import State


def workdir(tmp_path, *, rows: int, saved: list[int], every: int = 4, steps: int = 10, recorded: int | None = None):
    """A run's folder with so many steps told and these checkpoints.

    Args:
      recorded: a step whose checkpoint saved.json says was complete, 0 for none; None: a version that wrote neither
        saved.json nor inputs.json.
    """
    (tmp_path / "config.json").write_text(json.dumps({"steps": steps, "checkpoint": {"every": every}}))
    (tmp_path / "metrics.jsonl").write_text("{}\n" * rows)
    if recorded is not None:
        (tmp_path / "inputs.json").touch()
    if recorded:
        (tmp_path / "saved.json").write_text(json.dumps({"step": recorded}))
    for step in saved:
        folder = tmp_path / "checkpoints" / str(step)
        (folder / "default").mkdir(parents=True)
        for name in ("_CHECKPOINT_METADATA", "default/_METADATA", "default/manifest.ocdbt"):
            (folder / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("rows", "saved", "recorded"),
    [
        (3, [], None), (10, [8, 10], None), (9, [8], None), (0, [], None),
        (4, [], 0), (400, [], 0), (0, [], 8), (9, [8], 8),
    ],
    ids=[
        "killed before the first checkpoint was due", "finished", "made longer", "nothing yet",
        "killed in the first checkpoint", "as many rows as you like", "no row to lose", "resumed",
    ],
)  # fmt: skip
def test_what_may_be_resumed(tmp_path, rows, saved, recorded):
    assert checkpoint.check(workdir(tmp_path, rows=rows, saved=saved, recorded=recorded), 20) is None


def test_fewer_steps_than_done_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"steps=6, but .* has done 8: give at least 8"):
        checkpoint.check(workdir(tmp_path, rows=9, saved=[4, 8]), 6)


@pytest.mark.parametrize(
    ("rows", "every", "recorded"),
    [(4, 4, None), (10, 400, None), (1, 4, 8)],
    ids=["one was due", "the last was due", "one was recorded"],
)
def test_lost_checkpoints_do_not_cost_the_metrics(tmp_path, rows, every, recorded):
    with pytest.raises(ValueError, match=rf"tells of {rows} steps, but .* holds no checkpoint: put it back"):
        checkpoint.check(workdir(tmp_path, rows=rows, saved=[], every=every, recorded=recorded), 10)


def test_a_file_in_place_of_the_checkpoints_is_refused(tmp_path):
    (workdir(tmp_path, rows=2, saved=[]) / "checkpoints").write_text("")
    with pytest.raises(ValueError, match="checkpoints is not a folder"):
        checkpoint.check(tmp_path, 10)


@pytest.mark.parametrize("lost", ["", "default", "default/manifest.ocdbt", "_CHECKPOINT_METADATA"])
def test_a_half_copied_checkpoint_lies_aside_before_anything_is_loaded(tmp_path, lost):
    """The run goes on from the newest checkpoint that is whole; 6 is as incomplete as 8."""
    workdir(tmp_path, rows=9, saved=[4, 6, 8])
    for step in (6, 8):
        path = tmp_path / "checkpoints" / str(step) / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        (tmp_path / "checkpoints" / str(step)).mkdir(exist_ok=True)
    assert checkpoint.check(tmp_path, 10) is None
    lines = checkpoint.set_aside_damaged(tmp_path)
    assert ["checkpoints/8 is damaged (it lacks " in lines[0], "checkpoints/6 is damaged (it lacks " in lines[1]]
    assert all("the run goes on from that of step 4" in line for line in lines) and checkpoint.saved_steps(
        tmp_path
    ) == [4]


STATE = State(jnp.int32(2), {str(number): jnp.full((8, 8), number) for number in range(9)}, ())
SETTINGS = Checkpoint(every=2, keep=2)


def save(folder, *steps: int) -> checkpoint.Checkpoints:
    checkpoints = checkpoint.Checkpoints(folder, SETTINGS)
    for step in steps:
        checkpoints.save(step, STATE)
    checkpoints.close()
    return checkpoints


def names(folder) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


def test_what_was_saved_is_recorded_and_restored(tmp_path):
    save(tmp_path, 2, 3, 4)  # 3 is not due
    assert names(tmp_path) == {"2", "4"} and checkpoint.saved_steps(tmp_path) == [2, 4]
    assert json.loads((tmp_path / "saved.json").read_text()) == {"step": 4}
    assert checkpoint.check(tmp_path, 10) is None  # all parts that it looks for are there
    restored = checkpoint.Checkpoints(tmp_path, SETTINGS).restore(STATE)
    assert all(np.all(np.asarray(restored.params[name]) == int(name)) for name in STATE.params)
    shutil.rmtree(tmp_path / "checkpoints")
    save(tmp_path)  # a run that begins anew
    assert not (tmp_path / "saved.json").exists()


def test_parts_of_a_killed_write_are_removed(tmp_path):
    save(tmp_path, 2)
    for name in ("4.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-17"):
        (tmp_path / "checkpoints" / name / "default").mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "default" / "array").write_bytes(b"x" * 9999)
    save(tmp_path)
    assert names(tmp_path) == {"2"}


@pytest.fixture
def quiet(monkeypatch, caplog):
    """As the command has it: of its errors Orbax logs nothing. At the end no thread and no coroutine has raised any."""
    verbosity, raised = logging.get_verbosity(), []
    logging.set_verbosity(logging.FATAL)
    monkeypatch.setattr(sys, "unraisablehook", lambda args: raised.append(repr(args)))
    hook = sys.unraisablehook
    yield
    gc.collect()
    assert sys.unraisablehook is hook, "nobody puts another one in its place"
    assert raised == [] and [one for one in caplog.records if one.name == "asyncio"] == []
    logging.set_verbosity(verbosity)


@contextlib.contextmanager
def small_files(most: int):
    """Files of this process may have so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def large_state() -> State:
    """With 40 arrays that nothing compresses."""
    random = np.random.default_rng(0).standard_normal((40, 9000)).astype(np.float32)
    return STATE.replace(params={str(number): jnp.asarray(row) for number, row in enumerate(random)})


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_write_that_finds_no_room_leaves_the_older_checkpoint(tmp_path, quiet, capfd, monkeypatch, backend):
    """Written at once, or as on accelerators beside training."""
    monkeypatch.setattr(checkpoint.jax, "default_backend", lambda: backend)
    save(tmp_path, 2)
    checkpoints, large = checkpoint.Checkpoints(tmp_path, SETTINGS), large_state()
    told = r"^no space left to write .* \(File too large\): free some, and give the same command again$"
    with small_files(5000), pytest.raises(ValueError, match=told), disk.one_line(tmp_path):
        checkpoints.save(4, large)
        checkpoints.close()
    checkpoints.finish_alone()
    gc.collect()
    assert capfd.readouterr().err == "" and names(tmp_path) == {"2"}
    assert json.loads((tmp_path / "saved.json").read_text()) == {"step": 2}
    again = checkpoint.Checkpoints(tmp_path, SETTINGS)
    assert np.all(np.asarray(again.restore(STATE).params["8"]) == 8)
    again.save(4, large)
    again.close()
    assert names(tmp_path) == {"2", "4"}


@pytest.mark.parametrize("read", ["params", "state"])
def test_a_read_that_fails_is_one_error(tmp_path, quiet, read, monkeypatch):
    """Of a checkpoint without digests, whose arrays' file was cut off: many reads are under way at the first error."""
    checkpoints, large = checkpoint.Checkpoints(tmp_path, SETTINGS), large_state()
    checkpoints.save(2, large)
    checkpoints.close()
    (tmp_path / "checkpoints" / "2" / integrity.FILE).unlink()
    for path in (tmp_path / "checkpoints" / "2").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"checkpoints/2 cannot be read \(.*\): delete that folder and "):
        if read == "params":
            checkpoint.read_params(tmp_path, 2, large.params)
        else:
            checkpoint.Checkpoints(tmp_path, SETTINGS).restore(large)


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "No space left on device"),
        (OSError(errno.EDQUOT, "x"), "Disk quota exceeded"),
        (
            ValueError("RESOURCE_EXHAUSTED: Error writing ... [OS error 28: ENOSPC No space left ...]"),
            "No space left on device",
        ),
        (Exception("No space left on device (os error 28)"), "No space left on device"),
        (raised(RuntimeError("failed"), OSError(errno.EFBIG, "File too large")), "File too large"),
        (ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 1234 bytes"), None),
        (OSError(errno.EACCES, "Permission denied"), None),
        (MemoryError(), None),
    ],
)
def test_what_says_that_there_is_no_room(error, words):
    assert disk.reason(error) == words
