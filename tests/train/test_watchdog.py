"""A run that makes no progress says where it is: at once in the thread, and from outside, of processes that hang."""

import pathlib
import subprocess
import sys
import time

from mara_jax.parallel import watch
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


def test_each_of_several_processes_says_where_it_is_and_all_end_by_the_watch(tmp_path, capsys, monkeypatch):
    told = []
    monkeypatch.setattr(watch, "hang", lambda *words: told.append(words) or True)
    watchdog.entered("scoring of step 7")
    watchdog._Watchdog(10.0, False, tmp_path / "stalled", 2, 4)._report(12.0)
    words = f"no progress for 12 s: process 2 of 4 is in the scoring of step 7 (what its threads do: {tmp_path}"
    assert capsys.readouterr().err.startswith(f"mara_jax: {words}") and told == []
    watchdog._Watchdog(10.0, True, tmp_path / "stalled", 2, 4)._report(12.0)
    ((status, said),) = told
    assert status == watchdog.STALLED and said.startswith(words) and capsys.readouterr().err == ""


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
