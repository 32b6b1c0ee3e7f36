"""The way from a config file, or a written config.json, to a checked run."""

import dataclasses
import difflib
import typing
from typing import Any

import ml_collections

from mara_jax.config import checks
from mara_jax.config.schema import LanguageRun, Run, ToyRun, settings


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
    kind = kind_of(config)
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    values = dataclasses.asdict(values) if isinstance(values, LanguageRun | ToyRun) else dict(values)
    run = _build(kind, kind(), values, "")
    checks.check_values(run)
    return run


def kind_of(config: Any) -> type[LanguageRun] | type[ToyRun]:
    """Which schema a config has: a run, or a ConfigDict or dict of one.

    Raises:
      ValueError: it is none of these.
    """
    if isinstance(config, LanguageRun | ToyRun):
        return type(config)
    if not isinstance(config, ml_collections.ConfigDict | dict):
        raise ValueError(f"a config is to_config_dict(LanguageRun(...)) or of a ToyRun, not {config!r:.80}")
    return ToyRun if "toy" in config else LanguageRun


def _build(kind: type, defaults: Any, values: dict[str, Any], where: str) -> Any:
    """The dataclass of `defaults` with values in place of them; `kind` is the whole run's, for the error."""
    built = {}
    types = {field.name: field.type for field in dataclasses.fields(defaults)}
    for name, value in values.items():
        if name not in types:
            raise ValueError(unknown_field(kind, where + name))
        default = getattr(defaults, name)
        if dataclasses.is_dataclass(default):
            built[name] = _build(kind, default, dict(value), where + name + ".")
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
    element = types[0]
    if types[-1] is not ... and len(value) != len(types):
        raise ValueError(f"{where}={value!r} must have {len(types)} entries, as {default!r} has")
    if element is str:
        wrong = [entry for entry in value if not isinstance(entry, str)]
    else:
        wrong = [entry for entry in value if isinstance(entry, bool) or not isinstance(entry, int | float)]
    if wrong:
        raise ValueError(f"{where}={value!r} must hold {'words' if element is str else 'numbers'}, not {wrong[0]!r}")
    return tuple(element(entry) for entry in value)


def unknown_field(kind: type[LanguageRun] | type[ToyRun], path: str) -> str:
    """One line saying that a dotted field does not exist, what may be meant, and which ones there are."""
    node: Any = kind()
    *sections, last = path.split(".")
    for depth, section in enumerate(sections):
        if not dataclasses.is_dataclass(getattr(node, section, None)):
            last, sections = section, sections[:depth]
            break
        node = getattr(node, section)
    known = [field.name for field in dataclasses.fields(node)]
    place = ".".join(sections) or "the config"
    similar = [".".join([*sections, name]) for name in difflib.get_close_matches(last, known, 1)]
    similar += [name for name, *_ in settings(kind()) if name.split(".")[-1] == path.split(".")[-1]]
    cure = f"; did you mean {similar[0]}?" if similar else ""
    return f"unknown config field {path!r}: {place} has no {last!r}; it has {', '.join(known)}{cure}"
