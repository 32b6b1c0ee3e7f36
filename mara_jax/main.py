"""The command: ``python -m mara_jax.main --config=configs/FILE.py[:VARIANT] --workdir=DIR [--config.x.y=VALUE]``."""

import contextlib
import dataclasses
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from mara_jax import config
from mara_jax.parallel import hosts, mesh, sharding
from mara_jax.train import workdir as workdir_of_run

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE.py or FILE.py:VARIANT", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run writes; an existing run there is resumed.")
# Only where processes do not find each other: TPU pods, SLURM and Open MPI need none of them.
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, the same for every process.")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes run together.")
_PROCESS = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def main(argv: list[str]) -> int:
    """Parses flags, prepares the workdir and runs; returns the exit status."""
    try:
        run = parse(argv)
        workdir = pathlib.Path(_WORKDIR.value or "")
        join(run)
    except (ValueError, OSError, flags.Error) as error:
        return refused(error)
    try:
        hosts.first(lambda: workdir_of_run.check(workdir, run))
        train(run, workdir)
    except hosts.Elsewhere:
        return 2  # the process that refused says why
    except (ValueError, OSError) as error:
        status = refused(error)
        if hosts.several() and not isinstance(error, hosts.Agreed):
            hosts.abandon(status)
        return status
    except KeyboardInterrupt:
        if hosts.writes():
            print("mara_jax: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return hosts.abandon(130) if hosts.several() else 130
    except Exception:
        if not hosts.several():
            raise
        traceback.print_exc()
        hosts.abandon(1)
    return 0


def refused(error: Exception) -> int:
    """Tells in one line why there is no run; returns the exit status."""
    print(f"mara_jax: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def join(run: config.Run) -> None:
    """Makes the processes of a run one program, where there are several.

    Raises:
      ValueError: they do not find each other, or the run is none of several processes.
    """
    if isinstance(run, config.LanguageRun):
        mesh.initialise(_ADDRESS.value, _PROCESSES.value, _PROCESS.value)
    elif any(flag.value is not None for flag in (_ADDRESS, _PROCESSES, _PROCESS)):
        raise ValueError("the toy runs in one process: leave out --coordinator_address, --num_processes, --process_id")


def layout_of(run: config.LanguageRun) -> sharding.Layout:
    """The devices as the config arranges them.

    Raises:
      ValueError: sizes that do not fit the devices or the rows of a batch, or a table that cannot be.
    """
    wanted = dataclasses.asdict(run.mesh)
    layout = sharding.layout(mesh.make({axis: wanted[axis] for axis in mesh.AXES}), run.mesh.overrides)
    sharding.rows(layout, run.rollout.prompts_per_step, run.rollout.group_size // run.optimiser.micro_batches)
    return layout


def parse(argv: list[str]) -> config.Run:
    """The checked run that the command line asks for.

    Raises:
      ValueError: a flag is missing or unknown, a field is unknown or of the wrong type, or the run cannot work.
    """
    read_flags(FLAGS, argv)
    for flag in (_CONFIG, _WORKDIR):
        if flag.value is None:
            raise ValueError(
                f"--{flag.name} is missing: python -m mara_jax.main --config=configs/onetwo.py:nano --workdir=runs/nano"
            )
    return config.resolve(_CONFIG.value)


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


def train(run: config.Run, workdir: pathlib.Path) -> None:
    """Hands the run to the loop of its kind; imports wait until the config is known to be good."""
    logging.set_verbosity(logging.ERROR)  # Orbax tells every write
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if isinstance(run, config.ToyRun) and run.sweep.betas:
        from mara_jax.train import toy_study

        toy_study.run(run, workdir)
        return
    if isinstance(run, config.ToyRun):
        from mara_jax.train import toy

        toy.run(run, workdir)
        return
    from mara_jax.tasks import onetwo
    from mara_jax.train import loop

    check_threshold(run)
    with sharding.use(hosts.everywhere(lambda: layout_of(run))), too_large():
        hosts.everywhere(lambda: check_room(run))
        loop.run(run, onetwo.OneTwo(**dataclasses.asdict(run.task)), workdir)


def check_room(run: config.LanguageRun) -> None:
    """Refuses a run that the devices of the layout in use cannot make: its parameters, moments and cache alone have no
    room there, or it keeps what is for one device.

    Raises:
      ValueError: one line.
    """
    from mara_jax.train import capacity, shape

    shape.keeps(run.rollout)
    try:
        arch = shape.of_run(run)
    except (ValueError, OSError):
        return  # a shape that only the weights tell, or weights that are refused when they are read
    capacity.check(run, arch, *capacity.limit_here())


@contextlib.contextmanager
def too_large() -> Iterator[None]:
    """Tells in one line of a run that no memory can hold; other failures of a device stay as they are."""
    import jax

    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).strip().split("\n")[0][:160]
        raise ValueError(
            f"out of memory ({reason}): lower rollout.group_size, rollout.prompts_per_step or rollout.max_new_tokens, "
            "raise optimiser.micro_batches, or set policy.remat=layer"
        ) from error


def check_threshold(run: config.LanguageRun) -> None:
    """Refuses a threshold that no completion of the run's task can reach, or that MARA would find in every one.

    Raises:
      ValueError: one line.
    """
    from mara_jax.tasks import onetwo

    threshold, most = run.algorithm.threshold, onetwo.OneTwo.max_reward
    if threshold > most:
        raise ValueError(
            f"algorithm.threshold={threshold} is above every reachable reward ({most}): "
            f"no completion would ever be good; use at most {most}"
        )
    if threshold <= 0 and run.algorithm.method == "mara":
        raise ValueError(
            f"algorithm.threshold={threshold} is not above the reward of an invalid completion (0): MARA would count "
            f"those as good and spread mass over them; use more than 0 and at most {most}"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
