"""Looks at finished runs: ``python -m mara_jax.evaluate show|compare RUN... [--markdown]``."""

import argparse
import sys

from rich.console import Console

from mara_jax.evaluate import comparison
from mara_jax.train import plots, report


def main(argv: list[str]) -> int:
    """Prints one run's final table and redraws its figure, or a comparison of several; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mara_jax.evaluate", description=__doc__)
    parser.add_argument("action", choices=("show", "compare"), help="one run in full, or several side by side")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdir of a language-model run")
    parser.add_argument("--markdown", action="store_true", help="print the comparison as a markdown table")
    asked = parser.parse_args(argv)
    console = Console(soft_wrap=True, highlight=False)
    try:
        if asked.action == "show":
            for run in asked.runs:
                console.print(report.final_table(run))
                console.print(f"figure: {plots.final_figure(run)}")
        else:
            compared = comparison.compare(asked.runs)
            console.print(compared.markdown if asked.markdown else compared.table)
    except (ValueError, OSError) as error:
        print(f"mara_jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
