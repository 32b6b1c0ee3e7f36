"""What every command shares: flags, --config and its overrides, --help, --version, one-line errors, exit statuses."""

import dataclasses
import math
import os
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

import mara_jax
from mara_jax import config
from mara_jax.parallel.stop import Stopped

REFUSED = 2  # wrong flags, fields, files: one line on stderr says what to do
STOPPED = 75  # asked to end by a signal: what was done is saved, the same command goes on (EX_TEMPFAIL of sysexits.h)
INTERRUPTED = 130  # as shells have it for Ctrl-C
CLOSED_PIPE = 1  # whoever read the output, as in `| head`, has read enough
INDENT = "    "

# python -m mara_jax.NAME -> what it does.
COMMANDS = {
    "main": "trains a policy as a configuration says",
    "prior": "trains a chemical language model on SMILES",
    "predict": "finds a run's optimum before training",
    "audit": "says what a setting really optimises",
    "plan": "counts a run's memory and work on any devices",
    "bench": "measures a training step",
    "replay": "makes a step of a run again and compares",
    "export": "writes a checkpoint's policy as a directory",
    "generate": "samples completions, and counts answers",
    "evaluate": "shows and compares finished runs",
    "reward_model": "trains reward models on pairs of completions",
    "figures": "draws the papers' figures and checks them",
}


@dataclass(frozen=True)
class Flag:
    """A flag of a command.

    Attributes:
      name: of --name=VALUE.
      value: what stands for VALUE in --help; a flag of kind bool has none.
      meaning: one or two phrases.
      default: where it is not given; None where its absence means something.
      kind: str, int, float or bool.
      several: whether the value is a tuple of that kind, written with commas between.
      choices: words that it may be; none for anything.
      least, most: bounds of a number.
    """

    name: str
    value: str
    meaning: str
    default: Any = None
    kind: type = str
    several: bool = False
    choices: tuple[str, ...] = ()
    least: float = -math.inf
    most: float = math.inf


@dataclass(frozen=True)
class Command:
    """A command: what --help says of it, and what its command line may hold.

    Attributes:
      name: in COMMANDS.
      purpose: a paragraph, for --help.
      examples: command lines; what is missing is refused with the first of them.
      flags: its own.
      configs: the runs of which --config may name one; none where there is no such flag.
      required: names of flags that must be given.
      arguments: what follows the flags, for --help; "" where nothing does.
      interrupted: what Ctrl-C leaves.
    """

    name: str
    purpose: str
    examples: tuple[str, ...]
    flags: tuple[Flag, ...] = ()
    configs: tuple[type[config.LanguageRun] | type[config.ToyRun], ...] = ()
    required: tuple[str, ...] = ()
    arguments: str = ""
    interrupted: str = "nothing was written"


# ---- running --------------------------------------------------------------------------------------------------------


def run(command: Command | None, function: Callable[[list[str]], int], argv: list[str]) -> int:
    """Answers --help and --version, or calls `function` with the command line; returns the exit status.

    Args:
      command: whose --help it is; None for the package, which lists its commands.
    """
    try:
        if "--version" in argv[1:]:
            print(f"mara_jax {mara_jax.__version__}")
            status = 0
        elif {"--help", "-h"} & set(argv[1:]):
            print(help_text(command, argv) if command else list_commands())
            status = 0
        else:
            _quieten_libraries()
            status = function(argv)
        sys.stdout.flush()
        return status
    except (ValueError, OSError, KeyboardInterrupt, Stopped) as error:
        return report(command, error)


