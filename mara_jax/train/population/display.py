"""What a terminal shows of the members of a population: notes with their names, and means of their rows."""

from typing import Any

import numpy as np

from mara_jax.train import metrics


class MemberDisplay(metrics.Display):
    """The display of one member: its notes go to that of the population, its steps are shown as part of a mean."""

    def __init__(self, name: str, display: metrics.Display) -> None:
        self.name, self.display, self.console = name, display, display.console

    def note(self, text: str) -> None:
        self.display.note(f"{self.name}: {text}")

    def step(self, row: dict[str, Any], texts: list[tuple[str, bool]]) -> None:
        del row, texts

    def evaluation(self, row: dict[str, Any]) -> None:
        self.display.note(f"{self.name}: evaluation after step {row['step']}: reward {row['reward']:.3f}")


def mean_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A row with the means over members of what a terminal shows of a step; of values that are missing, none."""
    shown = {name: [row[name] for row in rows if row.get(name) is not None] for name in metrics.SHOWN}
    return {"step": rows[0]["step"]} | {name: float(np.mean(values)) for name, values in shown.items() if values}
