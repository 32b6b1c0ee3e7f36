"""The generate command: counts by hand, draws that do not depend on how they are divided, what it prints."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from mara_jax import hf
from mara_jax.generate import drawing
from mara_jax.generate.drawing import Counted, Sample
from mara_jax.policies import lora
from mara_jax.policies.parameters import Lora
from mara_jax.policies.policy import Policy
from mara_jax.train import sampled


def test_answers_are_counted():
    samples = [Sample(text, answer, -1.0, True) for text, answer in (("b.", "b"), ("a", "a"), ("?", None), ("a!", "a"))]
    assert drawing.counted(samples) == [
        Counted("a", 2, 0.5, "a"),
        Counted("b", 1, 0.25, "b."),
        Counted(None, 1, 0.25, "?"),
    ]


def test_completions_without_an_answer_are_none_of_the_different_ones():
    """Two answers, 2 to 1: effectively exp(H(2/3, 1/3)) = 1.89; none at all: 0."""
    given = [Sample(str(number), answer, 0.0, True) for number, answer in enumerate(["a", "a", "b", None, None])]
    words = str(drawing.table("Which?", given).title)
    assert "5 completions, 2 different, effectively 1.89" in words
    assert "1 completions, 0 different, effectively 0.00" in str(drawing.table("Which?", given[3:4]).title)


def test_draws_do_not_depend_on_how_they_are_divided(random_model):
    policy = sampled.load(str(random_model), "yes")
    whole, parts, other = (
        drawing.draw(policy, "a b", drawing.Sizes(number, 10, 8, at_once, 0), {})
        for number, at_once in ((3, 256), (3, 4), (4, 256))
    )
    texts = [[one.text for one in drawn] for drawn in (whole, parts, other)]
    assert len(texts[0]) == 10 and texts[0] == texts[1] != texts[2]
    assert [one.logp for one in whole] == pytest.approx([one.logp for one in parts], abs=1e-5)
    likeliest = drawing.draw(policy, "a b", drawing.Sizes(0, 5, 8, 256, 0), {"temperature": 0.0})
    assert len({one.text for one in likeliest}) == 1


def test_an_adapter_is_put_upon_its_base(random_model, tmp_path):
    base, params = hf.load(str(random_model))
    policy = Policy(**{**vars(base), "architecture": lora_of(base.architecture)})
    adapter = jax.tree.map(lambda x: x + 0.1, lora.init(policy.architecture, jax.random.key(1)))
    hf.export_adapter(policy, adapter, tmp_path / "adapter", base=str(random_model))
    loaded, attached, chat = sampled.load(str(tmp_path / "adapter"), "auto")
    assert chat
    tokens, lengths = np.array([[5, 6, 7]]), np.array([3])
    right = policy.logits(lora.attached(policy.architecture, params, adapter), tokens, lengths)
    assert np.abs(np.asarray(loaded.logits(attached, tokens, lengths)) - np.asarray(right)).max() < 1e-6
    assert np.abs(np.asarray(base.logits(params, tokens, lengths)) - np.asarray(right)).max() > 1e-3


def lora_of(arch):
    return dataclasses.replace(arch, lora=Lora(2, 4.0, ("q", "down")))


@pytest.fixture
def generate(command):
    return functools.partial(command, "mara_jax.generate")


def test_json_has_every_completion_and_its_counts(random_model, generate, tmp_path):
    (tmp_path / "own.py").write_text("def first(prompt, completion, kind):\n    return kind if completion else None\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "kind": "x"}\n{"prompt": "b", "kind": "y"}\n')
    done = generate(
        f"--weights={random_model}", f"--prompts={tmp_path}/rows.jsonl", f"--answer={tmp_path}/own.py:first",
        "--samples=5", "--max_new_tokens=6", "--json",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "b"]
    for row, kind in zip(rows, "xy", strict=True):
        assert len(row["samples"]) == 5 == sum(one["count"] for one in row["answers"])
        assert {one["answer"] for one in row["samples"] if one["text"]} == {kind}
        assert all(one["logp"] < 0 for one in row["samples"])


def test_the_table_shows_what_was_said(random_model, generate):
    done = generate(f"--weights={random_model}", "--prompt=a b", "--samples=6", "--max_new_tokens=4", "--temperature=0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "6 completions, 1 different, effectively 1.00" in done.stdout and "100.0%" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give one of --prompt and --prompts"),
        (("--prompt= ",), "--prompt is empty: write a text"),
        (("--prompt=a", "--prompts=b"), "give one of --prompt and --prompts"),
        (("--prompts=nothing.jsonl",), "the prompt file nothing.jsonl does not exist"),
        (("--prompt=a", "--max_new_tokens=64"), "has 64 positions: shorten one of them"),
        (("--prompt=a", "--answer=own.py"), "'own.py' names no function"),
        (("--prompt=a", "--samples=0"), "--samples=0 must be at least 1"),
    ],
)
def test_a_command_line_that_cannot_be_is_one_line(random_model, generate, arguments, words):
    done = generate(f"--weights={random_model}", *arguments)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout
