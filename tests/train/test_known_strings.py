"""Masses of answers from listed strings, against sums over the policy's logits; and what is kept with a checkpoint."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_prior

from mara_jax.config import Algorithm, LanguageRun, Policy, Rollout
from mara_jax.core import method_rules
from mara_jax.core.scored import Numbers, Scored
from mara_jax.tasks.base import Score, Task
from mara_jax.train import groups, host_state, known_strings, optim, preflight, step
from mara_jax.train.known_strings import KnownStrings
from mara_jax.train.replay import Remembered
from mara_jax.train.scoring import AnswerIndices, GroupScores
from mara_jax.train.setup import Setup
from mara_jax.train.state import BySampler

BETA, WIDTH, GOOD = 0.25, 6, np.float32(0.5)
RUN = LanguageRun(
    algorithm=Algorithm(method="reinvent", transform="mara_answers", beta=BETA, threshold=0.5),
    policy=Policy(chat=False),
    rollout=Rollout(group_size=4, max_new_tokens=WIDTH),
)


class Reversed(Task):
    """A string and the one read backwards are one answer; "CN" lists, beside itself, what the policy cannot give."""

    keeps_state = lists_strings = True
    asked: int = 0

    def __len__(self):
        return 1

    def prompt(self, index):
        return ""

    def score(self, prompt_index, texts, finished):
        return Score([1.0] * len(texts), [min(text, text[::-1]) for text in texts])

    def other_strings(self, index, text):
        self.asked += 1
        return [text[::-1], *(["CCCCCCC", "C[NH]"] if text == "CN" else [])]

    def state(self):
        return {"asked": self.asked}

    def restore(self, state):
        self.asked = state["asked"]


@pytest.fixture(scope="module")
def model():
    return small_prior.random_policy()


def setup_of(model, run=RUN) -> Setup:
    policy, params = model
    setup = Setup(run, Reversed(), policy, params, [[0]], optim.make(run.optimiser))
    return setup._replace(known_strings=KnownStrings(run.algorithm))


def rollout_of(policy, texts):
    """Completions of the empty prompt, one group, as sampling gives them."""
    tokens, lengths = np.zeros((1, len(texts), WIDTH), np.int32), np.zeros((1, len(texts)), np.int32)
    for place, ids in enumerate(policy.tokenizer(texts, add_special_tokens=False).input_ids):
        tokens[0, place, : len(ids)], lengths[0, place] = ids, len(ids) + 1
    prompt = {"prompt_tokens": np.zeros((1, 1), np.int32), "prompt_lengths": np.ones(1, np.int32)}
    return SimpleNamespace(tokens=tokens, lengths=lengths, text=[list(texts)], **prompt)


def scores_of(rewards, answers) -> GroupScores:
    return GroupScores(np.array([rewards], np.float32), [list(answers)], {})


def logp_of(model, text) -> float:
    """log ref(text and its end) from the logits."""
    policy, params = model
    ids = [0, *policy.tokenizer(text, add_special_tokens=False).input_ids, 0]
    logits = policy.logits(params, jnp.array([ids]), jnp.array([len(ids)]))
    logp = np.asarray(jax.nn.log_softmax(logits[0]))
    return float(sum(logp[place, token] for place, token in enumerate(ids[1:])))


def test_a_mass_is_the_sum_over_the_different_strings_that_are_known(model):
    """Two steps: the second brings one known string and one new one of the same answer."""
    setup = setup_of(model)
    policy = setup.policy
    completions = rollout_of(policy, ["CN", "CN", "CCO", "OO"])
    scores = scores_of([1.0, 1.0, 0.75, 0.4], ["CN", "CN", "CCO", "OO"])
    (masses,) = known_strings.log_masses(setup, completions, np.array([0]), scores, GOOD)
    want = {
        "CN": np.logaddexp(logp_of(model, "CN"), logp_of(model, "NC")) + 1 / BETA,
        "CCO": np.logaddexp(logp_of(model, "CCO"), logp_of(model, "OCC")) + 0.75 / BETA,
    }
    assert masses == pytest.approx(want, abs=2e-5)  # "OO" is not good; seven carbons and brackets cannot be drawn
    completions = rollout_of(policy, ["NC", "CFC", "F", "F"])
    (masses,) = known_strings.log_masses(
        setup, completions, np.array([0]), scores_of([1.0] * 4, ["CN", "CN", "F", "F"]), GOOD
    )
    want["CN"] = np.logaddexp(want["CN"], logp_of(model, "CFC") + 1 / BETA)
    assert masses == pytest.approx(want | {"F": logp_of(model, "F") + 1 / BETA}, abs=2e-5)


def test_only_what_is_good_in_a_step_adds_to_masses_replayed_completions_too(model):
    """The threshold moves from 1 to .7: the second step draws one of the first again and replays the other."""
    setup = setup_of(model)
    ethanol, fluorine = rollout_of(setup.policy, ["CCO", "F"]), rollout_of(setup.policy, ["F", "F"])
    scores = scores_of([0.75, 0.875], ["CCO", "F"])
    assert known_strings.log_masses(setup, ethanol, np.array([0]), scores, np.float32(1)) == [{}]
    tokens = tuple(ethanol.tokens[0, 0, :4].tolist())
    replayed = [[Remembered(tokens, 0.75, "CCO"), Remembered((1, 0), 0.5, "O"), Remembered((1, 0), 1.0, None)]]
    scores = scores_of([0.875, 0.875], ["F", "F"])
    (masses,) = known_strings.log_masses(setup, fluorine, np.array([0]), scores, np.float32(0.7), replayed)
    both = np.logaddexp(logp_of(model, "CCO"), logp_of(model, "OCC"))
    want = {"F": logp_of(model, "F") + 0.875 / BETA, "CCO": both + 0.75 / BETA}
    assert masses == pytest.approx(want, abs=2e-5)


def test_a_strings_number_depends_on_no_other_and_is_computed_in_rows_as_long_as_it_needs(model, monkeypatch):
    """Chains of 30, 1, 39 and 15 carbons with their ends, in groups of two; a completion has 40 tokens at most."""
    setup, widths = setup_of(model), []
    completions = SimpleNamespace(
        tokens=np.zeros((1, 2, 40), np.int32), prompt_tokens=np.zeros((1, 1), np.int32),
        prompt_lengths=np.ones(1, np.int32),
    )  # fmt: skip
    carbon, end = setup.policy.tokenizer("C").input_ids[0], 0
    strings = [(*[carbon] * count, end) for count in (30, 1, 39, 15)]
    compute = groups.sequence_logp
    monkeypatch.setattr(groups, "sequence_logp", lambda *args: (widths.append(args[-2].shape[-1]), compute(*args))[1])
    together = known_strings.ref_logp(setup, completions, 0, strings)
    assert widths == [16, 32, 40]
    alone = [known_strings.ref_logp(setup, completions, 0, [one])[0] for one in strings]
    assert together == alone
    wide = known_strings._ref_logp(setup, completions, 0, strings[:2], 40)
    np.testing.assert_allclose(together[:2], wide, rtol=1e-6)


def test_the_forward_kls_masses_have_no_rewards(model):
    setup = setup_of(model, dataclasses.replace(RUN, algorithm=dataclasses.replace(RUN.algorithm, kl="forward")))
    masses = known_strings.log_masses(
        setup, rollout_of(setup.policy, ["F"]), np.array([0]), scores_of([1.0], ["F"]), GOOD
    )
    assert masses == [pytest.approx({"F": logp_of(model, "F")}, abs=2e-5)]


def rewards_after(scores: GroupScores, masses: dict[str, float], threshold: float) -> np.ndarray:
    """[1, g] rewards of a group after MARA over answers with these log-masses."""
    index = AnswerIndices(1).of(scores.answer)
    log_mass = known_strings.by_index([masses], scores, index)
    reward, answer, zero = jnp.asarray(scores.reward), jnp.asarray(index), jnp.zeros((*index.shape, 1))
    batch = SimpleNamespace(
        ref_reward=None, ref_answer=None, log_mass=jnp.asarray(log_mass), reward=reward, answer=answer
    )
    numbers, algorithm = Numbers(BETA, threshold), method_rules.resolved(RUN.algorithm)
    known = step._masses(BySampler(batch), numbers, algorithm)
    scored = Scored(zero, zero + 1, zero[..., 0], reward, answer, known.log_mass)
    return np.asarray(method_rules.transformed(algorithm, scored, None, numbers)[0].reward)


def test_the_updates_bonus_is_beta_times_the_gap_to_the_largest_mass_of_the_group():
    """By hand: masses -1 and -3, an answer that is not good, and a completion without one."""
    scores = scores_of([1.0, 1.0, 0.2, 0.0], ["a", "b", "c", None])
    after = rewards_after(scores, {"a": -1.0, "b": -3.0, "elsewhere": 9.0}, 0.5)
    np.testing.assert_allclose(after, [[1, 1 + BETA * 2, 0.2, 0]], rtol=1e-6)


def test_an_answer_that_is_no_longer_good_is_no_anchor():
    """c was good before (a scaffold filter holds it back by now); d is below the threshold to which the floor moved."""
    scores = scores_of([1.0, 1.0, 0.0, 0.6, 0.0], ["a", "b", "c", "d", "a"])
    after = rewards_after(scores, {"a": -1.0, "b": -3.0, "c": 5.0, "d": 7.0}, 0.7)
    np.testing.assert_allclose(after, [[1, 1 + BETA * 2, 0, 0.6, 0]], rtol=1e-6)
    held_back = scores_of([0.0, 0.0], ["a", "b"])
    np.testing.assert_array_equal(rewards_after(held_back, {"a": -1.0, "b": -3.0}, 0.7), [[0, 0]])


def test_what_is_kept_comes_back_with_its_checkpoint(model, tmp_path):
    setup, other = setup_of(model), setup_of(model)
    completions, scores = rollout_of(setup.policy, ["CN", "F"]), scores_of([1.0, 1.0], ["CN", "F"])
    known_strings.log_masses(setup, completions, np.array([0]), scores, GOOD)
    host_state.save(setup, tmp_path, 2, [])
    host_state.save(setup, tmp_path, 4, [2])
    host_state.save(setup, tmp_path, 6, [4])
    assert sorted(path.name for path in (tmp_path / host_state.FOLDER).iterdir()) == [
        "step_000004.json",
        "step_000006.json",
    ]
    host_state.restore(other, tmp_path, 6)
    assert (other.task.asked, other.known_strings.log_mass) == (2, setup.known_strings.log_mass)
    assert other.known_strings.state() == setup.known_strings.state()
    # What was counted is not counted again.
    known_strings.log_masses(other, completions, np.array([0]), scores, GOOD)
    assert other.known_strings.log_mass == setup.known_strings.log_mass and other.task.asked == 2


def test_a_missing_or_damaged_file_is_refused_in_one_line(model, tmp_path):
    with pytest.raises(
        ValueError, match=r"step_000006.json, which belongs to the checkpoint of step 6, cannot be read"
    ):
        host_state.restore(setup_of(model), tmp_path, 6)
    (tmp_path / host_state.FOLDER).mkdir()
    (tmp_path / host_state.FOLDER / "step_000006.json").write_text(json.dumps({"task": {"asked": 1}}))
    with pytest.raises(ValueError, match="checkpoints/6 to resume from an earlier one"):
        host_state.restore(setup_of(model), tmp_path, 6)


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        ("evaluation", {"every": 1}, "evaluation.every=0"),
        ("warmup", {"max_steps": 9}, "warmup.max_steps=0"),
        ("rollout", {"equal_groups": "redraw"}, "rollout.equal_groups=keep"),
        ("reference", {"drawn": "before_training"}, "reference.drawn=auto"),
        ("algorithm", {"method": "vanilla", "transform": "none", "kl": "forward"}, "algorithm.estimator=ratio"),
        ("population", {"seeds": 2}, "start a run for each member"),
    ],
)
def test_what_would_ask_for_scores_again_is_refused(section, fields, words):
    run = dataclasses.replace(RUN, **{section: dataclasses.replace(getattr(RUN, section), **fields)})
    with pytest.raises(ValueError, match=words) as caught:
        preflight.check_members(run, Reversed())
    assert "\n" not in str(caught.value)
    preflight.check_members(RUN, Reversed())


def test_masses_from_samples_are_refused_where_scores_are_counted():
    class Counted(Reversed):
        lists_strings = False

    with pytest.raises(ValueError, match=r"use another algorithm\.method"):
        preflight.check_members(RUN, Counted())
