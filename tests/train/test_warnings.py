"""Warnings of what keeps a run from learning: after three steps in a row, once, and not of a run that succeeds."""

import dataclasses

import numpy as np
import pytest

from mara_jax.config import Algorithm, LanguageRun, Policy, Rollout
from mara_jax.train.warnings import Warnings

RUN = LanguageRun(steps=10, algorithm=Algorithm(method="vanilla"), rollout=Rollout(group_size=4, max_new_tokens=6))
MIXED = [[1.0, 0, 0, 1], [0, 1, 0, 0]]  # groups that have something to learn from
NONE, ALL = [[0.0] * 4] * 2, [[1.0] * 4] * 2
CUT, REWARD, TEXT, ONE = "are cut at rollout.max_new_tokens=6", "preferred to another", "same text", "has the reward 1,"


class Answers:
    """Prompts with one right answer, or with two."""

    def __init__(self, answers):
        self.answers = answers

    def answer_set(self, index):
        return self.answers


def said(steps, run=RUN, answers=None) -> list[tuple[int, str]]:
    """(step, line) of each warning in a run of such (reward_pg, share cut, share of the commonest text)."""
    watch, lines = Warnings(run, Answers(answers)), []
    for number, (reward, cut, commonest) in enumerate(steps, 1):
        row = {"step": number, "completions/truncated": cut, "completions/commonest": commonest}
        lines += [(number, line) for line in watch.of_step(row, np.array([0, 1]), np.array(reward))]
    return lines


FINE = (MIXED, 0.1, 0.4)


@pytest.mark.parametrize(
    ("step", "words"),
    [((MIXED, 0.6, 0.4), CUT), ((NONE, 0.1, 0.4), REWARD), ((NONE[:1] * 2 + MIXED[:1], 0, 0.4), REWARD),
     ((MIXED, 0.1, 0.95), TEXT), ((ALL, 0.1, 0.4), ONE)],
)  # fmt: skip
def test_each_is_said_once_after_three_steps_in_a_row(step, words):
    ((number, line),) = said([step] * 8)
    assert number == 3 and words in line and line.startswith("WARNING: ") and "\n" not in line
    assert said([step, step, FINE] * 3) == []


@pytest.mark.parametrize(
    ("dtype", "gap", "alarm"),
    [
        ("float32", 4e-3, True), ("float32", -4e-3, True), ("float32", 1e-3, False), ("float32", np.nan, False),
        ("bfloat16", 0.1, False), ("bfloat16", 1.0, True), ("float64", 1e-6, True),
    ],
)  # fmt: skip
def test_a_sampler_that_is_another_policy_is_told_at_once(dtype, gap, alarm):
    """Of completions of 20 tokens; a limit is of one token."""
    run = dataclasses.replace(RUN, policy=Policy(compute_dtype=dtype))
    watch, lines = Warnings(run, Answers(None)), []
    for number in (1, 2, 3):
        row = {"step": number, "completions/truncated": 0.0, "completions/commonest": 0.2}
        row |= {"sampler/logp_gap": gap, "length/mean": 20.0}
        lines += watch.of_step(row, np.array([0, 1]), np.array(MIXED))
    assert len(lines) == alarm
    if alarm:
        assert lines[0].startswith("WARNING: step 1: ") and f"differ by {gap / 20:.1e} nats a token" in lines[0]


def test_a_shorter_run_is_told_at_its_end():
    assert [number for number, _ in said([(NONE, 1.0, 0.4)] * 2, dataclasses.replace(RUN, steps=2))] == [2, 2]


@pytest.mark.parametrize(
    ("steps", "run", "answers"),
    [
        ([FINE] * 3 + [(ALL, 0.0, 0.8)] * 5, RUN, None),  # it has learned: all completions are good
        ([FINE] * 3 + [(ALL, 0.0, 1.0)] * 5, RUN, None),  # the one right answer is not a collapse
        ([FINE] * 3 + [(ALL, 0.0, 1.0)] * 5, RUN, ("4",)),
        ([(ALL, 0.0, 0.5)] * 5, dataclasses.replace(RUN, algorithm=Algorithm()), ("1", "2")),  # MARA parts good answers
        ([([[1.0, 1, 1, 1], [0, 0, 0, 0]], 0.5, 0.5)] * 5, RUN, None),  # half is not most
        ([([[0.0]], 0.0, 1.0)] * 5, dataclasses.replace(RUN, rollout=Rollout(group_size=1)), None),
    ],
)
def test_nothing_is_said_of_a_run_that_learns_or_has_learned(steps, run, answers):
    assert said(steps, run, answers) == []


def test_all_on_one_of_several_answers_is_a_collapse_however_good():
    ((number, line),) = said([FINE] * 3 + [(ALL, 0.0, 1.0)] * 5, RUN, ("1", "2"))
    assert number == 6 and "set algorithm.method=mara, raise algorithm.beta=0.1" in line


@pytest.mark.parametrize(
    ("weight", "algorithm", "words"),
    [
        (4e4, Algorithm(kl="forward", anchor="string"), "e^11 in the forward KL"),  # .1 x 4e4 / 4 is over 10 x 1
        (390, Algorithm(kl="forward", anchor="string"), None),
        (410, Algorithm(kl="forward", anchor="string"), "algorithm.kl=reverse, or algorithm.anchor=answer"),
        (410, Algorithm(kl="forward"), "set algorithm.kl=reverse"),
        (410, Algorithm(kl="forward", method="vanilla", estimator="ratio"), None),  # the cure would be another one
        (None, Algorithm(kl="forward", anchor="string"), None),  # no update
    ],
)
def test_a_forward_kl_that_leaves_nothing_of_the_rewards_is_told_at_once(weight, algorithm, words):
    watch, lines = Warnings(dataclasses.replace(RUN, algorithm=algorithm), Answers(None)), []
    for number in (1, 2):
        row = {"step": number, "completions/truncated": 0.0, "completions/commonest": 0.2}
        row |= {"objective/weights/largest_log": weight and float(np.log(weight))}
        lines += watch.of_step(row, np.array([0, 1]), np.array(MIXED))
    assert len(lines) == (words is not None)
    assert words is None or words in lines[0]
    assert not lines or ("anchor=answer" in lines[0]) == (algorithm.anchor == "string")
