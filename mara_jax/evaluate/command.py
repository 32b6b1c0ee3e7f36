"""The evaluate command: one finished run in full, or several side by side."""

from absl import flags
from rich.console import Console

from mara_jax import cli
from mara_jax.cli import Flag

ACTIONS = ("show", "compare")
COMMAND = cli.Command(
    name="evaluate",
    purpose="""show prints where the completions of each run end, beside its reference policy and its optimum, and
    draws its figure again; compare prints several runs side by side, with means over those that differ in their seed
    alone.""",
    examples=(
        "python -m mara_jax.evaluate show runs/nano",
        "python -m mara_jax.evaluate compare runs/nano runs/vanilla --markdown",
    ),
    flags=(Flag("markdown", "", "print the comparison as a markdown table", False, bool),),
    arguments="show|compare RUN ...",
)


def main(argv: list[str]) -> int:
    """Prints; returns the exit status."""
    return cli.run(COMMAND, evaluate, argv)


def evaluate(argv: list[str]) -> int:
    """Prints one run's final table and draws its figure again, or prints a comparison of several.

    Raises:
      ValueError, OSError: one line.
    """
    values, action, workdirs = parse(argv)
    from mara_jax.evaluate import comparison
    from mara_jax.train import summary

    console = Console(soft_wrap=True, highlight=False)
    if action == "compare":
        compared = comparison.compare(workdirs)
        console.print(compared.markdown if values.markdown else compared.table)
        return 0
    for workdir in workdirs:
        console.print(summary.final_table(workdir))
        console.print(f"figure: {summary.final_figure(workdir)}")
    return 0


def parse(argv: list[str]) -> tuple[flags.FlagValues, str, list[str]]:
    """The flags of this command, what to do, and the workdirs of the runs.

    Raises:
      ValueError: an unknown flag or action, or no run.
    """
    values, arguments = cli.parse_with_arguments(COMMAND, argv)
    if not arguments or arguments[0] not in ACTIONS:
        raise ValueError(f"say what to do, {' or '.join(ACTIONS)}, as in {COMMAND.examples[0]}")
    if not arguments[1:]:
        raise ValueError(f"name at least one workdir, as in {COMMAND.examples[0]}")
    return values, arguments[0], arguments[1:]
