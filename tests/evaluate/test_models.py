"""Several models on the same prompts: differences by hand and resampled, what is refused, the page, the Pareto plot."""

import json
import re

import numpy as np
import pytest
from written_runs import printed

from mara_jax.evaluate import drawing, models, models_page
from mara_jax.evaluate.drawing import pareto
from mara_jax.evaluate.models import Model
from mara_jax.measures import bootstrap, fronts
from mara_jax.train.evaluation import Group

SETTINGS = {"prompts": "p.jsonl", "reward": "r.py:f", "answer": "r.py:a", "samples": 4, "max_new_tokens": 8}
SETTINGS |= {"reward_model": "", "equivalence": "rouge1"}
HARD = [0.1, 0.3, 0.5, 0.7, 0.9, 0.2, 0.4, 0.6]  # prompts differ by more than models do


def model(name: str, reward, effective) -> Model:
    rows = [
        {
            "prompt_id": i, "prompt": f"p{i} <b>?", "reward": float(x), "answers/effective": float(y),
            "ngrams/ead": 0.5, "counts": {"yes": 3, f"<{name}>": 1},
        }
        for i, (x, y) in enumerate(zip(reward, effective, strict=True))
    ]  # fmt: skip
    measures = ("reward", "answers/effective", "ngrams/ead")
    metrics = {measure: float(np.mean([row[measure] for row in rows])) for measure in measures}
    intervals = {measure: list(bootstrap.interval([row[measure] for row in rows])[1:]) for measure in measures}
    settings = SETTINGS | {"weights": f"runs/{name}", "threshold": 0.8}
    result = {"settings": settings, "metrics": metrics, "prompts": rows, "intervals": intervals, "bootstrap": {}}
    return Model(name, name, result)


def changed(**settings) -> Model:
    """Another model on the same prompts, with other settings."""
    one = model("other", HARD, [2.0] * 8)
    one.result["settings"] |= settings
    return one


BASE = model("base", HARD, [2.0] * 8)
BETTER = model("better", [x + 0.05 for x in HARD], [1.0, 3.0] * 4)


def test_what_every_prompt_gains_exceeds_its_interval_though_the_intervals_overlap():
    """.05 on each prompt: the paired interval is that point, while each model's own interval is .3 wide."""
    reward, effective, ead = models.differences([BASE, BETTER])
    assert (reward.measure, reward.model, reward.base) == ("reward", "better", "base") and reward.exceeds
    assert (reward.value, reward.low, reward.high) == pytest.approx((0.05, 0.05, 0.05))
    assert BASE.result["intervals"]["reward"][1] > BETTER.result["intervals"]["reward"][0] + 0.2
    assert effective.value == 0 and effective.low < 0 < effective.high and not effective.exceeds
    assert (ead.low, ead.high) == (0, 0) and not ead.exceeds  # equal models
    assert models.differences([BETTER, BASE])[0].value == pytest.approx(-0.05)
    (line,) = models.verdicts([BASE, BETTER], [reward, effective, ead])
    assert line == "better against base: differs beyond the interval in 1 of 3 measures: reward +0.050"
    (line,) = models.verdicts(
        [BASE, BASE._replace(name="same")], models.differences([BASE, BASE._replace(name="same")])
    )
    assert line == "same against base: differs from it in none of 3 measures beyond the interval"


def test_equal_models_differ_beyond_the_interval_as_seldom_as_it_says():
    """Of 200 pairs of models with the same chances on 40 prompts, about one in twenty."""
    draw, beyond = np.random.default_rng(0), 0
    for _ in range(200):
        chance = draw.uniform(size=40)
        pair = [model(name, draw.binomial(16, chance) / 16, np.ones(40)) for name in ("a", "b")]
        beyond += models.differences(pair)[0].exceeds
    assert 2 <= beyond <= 22


def test_the_comparison_marks_what_exceeds():
    shown = models.compared([BASE, BETTER], models.differences([BASE, BETTER]))
    assert shown.header == ["measure", "base", "better - base"]
    assert shown.rows[0] == ["reward", "0.463", "+0.050 (+0.050 to +0.050) *"]
    assert not shown.rows[1][2].endswith("*") and "paired bootstrap over 8 prompts" in shown.note
    assert shown.markdown.splitlines()[1] == "| --- | ---: | ---: |"
    assert "+0.050 to +0.050) *" in printed(shown.table, 100)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 8}, r"base has --samples=4, other 8: measure both with the same one"),
        ({"reward": "s.py:f"}, r"base has --reward=r.py:f, other s.py:f: measure both"),
        ({"answer": ""}, r"base has --answer=r.py:a, other none: measure both"),
        ({"threshold": 0.5}, r"base has --threshold=0.8, other 0.5"),
        ({"reward_model": "r/model"}, r"base has --reward_model=none, other r/model"),
        ({"equivalence": "exact"}, r"base has --equivalence=rouge1, other exact"),
    ],
)
def test_other_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        models.check_comparable([BASE, changed(**changes)])
    old = model("old", HARD, [2.0] * 8)  # an evaluation from before there was a rule or a reward model
    del old.result["settings"]["reward_model"], old.result["settings"]["equivalence"]
    models.check_comparable([BASE, old])
    if set(changes) <= {"reward_model", "equivalence"}:
        models.check_comparable([old, changed(**changes)])


