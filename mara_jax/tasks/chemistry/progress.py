"""How far a search among molecules has come, kept up to date as molecules are scored."""

import bisect
from collections.abc import Mapping
from typing import Any

from mara_jax.tasks.chemistry import metrics, molecules

TOP = 10


class Progress:
    """Measures of a series of scores that grows: its best, its hits, and how far apart these are.

    Each equals what `metrics` computes of the whole series.

    Args:
      threshold: from which score on a molecule is a hit; distance: of `metrics.circles`.
    """

    def __init__(self, threshold: float, distance: float = 0.75) -> None:
        self.threshold, self.distance = threshold, distance
        self.seen = self.hits = 0
        self.best: list[float] = []  # the TOP best scores, ascending
        self.centres: list[Any] = []  # fingerprints of hits of which no two are within the distance

    def update(self, series: Mapping[str, float]) -> None:
        """Takes in the molecules that a series has behind those that were seen before."""
        for number, (smiles, score) in enumerate(series.items()):
            if number >= self.seen:
                self._add(smiles, score)
        self.seen = len(series)

    def _add(self, smiles: str, score: float) -> None:
        bisect.insort(self.best, score)
        del self.best[: max(len(self.best) - TOP, 0)]
        if score < self.threshold:
            return
        self.hits += 1
        with molecules.silence():
            molecule = molecules.parse(smiles)
        assert molecule is not None, "a series holds canonical SMILES"
        entry = molecule.fingerprint(metrics.DIVERSITY_FINGERPRINT)
        if all(1 - similarity > self.distance for similarity in molecules.similarities(entry, self.centres)):
            self.centres.append(entry)

    @property
    def top_mean(self) -> float:
        """The mean of the TOP best scores, or of as many as there are; 0 without any."""
        return sum(self.best) / len(self.best) if self.best else 0.0

    @property
    def circles(self) -> int:
        """The number that `metrics.circles` gives for the hits in the order in which they were scored."""
        return len(self.centres)
