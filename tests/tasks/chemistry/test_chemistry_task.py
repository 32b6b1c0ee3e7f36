"""The chemistry task: rewards, answers, columns and the budget, and that its state goes on exactly."""

import json

import pytest
from rdkit import DataStructs

from mara_jax.tasks import checked, make
from mara_jax.tasks.base import TaskError
from mara_jax.tasks.chemistry import molecules, molexp, oracles, task
from mara_jax.tasks.chemistry.designs import DESIGNS, LIGANDS
from mara_jax.tasks.chemistry.modifiers import ReverseSigmoid

BENZENE, TOLUENE, PHENOL, ETHANOL = "c1ccccc1", "Cc1ccccc1", "Oc1ccccc1", "CCO"


def scored(made, smiles, finished=None):
    return checked(made).score([0] * len(smiles), smiles, [True] * len(smiles) if finished is None else finished)


def qed(smiles):
    return oracles.score("qed", [smiles])[0]


def test_rewards_answers_and_columns_of_a_batch():
    """Ethanol twice, in two writings; an open ring; benzene cut at the length limit."""
    made = task.make(task.Config(hit=0.45))
    batch = ["CCO", "C1CC", "OCC", TOLUENE, BENZENE]
    score = scored(made, batch, [True, True, True, True, False])
    assert score.answer == ["CCO", None, "CCO", TOLUENE, None]
    assert score.reward.tolist() == pytest.approx([qed("CCO"), 0, qed("CCO"), qed(TOLUENE), 0])
    columns = {name: values.tolist() for name, values in score.columns.items()}
    assert columns["unique"] == [1, 0, 0, 1, 0] and columns["filtered"] == [0] * 5
    assert columns["oracle_calls"] == [2] * 5 and columns["hits"] == [1] * 5 and columns["circles"] == [1] * 5
    assert columns["top10"] == pytest.approx([(qed("CCO") + qed(TOLUENE)) / 2] * 5)
    assert (made.calls.invalid, made.calls.repeats) == (2, 1)
    assert len(made) == 1 and made.prompt(0) == ""


def test_answers_may_be_scaffolds():
    made = task.make(task.Config(answer="scaffold"))
    assert scored(made, [TOLUENE, PHENOL, ETHANOL, "CC("]).answer == [BENZENE, BENZENE, "no ring", None]


def test_a_molecule_has_one_scaffold_in_whichever_way_it_is_written():
    """RDKit's own keeps, of a mark at a double bond that is no stereocentre, an open valence: [CH]=C1CCCCC1."""
    made = task.make(task.Config(answer="scaffold", bucket_size=1, bucket_score=0.01))
    score = scored(made, ["O[C@H]=C1CCCCC1", "C1(=CO)CCCCC1", "NC=C1CCCCC1"])
    assert score.answer == ["C=C1CCCCC1"] * 3
    assert made.calls.calls == 2 and score.columns["filtered"].tolist() == [0, 1, 1]


def test_the_run_is_over_with_the_last_call_of_the_budget():
    made = task.make(task.Config(budget=3))
    assert scored(made, [ETHANOL, BENZENE]).reward.min() > 0 and not made.ended()
    score = scored(made, ["OCC", TOLUENE, PHENOL])
    assert score.reward.tolist() == pytest.approx([qed("CCO"), qed(TOLUENE), 0])  # phenol has no score
    assert made.calls.calls == 3 and made.ended().startswith("the budget of 3 oracle calls is used up")


def test_the_scaffold_filter_takes_the_reward_and_leaves_the_score():
    """A bucket of one: the second molecule of benzene's scaffold, and every repeat, has no reward."""
    made = task.make(task.Config(bucket_size=1, bucket_score=0.44))
    score = scored(made, [BENZENE, TOLUENE, BENZENE, ETHANOL, ETHANOL])
    assert (qed(BENZENE) > 0.44) and (qed(TOLUENE) > 0.44) and (qed(ETHANOL) < 0.44)
    assert score.columns["filtered"].tolist() == [0, 1, 1, 0, 0]
    assert score.reward.tolist() == pytest.approx([qed(BENZENE), 0, 0, qed(ETHANOL), qed(ETHANOL)])
    assert score.answer[1] == TOLUENE and made.calls.series[TOLUENE] == qed(TOLUENE)


def test_state_goes_on_exactly():
    cfg = task.Config(bucket_size=1, hit=0.4, budget=5)
    whole, before, after = (task.make(cfg) for _ in range(3))
    first, second = [TOLUENE, ETHANOL, "C("], [PHENOL, "OCC", "CCN", "CCCC", "CCCCC"]
    scored(whole, first)
    scored(before, first)
    after.restore(json.loads(json.dumps(before.state())))
    want, got = scored(whole, second), scored(after, second)
    assert got.reward.tolist() == want.reward.tolist() and got.answer == want.answer
    assert {k: v.tolist() for k, v in got.columns.items()} == {k: v.tolist() for k, v in want.columns.items()}
    assert after.state() == whole.state() and after.ended() == whole.ended() != ""
    # Had the filter been forgotten, phenol would be rewarded.
    assert got.columns["filtered"][0] == 1


