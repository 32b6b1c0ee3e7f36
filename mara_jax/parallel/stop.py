"""Signals by which a system asks a run to end: schedulers send them before they take a machine away.

The handlers belong to the process, so this module keeps what has been asked for.
"""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(BaseException):
    """The run ends because a signal has asked for it.

    Attributes:
      in_order: whether all processes of the run meet it at the same place.
    """

    def __init__(self, message: str, in_order: bool = False) -> None:
        super().__init__(message)
        self.in_order = in_order


class _Requests:
    name = ""  # of the first signal that came
    deferred = False
    process_ends = False  # with what listens


_requests = _Requests()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Inside, a signal raises `Stopped` in the main thread, once; in `deferred` it is only noted."""
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if _requests.process_ends else handler)
        _requests.name, _requests.deferred = "", False


def end_process_after_listening() -> None:
    """From the end of `listening` on, signals change nothing: all is written, and the exit status is decided.

    For a program, whose interpreter may take seconds to end. A second signal would kill it, and its status would say
    that instead of how the run has ended.
    """
    _requests.process_ends = True


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, `asked` says whether a signal has come; what has not been answered at the end raises `Stopped` there."""
    _requests.deferred = True
    try:
        yield
        if _requests.name:
            raise Stopped(reason())
    finally:
        _requests.deferred = False


def asked() -> bool:
    """Whether a signal has asked this process to end."""
    return bool(_requests.name)


def check_finished(step: int, steps: int) -> None:
    """Raises `Stopped`, on every process, where a run has been saved after fewer than its `steps` steps."""
    if step < steps:
        when = f"after step {step}, which is saved" if step else "before the first step"
        raise Stopped(f"{reason()} {when}", in_order=True)


def reason() -> str:
    """In words, which signal it was; another process of the run may have received it."""
    return (
        f"stopped by {_requests.name}" if _requests.name else "stopped, as another process of the run was asked to end"
    )


def _note(number: int, _: Any) -> None:
    # Only the first is raised: a second one would cut short the clearing away that the first has begun.
    first, _requests.name = not _requests.name, _requests.name or signal.Signals(number).name
    if first and not _requests.deferred:
        raise Stopped(reason())
