"""REINVENT's scaffold filter by hand, and measures of a growing series against those of the whole."""

import json

import pytest

from mara_jax.tasks.chemistry import metrics
from mara_jax.tasks.chemistry.progress import Progress
from mara_jax.tasks.chemistry.scaffold_filter import ScaffoldFilter

# smiles, scaffold, score, whether it is zeroed by buckets of two from .4 on
BATCH = (
    ("a", "S", 0.5, False),
    ("b", "S", 0.3, False),  # too low for a bucket
    ("c", "S", 0.4, False),
    ("d", "S", 0.9, True),  # the third of S
    ("a", "S", 0.5, True),  # again
    ("e", "", 0.9, False),
    ("d", "S", 0.9, True),
    ("b", "S", 0.3, False),  # not in a bucket, so no repeat
    ("f", "T", 1.0, False),
)


def test_a_bucket_by_hand():
    buckets = ScaffoldFilter(2, 0.4)
    smiles, scaffolds, scores, want = zip(*BATCH, strict=True)
    assert buckets.zeroed(smiles, scaffolds, scores) == list(want)
    assert buckets.counts == {"S": 3, "": 1, "T": 1} and buckets.full == 1


def test_molecules_in_parts_are_judged_as_at_once():
    smiles, scaffolds, scores, want = zip(*BATCH, strict=True)
    first, second = ScaffoldFilter(2), ScaffoldFilter(2)
    got = first.zeroed(smiles[:4], scaffolds[:4], scores[:4])
    second.restore(json.loads(json.dumps(first.state())))
    assert got + second.zeroed(smiles[4:], scaffolds[4:], scores[4:]) == list(want)


def test_a_bucket_of_none_is_refused():
    with pytest.raises(ValueError, match="bucket_size=0"):
        ScaffoldFilter(0)


def test_progress_is_what_metrics_say_of_the_series():
    chains = {"C" * length: length / 20 for length in range(1, 20)}
    rings = {f"c1ccc({'C' * length})cc1": 1.01 - length / 50 for length in range(1, 7)} | {
        "c1ccncc1O": 0.7,
        "CCOCCN": 0.6,
    }
    series = dict(list(chains.items())[::2]) | rings
    progress, part = Progress(0.6), {}
    assert progress.top_mean == 0
    for smiles, score in series.items():
        part[smiles] = score
        progress.update(part)
        assert progress.hits == metrics.hits(part, 0.6)
        assert progress.top_mean == pytest.approx(sum(sorted(part.values())[-10:]) / min(len(part), 10))
    hits = [smiles for smiles, score in series.items() if score >= 0.6]
    assert progress.circles == metrics.circles(hits) > 2
