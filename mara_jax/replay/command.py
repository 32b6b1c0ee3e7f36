"""The replay command: whether a step of a run, computed again from what it stored, gives the numbers that it wrote."""

import pathlib

from absl import flags

from mara_jax import cli
from mara_jax.cli import Flag

DIFFERS = 1  # exit status where a number is another one

COMMAND = cli.Command(
    name="replay",
    purpose="""Computes a step of a run again: from the newest checkpoint before it, with the completions that the run
    stored, rewards, answers, log-probs, loss and the gradient's norm. Says whether they are those of rollouts/ and
    metrics.jsonl, or which differ; then a reward function has changed, or a file, or the machine rounds differently.
    Writes nothing.""",
    examples=(
        "python -m mara_jax.replay --workdir=runs/digits",
        "python -m mara_jax.replay --workdir=runs/digits --step=7",
    ),
    flags=(
        Flag("workdir", "DIR", "the run"),
        Flag("step", "N", "which step; by default the last that has a row", kind=int, least=1),
    ),
    required=("workdir",),
)


def main(argv: list[str]) -> int:
    """Computes; returns the exit status."""
    return cli.run(COMMAND, replay, argv)


def replay(argv: list[str]) -> int:
    """Prints what the step of the command line gives now beside what it gave.

    Raises:
      ValueError, OSError: one line.
    """
    values = parse(argv)
    from mara_jax.replay import computation, drawing

    replayed = computation.replay(pathlib.Path(values.workdir), values.step)
    for line in drawing.lines(replayed):
        print(line)
    return DIFFERS if any(one.differences for one in replayed) else 0


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of this command; errors as of `cli.parse`."""
    return cli.parse(COMMAND, argv)
