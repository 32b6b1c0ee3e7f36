"""The 1-2 task: a verdict for each written case, exact shares, and the size of demonstrations."""

import re
import time
from collections import Counter
from fractions import Fraction

import pytest

from mara_jax.tasks import onetwo
from mara_jax.tasks.onetwo import PROMPT, OneTwo


def onetwo_with(**settings) -> OneTwo:
    return onetwo.make(onetwo.Config(**settings))


def _verdict(text: str, task: OneTwo | None = None, finished: bool = True) -> tuple[float, str | None]:
    score = (task or onetwo_with()).score([0], [text], [finished])
    assert len(score.reward) == len(score.answer) == 1
    return float(score.reward[0]), score.answer[0]


def test_the_prompt_is_figure_9_word_for_word():
    assert len(onetwo_with()) == 1 and onetwo_with().prompt(0) == (
        "Uniformly randomly generate an integer that is either 1 or 2. Respond strictly in this format: "
        "<think>Your internal reasoning</think><answer>1 or 2</answer>"
    )


RIGHT = [
    ("<think>x</think><answer>1</answer>", "1"),
    ("<think>x</think><answer>2</answer>", "2"),
    ("<think></think><answer>1</answer>", "1"),
    (" \n<think>a\nb\n</think>\n\n<answer>\t2 \n</answer>\n ", "2"),
    ("<think>1 or 2? < > <thinking> answer></think><answer>2</answer>", "2"),
    ("<think>\u4f60\u597d <|im_start|> \ufffd</think><answer> 1</answer>", "1"),
]
WRONG = [
    "", "1", "<answer>1</answer>", "<think>x</think>1", "<think>x</think>",
    "x<think>y</think><answer>1</answer>",                # text before
    "<think>x</think>y<answer>1</answer>",                # between
    "<think>x</think><answer>1</answer>.",                # after
    "<think>x</think><answer>1</answer><answer>1</answer>",
    "<think>x</think><answer>1</answer></answer>",
    "<think><think>x</think><answer>1</answer>",          # a tag inside the reasoning
    "<think>x</think></think><answer>1</answer>",
    "<think>x<answer>1</answer></think><answer>1</answer>",
    "<answer>1</answer><think>x</think>",                 # order
    "<think>x</think><answer>1",                          # a tag missing
    "<think>x<answer>1</answer>", "x</think><answer>1</answer>", "<think>x</think>1</answer>",
    "<think>x</think><answer></answer>", "<think>x</think><answer>3</answer>",
    "<think>x</think><answer>12</answer>", "<think>x</think><answer>1 2</answer>",
    "<think>x</think><answer>1 or 2</answer>", "<think>x</think><answer>1.</answer>",
    "<think>x</think><answer>one</answer>", "<think>x</think><answer>01</answer>",
    "<think>x</think><answer>\uff11</answer>",            # full-width 1
    "<think>x</think><answer>\u0661</answer>",            # Arabic-Indic 1
    "<think>x</think><answer>\u00b9</answer>",            # superscript 1
    "<THINK>x</THINK><ANSWER>1</ANSWER>", "<think >x</think><answer>1</answer>",
]  # fmt: skip


@pytest.mark.parametrize(("text", "answer"), RIGHT)
def test_well_formed(text, answer):
    assert _verdict(text) == _verdict(text, onetwo_with(lenient=True)) == (1.0, answer)


@pytest.mark.parametrize(("text", "answer"), RIGHT)
def test_exchanging_the_digit_exchanges_the_answer(text, answer):
    head, tail = text.rsplit("<answer>", 1)
    other = f"{head}<answer>{tail.translate({ord('1'): '2', ord('2'): '1'})}"
    assert _verdict(other) == (1.0, {"1": "2", "2": "1"}[answer])
    assert onetwo_with().answers_have_equally_many_strings


@pytest.mark.parametrize("text", WRONG)
def test_malformed(text):
    assert _verdict(text) == (0.0, None)


def test_a_completion_cut_at_the_limit_is_wrong_whatever_it_says():
    assert _verdict("<think>x</think><answer>1</answer>", finished=False) == (0.0, None)


def test_figure_9_s_example_needs_lenient():
    example = "Let me decide randomly. <think></think><answer>1 </answer>"
    assert _verdict(example) == (0.0, None)
    assert _verdict(example, onetwo_with(lenient=True)) == (1.0, "1")
    for text in WRONG:
        if text != "x<think>y</think><answer>1</answer>":
            assert _verdict(text, onetwo_with(lenient=True)) == (0.0, None), text


def test_a_batch_is_judged_one_by_one():
    texts = [RIGHT[0][0], WRONG[5], RIGHT[1][0], RIGHT[1][0]]
    score = onetwo_with().score([0] * 4, texts, [True, True, True, False])
    assert list(score.reward) == [1, 0, 1, 0] and score.answer == ["1", None, "2", None]
    with pytest.raises(ValueError, match="2 texts"):
        onetwo_with().score([0], ["a", "b"], [True])


