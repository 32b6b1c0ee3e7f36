"""Metrics of a search against hand-computed series, sets of bits in plain Python, and brute force."""

import itertools

import pytest
from rdkit import Chem
from rdkit.Chem import rdFingerprintGenerator

from mara_jax.tasks.chemistry import metrics, molexp
from mara_jax.tasks.chemistry.calls import OracleCalls

MIXED = [
    "c1ccccc1", "Cc1ccccc1", "CCO", "CCCO", "CC(=O)O", "C1CCCCC1", "c1ccncc1", "NC(=O)c1ccccc1", "CCN", "ClC(Cl)Cl",
]  # fmt: skip
GENERATOR = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)


def distance(one: str, other: str) -> float:
    bits, others = (set(GENERATOR.GetFingerprint(Chem.MolFromSmiles(s)).GetOnBits()) for s in (one, other))
    return 1 - len(bits & others) / len(bits | others)


# ---- yield and calls ------------------------------------------------------------------------------------------------


def test_yield_and_calls_by_hand():
    series = [0.1, 0.9, 0.85, 0.2] + [0.84, 0.86] * 10
    assert metrics.hits(series, 0.85) == 12 and metrics.hits(series, 0.9) == 1 and metrics.hits([], 0.5) == 0
    # The second call is the first hit; the tenth hit is the eighth .86, at call 4 + 16.
    assert metrics.calls_to_hits(series, 0.85) == {1: 2, 10: 20}
    assert metrics.calls_to_hits([1.0] * 100, 0.85) == {1: 1, 10: 10, 100: 100}
    assert metrics.calls_to_hits(series, 0.95) == {}
    assert metrics.calls_to_hits(series, 0.85, counts=(2, 3)) == {2: 3, 3: 6}


def test_the_series_of_oracle_calls_is_read_as_it_is():
    calls = OracleCalls(lambda smiles: [len(one) / 10 for one in smiles], budget=4)
    calls(["CCCCCCCC", "C", "CCCC", "CCCCC"])  # .8, .1, .4, .5
    assert metrics.hits(calls.series, 0.5) == 2
    assert metrics.calls_to_hits(calls.series, 0.5, counts=(1, 2)) == {1: 1, 2: 4}
    # The best each 2 calls: .8 at 2 and at 4: .8 + 1.6, divided by 4.
    assert metrics.top_auc(calls.series, 1, freq_log=2, max_oracle_calls=4) == pytest.approx(0.6)


# ---- area under the curve -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("series", "finish", "area"),
    [
        # The curve rises from 0 to 1 within the first 100 calls, then stays: 50 + 9,900.
        ([1.0] * 10_000, True, 0.995),
        # One point at the last call, 50: 25 until there; the last mean is held for 9,950 calls, or not at all.
        ([1.0] * 50, True, 0.9975),
        ([1.0] * 50, False, 0.0025),
        # 100 calls at .2, 50 more at .8: means .2 and .8; 10 + 25, then 9,850 x .8.
        ([0.2] * 100 + [0.8] * 50, True, 0.7915),
        ([0.2] * 100 + [0.8] * 50, False, 0.0035),
        # 1 behind 199 zeros: the ten best of 200 have the mean .1; 0, 100 x .05, 100 x .1 up to the last call.
        ([0.0] * 199 + [1.0] + [0.0] * 100, False, 0.0015),
        # Fewer than ten molecules: the mean of those there are; 4 x .25, then 9,996 x .5.
        ([0.0, 1.0, 0.5, 0.5], True, 0.4999),
        # A hundred calls have one trapezoid, a hundred and one have two: 50 and 1.
        ([1.0] * 100, False, 0.005),
        ([1.0] * 101, False, 0.0051),
        # PMO's own runs may have one call more, which counts.
        ([1.0] * 10_001, True, 0.9951),
    ],
)
def test_the_area_of_pmo_by_hand(series, finish, area):
    assert metrics.top_auc(series, finish=finish) == pytest.approx(area, abs=1e-12)


def test_the_area_of_other_counts_and_budgets_by_hand():
    series = [0.1, 0.4, 0.3, 0.8]
    # Top 1 each 2 calls of a budget of 5: .4 at 2, .8 at 4; .4 + 1.2, then one call at .8; divided by 5.
    assert metrics.top_auc(series, 1, freq_log=2, max_oracle_calls=5) == pytest.approx(2.4 / 5)
    # Top 2: .25 at 2, .6 at 4: .25 + .85 + .6.
    assert metrics.top_auc(series, 2, freq_log=2, max_oracle_calls=5) == pytest.approx(1.7 / 5)


