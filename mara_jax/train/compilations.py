"""What was compiled while something ran."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

# The event that JAX emits whenever its backend compiles a program (a hit in the persistent cache included).
_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """Programs compiled since the start, and the seconds it took."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _COMPILED:
            self.count, self.seconds = self.count + 1, self.seconds + duration_secs

    @contextlib.contextmanager
    def counted(self) -> Iterator[dict[str, float]]:
        """A dict that holds, after the block, what was compiled in it: programs, seconds."""
        before, compiled = (self.count, self.seconds), {}
        yield compiled
        compiled |= {"programs": self.count - before[0], "seconds": self.seconds - before[1]}