def _quieten_libraries() -> None:
    """What libraries log is in the errors that they raise; what ends the process in C++ is logged all the same."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read as jaxlib is imported
    logging.set_verbosity(logging.FATAL)  # Orbax logs every read and write, and with its traceback each error


def report(command: Command | None, error: BaseException) -> int:
    """Says in one line why a command ends, and returns its exit status; raises what no user has caused."""
    try:
        sys.stdout.flush()
    except OSError:
        # What is still buffered has no reader, or no room; Python would complain of it once more as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE
    if isinstance(error, KeyboardInterrupt):
        print(f"mara_jax: interrupted; {command.interrupted if command else 'nothing was written'}", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, Stopped):
        print(f"mara_jax: {error}; {command.interrupted if command else 'nothing was written'}", file=sys.stderr)
        return STOPPED
    if isinstance(error, ValueError | OSError):
        print(f"mara_jax: {' '.join(str(error).split())}", file=sys.stderr)
        return REFUSED
    raise error


# ---- parsing --------------------------------------------------------------------------------------------------------


def parse(command: Command, argv: list[str]) -> flags.FlagValues:
    """The flags of a command line: `values.NAME` is a value, `values["NAME"].present` whether it was given.

    Raises:
      ValueError: one line for an unknown flag or field, a wrong value, a flag that is missing, a config file that is
        missing or broken.
    """
    values, arguments = parse_with_arguments(command, argv)
    if arguments:
        raise ValueError(f"unexpected argument {arguments[0]!r}: every setting is a flag, --name=value")
    return values


def parse_with_arguments(command: Command, argv: list[str]) -> tuple[flags.FlagValues, list[str]]:
    """As `parse`, with the arguments that are no flags."""
    values = _define(command, argv)
    file = _config_file(argv) if command.configs else ""
    if file:
        _check_overrides(argv, _read(values["config"].parser.parse, file))
    arguments = _read(values, argv)[1:]
    for name in command.required:
        if values[name].value is None:
            raise ValueError(f"--{name} is missing, as in {command.examples[0]}")
    for flag in command.flags:
        _check_value(flag, values[flag.name].value)
    return values, arguments


def _define(command: Command, argv: list[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    values.set_gnu_getopt()  # flags may follow other arguments
    if command.configs:
        config_flags.DEFINE_config_file("config", None, "", flag_values=values, lock_config=True, sys_argv=argv)
    define = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}
    for flag in command.flags:
        if flag.several:
            flags.DEFINE(_Several(flag.kind), flag.name, flag.default, flag.meaning, flag_values=values)
        else:
            define[flag.kind](flag.name, flag.default, flag.meaning, flag_values=values)
    return values


class _Several(flags.ArgumentParser):
    """Reads values of one kind with commas between."""

    def __init__(self, kind: type) -> None:
        self.parser = {str: flags.ArgumentParser, int: flags.IntegerParser, float: flags.FloatParser}[kind]()

    def parse(self, argument: str) -> tuple:
        return tuple(self.parser.parse(part.strip()) for part in argument.split(","))

    def flag_type(self) -> str:
        return "values"


def _check_value(flag: Flag, value: Any) -> None:
    if value is None:
        return
    for one in value if flag.several else (value,):
        if flag.kind is float and not math.isfinite(one):
            raise ValueError(f"--{flag.name}={one} must be a finite number{_as_in(flag)}")
        if flag.choices and one not in flag.choices:
            raise ValueError(f"--{flag.name}={one} is unknown: choose one of {', '.join(flag.choices)}")
        if _bounds(flag) and not flag.least <= one <= flag.most:
            raise ValueError(f"--{flag.name}={one} must be {_bounds(flag)}")


def _as_in(flag: Flag) -> str:
    default = flag.default[0] if flag.several and flag.default else flag.default
    return "" if default is None else f", as {default:g}"


def writable_folder(value: str, flag: str = "out") -> pathlib.Path:
    """The folder that a flag names, there already or not, before anything is computed for it.

    Raises:
      ValueError: it or a folder above it is a file, or cannot be written.
    """
    folder = pathlib.Path(value)
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"--{flag}={value}: {there} is a file; choose a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--{flag}={value}: {there} cannot be written; choose another folder")
    return folder


def _bounds(flag: Flag) -> str:
    least = f"at least {flag.least:g}" if math.isfinite(flag.least) else ""
    most = f"at most {flag.most:g}" if math.isfinite(flag.most) else ""
    return " and ".join(filter(None, (least, most)))


def _read(parser: Callable[[Any], Any], text: Any) -> Any:
    """What a parser of flags returns; whatever it or a config file raises becomes one line."""
    try:
        return parser(text)
    except (AttributeError, KeyError, TypeError, ValueError, flags.Error) as error:
        # For an error inside a config file the message holds a whole traceback, of which the last line says it.
        message = str(error).strip()
        if "no attribute 'get_config'" in message:
            message = "the config file has no function get_config(variant) that returns the run: see configs/digits.py"
        if "Traceback" in message:
            message = message.splitlines()[-1].split("Error: ", 1)[-1]
        raise ValueError(message) from error
    except Exception as error:  # a config file is Python: running it can fail in any way
        raise ValueError(f"the config file cannot be run: {type(error).__name__}: {error}") from error


def _config_file(argv: list[str]) -> str:
    """The value of --config, if any. absl would report a file that is not there at its first use, in many lines."""
    value = ""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, _, own = word.partition("=")
        if name not in ("--config", "-config"):
            continue
        value = own or following
        file = value.split(":")[0]
        if file and not pathlib.Path(file).is_file():
            what = "is not a file" if pathlib.Path(file).exists() else "does not exist"
            raise ValueError(f"config file {file!r} {what}: give --config=FILE.py, as in --config=configs/digits.py")
    return value


def _check_overrides(argv: list[str], loaded: Any) -> None:
    """Refuses --config.FIELD overrides that the schema of the loaded config lacks, naming what it has."""
    names = [word.split("=")[0].lstrip("-").removeprefix("no") for word in argv if word.startswith("-")]
    names = [name.removeprefix("config.") for name in names if name.startswith("config.")]
    defaults = config.defaults_of(loaded)
    for name in names:
        node = defaults
        for part in name.split("."):
            if not dataclasses.is_dataclass(node) or not hasattr(node, part):
                raise ValueError(config.unknown_field(defaults, name))
            node = getattr(node, part)
    if names and dataclasses.is_dataclass(loaded):
        raise ValueError(
            f"--config.{names[0]}: the config file returns a {type(loaded).__name__}, which nothing can override: "
            "let get_config return to_config_dict(run)"
        )


# ---- help -----------------------------------------------------------------------------------------------------------


def list_commands() -> str:
    """What `python -m mara_jax` prints: each command with what it does."""
    width = len("mara_jax.") + max(map(len, COMMANDS))
    lines = [f"  python -m {f'mara_jax.{name}':{width}}  {does}" for name, does in COMMANDS.items()]
    return "\n".join([str(mara_jax.__doc__), "", *lines, "", "Each of them answers --help and --version."])


def help_text(command: Command, argv: list[str]) -> str:
    """What --help prints: purpose, examples, flags, and the fields of the config that --config names, or of each kind.

    Raises:
      ValueError: a config file that is missing or broken.
    """
    width = min(shutil.get_terminal_size().columns, 100)
    usage = f"python -m mara_jax.{command.name}" + (f" {command.arguments}" if command.arguments else "")
    parts = [_fill(f"{usage}: {COMMANDS[command.name]}.", width), _fill(command.purpose, width)]
    parts += ["Examples:\n" + "\n".join(f"  {example}" for example in command.examples)]
    parts += ["Flags:\n" + "\n".join(_flag_lines(command, width))]
    listed: set[str] = set()
    for title, run in _runs(command, argv):
        parts.append("\n".join([_fill(title, width), *_field_lines(run, listed, width)]))
        listed |= {name for name, *_ in config.settings(run)}
    return "\n\n".join(parts)


def _one_of(choices: tuple[str, ...]) -> str:
    return f"one of {', '.join(choices)}" if choices else ""


def _fill(text: str, width: int, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def _flag_lines(command: Command, width: int) -> Iterator[str]:
    if command.configs:
        needed = "; required" if "config" in command.required else ""
        yield "  --config=FILE.py[:VARIANT]"
        yield _fill(f"the configuration, whose fields --config.NAME=VALUE changes{needed}", width, 2 * INDENT)
    for flag in command.flags:
        yield f"  --{flag.name}" + (f"={flag.value}" if flag.value else "")
        default = "required" if flag.name in command.required else ""
        if flag.default not in (None, False):
            default = f"default {flag.default}"
        words = filter(None, (flag.meaning, _one_of(flag.choices), _bounds(flag), default))
        yield _fill("; ".join(words), width, 2 * INDENT)
    yield "  --help, --version"


def _runs(command: Command, argv: list[str]) -> Iterator[tuple[str, config.Run]]:
    """The runs whose fields are listed, each with a title: what --config names, else the defaults of each kind."""
    file = _config_file(argv) if command.configs else ""
    if file:
        yield (
            f"Fields of the configuration, with the values of {file}:",
            config.build(_read(_define(command, argv)["config"].parser.parse, file)),
        )
        return
    for place, kind in enumerate(command.configs):
        if place == 0:
            yield "Fields of a language model's configuration, with their defaults:", kind()
        else:
            yield "What a toy run's configuration (configs/toy.py) has besides steps, seed and algorithm:", kind()


def _field_lines(run: config.Run, listed: set[str], width: int) -> Iterator[str]:
    section = ""
    for name, value, meaning, allowed in config.settings(run):
        if name in listed:
            continue
        if name.rpartition(".")[0] != section:
            section = name.rpartition(".")[0]
            yield "\n" + _fill(
                f"{section}: {getattr(run, section).__doc__}" if section else "the whole run:", width, "  "
            )
        words = allowed.words if isinstance(allowed, config.Limit) else _one_of(allowed or ())
        yield f"  {name} = {value if value != '' else repr('')}"
        yield _fill("; ".join(filter(None, (meaning, words))), width, 2 * INDENT)
