"""Measures, terms and scores against known properties, similarities counted in Python, and numbers by hand."""

import pickle
import subprocess
import sys

import pytest
from rdkit import Chem
from rdkit.Chem import rdFingerprintGenerator

from mara_jax.tasks.chemistry import molecules, molexp
from mara_jax.tasks.chemistry.modifiers import Gaussian, MinGaussian, ReverseSigmoid, Step
from mara_jax.tasks.chemistry.terms import (
    Count,
    HasScaffold,
    Isomer,
    Matches,
    Near,
    Property,
    Scoring,
    Similarity,
    Term,
)

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
BENZENE, TOLUENE, CYCLOHEXANE, ETHANOL = "c1ccccc1", "Cc1ccccc1", "C1CCCCC1", "CCO"


def value(measure, smiles):
    return measure(molecules.known(smiles))


@pytest.mark.parametrize(
    ("name", "known"),
    [  # of aspirin, C9H8O4: published or counted, but for RDKit's own models (logp, qed, sa)
        ("weight", 180.159),
        ("tpsa", 63.60),
        ("heavy_atoms", 13),
        ("donors", 1),
        ("acceptors", 3),
        ("rotatable", 2),
        ("rings", 1),
        ("aromatic_rings", 1),
        ("logp", 1.3101),
        ("qed", 0.5501),
        ("sa", 1.580),
    ],
)
def test_properties_of_aspirin(name, known):
    assert value(Property(name), ASPIRIN) == pytest.approx(known, abs=5e-4)


def test_complexity_of_benzene_and_cyclohexane():
    assert value(Property("bertz"), BENZENE) > value(Property("bertz"), CYCLOHEXANE) >= 0
    assert (value(Property("rings"), CYCLOHEXANE), value(Property("aromatic_rings"), CYCLOHEXANE)) == (1, 0)


def test_atoms_are_counted_with_hydrogens_that_are_not_written():
    counts = {element: value(Count(element), ASPIRIN) for element in ("C", "H", "O", "F")}
    assert counts == {"C": 9, "H": 8, "O": 4, "F": 0}
    assert value(Count("H"), "[H]OC") == value(Count("H"), "[2H]OC") == 4
    assert molecules.atoms(molecules.known(ASPIRIN).rdkit) == 21


def test_isomers_by_hand():
    assert value(Isomer("C9H8O4"), ASPIRIN) == 1
    # One carbon, two hydrogens and so three atoms too few: exp(-1/2), exp(-2), 1, exp(-9/8), their geometric mean.
    assert value(Isomer("C10H10O4"), ASPIRIN) == pytest.approx(2.718281828 ** (-(0.5 + 2 + 1.125) / 4))
    with pytest.raises(ValueError, match="C7H8N2O2"):
        Isomer("c9h8")


def tanimoto(one: dict[int, int], other: dict[int, int]) -> float:
    keys = one.keys() | other.keys()
    least = sum(min(one.get(key, 0), other.get(key, 0)) for key in keys)
    return least / sum(max(one.get(key, 0), other.get(key, 0)) for key in keys)


@pytest.mark.parametrize(
    ("kind", "generator"),
    [
        ("ecfp4", rdFingerprintGenerator.GetMorganGenerator(radius=2)),
        ("ecfp6", rdFingerprintGenerator.GetMorganGenerator(radius=3)),
        ("atom_pairs", rdFingerprintGenerator.GetAtomPairGenerator(maxDistance=10)),
    ],
)
def test_similarities_are_those_of_unfolded_counts(kind, generator):
    counts = [
        generator.GetSparseCountFingerprint(Chem.MolFromSmiles(smiles)).GetNonzeroElements()
        for smiles in (ASPIRIN, TOLUENE)
    ]
    assert value(Similarity((ASPIRIN,), kind), TOLUENE) == pytest.approx(tanimoto(*counts), abs=1e-12)
    assert max(counts[0].values()) > 1  # counts, not bits


def test_features_do_not_tell_chlorine_from_bromine():
    bromide, chloride = "CCCBr", "CCCCl"
    assert value(Similarity((bromide,), "fcfp4"), chloride) == 1 > value(Similarity((bromide,), "ecfp4"), chloride)
    # ECFP4 and ECFP6 differ where a molecule has environments of radius 3.
    assert value(Similarity((ASPIRIN,), "ecfp4"), TOLUENE) != value(Similarity((ASPIRIN,), "ecfp6"), TOLUENE)


def test_the_largest_similarity_to_several_targets():
    each = [value(Similarity((target,)), TOLUENE) for target in (ETHANOL, BENZENE, ASPIRIN)]
    assert value(Similarity((ETHANOL, BENZENE, ASPIRIN)), TOLUENE) == max(each) == each[1] > each[2] > each[0]


def test_substructures_and_scaffolds():
    assert [value(Matches("c1ccccc1"), smiles) for smiles in (ASPIRIN, CYCLOHEXANE)] == [1, 0]
    assert [value(Matches("C(=O)[OH]", wanted=False), smiles) for smiles in (ASPIRIN, CYCLOHEXANE)] == [0, 1]
    scaffold = [value(HasScaffold(TOLUENE), smiles) for smiles in (ASPIRIN, BENZENE, CYCLOHEXANE, ETHANOL)]
    assert scaffold == [1, 1, 0, 0]
    assert value(HasScaffold(BENZENE, wanted=False), CYCLOHEXANE) == 1


