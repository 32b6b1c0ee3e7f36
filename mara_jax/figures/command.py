"""The figures command: each didactic figure as a PNG, an SVG and a JSON, with checks of what it must show."""

import pathlib
import time
from typing import Any

from rich.console import Console

from mara_jax import cli
from mara_jax.cli import Flag
from mara_jax.figures import computation, drawing, experiments
from mara_jax.train import workdir as workdirs
from mara_jax.train.tables import NumberTable

COMMAND = cli.Command(
    name="figures",
    purpose="""Trains the small problems of the papers' figures and writes each figure as a PNG, an SVG and a JSON:
    every panel's trained distribution beside its exact optimum, the distance between them, and checks of what the
    figure must show. The exit status is 1 when a check fails.""",
    examples=(
        "python -m mara_jax.figures",
        "python -m mara_jax.figures --only=2,6 --mode=converged --out=runs/figures",
    ),
    flags=(
        Flag("out", "DIR", "folder to write into", "runs/figures"),
        Flag("only", "2,6", f"some of {', '.join(computation.NAMES)}; all unless given"),
        Flag("mode", "MODE", "the paper's optimiser settings, or exact gradients until the optimum", "faithful",
             choices=tuple(experiments.MODES)),
    ),
    interrupted="figures already printed are complete",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Draws the figures and prints their checks; returns the exit status."""
    return cli.run(COMMAND, figures, argv)


def figures(argv: list[str]) -> int:
    """Draws the figures that the command line names; returns 1 if a check fails.

    Raises:
      ValueError, OSError: one line.
    """
    names, mode, out = parse(argv)
    out.mkdir(parents=True, exist_ok=True)
    return 0 if write_figures(names, mode, out) else 1


def parse(argv: list[str]) -> tuple[list[str], str, pathlib.Path]:
    """Which figures, in which mode, and the folder for them.

    Raises:
      ValueError: an unknown flag, figure or mode, or a folder that is a file.
    """
    values = cli.parse(COMMAND, argv)
    names = list(computation.NAMES) if values.only is None else [name.strip() for name in values.only.split(",")]
    for name in names:
        if name not in computation.NAMES:
            raise ValueError(f"--only={values.only}: {name!r} is no figure; use some of {','.join(computation.NAMES)}")
    return list(dict.fromkeys(names)), values.mode, cli.writable_folder(values.out)


def write_figures(names: list[str], mode: str, out: pathlib.Path) -> bool:
    """Writes each figure's files and prints a line for it, then the table of checks; returns whether all passed."""
    console = Console(soft_wrap=True, highlight=False)
    records = []
    for name in names:
        began = time.monotonic()
        record = computation.record(name, mode)
        stem = out / (f"figure{name}" if name.isdigit() else name)
        picture = drawing.write(record, stem.with_suffix(".png"))
        workdirs.write_json(stem.with_suffix(".json"), record)
        records.append(record)
        passed, total = _count(record)
        console.print(
            f"figure {name:<5} {len(record['panels']):>2} trainings, {passed} of {total} checks pass, "
            f"{time.monotonic() - began:4.1f} s   {picture}"
        )
    console.print(table(records))
    return all(check["pass"] for record in records for check in record["checks"])


def table(records: list[dict[str, Any]]) -> NumberTable:
    """One row a figure: distances from trained to optimum and checks passed; then a row for each failed check."""
    title = f"{records[0]['mode']}: what the figures must show"
    number_table = NumberTable.with_headers(
        "figure", "shows", "TV to optimum", "checks", texts=2, lines=True, title=title
    )
    for record in records:
        distances = [panel["tv_to_optimum"] for panel in record["panels"]]
        passed, total = _count(record)
        style = "green" if passed == total else "bold red"
        number_table.add_row(
            record["figure"],
            record["title"],
            f"{min(distances):.3f} - {max(distances):.3f}",
            f"[{style}]{passed} of {total}[/]",
        )
    for record in records:
        for check in record["checks"]:
            if not check["pass"]:
                text = f"{check['name']}: {check['measured']:.6g}, not {check['relation']} {check['expected']:.6g}"
                allowed = f" ± {check['tolerance']:g}" if check["tolerance"] else ""
                number_table.add_row(record["figure"], f"[red]{text}{allowed}[/]", "", "[bold red]fails[/]")
    return number_table


def _count(record: dict[str, Any]) -> tuple[int, int]:
    return sum(check["pass"] for check in record["checks"]), len(record["checks"])
