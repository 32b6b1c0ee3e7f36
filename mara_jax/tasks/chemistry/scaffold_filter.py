"""REINVENT's scaffold diversity filter: a scaffold that has given enough good molecules gives no reward any more."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

from mara_jax.tasks.base import TaskError


class ScaffoldFilter:
    """Buckets of the molecules that reached a score, one for each Bemis-Murcko scaffold.

    A molecule that reaches `min_score` is put into the bucket of its scaffold; behind the first `bucket_size` of a
    bucket its reward is 0. So it is for a molecule that is in a bucket already. Those without a ring share one bucket.

    Args:
      bucket_size: molecules of a scaffold that are rewarded; min_score: from which a molecule counts. REINVENT's
        defaults; its later papers use buckets of 10.

    Source: "IdenticalMurckoScaffold" of REINVENT (Blaschke et al. 2020, J. Cheminform. 12, 68).
    """

    def __init__(self, bucket_size: int = 25, min_score: float = 0.4) -> None:
        if bucket_size < 1:
            raise TaskError(f"bucket_size={bucket_size}: give at least 1 molecule")
        self.bucket_size, self.min_score = bucket_size, min_score
        self.molecules: dict[str, str] = {}  # canonical SMILES of those in a bucket, each with its scaffold
        self.counts: collections.Counter[str] = collections.Counter()

    def zeroed(self, smiles: Sequence[str], scaffolds: Sequence[str], scores: Sequence[float]) -> list[bool]:
        """Which molecules get no reward, judged in the order of the batch, and remembered.

        Args:
          smiles: [n] canonical SMILES; scaffolds: [n] those of their scaffolds, "" without a ring; scores: [n].
        """
        return [self._is_zeroed(*molecule) for molecule in zip(smiles, scaffolds, scores, strict=True)]

    def _is_zeroed(self, smiles: str, scaffold: str, score: float) -> bool:
        if smiles in self.molecules:
            return True
        if score < self.min_score:
            return False
        self.molecules[smiles] = scaffold
        self.counts[scaffold] += 1
        return self.counts[scaffold] > self.bucket_size

    @property
    def full(self) -> int:
        """How many buckets are full."""
        return sum(count >= self.bucket_size for count in self.counts.values())

    def state(self) -> dict[str, Any]:
        """The molecules in buckets, as plain data, which JSON keeps exactly."""
        return {"molecules": [[smiles, scaffold] for smiles, scaffold in self.molecules.items()]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes the place of the filter that gave this state; size and score stay this one's own."""
        self.molecules = {str(smiles): str(scaffold) for smiles, scaffold in state["molecules"]}
        self.counts = collections.Counter(self.molecules.values())