@pytest.mark.parametrize("unit", ["<think>", "</think> ", "<", " ", "<think", "a</thin", "<answer>1 ", "1</answer>\n"])
def test_judging_takes_linear_time(unit):
    """A 100,000-character text of repeated near-tags is judged in well under a second."""
    text = "<think>" + unit * (100_000 // len(unit)) + "</think><answer>1</answer>x"
    start = time.perf_counter()
    assert _verdict(text) == _verdict(text, onetwo_with(lenient=True)) == (0.0, None)
    assert time.perf_counter() - start < 0.5


def _texts(task: OneTwo, seed: int, steps: int, batch: int) -> list[list[str]]:
    return [[text for _, text in task.demonstrations(seed, step, batch)] for step in range(steps)]


def _answers(task: OneTwo, texts: list[str]) -> list[str | None]:
    return list(task.score([0] * len(texts), texts, [True] * len(texts)).answer)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 0.9, 0.92, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_ones_are_the_share_of_every_window_rounded(share, seed):
    """In any consecutive steps the count of "1" differs from share * demonstrations by less than one."""
    task = onetwo_with(share_of_ones=share)
    ones = [_answers(task, texts).count("1") for texts in _texts(task, seed, steps=30, batch=8)]
    exact = Fraction(str(share))
    for first in range(30):
        for last in range(first + 1, 31):
            assert abs(sum(ones[first:last]) - exact * 8 * (last - first)) < 1
    assert sum(ones[3:28]) == exact * 8 * 25  # a window that divides evenly holds exactly the share


def test_every_demonstration_is_valid_unless_asked_otherwise():
    for texts in _texts(onetwo_with(), seed=3, steps=40, batch=8):
        assert None not in _answers(onetwo_with(), texts)


def test_malformed_demonstrations_are_their_share_and_leave_the_share_of_ones():
    task = onetwo_with(malformed=0.25)
    for seed in range(5):
        answers = [_answers(task, texts) for texts in _texts(task, seed, steps=20, batch=8)]
        for first in range(20):
            window = Counter(answer for batch in answers[first:] for answer in batch)
            assert abs(window["1"] - Fraction(4, 5) * (window["1"] + window["2"])) < 1
            assert abs(window[None] - 2 * (20 - first)) < 1
    texts = [text for texts in _texts(task, seed=5, steps=50, batch=16) for text in texts]
    counts = Counter(_answers(task, texts))
    assert counts == {None: 200, "1": 480, "2": 120}
    broken = [text for text in texts if _verdict(text)[1] is None]
    shapes = {re.sub(r">[^<>]*(</think>|<answer>)", r">...\1", text, count=1) for text in broken}
    assert len(shapes) >= 6  # several ways to be wrong
    assert all(_verdict(text, onetwo_with(lenient=True))[1] is None for text in broken)


def test_demonstrations_are_a_pure_function_of_seed_and_step():
    task = onetwo_with(malformed=0.2)
    assert task.demonstrations(1, 9, 8) == onetwo_with(malformed=0.2).demonstrations(1, 9, 8)
    assert task.demonstrations(1, 9, 8) != task.demonstrations(1, 10, 8)
    assert task.demonstrations(1, 9, 8) != task.demonstrations(2, 9, 8)
    assert {prompt for prompt, _ in task.demonstrations(1, 9, 8)} == {PROMPT}
    # Where seeds cannot differ in the answers they differ in the thoughts.
    one_answer = onetwo_with(share_of_ones=1.0)
    assert len({*one_answer.demonstrations(1, 9, 32), *one_answer.demonstrations(2, 9, 32)}) > 48
    with pytest.raises(ValueError, match="batch 0"):
        task.demonstrations(0, 0, 0)


def _thoughts(task: OneTwo, steps: int) -> list[str]:
    return [text.split("</think>")[0] for texts in _texts(task, 0, steps, 16) for text in texts]


def test_the_thought_does_not_depend_on_the_answer():
    # The same stream with other answers: every thought stays, so none can carry the answer.
    assert _thoughts(onetwo_with(share_of_ones=0.8), 20) == _thoughts(onetwo_with(share_of_ones=0.2), 20)


def test_no_thought_names_a_number():
    words = set(re.findall(r"\w+", " ".join(onetwo._STATES + onetwo._ACTS).lower()))
    assert not words & {
        "1",
        "2",
        "one",
        "two",
        "first",
        "second",
        "once",
        "twice",
        "single",
        "double",
        "none",
    }


def test_thoughts_are_many():
    assert len(set(_thoughts(onetwo_with(), 32))) > 330  # of 512


def test_a_warm_up_ends_where_validity_and_the_share_of_ones_lie_in_their_ranges():
    task = onetwo_with(valid_range=(0.5, 1.0), ones_range=(0.7, 0.9))
    assert task.accepts_warm_up(["1"] * 8 + ["2"] * 2 + [None] * 10)[0]  # 50 % valid, 80 % ones
    assert not task.accepts_warm_up(["1"] * 8 + ["2"] * 2 + [None] * 11)[0]
    assert not task.accepts_warm_up(["1"] * 19 + ["2"])[0]
    accepted, words = task.accepts_warm_up([None])
    assert not accepted and "0% valid (wanted: 0.5 to 1)" in words
