"""The way from a config file, or a written config.json, to a checked run."""

import dataclasses
from typing import Any

import ml_collections

from mara_jax.config import checks, limits
from mara_jax.config.schema import LanguageRun, Run, ToyRun


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
      ValueError: an unknown field, a value of the wrong type, or a word or beta of the algorithm that means nothing.
    """
    kind = kind_of(config)
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    values = dataclasses.asdict(values) if isinstance(values, LanguageRun | ToyRun) else dict(values)
    run = _build(kind, kind(), values, "")
    checks.check_words(run.algorithm)
    limits.check(run, kind(), "algorithm.beta")
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
    for name, value in values.items():
        if not hasattr(defaults, name):
            raise ValueError(unknown_field(kind, where + name))
        default = getattr(defaults, name)
        if dataclasses.is_dataclass(default):
            built[name] = _build(kind, default, dict(value), where + name + ".")
        else:
            built[name] = _typed(value, default, where + name)
    return dataclasses.replace(defaults, **built)


def _typed(value: Any, default: Any, where: str) -> Any:
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return _typed_tuple(tuple(value), default, where)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"{where}={value!r} must be a {type(default).__name__}, as in {default!r}")
    return value


# Tuples of any length, and what they hold; every other one is a pair of numbers.
_ELEMENT = {"betas": float, "thresholds": float, "gaps": float, "methods": str, "kls": str, "estimators": str}


def _typed_tuple(value: tuple, default: tuple, where: str) -> tuple:
    element = _ELEMENT.get(where.split(".")[-1])
    if element is None and len(value) != len(default):
        raise ValueError(f"{where}={value!r} must have {len(default)} entries, as {default!r} has")
    if element is str:
        wrong = [v for v in value if not isinstance(v, str)]
    else:
        wrong = [v for v in value if isinstance(v, bool) or not isinstance(v, int | float)]
    if wrong:
        raise ValueError(f"{where}={value!r} must hold {'words' if element is str else 'numbers'}, not {wrong[0]!r}")
    return value if element is str else tuple(float(v) for v in value)


def unknown_field(kind: type, path: str) -> str:
    """One line saying that a dotted field does not exist, and which ones do."""
    node: Any = kind()
    *sections, last = path.split(".")
    for at, section in enumerate(sections):
        if not dataclasses.is_dataclass(getattr(node, section, None)):
            last, sections = section, sections[:at]
            break
        node = getattr(node, section)
    known = ", ".join(f.name for f in dataclasses.fields(node))
    place = ".".join(sections) or "the config"
    return f"unknown config field {path!r}: {place} has no {last!r}; it has {known}"
