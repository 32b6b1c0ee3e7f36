"""The training command: ``python -m mara_jax.main --config=configs/FILE.py[:VARIANT] --workdir=DIR``."""

import contextlib
import dataclasses
import pathlib
import sys
import traceback

from absl import flags
from ml_collections import config_flags

from mara_jax import cli, config
from mara_jax.cli import Flag
from mara_jax.parallel import roll, stop

PROCESS_FLAGS = ("coordinator_address", "num_processes", "process_id")
COMMAND = cli.Command(
    name="main",
    purpose="""Trains the policy of a configuration by reinforcement learning on all devices, and writes its metrics,
    checkpoints and figures to the workdir. A run that is there already is resumed from its last checkpoint. Several
    processes of TPU pods, SLURM and Open MPI find each other; elsewhere three flags say it.""",
    examples=(
        "python -m mara_jax.main --config=configs/digits.py --workdir=runs/digits",
        "python -m mara_jax.main --config=configs/toy.py --workdir=runs/toy",
        "python -m mara_jax.main --config=configs/digits.py --help",
    ),
    flags=(
        Flag("workdir", "DIR", "where the run writes, or is resumed"),
        Flag("dry_run", "", "only show the prompt, scored completions, the forecast, memory and time", False, bool),
        Flag("coordinator_address", "HOST:PORT", "of process 0, the same for every process"),
        Flag("num_processes", "N", "how many processes run together", kind=int),
        Flag("process_id", "I", "which of them this is, from 0", kind=int),
        Flag(
            "process_timeout",
            "SECONDS",
            "all processes end where one of them is silent for so long, or where the others wait for it 30 times as "
            "long; at once where one dies; 0: nobody watches",
            roll.TIMEOUT,
            float,
            least=0,
            most=86400,
        ),
    ),
    configs=(config.LanguageRun, config.ToyRun),
    required=("config", "workdir"),
    interrupted="the same command resumes from the last checkpoint, or begins again if there is none yet",
)


