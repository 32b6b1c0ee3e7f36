"""What a run shows at its end, read from its folder: a table and a figure."""

import os
from pathlib import Path

from mara_jax.train import open_report, plots, report
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


def final_figure(workdir: str | os.PathLike) -> Path:
    """Draws figure.png, and figure.svg beside it, into the run's folder; arguments and errors as of `final_table`."""
    record = report.read(workdir)
    return plots.final_figure(record) if record.answers else open_report.final_figure(record)
