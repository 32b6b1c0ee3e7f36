"""What a search leaves for its reader: every molecule with its score, and a picture of the best."""

import csv
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mara_jax.tasks.chemistry import metrics, molecules

TABLE, PICTURE = "molecules.csv", "molecules.png"
_IN_A_ROW, _ROWS, _CELL = 6, 2, (300, 230)  # molecules in a row of the picture, rows of each kind; pixels of one
_LEGEND = 26  # pixels


def write(series: Mapping[str, float], threshold: float, folder: pathlib.Path) -> str:
    """Writes molecules.csv and molecules.png; returns words that say what was reached and where it is shown.

    Args:
      series: scores by canonical SMILES, in the order of the oracle calls.
      threshold: the score from which a molecule is a hit.
      folder: where the files go.
    """
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["oracle_call", "smiles", "score"])
        writer.writerows([call, smiles, score] for call, (smiles, score) in enumerate(series.items(), 1))
    best = sorted(series, key=lambda smiles: -series[smiles])  # equal scores in the order of the calls
    hits = [smiles for smiles in best if series[smiles] >= threshold]
    centres = best_of_circles(hits)
    words = f"{len(series)} molecules, {len(hits)} hits (score from {threshold:g}), {len(centres)} circles"
    if not best:
        return words
    count = _IN_A_ROW * _ROWS
    (folder / PICTURE).write_bytes(picture(best[:count], centres[:count], series))
    return f"{words}; best {series[best[0]]:.3f}: {best[0]}\n{folder / PICTURE}   {folder / TABLE}"


def best_of_circles(hits: Sequence[str], distance: float = 0.75) -> list[str]:
    """Of hits with the best first, those that are further than `distance` from each taken before, see
    `metrics.circles`."""
    taken: list[str] = []
    entries: list[Any] = []
    with molecules.silence():
        for smiles, molecule in zip(hits, molecules.parse_each(hits), strict=True):
            assert molecule is not None, "a series holds canonical SMILES"
            entry = molecule.fingerprint(metrics.DIVERSITY_FINGERPRINT)
            if all(1 - similarity > distance for similarity in molecules.similarities(entry, entries)):
                taken.append(smiles)
                entries.append(entry)
    return taken


def picture(best: Sequence[str], centres: Sequence[str], scores: Mapping[str, float]) -> bytes:
    """A PNG: the best molecules, and below them the best of each circle, each with its score."""
    from rdkit.Chem.Draw import rdMolDraw2D  # `molecules` says what to install where it is missing

    parts = [(best, ""), (centres, "circle: ")]
    cells: list[tuple[Any, str]] = []
    for smiles, kind in parts:
        cells += [(molecules.known(one).rdkit, f"{kind}{scores[one]:.3f}") for one in smiles]
        cells += [(None, "")] * (-len(cells) % _IN_A_ROW)
    width, height = _CELL
    rows = max(len(cells) // _IN_A_ROW, 1)
    drawing = rdMolDraw2D.MolDraw2DCairo(width * _IN_A_ROW, height * rows, width, height)
    drawing.drawOptions().legendFontSize = _LEGEND
    with molecules.silence():
        drawing.DrawMolecules([mol for mol, _ in cells], legends=[legend for _, legend in cells])
    drawing.FinishDrawing()
    return drawing.GetDrawingText()
