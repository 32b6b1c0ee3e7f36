"""The task of digits in a range: verdicts by hand, and demonstrations that favour the lowest digit."""

import itertools

import pytest

from mara_jax.tasks import digits


def task(**settings) -> digits.Digits:
    return digits.make(digits.Config(**settings))


def test_ranges_are_all_pairs_of_digits_in_turn():
    pairs = [(low, high) for low, high in itertools.product(range(10), repeat=2) if low < high]
    declared = task(declared=True)
    for index in range(90):
        low, high = pairs[index % 45]
        assert f"from {low} to {high}." in declared.prompt(index)
        assert declared.answer_set(index) == tuple(str(digit) for digit in range(low, high + 1))
    assert len({declared.prompt(index) for index in range(90)}) == 90
    assert task().answer_set(3) is None and len(task(prompts=10**9)) == 10**9


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>1</answer>", "1"),
        (" <answer> 0 </answer>\n", "0"),
        ("<answer>2</answer>", None),  # prompt 0: from 0 to 1
        ("<answer>01</answer>", None),
        ("1", None),
        ("x <answer>1</answer>", None),
        ("<answer>\u0661</answer>", None),  # an Arabic-Indic 1
    ],
)
def test_verdicts(text, answer):
    score = task().score([0, 0], [text, text], [True, False])
    assert score.answer == [answer, None] and score.reward == [float(answer is not None), 0.0]


def test_demonstrations_are_valid_and_favour_the_lowest_digit():
    one = task(favour=0.5, prompts=45)
    pairs = [pair for step in range(100) for pair in one.demonstrations(3, step, 20)]
    index = {one.prompt(number): number for number in range(45)}
    score = one.score([index[prompt] for prompt, _ in pairs], [text for _, text in pairs], [True] * len(pairs))
    assert None not in score.answer
    assert one.demonstrations(3, 5, 20) == pairs[100:120] != one.demonstrations(4, 5, 20)
    # Half of them by choice, and of the others one in the number of digits: 1/2 + 1/2 mean(1 / size) = .662.
    expected = 0.5 + 0.5 * sum((10 - gap) / (gap + 1) for gap in range(1, 10)) / 45
    lows = [str(min(range(10), key=lambda d: f"from {d} to" not in prompt)) for prompt, _ in pairs]
    share = sum(low == answer for low, answer in zip(lows, score.answer, strict=True)) / len(pairs)
    assert abs(share - expected) < 4 * (0.25 / len(pairs)) ** 0.5
