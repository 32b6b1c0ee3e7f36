"""The datasets of reasoning-gym: prompts, scores and answers by hand, and every dataset that is installed."""

import json
import pathlib

import numpy as np
import pytest

from mara_jax.tasks import TaskError
from mara_jax.tasks import reasoning_gym as gym
from mara_jax.tasks.checked import checked

factory = pytest.importorskip("reasoning_gym.factory")

NAMES = sorted(set(factory.DATASETS) - {"composite"})
# What the package's own scorers do not do (0.1.25): these entries have no answer, but a scorer, ...
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
# ... and this one gives full marks to any text but "True" where the answer is False.
GIVEN_AWAY = {"game_of_life_halting"}
# Modules that evaluate text, nine of them what they score.
EVALUATING = {
    "basic_arithmetic", "binary_matrix", "bitwise_arithmetic", "codeio", "countdown", "intermediate_integration",
    "n_queens", "number_sorting", "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix",
    "string_insertion",
}  # fmt: skip


def task(**fields):
    return checked(gym.make(gym.Config(**{"datasets": "chain_sum", "size": 50} | fields)))


def scored(one, index, texts):
    score = one.score([index] * len(texts), texts, [True] * len(texts))
    columns = {name: np.asarray(column).tolist() for name, column in score.columns.items() if any(column)}
    return np.asarray(score.reward).tolist(), score.answer, columns


def test_a_sum_by_hand():
    one = task(options="min_terms=2,max_terms=2,min_digits=1,max_digits=1", instruction="Answer in tags.", seed=3)
    text, instruction = one.prompt(7).split("\n\n")
    total = eval(text.split(": ")[1].removesuffix(" =").removesuffix("="))  # "State the final answer to ...: 4 + 5 ="
    assert instruction == "Answer in tags." and len(one) == 50
    texts = [f"<answer> {total} </answer>", f"It is {total}.", f"<answer>0</answer> no: <answer>\n{total}</answer>"]
    assert scored(one, 7, texts) == ([1, 0, 1], [str(total), None, str(total)], {})
    assert one.prompt(7) == task(options="min_terms=2, max_terms=2, min_digits=1, max_digits=1",
                                 instruction="Answer in tags.", seed=3).prompt(7)  # fmt: skip
    other = task(seed=4)
    assert not {one.prompt(number) for number in range(50)} & {other.prompt(number) for number in range(50)}


def test_datasets_take_turns_and_have_options_of_their_own():
    one = task(
        datasets="chain_sum, spell_backward", options="chain_sum.min_terms=4,chain_sum.max_terms=4", answer_tag=""
    )
    assert len(one) == 100
    assert all(one.prompt(number).count(" + ") + one.prompt(number).count(" - ") == 3 for number in (0, 2, 98))
    assert all("Spell this word backward" in one.prompt(number) for number in (1, 3, 99))
    pairs = one.demonstrations(1, 2, 8)
    assert len(pairs) == 8 and pairs == one.demonstrations(1, 2, 8) != one.demonstrations(1, 3, 8)
    by_prompt = {one.prompt(number): number for number in range(100)}
    assert all(scored(one, by_prompt[prompt], [text])[0] == [1] for prompt, text in pairs)


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        ("7", "7"), ("7.00", "7"), ("+7", "7"), ("-0.50", "-0.5"), ("1e3", "1000"), ("1e999", "1e999"), ("nan", "nan"),
        ("[1,  2]", "[1,2]"), ('{"a": [1]}', '{"a":[1]}'), ("A  B\n C", "A B C"), ("-0", "0"),
    ],
)  # fmt: skip
def test_answers_have_one_spelling(text, spelling):
    assert gym.spelt(text) == spelling


@pytest.mark.parametrize(
    ("text", "harmless"),
    [
        ("3 + 4*(5 - 2)", True), ("[1, 2]", True), ("['a', 'b']", True), ("sqrt(2)*x**2 + C", True), ("so: 7", True),
        ("__import__('os').system('id')", False), ("(3).__class__", False), ("exec('x')", False), ("a! + f(2)", False),
        ("sqrt('__import__(chr(111))')", False), ("(lambda: 1)()", False), ("[f(x) for x in (1,)]", False),
        ("sqrt(open)(1)", False), ("f'{open(1)}'", False), ("(" * 9999, False),
    ],
)  # fmt: skip
def test_what_would_run_is_told_from_what_would_not(text, harmless):
    assert gym.is_harmless(text) is harmless


