"""A thread that says so when a run makes no progress: in which phase it is, and which of several processes hangs.

What is waited for may never come: a reward function that hangs, a collective of which one process is stopped, a file
server that is away. The main thread can then tell nobody, so that a thread of its own does.
"""

import contextlib
import faulthandler
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax

from mara_jax.parallel import hosts

STALLED = 70  # exit status of a process that its watchdog has ended (EX_SOFTWARE of sysexits.h)
FOLDER = "stalled"  # in WORKDIR: where each process stands and the stacks of its threads, once one of them hangs


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


class Place(NamedTuple):
    """Where a process stands: its number, its phase, and the clock (s since the epoch) when it got there."""

    process: int
    phase: str
    since: float


@contextlib.contextmanager
def watching(seconds: float, ends: bool, workdir: pathlib.Path) -> Iterator[None]:
    """Inside, this process is watched.

    Args:
      seconds: without progress after which a line is written to stderr, and again after as many more; 0: nothing is.
      ends: whether the process then ends, too, with the status STALLED.
      workdir: of the run, which several processes share; there they tell each other where they stand.
    """
    if not seconds:
        yield
        return
    entered("start")
    count = jax.process_count() if hosts.several_processes() else 1
    index = jax.process_index() if count > 1 else 0
    watch = _Watch(seconds, ends, workdir / FOLDER, index, count)
    watch.start()
    try:
        yield
    finally:
        watch.end()


class _Watch(threading.Thread):
    """Looks at the progress every now and then."""

    def __init__(self, seconds: float, ends: bool, folder: pathlib.Path, process: int, count: int) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.seconds, self.ends, self.folder, self.process, self.count = seconds, ends, folder, process, count
        self.look = min(seconds / 20, 30.0)
        self.ended = threading.Event()
        self.own = folder / f"process_{process}.json"
        self.stacks = folder / f"process_{process}_stacks.txt"
        _removed(self.own)

    def end(self) -> None:
        """Ends the thread, and takes away what it has left, unless the run ends as it stands."""
        self.ended.set()
        self.join()
        _removed(self.own)
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # stacks stay

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
                _removed(self.own)
            idle = now - max(_progress.since, began)
            if self.count > 1 and idle > self.look and self.folder.is_dir() and self._others():
                self._tell(idle)  # another process hangs, and wants to know who is where
            if idle >= self.seconds * (told + 1):
                told = int(idle / self.seconds)
                self._report(idle)

    def _report(self, idle: float) -> None:
        """Writes the line, once the other processes have had time to say where they are; ends the process if asked."""
        seen = _progress.count
        self._tell(idle)
        if self.count > 1 and (self.ended.wait(3 * self.look) or _progress.count != seen):
            return
        others = self._others()
        stacks = self._write_stacks()
        if all(place.process > self.process for place in others):  # one process speaks
            print(f"mara_jax: no progress for {idle:.0f} s: {self._where(others)}{stacks}", file=sys.stderr, flush=True)
        if self.ends:
            sys.stdout.flush()
            os._exit(STALLED)

    def _where(self, others: list[Place]) -> str:
        """In words, what hangs."""
        own = Place(self.process, _progress.phase, time.time() - (time.monotonic() - _progress.since))
        if self.count == 1:
            return f"the run is in the {own.phase}"
        silent = sorted({*range(self.count)} - {self.process, *(place.process for place in others)})
        if silent:
            names = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
            return (
                f"process {names} of {self.count} says nothing (it has ended or is stopped, or does not see "
                f"{self.folder}); process {own.process} waits in the {own.phase}"
            )
        if all(place.phase == own.phase for place in others):
            return f"all {self.count} processes are in the {own.phase}"
        first = min([own, *others], key=lambda place: place.since)
        waits = next((place for place in [own, *others] if place is not first), own)
        return (
            f"process {first.process} of {self.count} has been longest where it is, in the {first.phase}; process "
            f"{waits.process} waits in the {waits.phase}"
        )

    def _tell(self, idle: float) -> None:
        """Says on the shared disk where this process stands; one that is away is told of by nobody."""
        place = {"phase": _progress.phase, "since": time.time() - idle, "written": time.time()}
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            part = self.own.with_suffix(".part")
            part.write_text(json.dumps(place))
            part.replace(self.own)

    def _others(self) -> list[Place]:
        """Where the other processes stand that have said so lately."""
        places, oldest = [], time.time() - 10 * self.look - self.seconds
        for process in range(self.count):
            path = self.folder / f"process_{process}.json"
            if process == self.process:
                continue
            with contextlib.suppress(OSError, ValueError):
                said = json.loads(path.read_text())
                if said["written"] >= oldest:
                    places.append(Place(process, said["phase"], said["since"]))
        return places

    def _write_stacks(self) -> str:
        """Writes what every thread is doing; returns words that say where."""
        try:
            self.folder.mkdir(exist_ok=True)
            with self.stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            return ""
        return f" (what its threads do: {self.stacks})"


def _removed(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
