"""MOSES' statistics: hand counts, sets that are equal, and where the package is there, the published training set."""

import math

import pytest

from mara_jax.tasks.chemistry import metrics, molecules, moses

SET = ["CCO", "c1ccccc1", "CC(=O)NCc1ccccc1", "O=C(c1ccccc1)N1CCCCC1", "c1ccc2ccccc2c1"]


def test_shares_by_hand():
    """Of six two are bad; of four valid ones three differ; of these two are new."""
    shares = moses.shares(["CCO", "OCC", "C1", "", "CCC", "c1ccccc1"], {"CCO"})
    assert shares == {"valid": 4 / 6, "unique@1k": 3 / 4, "unique@10k": 3 / 4, "novel": 2 / 3}
    assert math.isnan(moses.shares(["C1"], set())["novel"])


def test_uniqueness_reads_the_first_valid_ones():
    shares = moses.shares([*["C1"] * 10, *["C"] * 1000, "CC"], set())
    assert shares["unique@1k"] == 1 / 1000 and shares["unique@10k"] == 2 / 1001


def test_a_set_is_nearest_to_itself():
    own = moses.profile(SET)
    same = moses.distances(own, moses.profile(SET[::-1]))
    assert same == pytest.approx({"snn": 1, "frag": 1, "scaf": 1, "logp": 0, "sa": 0, "qed": 0, "weight": 0})


def test_fragments_and_scaffolds_by_hand():
    """The amide is cut at its three BRICS bonds; scaffolds of one ring do not count."""
    own = moses.profile(["CC(=O)NCc1ccccc1", "c1ccccc1"])
    assert own.fragments == {"[1*]C(C)=O": 1, "[5*]N[5*]": 1, "[4*]C[8*]": 1, "[16*]c1ccccc1": 1, "c1ccccc1": 1}
    assert own.scaffolds == {}
    assert moses.profile(["Cc1ccc2ccccc2c1", "c1ccc2ccccc2c1"]).scaffolds == {"c1ccc2ccccc2c1": 2}


def test_cosine_by_hand():
    assert moses.cosine({"a": 3, "b": 4}, {"b": 5, "c": 12}) == pytest.approx(20 / (5 * 13))
    assert math.isnan(moses.cosine({}, {"a": 1}))


def test_nearest_similarity_and_distance_of_weights_by_hand():
    """Ethanol (46.07) beside benzene (78.11): one is moved by the difference; likewise similarities of fingerprints."""
    one, two = moses.profile(["CCO", "c1ccccc1"]), moses.profile(["c1ccccc1"])
    similar = molecules.similarities(one.fingerprints[0], two.fingerprints)[0]
    measured = moses.distances(one, two)
    assert measured["snn"] == pytest.approx((similar + 1) / 2) and measured["weight"] == pytest.approx(16.022, abs=1e-3)
    with pytest.raises(ValueError, match="neither set may be empty"):
        moses.distances(one, moses.profile([]))


def test_diversities_count_each_with_itself():
    own = moses.diversities(moses.profile(SET))
    assert own["intdiv"] == pytest.approx(metrics.internal_diversity(SET) * (len(SET) - 1) / len(SET))
    apart = moses.diversities(moses.profile(["CCO", "c1ccccc1"]))  # nothing in common: similarities 1, 0, 0, 1
    assert apart == pytest.approx({"intdiv": 0.5, "intdiv2": 1 - math.sqrt(0.5)})
    twice = moses.diversities(moses.profile(["CCO", "OCC", "c1ccccc1"]))  # molsets averages the roots
    assert twice["intdiv2"] == pytest.approx(1 - (2 * math.sqrt(2 / 3) + math.sqrt(1 / 3)) / 3)


@pytest.fixture
def alerts(monkeypatch):
    monkeypatch.setattr(moses, "_alerts", lambda: [molecules.pattern("C#N"), molecules.pattern("[H]OC=O")])


@pytest.mark.parametrize(
    ("smiles", "passes"),
    [
        ("CCO", True),
        ("CC#N", False),
        ("CC(=O)O", False),  # patterns see hydrogens
        ("C[N+](C)(C)C", False),
        ("CP", False),
        ("C1CCCCCCC1", False),  # eight in a ring
        ("C1CCCCCC1", True),
    ],
)
def test_filters(alerts, smiles, passes):
    assert moses.filtered([smiles, "C1"]) == passes


def test_published_rows_name_the_statistics_that_are_computed():
    assert {name.partition("/")[0] for name in moses.PUBLISHED["CharRNN"]} <= {
        *moses.shares([], set()), *moses.diversities(moses.profile([])), "filters", "snn", "frag", "scaf",
    }  # fmt: skip