def test_answers_are_not_run(tmp_path):
    """Scorers of these evaluate what they are given: as planted, it would write a file."""
    names = ("spiral_matrix", "countdown", "simple_integration", "polynomial_multiplication")
    one = task(datasets=",".join(names), answer_tag="")
    for index in range(len(names)):
        rewards, _, columns = scored(one, index, [f"open({str(tmp_path / names[index])!r}, 'w').close()"])
        assert rewards == [0] and columns == {"refused": [1]}
        assert scored(one, index, [one.task._said(gym.solution, index)])[::2] == ([1], {})
    source = gym.Source("countdown", "{}", 0, 50)
    gym._dataset(source).score_answer(f"open({str(tmp_path / 'planted')!r}, 'w').close()", gym._entry(source, 0))
    assert [path.name for path in pathlib.Path(tmp_path).iterdir()] == ["planted"]


def test_a_scorer_that_raises_gives_nothing_and_is_counted():
    one = task(datasets="prime_factorization", answer_tag="")
    assert scored(one, 0, ["no number"]) == ([0], ["no number"], {"raised": [1]})


@pytest.mark.slow
def test_a_scorer_that_hangs_gives_nothing_and_is_counted():
    one = task(datasets="countdown", answer_tag="", time_limit=10.0)
    assert scored(one, 0, ["9**9**9**9"]) == ([0], ["9**9**9**9"], {"failed": [1]})
    assert scored(one, 0, ["1"])[2] == {}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"datasets": ""}, "task.datasets is empty: set --config.task.datasets=chain_sum, or several"),
        ({"datasets": "chain_sums"}, "no dataset 'chain_sums', which task.datasets names; near it are chain_sum, "),
        ({"datasets": "?"}, "no dataset '?', which task.datasets names; it has ab, acre, "),
        ({"datasets": "lcm,lcm"}, "task.datasets='lcm,lcm' names a dataset twice"),
        ({"datasets": "composite"}, "name its parts, as in task.datasets=chain_sum,lcm; they take turns"),
        ({"options": "terms=2"}, "task.options: chain_sum has no option 'terms'; it has min_terms=2, max_terms=6, "),
        ({"options": "size=2"}, "task.options: 'size' of chain_sum is task.size"),
        ({"options": "min_terms"}, "'min_terms' is not of the form NAME=VALUE or DATASET.NAME=VALUE: min_terms=2"),
        ({"options": "lcm.min_numbers=2"}, "'lcm.min_numbers=2' is not of the form NAME=VALUE or DATASET.NAME=VALUE"),
        (
            {"options": "min_terms=9"},
            "task.options: chain_sum refuses {'min_terms': 9}: max_terms must be",
        ),
        ({"options": "min_terms=two"}, "task.options: chain_sum refuses {'min_terms': 'two'}: '>' not supported"),
    ],
)
def test_settings_that_cannot_be_are_one_line(fields, words):
    with pytest.raises(TaskError) as caught:
        task(**fields)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(gym.sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(TaskError, match=r'reasoning-gym is not installed \(.*\): pip install "mara_jax\[reasoning\]"'):
        gym._dataset.__wrapped__(gym.Source("lcm", "{}", 0, 1))


@pytest.mark.slow
def test_every_dataset_makes_prompts_and_scores_its_own_answers():
    one = gym.make(gym.Config(datasets=",".join(NAMES), size=9, answer_tag=""))
    again = gym.make(gym.Config(datasets=",".join(NAMES), size=9, answer_tag=""))
    count, unlike = len(NAMES), []
    for index in reversed(range(len(one.sources) * 3)):  # another process, other entries before it: the same question
        unlike += [NAMES[index % count]] if again.prompt(index) != one.prompt(index) else []
    assert unlike == []
    own = [one._said(gym.solution, number) for number in range(count)]
    assert {name for name, answer in zip(NAMES, own, strict=True) if answer is None} == WITHOUT_ANSWER
    rows = range(count)
    right = one.score(rows, [answer or "" for answer in own], [True] * count)
    assert {name for name, value in zip(NAMES, right.reward, strict=True) if value < 1} == WITHOUT_ANSWER
    wrong = one.score(rows, ["no such answer"] * count, [True] * count)
    assert {name for name, value in zip(NAMES, wrong.reward, strict=True) if value >= 1} <= GIVEN_AWAY
    assert not any(right.columns["failed"]) and not any(wrong.columns["failed"]) and not any(right.columns["refused"])
    assert {source.name for source in one.sources if gym._evaluates(source)} == EVALUATING


@pytest.mark.slow
def test_a_run_from_a_config_alone(command, tmp_path):
    """A model from scratch, which learns the form of an answer and hardly any sum."""
    small = ["--config.policy.weights=nano", "--config.warmup.steps=40", "--config.warmup.learning_rate=3e-3"]
    done = command(
        "mara_jax.main", "--config=configs/prompts.py:sums", f"--workdir={tmp_path}/run", "--config.steps=2",
        "--config.rollout.max_new_tokens=24", "--config.optimiser.learning_rate=5e-4", *small,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["valid/fraction"] > 0.5 and last["task/failed"] == last["task/refused"] == 0
