"""benchmarks/noveltybench.py: which answer a completion names, by hand."""

import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("novelty_script", ROOT / "benchmarks" / "noveltybench.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "prompt, completion, answer",
    [
        ("curated-88", "You rolled a 17!", "17"),
        ("curated-88", "The 20-sided die shows 7.", None),  # two numbers: 20 and 7
        ("curated-88", "You rolled a 21.", None),
        ("curated-90", "I picked 100", "100"),  # and not 1, 10
        ("curated-67", "One of them is EQUATORIAL GUINEA.", "Equatorial Guinea"),
        ("curated-85", "The Queen of Hearts, yes, the queen of hearts.", "queen of hearts"),
        ("curated-85", "10 of Clubs", "ten of clubs"),
        ("curated-74", "Harry Potter and the Sorcerer's Stone", "Philosopher's Stone"),
        ("curated-47", "Half full, not half empty", None),
        ("curated-58", "N'Djamena, the capital of Chad", "N'Djamena"),
        ("curated-58", "Paris", None),
    ],
)
def test_an_answer_is_named_alone(script, prompt, completion, answer):
    assert script.which(completion, script.ANSWERS[prompt]) == answer
    assert script.names_one([completion], [script.ANSWERS[prompt]]) == [float(answer is not None)]


def test_sets_have_no_answer_twice(script):
    sizes = {key: len(names) for key, names in script.ANSWERS.items()}
    assert sizes == {
        "curated-47": 2, "curated-48": 2, "curated-58": 54, "curated-67": 20, "curated-70": 6, "curated-74": 7,
        "curated-85": 52, "curated-87": 15, "curated-88": 20, "curated-90": 100, "curated-97": 10,
    }  # fmt: skip
    assert all(len({name.casefold() for name in names}) == len(names) for names in script.ANSWERS.values())


def test_a_file_without_the_benchmarks_prompts_is_refused(script, tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"id": "curated-88", "prompt": "Roll a die."}) + "\n")
    with pytest.raises(SystemExit, match="has 1 of the 11 prompts with finite answers"):
        script.write_prompts(path, tmp_path / "out")
