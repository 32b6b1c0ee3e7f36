"""One run at a time in a folder: processes that are refused, killed, start at one moment, or know no file locks."""

import errno
import fcntl
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from mara_jax.train import lock
from mara_jax.train import workdir as workdirs

ROOT = pathlib.Path(__file__).parents[2]
# Takes the lock at a given time of the clock, says so or why not, and holds it until a line comes. No jax: it is quick.
PROGRAM = """
import os, pathlib, sys, time
from mara_jax.train import lock
time.sleep(max(0, float(sys.argv[2]) - time.time()))
try:
    with lock.held(pathlib.Path(sys.argv[1])):
        if "child" in sys.argv and os.fork() == 0:
            time.sleep(60)
        print("held", flush=True)
        sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
"""


def start(workdir: pathlib.Path, *words: str, at: float = 0.0) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(workdir), str(at), *words]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen) -> str:
    assert process.stdout
    return process.stdout.readline().rstrip("\n")


def end(process: subprocess.Popen) -> None:
    """Lets a holder go its way to the end."""
    process.communicate("\n", timeout=20)


def test_a_second_run_is_refused_and_told_by_whom(tmp_path):
    workdir = tmp_path / "deep" / "run"
    first = start(workdir)
    assert said(first) == "held"
    second = start(workdir)
    line = said(second)
    assert line.startswith(
        f"workdir {workdir} is in use by another run (process {first.pid} on {socket.gethostname()}, since 20"
    )
    assert line.endswith("wait until it ends, choose another --workdir")
    end(second)
    assert (workdir / "lock").exists()
    end(first)
    assert not (tmp_path / "deep").exists()  # where nothing was written there is no folder either


def test_what_was_written_or_there_before_stays(tmp_path):
    with lock.held(tmp_path):
        pass
    assert tmp_path.is_dir() and not any(tmp_path.iterdir())
    with lock.held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "config.json").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.json"]


def test_a_lock_goes_with_its_process(tmp_path):
    """Killed, it leaves its file and a child that it had forked: neither is in the way."""
    killed = start(tmp_path, "child")
    assert said(killed) == "held"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert json.loads((tmp_path / "lock").read_text())["pid"] == killed.pid
    workdirs.check_place(tmp_path)
    assert workdirs.only_begun(tmp_path)  # a lock is no run
    with lock.held(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_of_runs_that_start_at_one_moment_one_wins(tmp_path):
    for attempt in range(2):
        at = time.time() + 0.6
        processes = [start(tmp_path / str(attempt) / "run", at=at) for _ in range(6)]
        lines = [said(process) for process in processes]
        assert lines.count("held") == 1 and sum("in use by another run" in line for line in lines) == 5
        for process in processes:
            end(process)
        # The folder itself may stay: whoever made it was refused while another held the lock there.
        assert not [path for path in (tmp_path / str(attempt)).rglob("*") if not path.is_dir()]


@pytest.fixture
def no_file_locks(monkeypatch):
    """A network file system without locks."""

    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(lock, "_SECONDS", 0.0)


def owner(workdir: pathlib.Path, pid: int, host: str | None = None) -> pathlib.Path:
    """The file of a holder, alive or dead."""
    path = workdir / "lock.owner"
    path.write_text(json.dumps({"pid": pid, "host": host or socket.gethostname(), "since": "2030-01-02 03:04:05"}))
    return path


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_without_file_locks_a_living_process_of_this_host_is_respected(tmp_path, no_file_locks, dead):
    path = owner(tmp_path, os.getppid())
    with (
        pytest.raises(ValueError, match=rf"process {os.getppid()} on .*, since 2030-01-02 03:04:05"),
        lock.held(tmp_path),
    ):
        pass
    assert path.exists()
    for pid in (dead, os.getpid()):  # an earlier process may have had our number
        owner(tmp_path, pid)
        with lock.held(tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert not path.exists()


@pytest.mark.parametrize("text", [None, "", "{"], ids=["another host", "just made", "damaged"])
def test_without_file_locks_what_cannot_be_known_is_refused_with_the_cure(tmp_path, no_file_locks, dead, text):
    path = owner(tmp_path, dead, "elsewhere")
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=rf"or, if that run has ended, delete {path}$"), lock.held(tmp_path):
        pass
    assert path.exists()
    path.unlink()
    with lock.held(tmp_path):
        assert path.exists()