@pytest.mark.parametrize("length", [0, 10_002])
def test_series_that_no_run_gives_are_refused(length):
    with pytest.raises(ValueError, match=f"{length} scores"):
        metrics.top_auc([1.0] * length)


# ---- MolExp ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", molexp.TARGETS)
def test_the_score_of_molexp_is_a_product_over_targets(task):
    targets = molexp.TARGETS[task]
    assert metrics.molexp_score(task, ["CCO", *targets]) == 1
    one = metrics.molexp_similarities(task, targets[:1])
    product = 1.0
    for target in targets[1:]:
        product *= one[target]
    # The reward of a policy that keeps to one target is 1; its score is what the others have in common with it.
    assert one[targets[0]] == 1 and product < 0.4
    assert metrics.molexp_score(task, targets[:1]) == pytest.approx(product)
    assert metrics.molexp_score(task, ["no molecule"]) == metrics.molexp_score(task, []) == 0


# ---- diversity ------------------------------------------------------------------------------------------------------


def test_internal_diversity_is_the_mean_distance_of_pairs():
    apart = distance("CCO", "c1ccccc1")
    assert metrics.internal_diversity(["CCO", "OCC"]) == 0
    assert metrics.internal_diversity(["CCO", "c1ccccc1", "OCC"]) == pytest.approx(apart * 2 / 3)
    pairs = [distance(*pair) for pair in itertools.combinations(MIXED, 2)]
    assert metrics.internal_diversity([*MIXED, "c1cc"]) == pytest.approx(sum(pairs) / len(pairs))
    assert metrics.internal_diversity(["CCO"]) == metrics.internal_diversity([]) == 0
    # IntDiv1 of MOSES averages all n x n pairs.
    square = [distance(one, other) for one in MIXED for other in MIXED]
    assert metrics.internal_diversity(MIXED) * 9 / 10 == pytest.approx(sum(square) / len(square))


def largest_set(smiles: list[str], least: float) -> int:
    """The largest set of molecules of which no two are within `least`, by trying all."""
    return next(
        size
        for size in range(len(smiles), -1, -1)
        for chosen in itertools.combinations(smiles, size)
        if all(distance(*pair) > least for pair in itertools.combinations(chosen, 2))
    )


@pytest.mark.parametrize("least", [0.3, 0.6, 0.75, 0.9])
def test_circles_are_a_lower_bound_of_the_largest_set(least):
    exact = largest_set(MIXED, least)
    greedy = [metrics.circles(order, least) for order in (MIXED, MIXED[::-1], sorted(MIXED))]
    assert max(greedy) <= exact and min(greedy) >= exact / 2 and exact > 1


def test_circles_depend_on_the_order():
    """Toluene-like molecules between two ends: where the middle comes first, it excludes both ends."""
    ends, middle = ("CCCCCCO", "c1ccccc1CN"), "c1ccccc1CCCCCCO"
    least = max(distance(middle, end) for end in ends)
    assert distance(*ends) > least
    assert metrics.circles([*ends, middle], least) == largest_set([*ends, middle], least) == 2
    assert metrics.circles([middle, *ends], least) == 1


def test_a_distance_that_is_exactly_the_threshold_is_within():
    # Eight bits of sixteen and the like are exact in binary.
    pair = next(p for p in itertools.combinations(MIXED, 2) if distance(*p) in (0.5, 0.75, 0.875, 0.25))
    assert metrics.circles(pair, distance(*pair)) == 1
    assert metrics.circles(pair, distance(*pair) - 1e-9) == 2


def test_circles_of_known_sets():
    assert metrics.circles([]) == 0
    assert metrics.circles(["CCO", "OCC", "no molecule"]) == 1
    assert metrics.circles(["c1ccccc1", "CCO", "C1CCCCC1"]) == 3


def test_scaffolds_by_hand():
    # Benzene of three, pyridine, and two rings with their linker; acyclic molecules have none.
    smiles = ["c1ccccc1", "Cc1ccccc1", "CC(=O)Oc1ccccc1C(=O)O", "Cc1ccncc1", "c1ccccc1CCc1ccccc1", "CCO", "CCCC", "bad"]
    assert metrics.scaffolds(smiles) == 3