def test_near_another_molecule():
    assert value(Near(ASPIRIN, "weight", 10), ASPIRIN) == 1
    difference = value(Property("weight"), ASPIRIN) - value(Property("weight"), TOLUENE)
    assert value(Near(ASPIRIN, "weight", 50), TOLUENE) == pytest.approx(Gaussian(0, 50)(difference))


def test_a_score_of_weighted_terms_by_hand():
    terms = (
        Term(Property("donors"), Gaussian(3, 1), 3.0),
        Term(Matches("c1ccccc1")),
        Term(Property("qed"), weight=1.0),
    )
    # Aspirin: exp(-2), 1, .5501; weights 3, 1, 1.
    assert Scoring(terms)([ASPIRIN]) == [pytest.approx((2.718281828**-6 * 0.5501218) ** 0.2)]
    assert Scoring(terms, "arithmetic")([ASPIRIN]) == [pytest.approx((3 * 0.1353353 + 1 + 0.5501218) / 5)]
    assert Scoring(terms)([ASPIRIN, "nothing", CYCLOHEXANE])[1:] == [0, 0]
    assert Scoring(terms, "arithmetic")([CYCLOHEXANE])[0] > 0


def test_the_reward_of_the_published_chemistry_runs_without_docking():
    """QED, fewer than four donors, and synthesizability: each falls for a molecule that lacks it."""
    reward = Scoring((
        Term(Property("donors"), Step(high=3)),
        Term(Property("qed")),
        Term(Property("sa"), ReverseSigmoid(2, 6)),
    ))  # fmt: skip
    glucose = "OCC1OC(O)C(O)C(O)C1O"  # five donors
    scores = reward([ASPIRIN, glucose])
    assert scores[0] > 0.6 and scores[1] == 0


def test_a_term_behind_a_zero_is_not_computed():
    def never(molecule):
        raise AssertionError

    terms = (Term(Matches("[U]")), Term(never))
    assert Scoring(terms)([ASPIRIN]) == [0]
    with pytest.raises(AssertionError):
        Scoring(terms, "arithmetic")([ASPIRIN])


def test_scores_can_be_sent_to_other_processes():
    score = Scoring((Term(Similarity((ASPIRIN,)), MinGaussian(0.5, 0.1)), Term(Near(TOLUENE, "logp", 1), weight=2.0)))
    program = "import pickle, sys; score = pickle.load(sys.stdin.buffer); print(score([sys.argv[1]]))"
    done = subprocess.run(
        [sys.executable, "-c", program, TOLUENE], input=pickle.dumps(score), capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == str(score([TOLUENE]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Property("mass"), "no property 'mass'; there are qed, sa"),
        (lambda: Similarity((ASPIRIN,), "maccs"), "no fingerprint 'maccs'; there are ecfp4"),
        (lambda: Similarity(ASPIRIN), r"give a tuple of SMILES"),
        (lambda: Scoring(()), "give at least one"),
        (lambda: Scoring((Term(Property("qed"), weight=0.0),)), "weight above 0"),
        (lambda: Scoring((Term(Property("qed")),), "harmonic"), "no mean 'harmonic'"),
        (lambda: Similarity((ASPIRIN, "c1cc")), "'c1cc' is no SMILES"),
        (lambda: HasScaffold("c1cc"), "'c1cc' is no SMILES"),
        (lambda: Near("c1cc", "qed", 1), "'c1cc' is no SMILES"),
        (lambda: Matches("[["), r"'\[\[' is no SMARTS"),
        (lambda: Count("Fl"), "element='Fl': give a symbol from H to Lr, as in F or Cl"),
        (lambda: Count("cl"), "element='cl': give a symbol"),
        (lambda: Isomer("C7h8"), "formula='C7h8': write elements with their counts"),
        (lambda: Isomer("C7H8Xx"), "element='Xx': give a symbol"),
        (lambda: molexp.score("D2", [ASPIRIN]), "no task 'D2'; it has AP, A2A, BACE1, EGFR"),
    ],
)
def test_what_cannot_be_a_score_is_one_clear_line(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


# ---- MolExp ---------------------------------------------------------------------------------------------------------


def test_molexp_has_four_tasks_of_two_to_four_targets():
    assert {task: len(targets) for task, targets in molexp.TARGETS.items()} == {
        "AP": 2,
        "A2A": 3,
        "BACE1": 3,
        "EGFR": 4,
    }


@pytest.mark.parametrize("task", molexp.TARGETS)
def test_the_reward_of_molexp_is_the_largest_similarity_of_folded_counts(task):
    assert molexp.score(task, molexp.TARGETS[task]) == [1] * len(molexp.TARGETS[task])
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    aspirin, *targets = (
        generator.GetCountFingerprint(Chem.MolFromSmiles(smiles)).GetNonzeroElements()
        for smiles in (ASPIRIN, *molexp.TARGETS[task])
    )
    assert molexp.score(task, [ASPIRIN]) == [pytest.approx(max(tanimoto(aspirin, target) for target in targets))]