def test_the_state_of_another_oracle_or_filter_is_refused():
    state = task.make(task.Config()).state()
    with pytest.raises(TaskError, match="of the oracle 'qed'"):
        task.make(task.Config(oracle="median1")).restore(state)
    with pytest.raises(TaskError, match="bucket_size"):
        task.make(task.Config(bucket_size=2)).restore(state)


def test_oracles_by_name(tmp_path):
    own = tmp_path / "own_oracle.py"
    own.write_text("def length(smiles):\n    return [len(one) / 100 for one in smiles]\n")
    made = task.make(task.Config(oracle=f"{own}:length"))
    assert scored(made, [ETHANOL, BENZENE]).reward.tolist() == pytest.approx([0.03, 0.08])
    assert made.code_files() == [str(own)] and made.max_reward is None
    of_molexp = task.make(task.Config(oracle="molexp:AP"))
    assert scored(of_molexp, [TOLUENE]).reward.tolist() == pytest.approx(molexp.score("AP", [TOLUENE]))
    program = task.make(task.Config(oracle="program:awk '{print length($0) / 10}'"))
    assert scored(program, [ETHANOL]).reward.tolist() == pytest.approx([0.3])
    assert program.code_files() == [] and of_molexp.max_reward == 1.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"oracle": "quality"}, "task.oracle='quality' is unknown"),
        ({"oracle": "molexp:XY"}, "MolExp has no task 'XY'"),
        ({"oracle": "nowhere.py:f"}, "nowhere.py does not exist"),
        ({"oracle": "program:"}, "task.oracle='program:' names no program: write program:COMMAND"),
        ({"oracle": "program:awk '{print"}, "task.oracle=.*: no closing quotation"),
    ],
)
def test_what_is_no_oracle_is_refused_in_one_line(fields, words):
    with pytest.raises((ValueError, OSError), match=words) as caught:
        task.make(task.Config(**fields))
    assert "\n" not in str(caught.value)


def test_a_failing_oracle_stops_or_scores_zero(tmp_path):
    own = tmp_path / "failing_oracle.py"
    own.write_text(
        "def f(smiles):\n    if 'CCO' in smiles:\n        raise KeyError('x')\n    return [1e400] * len(smiles)\n"
    )
    made = task.make(task.Config(oracle=f"{own}:f"))
    with pytest.raises(TaskError, match="the oracle fails at CCO: KeyError"):
        scored(made, [ETHANOL])
    with pytest.raises(TaskError, match="no finite number"):
        scored(made, [BENZENE])
    forgiving = task.make(task.Config(oracle=f"{own}:f", failure="zero"))
    assert scored(forgiving, [ETHANOL, BENZENE]).reward.tolist() == [0, 0]
    assert forgiving.calls.failed == ["CCO", BENZENE] and forgiving.calls.calls == 2


@pytest.mark.slow
def test_a_score_in_a_worker_process():
    made = task.make(task.Config(processes=1))
    try:
        assert scored(made, [ETHANOL]).reward.tolist() == pytest.approx([qed("CCO")])
    finally:
        made.close()


def test_other_strings_are_the_same_molecule_and_a_function_of_it():
    made = task.make(task.Config(randomised=16))
    aspirin = ("CC(=O)Oc1ccccc1C(=O)O", "OC(=O)c1ccccc1OC(C)=O")
    first, second = (made.other_strings(0, smiles) for smiles in aspirin)
    assert first == second and len(set(first)) == 16
    assert set(scored(made, first).answer) == {aspirin[0]} and made.calls.calls == 1
    assert made.other_strings(0, "C") == ["C"]
    assert task.make(task.Config(seed=1)).other_strings(0, aspirin[0]) != first


def test_designs_ask_for_few_donors_and_an_amide():
    paracetamol, glycerol, lactam = "CC(=O)Nc1ccc(O)cc1", "OCC(O)C(O)C(O)CO", "O=C1CCCCN1c1ccc(OCCC)cc1"
    amide = "CCCN(C)C(=O)c1ccc(OC)cc1"
    assert [score > 0 for score in DESIGNS["synth"]([amide, glycerol, lactam])] == [True, False, True]
    assert [score > 0 for score in DESIGNS["amide"]([amide, glycerol, lactam])] == [True, False, False]
    assert DESIGNS["synth"]([paracetamol]) == [0]  # lighter than 200


def test_designs_ask_for_likeness_to_a_ligand():
    """By hand: a weighted geometric mean, in which likeness has four parts of nine, and is full from .6 on."""
    smiles = [LIGANDS["haloperidol"], "O=C(c1ccc(F)cc1)C1CCN(Cc2ccccc2)CC1"]
    for text, score in zip(smiles, DESIGNS["synth"](smiles), strict=True):
        one = molecules.parse(text)
        assert one is not None
        counts = [molecules.parse(other).fingerprint("fcfp4") for other in LIGANDS.values()]
        likeness = max(DataStructs.TanimotoSimilarity(one.fingerprint("fcfp4"), count) for count in counts)
        qed, easy = one.property("qed"), ReverseSigmoid(2.0, 5.0)(one.property("sa"))
        assert score == pytest.approx((min(likeness / 0.6, 1) ** 4 * qed**2 * easy) ** (1 / 9), abs=1e-12)
    assert 0.2 < likeness < 0.6


def test_make_finds_the_task_of_a_run():
    from mara_jax.config import LanguageRun

    assert make(LanguageRun(task=task.Config())).name == "chemistry"
