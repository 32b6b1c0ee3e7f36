"""A process that calls the user's functions, so that one that hangs or dies can be replaced."""

import contextlib
import ctypes
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

from mara_jax.tasks import functions
from mara_jax.tasks.base import TaskError
from mara_jax.tasks.checked import described

_START_LIMIT = 120.0  # seconds in which a worker must have imported the functions
_GRACE = 5.0  # seconds that a call has to end what it has started, before its process is killed
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


class WorkerError(TaskError):
    """A call that failed: the function raised, did not return in time, or its process died.

    Attributes:
      repeated: whether calls for its completions one by one may tell which of them it was.
    """

    def __init__(self, message: str, repeated: bool = True) -> None:
        super().__init__(message)
        self.repeated = repeated


class _Asked(SystemExit):
    """What a call is interrupted by when its process is asked to end."""


class Worker:
    """A process that has imported functions, and calls one of them at a time.

    Args:
      names: of the functions, as `functions.find` takes them; time_limit: seconds for a call; memory_limit: GiB that
        the process may allocate (on Linux).

    Attributes:
      named: of each function, the arguments that it names; needed: those without a default; files: the Python files
        that define them.

    Raises:
      WorkerError: a function cannot be imported.
    """

    def __init__(self, names: Sequence[str], time_limit: float, memory_limit: float) -> None:
        self.names, self.time_limit, self.memory_limit, self.waits_for = list(names), time_limit, memory_limit, ""
        self.ended, self._starting = False, threading.Lock()
        self.named: dict[str, tuple[str, ...]]
        self.needed: dict[str, tuple[str, ...]]
        self.files: list[str]
        self.named, self.needed, self.files = self._start()

    def _start(self) -> Any:
        self.connection, theirs = Pipe()
        number = theirs.fileno()
        command = [sys.executable, "-m", "mara_jax.tasks.worker", str(number), str(int(self.memory_limit * 2**30))]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)  # the worker imports what this process can
        # Sets and hashes of texts have one order in every process, so that functions which use it are repeatable.
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONHASHSEED": "0"}
        with theirs, self._starting:
            if self.ended:
                raise WorkerError("the worker process has been ended", repeated=False)
            self.process = subprocess.Popen(command, pass_fds=(number,), stdin=subprocess.DEVNULL, env=environment)
        self.connection.send(self.names)
        return self._answer(_START_LIMIT, "importing " + ", ".join(self.names))

    def send(self, kind: str, name: str, values: Mapping[str, Any], count: int) -> None:
        """Starts a call of a reward function ("reward") or an answer function ("answer"); `result` waits for it."""
        self.waits_for = name
        with contextlib.suppress(ConnectionError):  # its process is dead: `result` says so
            self.connection.send((kind, name, dict(values), count))

    def result(self) -> Any:
        """What the call that was started returned.

        Raises:
          WorkerError: it failed; the worker is ready for the next call.
        """
        return self._answer(self.time_limit, self.waits_for)

    def _answer(self, limit: float, what: str) -> Any:
        try:
            if not self.connection.poll(limit):
                self.close()
                self._start()
                raise WorkerError(f"{what} did not return within {limit:g} s")
            worked, value, repeated = self.connection.recv()
        except (EOFError, ConnectionError):
            status = self.process.wait()
            self.close()
            words = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            if what == self.waits_for:
                self._start()
            raise WorkerError(f"{what}: its process ended {words}") from None
        except WorkerError:
            raise
        except Exception as error:  # an object of a class that only the user's file knows
            raise WorkerError(f"{what} returned what cannot be read here ({error}): return plain values") from None
        if not worked:
            raise WorkerError(value, repeated)
        return value

    def end(self) -> None:
        """Ends the process for good, whatever it does; another thread may be waiting in `result`, which then raises."""
        with self._starting:
            self.ended = True
        self._stop()

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._stop()
        self.connection.close()

    def _stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:  # compiled code, or somebody's Python that ignores it
            self.process.kill()
            self.process.wait()


def serve(connection: Connection) -> None:
    """Imports the functions that the other side names, then calls them until it closes the connection."""
    try:
        known = {name: functions.find(name) for name in connection.recv()}
    except (ValueError, OSError) as error:
        connection.send((False, str(error), False))
        return
    named = {name: function.named for name, function in known.items()}
    needed = {name: function.needed for name, function in known.items()}
    files = sorted({function.file for function in known.values() if function.file})
    connection.send((True, (named, needed, files), False))
    while True:
        try:
            kind, name, values, count = connection.recv()
        except EOFError:
            return
        call = functions.reward if kind == "reward" else functions.answers
        try:
            reply = (True, call(known[name], values, count), False)
            pickle.dumps(reply)
        except _Asked:
            raise
        except functions.WrongShape as error:
            reply = (False, str(error), False)
        except TaskError as error:
            reply = (False, str(error), True)
        except BaseException as error:  # somebody's Python: it can fail in any way, sys.exit among them
            reply = (False, f"{name} failed: {described(error)}", True)
        connection.send(reply)


def _end_with_parent() -> None:
    """Asks the kernel to kill this process when its parent ends, as a call that hangs would never notice."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)


def _leave(number: int, _: Any) -> None:
    """Interrupts the call, so that its `finally` and `with` can end the programs that it has started."""
    signal.signal(number, signal.SIG_IGN)
    raise _Asked(128 + number)


if __name__ == "__main__":
    _end_with_parent()
    if sys.platform == "linux":  # counts what is allocated, not what is mapped; elsewhere it is not enforced
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        most = int(sys.argv[2]) if hard == resource.RLIM_INFINITY else min(int(sys.argv[2]), hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    os.dup2(2, 1)  # what functions print must not mix with the run's own lines
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the run decides what ends
    signal.signal(signal.SIGTERM, _leave)
    try:
        serve(Connection(int(sys.argv[1])))
    except _Asked as asked:
        os._exit(int(str(asked.code)))  # at once: taking Python down can last a second
