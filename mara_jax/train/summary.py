"""What a run shows at its end, read from its folder: a table and a figure."""

import os
from pathlib import Path

from rich.console import Console

from mara_jax.train import evaluation_report, mode_report, open_report, plots, report
from mara_jax.train.tables import NumberTable


def final_table(workdir: str | os.PathLike) -> NumberTable:
    """Where the run's completions end, or, where answers are not known beforehand, how its metrics changed.

    Args:
      workdir: the run's folder.

    Returns:
      A rich table; print it with `rich.print`.

    Raises:
      FileNotFoundError: one of the run's files is missing.
      ValueError: one of them cannot be read.
    """
    record = report.read(workdir)
    return report.answers_table(record) if record.answers else open_report.final_table(record)


def show_modes(workdir: str | os.PathLike, console: Console) -> None:
    """Prints the table of a run's good answers and draws their figure; nothing where it wrote no ledger of them, a line
    where nothing is known of their mass before training.

    Raises:
      ValueError: the ledger cannot be read.
    """
    prompts = mode_report.read(Path(workdir))
    if not prompts:
        return
    answers = mode_report.answers_of(prompts)
    if all(one.fields["reference"] is None and one.fields["optimum"] is None for one in answers):
        # Nothing to compare with, as where the reference policy is not measured.
        console.print(mode_report.line(prompts))
        return
    console.print(mode_report.table(prompts))
    figure = mode_report.figure(Path(workdir), prompts)
    if figure is not None:
        console.print(f"figure: {figure}", markup=False)


def show_evaluations(workdir: str | os.PathLike, console: Console) -> None:
    """Prints the table of a run's evaluations, draws their figure, and says which checkpoint is best; nothing where no
    evaluation was made. Errors as of `final_table`."""
    folder = Path(workdir)
    best = report.read_config(folder).get("checkpoint", {}).get("best", "")  # earlier versions had no such field
    table = evaluation_report.final_table(folder, best)
    if table is None:
        return
    console.print(table)
    console.print(f"figure: {evaluation_report.final_figure(folder)}", markup=False)
    step = evaluation_report.best_step(folder, best) if best else None
    if step is not None:
        command = f"python -m mara_jax.export --workdir={folder} --step=best --out={folder}-best"
        console.print(f"best checkpoint by {best}: step {step}; {command}", markup=False)


def final_figure(workdir: str | os.PathLike) -> Path:
    """Draws figure.png, and figure.svg beside it, into the run's folder; arguments and errors as of `final_table`."""
    record = report.read(workdir)
    return plots.final_figure(record) if record.answers else open_report.final_figure(record)
