"""What a search among molecules has reached: yields and calls, PMO's area under the curve, MolExp's score, diversities.

A `series` holds the scores of distinct molecules in the order in which an oracle was called for them: the scores alone,
or by SMILES as `calls.OracleCalls.series` has them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mara_jax.tasks.base import TaskError
from mara_jax.tasks.chemistry import molecules, molexp

Series = Mapping[str, float] | Iterable[float]
DIVERSITY_FINGERPRINT = "ecfp4_bits_1024"  # that of MOSES


def hits(series: Series, threshold: float) -> int:
    """The yield: how many molecules score at least `threshold`."""
    return sum(score >= threshold for score in _scores(series))


def calls_to_hits(series: Series, threshold: float, counts: Sequence[int] = (1, 10, 100)) -> dict[int, int]:
    """How many calls the first 1, 10 and 100 molecules that score at least `threshold` took.

    Returns:
      Calls by number of molecules, without those numbers that were not reached.
    """
    numbers = [call for call, score in enumerate(_scores(series), 1) if score >= threshold]
    return {count: numbers[count - 1] for count in counts if 0 < count <= len(numbers)}


def top_auc(
    series: Series,
    top: int = 10,
    *,
    freq_log: int = 100,
    max_oracle_calls: int = 10_000,
    finish: bool = True,
) -> float:
    """PMO's area under the curve of the mean of the `top` best molecules against calls, divided by the budget.

    Trapezoids from 0 calls, where the curve is 0, to each multiple of `freq_log` below the last call, and to the last
    call; there may be fewer than `top` molecules in a mean. With `finish` the last mean is held until the budget ends.

    Args:
      series: scores of distinct molecules by call; PMO's own runs may have one more than `max_oracle_calls`.

    Raises:
      ValueError: there are no scores, or more than that.

    Source: Gao et al. 2022 (arXiv 2206.12411), `top_auc` of mol_opt.
    """
    scores = list(_scores(series))
    if not 0 < len(scores) <= max_oracle_calls + 1:
        raise TaskError(
            f"{len(scores)} scores: an area needs at least one, and no more than the {max_oracle_calls} calls"
        )
    ends = [*range(freq_log, min(len(scores), max_oracle_calls), freq_log), len(scores)]
    area, before, mean, best = 0.0, 0, 0.0, []
    for end in ends:
        best = sorted([*best, *scores[before:end]], reverse=True)[:top]
        last, mean = mean, sum(best) / len(best)
        area += (end - before) * (last + mean) / 2
        before = end
    if finish:
        area += max(max_oracle_calls - len(scores), 0) * mean
    return area / max_oracle_calls


def molexp_score(task: str, smiles: Sequence[str]) -> float:
    """A task's score under MolExp: the product over its targets of the best similarity of any molecule to each."""
    return math.prod(molexp_similarities(task, smiles).values())


def molexp_similarities(task: str, smiles: Sequence[str]) -> Mapping[str, float]:
    """The best similarity of any molecule to each target of a task of MolExp; 0 without molecules."""
    reached = _fingerprints(smiles, molexp.FINGERPRINT)
    return {
        target: max(
            molecules.similarities(molecules.known(target).fingerprint(molexp.FINGERPRINT), reached), default=0.0
        )
        for target in molexp.targets(task)
    }


def internal_diversity(smiles: Sequence[str]) -> float:
    """Mean Tanimoto distance of the pairs of different entries, ECFP4 bits folded to 1,024; 0 for fewer than two.

    IntDiv1 of MOSES also pairs each of n molecules with itself: it is this times (n - 1) / n.
    """
    entries = _fingerprints(smiles, DIVERSITY_FINGERPRINT)
    pairs = len(entries) * (len(entries) - 1) / 2
    similar = sum(sum(molecules.similarities(entry, entries[:row])) for row, entry in enumerate(entries))
    return 1 - similar / pairs if pairs else 0.0


def circles(smiles: Sequence[str], distance: float = 0.75) -> int:
    """A lower bound of #Circles: molecules of which no two are within `distance`, as one pass finds them.

    A molecule is taken where its Tanimoto distance to each taken before is above `distance` (ECFP4 bits folded to
    1,024). #Circles is the largest such set, which is hard to find; the number here depends on the order of molecules.

    Source: Xie et al. 2023 (ICLR, "How much space has been explored?").
    """
    centres: list[Any] = []
    for entry in _fingerprints(smiles, DIVERSITY_FINGERPRINT):
        if all(1 - similarity > distance for similarity in molecules.similarities(entry, centres)):
            centres.append(entry)
    return len(centres)


def scaffolds(smiles: Sequence[str]) -> int:
    """How many different Bemis-Murcko scaffolds the molecules have; those without a ring have none."""
    with molecules.silence():
        parsed = [molecule for molecule in molecules.parse_each(smiles) if molecule is not None]
        return len({molecule.scaffold for molecule in parsed} - {""})


def _scores(series: Series) -> Iterable[float]:
    return series.values() if isinstance(series, Mapping) else series


def _fingerprints(smiles: Sequence[str], kind: str) -> list[Any]:
    """The molecules' fingerprints; SMILES that do not parse are left out."""
    with molecules.silence():
        return [molecule.fingerprint(kind) for molecule in molecules.parse_each(smiles) if molecule is not None]
