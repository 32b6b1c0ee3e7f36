"""Oracles by the names that a config has: of PMO, of MolExp, of `designs`, functions and programs of the user's own."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from mara_jax.tasks import functions
from mara_jax.tasks.base import TaskError
from mara_jax.tasks.chemistry import designs, molexp, oracles
from mara_jax.tasks.chemistry.calls import Oracle
from mara_jax.tasks.chemistry.program import Program

MOLEXP, PROGRAM = "molexp:", "program:"  # what such a name begins with


@dataclass(frozen=True)
class OwnFunction:
    """A function of a list of SMILES, found by its name in whichever process calls it.

    Args:
      name: "FILE.py:FUNCTION" or "PACKAGE.MODULE:FUNCTION".
    """

    name: str

    def __call__(self, smiles: Sequence[str]) -> Sequence[float]:
        """[n] scores of n SMILES, as the function returns them."""
        return _found(self.name).call(list(smiles))

    @property
    def file(self) -> str:
        """The file that defines it, "" where none does."""
        return _found(self.name).file


_KNOWN: dict[str, functions.Function] = {}  # a file is imported once, not for each batch


def _found(name: str) -> functions.Function:
    if name not in _KNOWN:
        _KNOWN[name] = functions.find(name)
    return _KNOWN[name]


def _words(name: str) -> tuple[str, ...]:
    """The command of a program's name, split as a shell would."""
    try:
        words = tuple(shlex.split(name.removeprefix(PROGRAM)))
    except ValueError as error:
        raise TaskError(f"task.oracle={name!r:.80}: {str(error).lower()}") from None
    if not words:
        raise TaskError(f"task.oracle={name!r:.80} names no program: write {PROGRAM}COMMAND, with its arguments")
    return words


def named(name: str, seconds: float) -> Oracle:
    """The oracle of a name.

    Args:
      name: of `oracles.ORACLES` or `designs.DESIGNS`, "molexp:TASK", "FILE.py:FUNCTION", "PACKAGE.MODULE:FUNCTION", or
        "program:COMMAND", a command with its arguments that reads SMILES, one a line, and writes as many numbers.
      seconds: in which a program must end.

    Raises:
      ValueError, FileNotFoundError: one line; there is no such oracle.
    """
    known = oracles.ORACLES | designs.DESIGNS
    if name in known:
        return known[name]
    if name.startswith(MOLEXP):
        return molexp.scoring(name.removeprefix(MOLEXP))
    if name.startswith(PROGRAM):
        return Program(_words(name), seconds)
    if ":" in name:
        own = OwnFunction(name)
        _found(name)  # what cannot be found is said before anything is drawn
        return own
    tasks = ", ".join(MOLEXP + task for task in molexp.TARGETS)
    raise TaskError(
        f"task.oracle={name!r:.80} is unknown: choose one of {', '.join(known)}, {tasks}, FILE.py:FUNCTION, or "
        f"{PROGRAM}COMMAND"
    )
