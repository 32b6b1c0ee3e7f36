"""A run that makes no progress says where it is: at once in the thread, and from outside, of processes that hang."""

import json
import pathlib
import subprocess
import sys
import time

from mara_jax.train import watchdog, workdir

ROOT = pathlib.Path(__file__).parents[2]
LINE = "mara_jax: no progress for "


def hang(seconds: float, until: float, phase: str, workdir: pathlib.Path) -> None:
    """This process, watched, is in a phase for `until` seconds."""
    with watchdog.watching(seconds, False, workdir):
        watchdog.entered(phase)
        time.sleep(until)


def test_one_line_names_the_phase_and_the_file_with_stacks(tmp_path, capsys):
    hang(0.4, 0.7, "scoring of step 7", tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    stacks = tmp_path / "stalled" / "process_0_stacks.txt"
    assert line == f"{LINE}0 s: the run is in the scoring of step 7 (what its threads do: {stacks})"
    assert "in hang" in stacks.read_text() and [path.name for path in stacks.parent.iterdir()] == [stacks.name]
    assert workdir.only_begun(tmp_path)  # its folder alone is no run


def test_it_is_said_again_after_as_long_once_more(tmp_path, capsys):
    hang(0.2, 0.75, "warm-up, step 3 of 8", tmp_path)
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_nothing_is_said_of_a_run_that_goes_on(tmp_path, capsys):
    with watchdog.watching(0.4, False, tmp_path):
        for number in range(8):
            watchdog.entered(f"update of step {number}")
            time.sleep(0.1)
    hang(0, 0.1, "any", tmp_path)  # 0: nobody watches
    assert capsys.readouterr().err == "" and list(tmp_path.iterdir()) == []


def test_a_process_that_was_stopped_is_not_told_of_when_it_goes_on(tmp_path, capsys, monkeypatch):
    """As by SIGSTOP, or by a machine that sleeps: the thread has not looked either."""
    with watchdog.watching(1.0, False, tmp_path):
        watchdog.entered("sampling of step 2")
        before = time.monotonic
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: before() + 3600)
        time.sleep(0.3)
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def place(folder: pathlib.Path, process: int, phase: str, since: float, written: float = 0.0) -> None:
    folder.mkdir(exist_ok=True)
    told = {"phase": phase, "since": time.time() - since, "written": time.time() - written}
    (folder / f"process_{process}.json").write_text(json.dumps(told))


def said(tmp_path: pathlib.Path, capsys, process: int, count: int) -> str:
    """What a process of several says that hangs in the update of step 7, since a second."""
    watchdog.entered("update of step 7")
    watch = watchdog._Watch(10.0, False, tmp_path / "stalled", process, count)
    watch.look = 0.01
    watch._report(1.0)
    return capsys.readouterr().err


def test_the_process_that_all_wait_for_is_named(tmp_path, capsys):
    """It is the one that has been longest where it is: the others have gone on until they needed it."""
    folder = tmp_path / "stalled"
    place(folder, 1, "scoring of step 7", since=3.0)
    place(folder, 2, "update of step 7", since=0.5)
    words = (
        "process 1 of 3 has been longest where it is, in the scoring of step 7; process 0 waits in the update of step 7"
    )
    assert words in said(tmp_path, capsys, 0, 3)
    place(folder, 1, "update of step 7", since=3.0)
    assert "all 3 processes are in the update of step 7" in said(tmp_path, capsys, 0, 3)
    # One of them speaks, also where it is not process 0.
    assert said(tmp_path, capsys, 2, 3) == ""
    (folder / "process_0.json").unlink()
    assert "process 0 of 2 says nothing" in said(tmp_path, capsys, 1, 2)


def test_a_process_that_says_nothing_is_named(tmp_path, capsys):
    """And what an earlier hang has left counts for nothing."""
    place(tmp_path / "stalled", 2, "scoring of step 7", since=90, written=90)
    place(tmp_path / "stalled", 1, "update of step 7", since=0.9)
    told = said(tmp_path, capsys, 0, 3)
    assert "process 2 of 3 says nothing" in told and "process 0 waits in the update of step 7" in told
    assert told.count("\n") == 1


PROGRAM = """
import sys, time, pathlib
from mara_jax.train import watchdog
with watchdog.watching(.3, True, pathlib.Path(sys.argv[1])):
    watchdog.entered("scoring of step 7")
    time.sleep(60)
"""


def test_a_process_ends_where_it_is_asked_to(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == watchdog.STALLED == 70
    assert done.stderr.startswith(LINE) and done.stderr.count("\n") == 1
