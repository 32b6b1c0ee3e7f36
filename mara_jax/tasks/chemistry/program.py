"""A program of one's own as an oracle: SMILES on its standard input, one a line; a number a line on its output."""

import math
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from mara_jax.tasks.base import TaskError

_SHOWN = 200  # characters of what a program wrote that an error repeats


@dataclass(frozen=True)
class Program:
    """A command that scores molecules; it starts anew for each call.

    Args:
      command: the program and its arguments; it is not given to a shell.
      seconds: in which it must end, else it is killed with every process that it has started. Where worker processes
        call it, this limit must be below theirs (`calls.Processes`), as a killed worker cannot end its program.

    Example: ``Program(("python", "dock.py", "--receptor=1abc.pdb"), seconds=500)``.
    """

    command: tuple[str, ...]
    seconds: float = 50.0

    def __post_init__(self) -> None:
        if isinstance(self.command, str) or not self.command:
            raise TaskError(f"command={self.command!r:.80}: give a tuple, the program and its arguments")

    def __call__(self, smiles: Sequence[str]) -> list[float]:
        """[n] numbers of n SMILES.

        Raises:
          ValueError: one line; the program cannot be started, fails, takes too long, or does not write n numbers.
        """
        written = self._run("".join(f"{one}\n" for one in smiles))
        lines = [line for line in written.splitlines() if line.strip()]
        if len(lines) != len(smiles):
            raise self._error(f"wrote {len(lines)} lines for {len(smiles)} SMILES: it must write one number a line")
        return [self._number(line, one) for line, one in zip(lines, smiles, strict=True)]

    def _run(self, given: str) -> str:
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
            )
        except OSError as error:
            raise self._error(f"cannot be started: {error.strerror}") from None
        with process:
            try:
                written, said = process.communicate(given, self.seconds)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)  # not yet waited for, so that its number is still its own
                if isinstance(error, subprocess.TimeoutExpired):
                    raise self._error(f"did not end within {self.seconds:g} s") from None
                raise
        if process.returncode:
            last = (said.strip().splitlines() or ["it says nothing on standard error"])[-1]
            raise self._error(f"ended with status {process.returncode}: {last:.{_SHOWN}}")
        return written

    def _number(self, line: str, smiles: str) -> float:
        try:
            number = float(line)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self._error(f"wrote {line.strip()!r:.80} for {smiles}: it must write a finite number")
        return number

    def _error(self, what: str) -> TaskError:
        return TaskError(f"{' '.join(self.command):.80} {what}")
