"""Reward and answer functions of the user's own: found by name, called with the columns that they name.

The signature of a reward function is TRL's: ``def f(prompts, completions, **columns) -> list[float | None]``. None
means that the function does not judge this completion; an exception in the place of a number, that it failed at this
one alone. It may also return a dict of lists, `reward` and others to log.
An answer function judges one completion: ``def f(prompt, completion, **columns) -> str | None``.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mara_jax.tasks.base import TaskError
from mara_jax.tasks.checked import described


class WrongShape(TaskError):
    """A function that returned no list with a value for each completion."""


class Function(NamedTuple):
    """A function of the user's own.

    name: as it was asked for; call: the function; named: the arguments that it names; needed: those without a default;
    takes_all: whether it also takes any other (`**columns`); file: that defines it, "" where none does.
    """

    name: str
    call: Callable[..., Any]
    named: tuple[str, ...]
    needed: tuple[str, ...]
    takes_all: bool
    file: str

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of these values that the function takes."""
        return dict(values) if self.takes_all else {name: values[name] for name in self.named if name in values}


def find(name: str) -> Function:
    """The function that "FILE.py:FUNCTION" or "PACKAGE.MODULE:FUNCTION" names.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: one line; it names no function, or its file fails when it is imported.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise TaskError(f"{name!r} names no function: write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION")
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    call = getattr(module, attribute, None)
    if not callable(call):
        others = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise TaskError(f"{place} has no function {attribute!r}; it has {', '.join(others) or 'none'}")
    if inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call):
        raise TaskError(f"{name} is async, and nothing awaits it: write an ordinary function")
    parameters = inspect.signature(call).parameters.values()
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return Function(
        name,
        call,
        tuple(one.name for one in named),
        tuple(one.name for one in named if one.default is one.empty),
        any(one.kind is one.VAR_KEYWORD for one in parameters),
        getattr(module, "__file__", None) or "",
    )


def _file(path: Path) -> Any:
    """The module of a file, which may import others beside it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give FILE.py:FUNCTION")
    folder = str(path.absolute().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path.absolute())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # so that what it defines can be pickled
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise TaskError(f"{path}, line {error.lineno}: {error.msg}: {(error.text or '').strip()!r:.80}") from None
    except Exception as error:  # somebody's Python: it can fail in any way
        raise TaskError(f"{path} cannot be imported: {described(error)}") from None
    return module


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"the module {name!r} cannot be imported: {described(error)}") from None


def check_arguments(name: str, needed: Sequence[str], given: Sequence[str], columns: Sequence[str]) -> None:
    """Refuses a function that wants what nothing gives it.

    Args:
      needed: its arguments without a default; given: what it always gets; columns: those of the prompt file.

    Raises:
      ValueError: naming the argument and the columns.
    """
    for argument in needed:
        if argument not in (*given, *columns):
            others = ", ".join(columns) or "no others"
            raise TaskError(
                f"{name} wants the argument {argument!r}; it can have {', '.join(given)} and the columns of the prompt "
                f"file ({others}): add the column, or give the argument a default"
            )


def reward(function: Function, values: Mapping[str, Any], count: int) -> tuple[list[Any], dict[str, list[Any]]]:
    """Rewards of `count` completions, and further columns.

    Raises:
      ValueError: what it returns is no list of so many numbers or None.
    """
    arguments = function.arguments(values)
    if "step" in arguments:
        arguments["step"] = arguments["step"][0]  # one for all completions of a call
    returned = function.call(**arguments)
    columns = dict(returned) if isinstance(returned, Mapping) else {"reward": returned}
    if "reward" not in columns:
        raise WrongShape(f"{function.name} returned a dict without 'reward', only {', '.join(map(repr, columns))}")
    lists = {str(name): _list(function, str(name), column, count) for name, column in columns.items()}
    return lists.pop("reward"), lists


def answers(function: Function, values: Mapping[str, Sequence[Any]], count: int) -> list[Any]:
    """Answers of `count` completions, each from its own prompt, completion and columns; exceptions where it fails."""
    singular = {"prompts": "prompt", "completions": "completion"}
    rows = [{singular.get(name, name): column[row] for name, column in values.items()} for row in range(count)]
    return [_answer(function, row) for row in rows]


def _answer(function: Function, row: Mapping[str, Any]) -> Any:
    try:
        return function.call(**function.arguments(row))
    except TaskError as error:
        return _plain(error)
    except Exception as error:  # somebody's Python: it can fail in any way
        return TaskError(f"failed: {described(error)}")


def _list(function: Function, name: str, column: Any, count: int) -> list[Any]:
    """A column as a list of plain values."""
    if hasattr(column, "tolist"):
        column = column.tolist()  # of numpy, jax and torch
    if not isinstance(column, list | tuple):
        raise WrongShape(f"{function.name} returned {name!r} {column!r:.80}: return a list of {count} numbers")
    if len(column) != count:
        raise WrongShape(f"{function.name} returned {len(column)} values of {name!r} for {count} completions")
    return [_plain(value) for value in column]


def _plain(value: Any) -> Any:
    """A number of numpy, jax or torch as Python's; an exception as one that every process knows."""
    if isinstance(value, Exception) and type(value) is not TaskError:
        return TaskError(f"{type(value).__name__}: {value}")
    item = getattr(value, "item", None)
    return item() if callable(item) else value
