"""The watch that the processes of a run keep over each other: where one is gone, all others end and name it.

By itself jax notices after a hundred seconds that a process is gone, says so in a page of text from within C++, and
does not notice at all one that is only slow. Here every process keeps a connection to process 0, on which it says
once a second that it lives, and at once when it reaches a meeting (a place where all wait for each other), or when it
ends by itself, with the reason. The system closes the connections of a process that is killed. Process 0 judges
(`roll`), and tells all others, which end; these judge process 0.

The watch belongs to the process, so this module keeps it; with one process there is none, and every call does nothing.
"""

import contextlib
import os
import selectors
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from mara_jax.parallel import meeting
from mara_jax.parallel.meeting import Connection, Place
from mara_jax.parallel.roll import LOST, Loss, Roll

INTERVAL = 1.0  # seconds between two words of a process
SETTLING = 3.0  # seconds within which a process that failed hears whether another one was the cause


class Watch(threading.Thread):
    """The thread that listens and judges.

    Args:
      process: this one.
      peers: connections to the processes that this one hears: those of process 0 to all others, or that to process 0.
      names: how to call each process.
      timeout: seconds of silence.
      cure: what follows the line with which a process ends that has lost another one.
    """

    def __init__(
        self, process: int, peers: Mapping[int, Connection], names: Mapping[int, str], timeout: float, cure: str
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self.process, self.peers, self.names, self.timeout, self.cure = process, peers, names, timeout, cure
        self.roll = Roll({one: names[one] for one in {0, process, *peers}}, timeout, time.monotonic())
        self.lock = threading.Lock()  # of the roll
        self.interval = min(INTERVAL, timeout / 8)
        self.meetings = 0  # that this process has reached
        self.staying = {process, *peers}  # who has not reached the end of the run
        self.ending = False  # whether this process ends by itself: nothing that is heard counts any more
        self.parted = threading.Event()  # whether nobody listens any more
        self.selector = selectors.DefaultSelector()
        for peer, connection in peers.items():
            self.selector.register(connection.socket, selectors.EVENT_READ, peer)

    # ---- what the run says ----------------------------------------------------------------------------------------

    def arrive(self) -> None:
        """This process has reached the next meeting."""
        self.meetings += 1
        if self.process:
            self.peers[0].send(arrived=self.meetings)
        else:
            with self.lock:
                self.roll.arrived(0, self.meetings, time.monotonic())

    def leave(self) -> None:
        """This process has reached the end of the run: waits until all have. Then nobody watches any more."""
        self.staying.discard(self.process)
        if self.process:
            self.peers[0].send(left=True)
        while self.is_alive() and not self.parted.wait(INTERVAL):
            pass

    def fail(self, status: int, words: str) -> None:
        """This process ends by itself: tells the others why."""
        self.ending = True
        if self.process:
            self.peers[0].send(ended=[status, words])
        else:
            self._send_all(lost=Loss(0, status, f"{self.names[0]} has ended with status {status}: {words}"))
        # If it were closed while there is anything unread, a connection would lose what was sent last.
        self.parted.wait(INTERVAL)

    def hang(self, status: int, words: str) -> None:
        """This process makes no progress: process 0 ends all, and names the one that the others wait for."""
        if self.process:
            self.peers[0].send(hangs=[status, words])
        else:
            with self.lock:
                self.roll.hangs(0, status, words)

    # ---- the thread -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        looked = spoke = time.monotonic()
        while not self.parted.is_set():
            ready = self.selector.select(self.interval)
            now = time.monotonic()
            paused, looked = now - looked, now
            with self.lock:
                loss, warnings = self._heard([key.data for key, _ in ready], paused, now)
            if loss is not None and not self.ending:
                self._end(loss)
            for line in warnings:
                _say(line)
            if now >= spoke + self.interval:
                spoke = now
                self._send_all(alive=True)
            if not self.process and not self.staying:
                self._send_all(leave=True)
                self.parted.set()

    def _heard(self, ready: list[int], paused: float, now: float) -> tuple[Loss | None, list[str]]:
        """Takes in what these processes have sent; returns what is lost, and warnings.

        Args:
          paused: seconds in which this process has not listened.
        """
        if paused > self.timeout / 2:
            self.roll.suspended(now)
        self.roll.heard(self.process, now)
        for peer in ready:
            self._hear(peer, paused, now)
        return self.roll.loss(now), [] if self.process else self.roll.warnings(now)

    def _hear(self, peer: int, paused: float, now: float) -> None:
        connection = self.peers[peer]
        messages = connection.received()
        if messages is None:
            self.selector.unregister(connection.socket)
            at_the_end = self.process and self.process not in self.staying
            if at_the_end or (self.ending and not self.selector.get_map()):
                self.parted.set()
            elif paused > self.timeout / 2:
                own = self.names[self.process]
                words = f"{own} itself did not run for {paused:.0f} s, and is given up by the others"
                self.roll.judged(Loss(self.process, LOST, words), now)
            else:
                self.roll.closed(peer)
            return
        self.roll.heard(peer, now)
        for message in messages:
            if "arrived" in message:
                self.roll.arrived(peer, message["arrived"], now)
            elif "ended" in message:
                self.roll.ended(peer, *message["ended"], now)  # pyright: ignore[reportCallIssue]
            elif "hangs" in message:
                self.roll.hangs(peer, *message["hangs"])
            elif "lost" in message:
                self.roll.judged(Loss(*message["lost"]), now)
            elif "left" in message:
                self.staying.discard(peer)
            elif "leave" in message:
                self.parted.set()

    def _send_all(self, **message: Any) -> None:
        for connection in self.peers.values():
            connection.send(**message)

    def _end(self, loss: Loss) -> NoReturn:
        """Ends this process, which cannot go on without another, or which the others have given up."""
        self._send_all(lost=loss)
        _say(f"mara_jax: {loss.words}" + (f"; {self.cure}" if loss.status == LOST else ""))
        end_at_once(loss.status)


_watch: Watch | None = None


def begin(place: Place, timeout: float, settings: Mapping[str, Any], cure: str) -> None:
    """Waits until all processes of a run are there, before jax joins them, and begins to watch.

    Args:
      place: of this process; with one process, or a timeout of 0, nobody is waited for or watched.
      timeout: seconds of silence after which a process is given up.
      settings: what all must have in common, as of `fingerprint.of_process`.
      cure: as of `Watch`.

    Raises:
      ValueError: one line on every process; one is missing, or has other settings, packages or code.
    """
    global _watch
    if place.count < 2 or not timeout:
        return
    peers, names = meeting.meet(place, settings)
    _watch = Watch(place.process, peers, names, timeout, cure)
    _watch.start()


def arrive() -> None:
    """To be called before all processes wait for each other, by all of them in the same order."""
    if _watch is not None:
        _watch.arrive()


def leave() -> None:
    """Ends the watch, in order, at a place that all processes reach: the end of the run, or an error that all raise."""
    global _watch
    if _watch is not None:
        _watch.leave()
        _watch = None


def settle() -> None:
    """Waits a little after an error: if another process was its cause, this one ends meanwhile, and names that."""
    if _watch is not None:
        time.sleep(SETTLING)


def fail(status: int, words: str) -> NoReturn:
    """Ends this process at once, after an error that the others have not met: they end as well, and name it.

    A normal exit would wait for the others, which wait for this one in the middle of a computation.

    Args:
      status: with which all end.
      words: what this process has said.
    """
    if _watch is not None:
        _watch.fail(status, words)
    end_at_once(status)


def hang(status: int, words: str) -> bool:
    """Whether somebody watches, and ends this process and all others soon, since this one makes no progress.

    Args:
      status: with which all end.
      words: where this process is; all say where the one is that the others wait for.
    """
    if _watch is not None:
        _watch.hang(status, words)
    return _watch is not None


def end_at_once(status: int) -> NoReturn:
    """Ends this process without waiting for the others, from any thread."""
    flushing = threading.Thread(target=_flush, daemon=True)
    flushing.start()
    flushing.join(INTERVAL)  # whoever reads may have been stopped
    os._exit(status)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()


def _say(line: str) -> None:
    """Writes a line from beside the main thread, which may hold the lock of sys.stderr; shows the cursor again."""
    start = "\r\x1b[J\x1b[?25h" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{start}{line}\n".encode())
