"""Which processes of a run the others can go on with: what has been heard of each, and when that is too little.

Pure bookkeeping, with the clock as an argument; `watch` listens and speaks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

TIMEOUT = 60.0  # seconds of silence after which a process is given up, where nobody asks for others
LOST = 69  # exit status of a process whose run has lost another one (EX_UNAVAILABLE of sysexits.h)
GIVEN_UP = 30  # times `timeout` that the others wait for a process that lives but does not arrive
ASKED = (75, 130)  # statuses of processes that were asked to end, by a signal which may reach others a little later
PATIENCE = 1.0  # seconds that they have to end by themselves
MOSTLY = 0.5  # of the time: if the others wait for a process for longer than that, it is named


class Loss(NamedTuple):
    """Why a run cannot go on: the process at fault, the status with which the others end, and one line."""

    process: int
    status: int
    words: str


@dataclass
class _Known:
    """What is known of a process: its name, when it was heard last, how many meetings it has reached."""

    name: str
    heard: float
    arrived: int = 0
    closed: bool = False  # whether its connection is
    behind_since: float | None = None  # when another reached a meeting that this one has not
    told: float = 0.0  # seconds of this wait that were told of last
    waited: float = 0.0  # seconds that it was behind in this window of time
    late: int = 0  # windows in a row in which it was behind for most of the time


class Roll:
    """The processes that are watched.

    A meeting is a place that all processes reach, in the same order, and where each waits for the others.

    Args:
      names: how to call each process.
      timeout: seconds without a word after which a process counts as stopped.
      now: the clock, seconds.
    """

    def __init__(self, names: Mapping[int, str], timeout: float, now: float) -> None:
        self.timeout = timeout
        self.known = {process: _Known(name, now) for process, name in names.items()}
        self.counted = self.window = now  # until when waiting is counted; when this window of time began
        self.verdict: tuple[float, Loss] | None = None  # what a process has said, and when
        self.hanging: dict[int, tuple[int, str]] = {}  # processes that say so themselves: status and words

    def heard(self, process: int, now: float) -> None:
        """A process has said anything at all."""
        self.known[process].heard = now

    def arrived(self, process: int, meetings: int, now: float) -> None:
        """A process has reached its `meetings`-th meeting."""
        self._count_waiting(now)
        one = self.known[process]
        one.arrived, one.behind_since, one.told = meetings, None, 0.0
        first = max(other.arrived for other in self.known.values())
        for other in self.known.values():
            if other.arrived < first and other.behind_since is None:
                other.behind_since = now

    def closed(self, process: int) -> None:
        """A process's connection is closed."""
        self.known[process].closed = True

    def ended(self, process: int, status: int, words: str, now: float) -> None:
        """A process has said that it ends by itself, and why."""
        self.judged(Loss(process, status, f"{self.known[process].name} has ended with status {status}: {words}"), now)

    def hangs(self, process: int, status: int, words: str) -> None:
        """A process says that it makes no progress, and with which status all are to end."""
        self.hanging.setdefault(process, (status, words))

    def judged(self, loss: Loss, now: float) -> None:
        """A process has said that the run has lost one; the first who says so counts."""
        self.verdict = self.verdict or (now, loss)

    def suspended(self, now: float) -> None:
        """This process itself has not run for a while, so that the others' silence means nothing."""
        self.counted = now
        for one in self.known.values():
            one.heard, one.behind_since = now, None if one.behind_since is None else now

    def loss(self, now: float) -> Loss | None:
        """The process that the others cannot go on with, if there is one."""
        if self.verdict is not None:  # it comes first: connections that are closed may have been because of it
            said, loss = self.verdict
            return loss if loss.status not in ASKED or now >= said + PATIENCE else None
        for fault in (self._dead, self._silent, self._too_slow):
            for process, one in self.known.items():
                words = fault(one, now)
                if words:
                    return Loss(process, LOST, f"{one.name} {words}")
        return self._hanging(now) if self.hanging else None

    def _hanging(self, now: float) -> Loss:
        """The process that the others wait for; the first that has said that it hangs where none has gone further."""
        first, (status, words) = next(iter(self.hanging.items()))
        late = next((process for process, one in self.known.items() if one.behind_since is not None), first)
        since = self.known[late].behind_since
        if late in self.hanging:
            words = self.hanging[late][1]
        elif since is not None:
            words = f"the others have waited {now - since:.0f} s for it"
        return Loss(late, status, f"{self.known[late].name} hangs: {words}")

    def _dead(self, one: _Known, _: float) -> str:
        reason = "its connection closed without a word: killed, out of memory, or its machine is gone"
        return f"is dead ({reason})" * one.closed

    def _silent(self, one: _Known, now: float) -> str:
        silent = now - one.heard > self.timeout
        return f"has been silent for {self.timeout:g} s (stopped, swapped out, or cut off)" * silent

    def _too_slow(self, one: _Known, now: float) -> str:
        most = GIVEN_UP * self.timeout
        waiting = 0.0 if one.behind_since is None else now - one.behind_since
        return f"is too slow: the others have waited {most:g} s for it" * (waiting > most)

    def warnings(self, now: float) -> list[str]:
        """Lines about slow processes: of a long wait, after `timeout` and whenever it has doubled; of many short ones.

        To be called again and again.
        """
        self._count_waiting(now)
        lines = []
        for one in self.known.values():
            waiting = 0.0 if one.behind_since is None else now - one.behind_since
            if waiting > max(self.timeout, 2 * one.told):
                one.told = waiting
                lines.append(f"WARNING: {one.name} is slow: the others have waited {waiting:.0f} s for it")
        if now - self.window >= self.timeout:
            lines += self._of_window(now - self.window)
            self.window = now
        return lines

    def _of_window(self, elapsed: float) -> list[str]:
        """Lines about processes that were behind for most of the last `elapsed` seconds."""
        late = [one for one in self.known.values() if one.waited > MOSTLY * elapsed]
        if len(late) > len(self.known) // 2:
            late = []  # where most are late, the others are early
        lines = []
        for one in self.known.values():
            one.late = one.late + 1 if one in late else 0
            if one.late and one.late & (one.late - 1) == 0 and not one.told:  # the first, second, fourth ... time
                waited = f"the others have waited {one.waited:.2g} of the last {elapsed:.2g} s for it"
                lines.append(f"WARNING: {one.name} is slow: {waited}")
            one.waited = 0.0
        return lines

    def _count_waiting(self, now: float) -> None:
        """Adds the time since the last call to that of the processes that are behind."""
        for one in self.known.values():
            if one.behind_since is not None:
                one.waited += now - max(one.behind_since, self.counted)
        self.counted = now
