"""Draws the didactic figures: ``python -m mara_jax.figures --out=DIR [--only=2,6] [--mode=faithful|converged]``.

Each figure is a PNG, an SVG and a JSON: every panel's trained distribution beside its exact optimum, the distance
between them, and checks of what the figure must show. The exit status is 1 when a check fails.
"""

import argparse
import pathlib
import sys
import time
from typing import Any, NoReturn

import jax
from rich.console import Console

from mara_jax.figures import drawing, experiments, figure_records
from mara_jax.train import workdir as workdirs
from mara_jax.train.tables import NumberTable


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: list[str]) -> int:
    """Makes the figures asked for and prints their checks; returns the exit status."""
    try:
        names, mode, out = parse(argv)
        out.mkdir(parents=True, exist_ok=True)
        passed = make(names, mode, out)
    except (ValueError, OSError) as error:
        print(f"mara_jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mara_jax: interrupted; figures already announced are whole", file=sys.stderr)
        return 130
    return 0 if passed else 1


def parse(argv: list[str]) -> tuple[list[str], str, pathlib.Path]:
    """Which figures, in which mode, and where to.

    Args:
      argv: the command's arguments, without its own name.

    Raises:
      ValueError: an argument, figure or mode is not known, or the folder cannot be one.
    """
    parser = _Parser(prog="python -m mara_jax.figures", description=__doc__)
    parser.add_argument("--out", default="runs/figures", help="folder to write into (default: %(default)s)")
    parser.add_argument("--only", metavar="2,6", help=f"figures among {','.join(figure_records.NAMES)} (default: all)")
    parser.add_argument(
        "--mode",
        default="faithful",
        help="faithful: the paper's optimiser settings (default); converged: exact gradients, until the optimum",
    )
    asked = parser.parse_args(argv)
    names = [name.strip() for name in asked.only.split(",")] if asked.only is not None else list(figure_records.NAMES)
    for name in names:
        if name not in figure_records.NAMES:
            raise ValueError(
                f"--only={asked.only}: {name!r} is no figure; use some of {','.join(figure_records.NAMES)}"
            )
    if asked.mode not in experiments.MODES:
        raise ValueError(f"--mode={asked.mode} is not known: use {' or '.join(experiments.MODES)}")
    out = pathlib.Path(asked.out)
    for folder in (out, *out.parents):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out={asked.out}: {folder} is a file; choose a folder")
    return list(dict.fromkeys(names)), asked.mode, out


def make(names: list[str], mode: str, out: pathlib.Path) -> bool:
    """Writes each figure's files and prints a line for it, then the table of checks; returns whether all passed."""
    console = Console(soft_wrap=True, highlight=False)
    records = []
    for name in names:
        began = time.monotonic()
        record = figure_records.record(name, mode)
        png, svg = drawing.render(record)
        stem = out / (f"figure{name}" if name.isdigit() else name)
        workdirs.write_json(stem.with_suffix(".json"), record)
        stem.with_suffix(".png").write_bytes(png)
        stem.with_suffix(".svg").write_bytes(svg)
        records.append(record)
        passed, total = _count(record)
        console.print(
            f"figure {name:<5} {len(record['panels']):>2} trainings, {passed} of {total} checks pass, "
            f"{time.monotonic() - began:4.1f} s   {stem.with_suffix('.png')}"
        )
    console.print(table(records))
    return all(check["pass"] for record in records for check in record["checks"])


def table(records: list[dict[str, Any]]) -> NumberTable:
    """One row a figure: distances from trained to optimum and checks passed; then a row for each failed check."""
    title = f"{records[0]['mode']}: what the figures must show"
    shown = NumberTable.of("figure", "shows", "TV to optimum", "checks", texts=2, lines=True, title=title)
    for record in records:
        distances = [panel["tv_to_optimum"] for panel in record["panels"]]
        passed, total = _count(record)
        style = "green" if passed == total else "bold red"
        shown.add_row(
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
                shown.add_row(record["figure"], f"[red]{text}{allowed}[/]", "", "[bold red]fails[/]")
    return shown


def _count(record: dict[str, Any]) -> tuple[int, int]:
    return sum(check["pass"] for check in record["checks"]), len(record["checks"])


if __name__ == "__main__":
    # Many small programs, each run once: optimising them takes longer than it saves.
    jax.config.update("jax_disable_most_optimizations", True)
    sys.exit(main(sys.argv[1:]))
