"""The command: ``python -m mara_jax.main --config=configs/FILE.py[:VARIANT] --workdir=DIR [--config.x.y=VALUE]``."""

import dataclasses
import os
import pathlib
import sys
import traceback

from absl import flags, logging
from ml_collections import config_flags

from mara_jax import cli, config
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
        return cli.refused(error)
    try:
        hosts.on_process_zero(lambda: workdir_of_run.check(workdir, run))
        train(run, workdir)
    except hosts.RemoteError:
        return 2  # the process that refused says why
    except (ValueError, OSError) as error:
        status = cli.refused(error)
        if hosts.several_processes() and not isinstance(error, hosts.SharedError):
            hosts.exit_at_once(status)
        return status
    except KeyboardInterrupt:
        if hosts.is_process_zero():
            print("mara_jax: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return hosts.exit_at_once(130) if hosts.several_processes() else 130
    except Exception:
        if not hosts.several_processes():
            raise
        traceback.print_exc()
        hosts.exit_at_once(1)
    return 0


def join(run: config.Run) -> None:
    """Makes the processes of a run one program, where there are several.

    Raises:
      ValueError: they do not find each other, or the run is none of several processes.
    """
    if isinstance(run, config.LanguageRun):
        mesh.join_processes(_ADDRESS.value, _PROCESSES.value, _PROCESS.value)
    elif any(flag.value is not None for flag in (_ADDRESS, _PROCESSES, _PROCESS)):
        raise ValueError("the toy runs in one process: leave out --coordinator_address, --num_processes, --process_id")


def parse(argv: list[str]) -> config.Run:
    """The checked run that the command line asks for.

    Raises:
      ValueError: a flag is missing or unknown, a field is unknown or of the wrong type, or the run cannot work.
    """
    cli.read_flags(FLAGS, argv)
    for flag in (_CONFIG, _WORKDIR):
        if flag.value is None:
            raise ValueError(
                f"--{flag.name} is missing: python -m mara_jax.main --config=configs/onetwo.py:nano --workdir=runs/nano"
            )
    return config.resolve(_CONFIG.value)


def train(run: config.Run, workdir: pathlib.Path) -> None:
    """Hands the run to the loop of its kind; imports wait until the config is known to be good."""
    logging.set_verbosity(logging.ERROR)  # Orbax tells every write
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if isinstance(run, config.ToyRun) and run.sweep.betas:
        from mara_jax.toy import sweep

        sweep.run(run, workdir)
        return
    if isinstance(run, config.ToyRun):
        from mara_jax.toy import single_run

        single_run.run(run, workdir)
        return
    from mara_jax.tasks import onetwo
    from mara_jax.train import loop, preflight

    preflight.check_threshold(run)
    with sharding.use(hosts.raise_on_all_processes(lambda: preflight.layout_of(run))), preflight.too_large():
        hosts.raise_on_all_processes(lambda: preflight.check_room(run))
        loop.run(run, onetwo.OneTwo(**dataclasses.asdict(run.task)), workdir)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