def test_other_prompts_are_refused():
    other = model("other", HARD, [2.0] * 8)
    other.result["prompts"][3]["prompt"] = "another"
    with pytest.raises(
        ValueError, match=r"base and other have other prompts \(number 3 differs\): measure both on one"
    ):
        models.check_comparable([BASE, other])
    with pytest.raises(ValueError, match=r"have other prompts \(8 and 7 of them\)"):
        models.check_comparable([BASE, model("other", HARD[:7], [2.0] * 7)])
    with pytest.raises(ValueError, match=r"1 evaluation, base: name at least two to compare"):
        models.check_comparable([BASE])
    one = [model(name, HARD[:1] * 2, [1.0] * 2) for name in "ab"]
    for each in one:
        each.result["prompts"].pop()
    with pytest.raises(ValueError, match=r"1 prompt: differences are resampled over prompts"):
        models.check_comparable(one)


def test_no_point_beats_those_of_the_front():
    assert fronts.pareto_best([0.9, 0.89, 0.7, 0.7, 0.5, 0.9], [1.0, 2.0, 3.0, 2.9, 1.0, 1.0]) == [0, 5, 1, 2]
    diverse, worse = model("diverse", [0.1] * 8, [3.0] * 8), model("worse", [0.05] * 8, [2.9] * 8)
    assert models.front([worse, BASE, diverse, BETTER]) == [
        "better",
        "diverse",
    ]  # base has as many answers, less reward
    silent = [model(name, HARD, [0.0] * 8) for name in "ab"]
    assert models.diversity_of(silent) == "ngrams/ead" and models.diversity_of([*silent, BASE]) == "answers/effective"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a", "runs/b"], ["a", "b"]),
        (["runs/a/model", "runs/b/model"], ["a-model", "b-model"]),
        (["runs/a/checkpoints/20", "runs/a/checkpoints/40"], ["a-checkpoints-20", "a-checkpoints-40"]),
        (["smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M@main"], ["smollm2-135m-instruct", "SmolLM2-135M@main"]),
        (["model", "x/model"], ["1-model", "2-x-model"]),
        (["runs/a/reference", "runs/a", "runs/a/checkpoints/4"], ["reference", "a", "a-checkpoints-4"]),
        (["a b/c", "d/c"], ["b-c", "d-c"]),
    ],
)
def test_names_are_short_and_different(paths, names):
    assert models.names_of(paths) == names


def write(folder, one: Model) -> str:
    folder.mkdir()
    (folder / models.FILE).write_text(json.dumps(one.result))
    return str(folder)


def test_evaluations_are_compared_from_their_folders(command, tmp_path):
    folders = [write(tmp_path / one.name, one) for one in (BASE, BETTER)]
    out = tmp_path / "both"
    done = command("mara_jax.evaluate", "compare", *folders, f"--out={out}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "better against base: differs beyond the interval in 1 of 3 measures: reward +0.050" in done.stdout
    assert "Pareto-best of reward and answers/effective: better" in done.stdout
    result = json.loads((out / "evaluation.json").read_text())
    assert result["pareto"] == {"quality": "reward", "diversity": "answers/effective", "best": ["better"]}
    assert [row["exceeds"] for row in result["differences"]] == [True, False, False]
    assert "<strong>+0.050 (+0.050 to +0.050) *</strong>" in (out / "evaluation.html").read_text()
    again = models.read([str(out)])  # that of several stands for each of them
    assert [one.name for one in again] == ["base", "better"] and again[0].result == BASE.result
    done = command("mara_jax.evaluate", "compare", *folders, "--markdown")
    assert "| reward | 0.463 | +0.050 (+0.050 to +0.050) * |" in done.stdout
    refusals = [
        ([folders[0], str(tmp_path)], "evaluation.json does not exist: name folders that evaluate run has written"),
        ([folders[0], folders[0]], "is named twice: name each model once"),
        ([folders[0]], "1 evaluation, base: name at least two"),
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    refusals += [([folders[0], str(tmp_path / "run")], "run is a run, others are evaluations: compare runs, or what")]
    (tmp_path / "broken").mkdir()
    for text, words in (
        ("{", "is not JSON: run evaluate run again"),
        ("{}", "lacks 'settings': it was not written by"),
    ):
        (tmp_path / "broken" / models.FILE).write_text(text)
        with pytest.raises(ValueError, match=words):
            models.read([folders[0], str(tmp_path / "broken")])
    for arguments, words in refusals:
        done = command("mara_jax.evaluate", "compare", *arguments)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_page_of_several_models(tmp_path):
    """Escaped, with every model's completions by answer, and the bars of the plot as far as the intervals."""
    groups = [
        Group(
            i, f"p{i} <b>?", ["t<i>", "t<i>", "u", "v"], np.ones(4, np.float32), ["yes"] * 3 + ["<x>"], np.ones(4, bool)
        )
        for i in range(8)
    ]
    evaluated = [BASE._replace(groups=groups), BETTER]
    rows = models.differences(evaluated)
    models_page.write(tmp_path / "page.html", evaluated, rows, pareto(tmp_path / "plot.png", evaluated))
    text = (tmp_path / "page.html").read_text()
    assert "<b>" not in text and "<i>" not in text and "&lt;base&gt;" in text and "&lt;better&gt;" in text
    assert text.count("completions of base") == 8 and "completions of better" not in text
    assert text.count("2 times:") == 8 and "Pareto-best of reward and answers/effective: better." in text
    cells = re.findall(r"<td>([\d.]+)</td>", text)
    assert f"{HARD[0]:.3f}" in cells and f"{HARD[0] + 0.05:.3f}" in cells
    (low, high), mean = BASE.result["intervals"]["reward"], BASE.result["metrics"]["reward"]
    assert np.ravel(drawing._reach(BASE.result, "reward")).tolist() == pytest.approx([mean - low, high - mean])
    svg = (tmp_path / "plot.svg").read_text()
    assert "base" in svg and "better" in svg and "Pareto-best" in svg
