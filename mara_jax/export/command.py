"""The export command: the policy of a checkpoint as a directory that transformers, or peft, loads."""

import pathlib

from absl import flags

from mara_jax import cli, config
from mara_jax.cli import Flag

COMMAND = cli.Command(
    name="export",
    purpose="""Writes the policy of one of a run's checkpoints as a Hugging Face directory, with tokenizer, chat
    template and generation config; of a run that trains an adapter, the adapter as peft has it. The run may still be
    going on.""",
    examples=(
        "python -m mara_jax.export --workdir=runs/digits --out=runs/digits-model",
        "python -m mara_jax.export --workdir=runs/digits --step=40 --out=runs/digits-40",
        "python -m mara_jax.export --workdir=runs/prompts --step=best --out=runs/best",
    ),
    flags=(
        Flag("workdir", "DIR", "the run"),
        Flag("step", "N", "of the checkpoint, or best, by checkpoint.best; by default the newest"),
        Flag("out", "DIR", "where to write; it must not exist, or be empty"),
    ),
    required=("workdir", "out"),
)


def main(argv: list[str]) -> int:
    """Writes; returns the exit status."""
    return cli.run(COMMAND, export, argv)


def export(argv: list[str]) -> int:
    """Writes the policy of the checkpoint that the command line names.

    Raises:
      ValueError, OSError: one line.
    """
    values = parse(argv)
    workdir = pathlib.Path(values.workdir)
    from mara_jax.train import checkpoint, trained
    from mara_jax.train import workdir as workdirs

    run = workdirs.read_run(workdir, "--workdir")

    asked = _best(workdir, run) if values.step == "best" else _number(values.step)
    step = checkpoint.step_to_read(workdir, asked)
    trained.check_place(pathlib.Path(values.out))
    policy = trained.policy_of(run, workdir)
    params = checkpoint.read_params(workdir, step, trained.abstract_params(policy))
    written = trained.write(run, policy, params, pathlib.Path(values.out), workdir)
    print(f"step {step} of {workdir}: {written}")
    return 0


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of this command; errors as of `cli.parse`."""
    return cli.parse(COMMAND, argv)


def _number(step: str | None) -> int | None:
    if step is not None and not step.isdecimal():
        raise ValueError(f"--step={step} is neither the number of a step nor best: leave it out for the newest")
    return None if step is None else int(step)


def _best(workdir: pathlib.Path, run: config.LanguageRun) -> int:
    """The step of the best checkpoint by `checkpoint.best`."""
    from mara_jax.train import evaluation_report

    measure = run.checkpoint.best
    if not measure:
        raise ValueError(
            f"--step=best, but {workdir} keeps no best checkpoint (checkpoint.best is empty): give the number of a step"
        )
    step = evaluation_report.best_step(workdir, measure)
    if step is None:
        raise ValueError(f"--step=best, but {workdir} has no checkpoint with an evaluation yet: wait for the first")
    return step
