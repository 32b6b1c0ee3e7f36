"""Pairs that are read, and pairs that are made of prompts: which is better, their lengths, what is held out."""

import collections
import json
import pathlib

import numpy as np
import pytest

from mara_jax.reward_model import pairs, quality
from mara_jax.reward_model.pairs import Pair
from mara_jax.tasks import prompt_file

CONFIGS = pathlib.Path(__file__).parents[2] / "configs" / "prompts"


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_are_texts_or_messages(tmp_path):
    asked = [{"role": "user", "content": "q?"}]
    rows = [
        {"prompt": "q?", "chosen": "yes", "rejected": "no", "margin": 2},
        {"prompt": asked, "chosen": [{"role": "assistant", "content": "y"}], "rejected": "n"},
    ]
    assert pairs.read(written(tmp_path / "a.jsonl", rows)) == [Pair("q?", "yes", "no"), Pair(asked, "y", "n")]
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\n"q?",yes,no\n')
    assert pairs.read(str(tmp_path / "a.csv")) == [Pair("q?", "yes", "no")]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "q?", "chosen": "yes"}, "its 'rejected' is None, no text"),
        ({"prompt": "q?", "chosen": " ", "rejected": "no"}, "its 'chosen' is ' '"),
        ({"prompt": "q?", "chosen": [{"role": "user", "content": "y"}], "rejected": "no"}, "its 'chosen' is [{'role'"),
        ({"chosen": "yes", "rejected": "no"}, 'it has no "prompt"'),
    ],
)
def test_rows_that_are_no_pairs_are_named(tmp_path, row, words):
    whole = {"prompt": "q?", "chosen": "yes", "rejected": "no"}
    with pytest.raises(ValueError) as caught:
        pairs.read(written(tmp_path / "a.jsonl", [whole, row]))
    assert words in str(caught.value) and "line 2" in str(caught.value) and "\n" not in str(caught.value)


def test_pairs_of_the_prompts_that_ship_with_the_project():
    """Each good answer stands against one of other prompts that is wrong here, and length tells nothing."""
    files = [str(CONFIGS / name) for name in ("train.jsonl", "heldout.jsonl")]
    answers = {row["prompt"]: row["answers"] for file in files for row in prompt_file.read(file)}
    made = pairs.made(files, seed=0)
    assert made == pairs.made(files, seed=0) != pairs.made(files, seed=1)
    assert len(set(made)) == len(made) > 1500 and {pair.prompt for pair in made} == answers.keys()
    assert max(collections.Counter(pair.prompt for pair in made).values()) <= pairs.PAIRS_OF_A_PROMPT
    for pair in made:
        assert pair.chosen in answers[pair.prompt] and pair.rejected not in answers[pair.prompt]
    same = np.mean([len(pair.chosen) == len(pair.rejected) for pair in made])
    assert same > 0.9
    training, held_out = pairs.split(made, 0.2, seed=0)
    assert sorted([*training, *held_out]) == list(range(len(made)))
    prompts = [{made[number].prompt for number in part} for part in (training, held_out)]
    assert not prompts[0] & prompts[1] and len(prompts[1]) == round(0.2 * len(answers))
    lengths = [
        quality.Lengths(*(np.array([len(made[n][place]) for n in part], float) for place in (1, 2)))
        for part in (training, held_out)
    ]
    assert max(quality.by_length(*lengths).values()) <= 0.55


def test_pairs_of_completions_are_others_or_their_own_words(tmp_path):
    texts = [f"the quick brown fox number {number}" for number in range(10)]
    rows = [{"prompt": f"q{n}?", "completion": [text, "one"]} for n, text in enumerate(texts)]
    made = pairs.made([written(tmp_path / "a.jsonl", rows)], seed=0)
    mixed = [pair for pair in made if sorted(pair.chosen.split()) == sorted(pair.rejected.split())]
    assert len(mixed) > len(made) / 4
    for pair in made:
        assert pair.chosen in (texts[int(pair.prompt[1])], "one") and pair.rejected != pair.chosen
        assert pair in mixed or pair.rejected in texts


def test_a_pair_of_equal_completions_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "a"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"line 2: chosen and rejected are both 'a', so that neither is better"):
        pairs.read(str(path))


def test_prompts_without_texts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has `answers` or a `completion`"):
        pairs.made([written(tmp_path / "a.jsonl", [{"prompt": "q?"}])], seed=0)
    with pytest.raises(ValueError, match="not as good for the others"):
        pairs.made([written(tmp_path / "b.jsonl", [{"prompt": "q?", "answers": ["a"]}])], seed=0)
    with pytest.raises(ValueError, match=r"--held_out=0.1 of 3 prompts holds out 0"):
        pairs.split([Pair(f"q{n}", "a", "b") for n in range(3)], 0.1, 0)