def main(argv: list[str]) -> int:
    """Trains; returns the exit status."""
    return cli.run(COMMAND, train, argv)


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of this command; errors as of `cli.parse`."""
    return cli.parse(COMMAND, argv)


def run_of(values: flags.FlagValues) -> config.Run:
    """The run that the flags ask for.

    The held-out prompts of a config file belong to its training prompts: who names other training prompts has
    evaluations where they are asked for, too, by `evaluation.prompts` or `evaluation.every`.

    Raises:
      ValueError: one line.
    """
    run = config.resolve(values.config)
    named = config_flags.get_override_values(values["config"])
    if isinstance(run, config.ToyRun) or "task.prompts" not in named or "evaluation.prompts" in named:
        return run
    every = run.evaluation.every if "evaluation.every" in named or not run.evaluation.prompts else 0
    run = dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, prompts="", every=every))
    config.check(run)
    return run


def train(argv: list[str]) -> int:
    """Trains what the command line asks for, or until a signal asks to end.

    Raises:
      ValueError, OSError, Stopped: one line.
    """
    with stop.listening():
        return _train(argv)


def _train(argv: list[str]) -> int:
    """Imports wait until the config is known to be good."""
    values = parse(argv)
    run, workdir = run_of(values), pathlib.Path(values.workdir)
    if isinstance(run, config.ToyRun):
        names = (*PROCESS_FLAGS, "process_timeout")
        if any(values[name].present for name in names):
            raise ValueError(f"the toy runs in one process: leave out --{', --'.join(names)}")
        if values.dry_run:
            raise ValueError("the toy takes seconds: leave out --dry_run")
        _train_toy(run, workdir)
        return 0
    from mara_jax.parallel import hosts, joining, watch

    place = joining.place_of(*(values[name].value for name in PROCESS_FLAGS))
    if place is not None:
        settings = {"workdir": str(workdir)} | dataclasses.asdict(run)
        watch.begin(place, values.process_timeout, settings, COMMAND.interrupted)
        joining.join(place, values.process_timeout)
    try:
        (_try_language_model if values.dry_run else _train_language_model)(run, workdir)
        watch.leave()
    except hosts.RemoteError:
        watch.leave()
        return cli.REFUSED  # the process that raised it reports it
    except BaseException as error:
        if not hosts.several_processes():
            raise
        if isinstance(error, hosts.SharedError) or (isinstance(error, stop.Stopped) and error.in_order):
            status, _ = _reported(error)
            watch.leave()
            return status
        if not isinstance(error, stop.Stopped | KeyboardInterrupt):
            watch.settle()
        watch.fail(*_reported(error))
    return 0


def _reported(error: BaseException) -> tuple[int, str]:
    """Reports an error of one of several processes: its status, and the error in one line.

    Of an interruption, which reaches all, process 0 reports.
    """
    from mara_jax.parallel import hosts

    words = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, KeyboardInterrupt | stop.Stopped) and not hosts.is_process_zero():
        return (cli.STOPPED if isinstance(error, stop.Stopped) else cli.INTERRUPTED), words
    try:
        return cli.report(COMMAND, error), words
    except BaseException:
        traceback.print_exc()
        return 1, f"{type(error).__name__}: {words}"


def _train_toy(run: config.ToyRun, workdir: pathlib.Path) -> None:
    from mara_jax.toy import single_run, sweep
    from mara_jax.train import disk, lock
    from mara_jax.train import workdir as run_directory

    run_directory.check_place(workdir)
    with disk.one_line(workdir), lock.held(workdir):
        run_directory.check(workdir, run)
        if run.sweep.betas:
            sweep.run(run, workdir)
        else:
            single_run.run(run, workdir)


def _train_language_model(run: config.LanguageRun, workdir: pathlib.Path) -> None:
    """Arranges the devices and hands the run to the loop."""
    from mara_jax import tasks
    from mara_jax.parallel import hosts, sharding
    from mara_jax.train import disk, finished, lock, loop, preflight, watchdog
    from mara_jax.train import workdir as run_directory
    from mara_jax.train.population import training as population

    with disk.one_line(workdir), contextlib.ExitStack() as held:
        hosts.on_process_zero(lambda: run_directory.check_place(workdir))
        hosts.on_process_zero(lambda: held.enter_context(lock.held(workdir)))
        hosts.on_process_zero(lambda: run_directory.check(workdir, run))
        hosts.on_process_zero(lambda: finished.check(workdir, run.steps))
        held.enter_context(watchdog.watching(run.watchdog, run.watchdog_ends, workdir))
        task = hosts.raise_on_all_processes(lambda: tasks.make(run))
        preflight.check_members(run, task)
        layout = hosts.raise_on_all_processes(lambda: preflight.layout_of(run))
        with sharding.use(layout), preflight.too_large(config.is_population(run)):
            hosts.raise_on_all_processes(lambda: preflight.check_room(run))
            (population.run if config.is_population(run) else loop.run)(run, task, workdir)
    # The last of all: a signal or a kill before it leaves a run that may be begun again.
    with disk.one_line(workdir):
        hosts.on_process_zero(lambda: finished.record(workdir, run.steps))


def _try_language_model(run: config.LanguageRun, workdir: pathlib.Path) -> None:
    """Shows what the run would do; workdir is not touched."""
    from mara_jax import tasks
    from mara_jax.parallel import hosts, sharding
    from mara_jax.train import dry_run, preflight

    task = hosts.raise_on_all_processes(lambda: tasks.make(run))
    preflight.check_members(run, task)
    layout = hosts.raise_on_all_processes(lambda: preflight.layout_of(run))
    if config.is_population(run):
        members = config.members(run)
        run, layout = members[0].run, None  # a member lies on one device
        print(f"population of {len(members)} members; prompt, memory and time are of one, {members[0].name}")
    with sharding.use(layout), preflight.too_large():
        hosts.raise_on_all_processes(lambda: preflight.check_room(run))
        dry_run.run(run, task)


if __name__ == "__main__":
    stop.end_process_after_listening()
    sys.exit(main(sys.argv))
