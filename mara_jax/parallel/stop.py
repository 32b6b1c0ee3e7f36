"""Signals by which a system asks a run to end: schedulers send them before they take a machine away.

The handlers belong to the process, so this module keeps what has been asked for.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Python throws away what is raised in finalizers, and in callbacks of its garbage collector, of which jax has one.
_LOST_IN = ("__del__", "_xla_gc_callback")
_AGAIN = 0.05  # seconds after which a signal that came there is sent again


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
    """Inside, a signal raises `Stopped` in the main thread, once; in `deferred` it is only noted.

    Ctrl-C raises KeyboardInterrupt as ever, but never where it would be lost.
    """
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or somebody else's
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            ignored = _requests.process_ends and number in SIGNALS
            signal.signal(number, signal.SIG_IGN if ignored else handler)
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


def _note(number: int, frame: FrameType | None) -> None:
    if not _requests.deferred and _sent_again(number, frame):
        return
    # Only the first is raised: a second one would cut short the clearing away that the first has begun.
    first, _requests.name = not _requests.name, _requests.name or signal.Signals(number).name
    if first and not _requests.deferred:
        raise Stopped(reason())


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _sent_again(number, frame):
        raise KeyboardInterrupt


def _sent_again(number: int, frame: FrameType | None) -> bool:
    """Whether what is raised in this frame would be lost; then the signal comes again."""
    while frame is not None and frame.f_code.co_name not in _LOST_IN:
        frame = frame.f_back
    if frame is None:
        return False
    timer = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
    return True
