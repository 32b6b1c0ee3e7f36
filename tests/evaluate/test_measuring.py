"""Weights measured on a file of prompts: pass@k by enumeration, and a whole evaluation by counting its completions."""

import itertools
import json

import numpy as np
import pytest

from mara_jax.core import diversity
from mara_jax.train import evaluation


def test_pass_at_k_is_the_share_of_subsets_with_a_good_sample():
    for count, good in ((5, 2), (6, 0), (4, 4), (7, 1)):
        samples = [1] * good + [0] * (count - good)
        for k in range(1, count + 1):
            subsets = list(itertools.combinations(samples, k))
            expected = np.mean([any(subset) for subset in subsets])
            assert diversity.pass_at_k(count, good, k) == pytest.approx(expected)


def test_measures_of_a_prompt_by_hand():
    reward, finished = np.array([1.0, 0.5, 1.0, 0.0], np.float32), np.array([True, True, True, False])
    group = evaluation.Group(0, "p", ["a!", "b", "a", "?"], reward, ["a", "b", "a", None], finished)
    measured = evaluation._of_prompt(group, 0.8)
    # Two of four are good: pass@2 = 1 - (2 choose 2) / (4 choose 2). The answers' shares are 2/3 and 1/3.
    effective = 2 ** (-(2 / 3) * np.log2(2 / 3) - (1 / 3) * np.log2(1 / 3))
    assert measured == {
        "reward": 0.625, "pass@1": 0.5, "pass@2": pytest.approx(5 / 6), "pass@4": 1.0, "valid": 0.75,
        "answers/distinct": 2.0, "answers/good": 1.0, "answers/effective": pytest.approx(effective),
        "truncated": 0.25, "counts": {"a": 2, "b": 1},
    }  # fmt: skip


def test_run_measures_weights_and_writes_what_it_prints(command, random_model, tmp_path):
    """Each measure is counted again from the prompts' counts."""
    (tmp_path / "own.py").write_text(
        "def reward(prompts, completions, wanted):\n"
        "    return [float(text[:1] in set(one)) for text, one in zip(completions, wanted)]\n"
        "def answer(prompt, completion):\n    return completion[:1] or None\n"
    )
    lines = [{"prompt": f"{letter}?", "wanted": "abcdefghijklmnopqrstuvwxyz"} for letter in "abc"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = command(
        "mara_jax.evaluate", "run", f"--weights={random_model}", f"--prompts={tmp_path}/rows.jsonl", "--samples=20",
        f"--reward={tmp_path}/own.py:reward", f"--answer={tmp_path}/own.py:answer", "--max_new_tokens=3",
        f"--out={tmp_path}/out",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["prompt"] for row in written["prompts"]] == ["a?", "b?", "c?"]
    for row in written["prompts"]:
        good = sum(count for answer, count in row["counts"].items() if answer in lines[0]["wanted"])
        assert row["reward"] == pytest.approx(good / 20) == row["pass@1"]
        assert row["pass@4"] == pytest.approx(diversity.pass_at_k(20, good, 4))
        assert row["answers/distinct"] == len(row["counts"]) and row["valid"] == sum(row["counts"].values()) / 20
    for name, value in written["metrics"].items():
        assert value == pytest.approx(np.mean([row[name] for row in written["prompts"]]))
        assert f"{name}" in done.stdout and f"{value:.3f}" in done.stdout
    assert 0 < written["metrics"]["reward"] < 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--weights=x", "--prompts=y", "--out=z"], "--reward is missing: evaluate run takes --weights"),
        (["--weights=x", "--prompts=y", "--out=z", "--reward=r.py:f", "more"], "unexpected argument 'more'"),
        (["--weights=x", "--prompts=y", "--out=z", "--reward=r.py:f"], "the prompt file y does not exist"),
    ],
)
def test_what_cannot_be_measured_is_one_line(command, flags, words):
    done = command("mara_jax.evaluate", "run", *flags)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
