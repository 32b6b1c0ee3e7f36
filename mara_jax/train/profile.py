"""A window of steps traced by jax's profiler."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax

from mara_jax.config import Profile


class Window:
    """Traces steps `first` to `first + steps - 1` of a run, numbered as in metrics.jsonl, into WORKDIR/profile.

    A run that is resumed inside the window, or that never reaches it, is not traced.
    """

    def __init__(self, cfg: Profile, workdir: pathlib.Path, last: int) -> None:
        self.first, self.last = cfg.first, min(cfg.first + cfg.steps - 1, last)
        self.folder, self.open = workdir / "profile", False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Encloses one step: opens the window before its first, closes it after its last."""
        if number == self.first <= self.last:
            jax.profiler.start_trace(self.folder)
            self.open = True
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if self.open and number == self.last:
            jax.profiler.stop_trace()
            self.open = False
