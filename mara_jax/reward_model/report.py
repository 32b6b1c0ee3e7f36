"""What is written and printed of a trained reward model: held-out accuracy, calibration, and what length alone says."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from mara_jax.reward_model import drawing, quality
from mara_jax.reward_model.pairs import Pair
from mara_jax.train import reward_model
from mara_jax.train import workdir as workdirs
from mara_jax.train.tables import NumberTable

FILE, FIGURE = "reward_model.json", "calibration.png"


class Encoded(NamedTuple):
    """Pairs, and the token ids of their chosen and rejected sequences."""

    pairs: list[Pair]
    chosen: list[list[int]]
    rejected: list[list[int]]


def margins(model: reward_model.RewardModel, encoded: Encoded) -> np.ndarray:
    """[n] float64 Score of the chosen completion minus that of the rejected one."""
    scores = model.scores([*encoded.chosen, *encoded.rejected]).astype(np.float64)
    return scores[: len(encoded.pairs)] - scores[len(encoded.pairs) :]


def lengths(encoded: Encoded, unit: str) -> quality.Lengths:
    """Lengths of chosen and rejected completions in "characters", or of their sequences in "tokens"."""
    if unit == "tokens":
        return quality.Lengths(_counts(encoded.chosen), _counts(encoded.rejected))
    texts = [[pair.chosen for pair in encoded.pairs], [pair.rejected for pair in encoded.pairs]]
    return quality.Lengths(*map(_counts, texts))


def _counts(rows: Sequence[Any]) -> np.ndarray:
    return np.array([len(row) for row in rows], np.float64)


def measured(model: reward_model.RewardModel, training: Encoded, held_out: Encoded, seed: int) -> dict[str, Any]:
    """What reward_model.json holds."""
    margin = margins(model, held_out)
    units = ("characters", "tokens")
    return {
        "held_out": quality.accuracy(held_out.pairs, margin) | {"loss": quality.loss(margin)},
        "length": {unit: quality.by_length(*(lengths(part, unit) for part in (training, held_out))) for unit in units},
        "training_pairs": len(training.pairs),
        "calibration": quality.calibration(margin, seed),
    }


def write(
    workdir: pathlib.Path,
    model: reward_model.RewardModel,
    training: Encoded,
    held_out: Encoded,
    seed: int,
    console: Console,
) -> None:
    """Writes reward_model.json and calibration.png (and .svg, .json), and prints a table."""
    result = measured(model, training, held_out, seed)
    workdirs.write_json(workdir / FILE, result)
    workdirs.write_json((workdir / FIGURE).with_suffix(".json"), result["calibration"])
    known = result["held_out"]
    title = f"{known['pairs']} held-out pairs, error {result['calibration']['error']:.3f}"
    figure = drawing.draw(workdir / FIGURE, result["calibration"], title)
    console.print(table(result))
    console.print(f"figure: {figure}   numbers: {workdir / FILE}", markup=False)


def table(result: dict[str, Any]) -> NumberTable:
    """Held-out pairs that are right, by the model and by length alone."""
    known = result["held_out"]
    shown = NumberTable.with_headers(
        "", "right", title=f"{known['pairs']} held-out pairs of {known['prompts']} prompts that training has not seen"
    )
    between = "" if known["interval"] is None else " ({:.1%} to {:.1%})".format(*known["interval"])
    shown.add_row("the reward model (95 % interval over prompts)", f"{known['accuracy']:.1%}{between}")
    for unit, rules in result["length"].items():
        shown.add_row(f"length alone, in {unit}: the longer, or the shorter", f"{rules['longer']:.1%}")
        shown.add_row(f"length alone, in {unit}: a cubic in its logarithm", f"{rules['fitted']:.1%}")
    return shown
