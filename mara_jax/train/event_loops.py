"""Event loops that end after everything that was begun on them, for Orbax, which closes its own at the first error.

What TensorStore then still writes or reads reports to a loop that is closed: its threads raise "Event loop is closed",
which Python hands to sys.unraisablehook, and asyncio logs each error that nobody has asked for. So one full disk is
told of in hundreds of lines, from threads, some at the very end. With these loops the first error speaks alone, once
all has ended.
"""

import asyncio
import contextlib
from collections.abc import Iterator

MOST = 60.0  # seconds that a loop waits for what was begun on it: a file server may never answer


class _Patient(asyncio.SelectorEventLoop):
    """Lets its tasks end before it closes; whoever gathered them then sees their errors, too."""

    def close(self) -> None:
        if not self.is_closed() and not self.is_running():
            begun = asyncio.all_tasks(self)
            if begun:
                self.run_until_complete(asyncio.wait(begun, timeout=MOST))
        super().close()


class _Policy(asyncio.DefaultEventLoopPolicy):
    _loop_factory = _Patient


@contextlib.contextmanager
def patient(lasting: bool = False) -> Iterator[None]:
    """Inside, new event loops are patient ones.

    Args:
      lasting: also afterwards, for threads that go on after the block.
    """
    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(_Policy())
    try:
        yield
    finally:
        if not lasting:
            asyncio.set_event_loop_policy(before)
