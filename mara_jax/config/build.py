"""The way from a config file, or a written config.json, to a checked run."""

import dataclasses
import difflib
import importlib
import typing
from typing import Any

import ml_collections

from mara_jax.config import checks
from mara_jax.config.schema import LanguageRun, Run, Task, ToyRun, settings


def resolve(config: Any) -> Run:
    """The frozen, checked run behind a ConfigDict (or a plain dict, as read from config.json).

    Raises:
      ValueError: an unknown field (the known ones are named), or values that cannot work together.
    """
    run = build(config)
    checks.check(run)
    return run


def build(config: Any) -> Run:
    """The run behind a config as it stands: what training refuses (see `check`) can still be audited.

    Raises:
      ValueError: an unknown field, or a value of the wrong type or that its field cannot have.
    """
    default = defaults_of(config)
    run = _build(default, default, _values(config), "")
    checks.check_values(run)
    return run


def defaults_of(config: Any) -> Run:
    """The defaults of a config's fields: of its kind of run, with the section of its own task.

    Args:
      config: a run, or a ConfigDict or dict of one.

    Raises:
      ValueError: it is none of these, or names a module that makes no task.
    """
    values = _values(config)
    if "toy" in values:
        return ToyRun()
    section = values.get("task")
    module = section.get("module") if isinstance(section, dict) else None
    return LanguageRun(task=_task_section(module)) if module else LanguageRun()


def _values(config: Any) -> dict[str, Any]:
    if isinstance(config, LanguageRun | ToyRun):
        return dataclasses.asdict(config)
    if not isinstance(config, ml_collections.ConfigDict | dict):
        raise ValueError(f"a config is to_config_dict(LanguageRun(...)) or of a ToyRun, not {config!r:.80}")
    return dict(config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config)


def _task_section(module: str) -> Task:
    """The defaults of the section that a task's module defines."""
    try:
        section = getattr(importlib.import_module(module), "Config", None)
    except Exception as error:  # a task's module is somebody's Python: importing it can fail in any way
        raise ValueError(
            f"task.module={module!r} cannot be imported ({type(error).__name__}: {error}): name the module of a task"
        ) from error
    if not (isinstance(section, type) and issubclass(section, Task)):
        raise ValueError(f"task.module={module!r} has no class Config(mara_jax.config.Task): name the module of a task")
    try:
        defaults = section()
    except TypeError as error:
        raise ValueError(f"{module}.Config: {error}: give every field a default") from error
    for one in dataclasses.fields(defaults):
        if not isinstance(getattr(defaults, one.name), bool | int | float | str | tuple):
            raise ValueError(
                f"{module}.Config: the default of {one.name} is {getattr(defaults, one.name)!r}: a field is a bool, "
                "int, float or str, or a tuple of numbers or words typed as tuple[float, ...]"
            )
    return defaults


def _build(run: Run, defaults: Any, values: dict[str, Any], where: str) -> Any:
    """The dataclass of `defaults` with values in place of them; `run` has all defaults, for the error."""
    built = {}
    types = {field.name: field.type for field in dataclasses.fields(defaults)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(unknown_field(run, where + name))
        default = getattr(defaults, name)
        if dataclasses.is_dataclass(default):
            built[name] = _build(run, default, dict(value), where + name + ".")
        elif isinstance(default, tuple) and isinstance(value, list | tuple):
            built[name] = _typed_tuple(tuple(value), default, typing.get_args(types[name]), where + name)
        else:
            built[name] = _typed(value, default, where + name)
    return dataclasses.replace(defaults, **built)


def _typed(value: Any, default: Any, where: str) -> Any:
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"{where}={value!r} must be a {type(default).__name__}, as in {default!r}")
    return value


def _typed_tuple(value: tuple, default: tuple, types: tuple, where: str) -> tuple:
    """`value` as its field has it; `types` are the arguments of the field's tuple type: (T, ...), or (T, T)."""
    if not types:
        raise ValueError(f"{where} is typed as a bare tuple: say of what, as in tuple[float, ...] or tuple[str, ...]")
    element = types[0]
    if types[-1] is not ... and len(value) != len(types):
        raise ValueError(f"{where}={value!r} must have {len(types)} entries, as {default!r} has")
    if element is str:
        wrong = [entry for entry in value if not isinstance(entry, str)]
    else:
        wrong = [entry for entry in value if isinstance(entry, bool) or not isinstance(entry, int | float)]
    if wrong:
        raise ValueError(f"{where}={value!r} must hold {'words' if element is str else 'numbers'}, not {wrong[0]!r}")
    if element is str:  # as the command line gives them: "vanilla,mara"
        return tuple(word.strip() for entry in value for word in entry.split(","))
    return tuple(element(entry) for entry in value)


def unknown_field(run: Run, path: str) -> str:
    """One line saying that a dotted field does not exist, what may be meant, and which ones the run has."""
    node: Any = run
    *sections, last = path.split(".")
    for depth, section in enumerate(sections):
        if not dataclasses.is_dataclass(getattr(node, section, None)):
            last, sections = section, sections[:depth]
            break
        node = getattr(node, section)
    known = [field.name for field in dataclasses.fields(node)]
    place = ".".join(sections) or "the config"
    similar = [".".join([*sections, name]) for name in difflib.get_close_matches(last, known, 1)]
    similar += [name for name, *_ in settings(run) if name.split(".")[-1] == path.split(".")[-1]]
    cure = f"; did you mean {similar[0]}?" if similar else ""
    return f"unknown config field {path!r}: {place} has no {last!r}; it has {', '.join(known)}{cure}"
