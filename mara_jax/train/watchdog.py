"""A thread that says so when a run makes no progress, and in which phase it is.

What is waited for may never come: a reward function that hangs, a collective of which one process is stopped, a file
server that is away. The main thread can then tell nobody, so that a thread of its own does. Each of several processes
says where it is itself; which of them the others wait for, `parallel.watch` tells.
"""

import contextlib
import faulthandler
import pathlib
import sys
import threading
import time
from collections.abc import Iterator

import jax

from mara_jax.parallel import hosts, watch

STALLED = 70  # exit status of a process that its watchdog has ended (EX_SOFTWARE of sysexits.h)
FOLDER = "stalled"  # in WORKDIR: the stacks of the threads of each process that hangs


class _Progress:
    """What the main thread is in; it belongs to the process."""

    phase = "start"
    since = time.monotonic()
    count = 0  # of `entered`


_progress = _Progress()


def entered(phase: str) -> None:
    """Notes that this process has got to a phase, or on within it; named as in "no progress in the PHASE"."""
    _progress.phase, _progress.since = phase, time.monotonic()
    _progress.count += 1


@contextlib.contextmanager
def watching(seconds: float, ends: bool, workdir: pathlib.Path) -> Iterator[None]:
    """Inside, this process is watched.

    Args:
      seconds: without progress after which a line is written to stderr, and again after as many more; 0: nothing is.
      ends: whether the process then ends, too, with the status STALLED, as do all others of the run.
      workdir: of the run.
    """
    if not seconds:
        yield
        return
    entered("start")
    count = jax.process_count() if hosts.several_processes() else 1
    index = jax.process_index() if count > 1 else 0
    looking = _Watchdog(seconds, ends, workdir / FOLDER, index, count)
    looking.start()
    try:
        yield
    finally:
        looking.end()


class _Watchdog(threading.Thread):
    """Looks at the progress every now and then."""

    def __init__(self, seconds: float, ends: bool, folder: pathlib.Path, process: int, count: int) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.seconds, self.ends, self.folder = seconds, ends, folder
        self.name_of_run = f"process {process} of {count}" if count > 1 else "the run"
        self.look = min(seconds / 20, 30.0)
        self.ended = threading.Event()
        self.stacks = folder / f"process_{process}_stacks.txt"

    def end(self) -> None:
        """Ends the thread; stacks that it has written stay."""
        self.ended.set()
        self.join()

    def run(self) -> None:
        told_at, told, looked = 0, 0, time.monotonic()
        began = looked  # when this thread last began to look without a gap
        while not self.ended.wait(self.look):
            now, seen = time.monotonic(), _progress.count
            if now - looked > 10 * self.look:
                began = now  # this thread did not run either: the process was stopped, or its machine slept
            looked = now
            if seen != told_at:
                told_at, told = seen, 0
            idle = now - max(_progress.since, began)
            if idle >= self.seconds * (told + 1):
                told = int(idle / self.seconds)
                self._report(idle)

    def _report(self, idle: float) -> None:
        """Writes the line, or ends the run with it, if asked."""
        words = f"no progress for {idle:.0f} s: {self.name_of_run} is in the {_progress.phase}{self._write_stacks()}"
        if self.ends and watch.hang(STALLED, words):
            return  # all processes write it as they end
        print(f"mara_jax: {words}", file=sys.stderr, flush=True)
        if self.ends:
            watch.end_at_once(STALLED)

    def _write_stacks(self) -> str:
        """Writes what every thread is doing; returns words that say where."""
        try:
            self.folder.mkdir(exist_ok=True)
            with self.stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            return ""
        return f" (what its threads do: {self.stacks})"
