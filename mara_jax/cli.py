"""What every command shares: flags, a config file with overrides, refusals in one line."""

import dataclasses
import pathlib
import sys
from typing import Any

from absl import flags

from mara_jax import config


def refused(error: Exception) -> int:
    """Tells in one line why there is no run; returns the exit status."""
    print(f"mara_jax: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def read_flags(values: flags.FlagValues, argv: list[str]) -> None:
    """Parses a command line of --name=value flags, --config=FILE.py and its overrides among them.

    Args:
      values: where the flags are defined and set; every command may have its own.
      argv: the command's name and its flags.

    Raises:
      ValueError: one line for an unknown flag or field, a wrong type, a config file that is missing or broken.
    """
    file = _config_file(argv)
    if file:
        _known_fields(argv, _read(values["config"].parser.parse, file))
    rest = _read(values, argv)
    if rest[1:]:
        raise ValueError(f"unexpected argument {rest[1]!r}: every setting is a flag, --name=value")


def _read(parse: Any, given: Any) -> Any:
    """What a parser of flags makes of its argument; whatever a config file raises becomes one line."""
    try:
        return parse(given)
    except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
        # For an error inside a config file the message holds a whole traceback: its last line says it.
        text = str(error).strip()
        if "no attribute 'get_config'" in text:
            text = "the config file has no function get_config(variant) that returns the run: see configs/onetwo.py"
        raise ValueError(text.splitlines()[-1].split("Error: ", 1)[-1] if "Traceback" in text else text) from error
    except Exception as error:  # a config file is Python: running it can fail in any way
        raise ValueError(f"the config file cannot be run: {type(error).__name__}: {error}") from error


def _config_file(argv: list[str]) -> str:
    """The value of --config, if any. A file that is not there absl would tell only at its first use, in many lines."""
    given = ""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        name, _, value = arg.partition("=")
        if name.lstrip("-") != "config" or not name.startswith("-"):
            continue
        given = value or following
        file = given.split(":")[0]
        if file and not pathlib.Path(file).is_file():
            what = "is not a file" if pathlib.Path(file).exists() else "does not exist"
            raise ValueError(
                f"config file {file!r} {what}: give --config=FILE.py, as in --config=configs/onetwo.py:nano"
            )
    return given


def _known_fields(argv: list[str], loaded: Any) -> None:
    """Refuses --config.FIELD overrides that the schema of the loaded config lacks, naming what it has."""
    flagged = [arg.split("=")[0].lstrip("-").removeprefix("no") for arg in argv if arg.startswith("-")]
    names = [name.removeprefix("config.") for name in flagged if name.startswith("config.")]
    kind = config.kind_of(loaded)
    for name in names:
        node = kind()
        for part in name.split("."):
            if not dataclasses.is_dataclass(node) or not hasattr(node, part):
                raise ValueError(config.unknown_field(kind, name))
            node = getattr(node, part)
    if names and dataclasses.is_dataclass(loaded):
        raise ValueError(
            f"--config.{names[0]}: the config file returns a {kind.__name__}, which nothing can override: "
            "let get_config return to_config_dict(run)"
        )
