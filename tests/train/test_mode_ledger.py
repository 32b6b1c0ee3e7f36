"""The mode ledger: masses, steps and alarms of rows written by hand, and what a resumed run has of it."""

import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mara_jax.config import Algorithm, LanguageRun
from mara_jax.train import group_metrics, mode_ledger, mode_report, summary
from mara_jax.train.mode_ledger import ModeLedger
from mara_jax.train.reference_samples import PromptSamples

MARA = Algorithm(method="mara", anchor="answer", beta=0.1, threshold=0.8)


class Prompts:
    """A task of prompts whose answers are not known, or declared."""

    answers_have_equally_many_strings = True

    def __init__(self, declared=None):
        self.declared = declared

    def prompt(self, number):
        return f"prompt\n {number}"

    def answer_set(self, number):
        return self.declared


def samples(**counts: int) -> PromptSamples:
    """Of the reference policy: answers, good ones but for x; none for "none"."""
    names = [name for name, count in counts.items() for _ in range(count)]
    reward = np.array([float(name not in ("x", "none")) for name in names], np.float32)
    return PromptSamples(reward, [None if name == "none" else name for name in names], np.zeros(len(names)), names)


def setup_of(known=None, algorithm=MARA, declared=None) -> Any:
    store = None if known is None else SimpleNamespace(known=known)
    return SimpleNamespace(cfg=LanguageRun(algorithm=algorithm), task=Prompts(declared), ref_samples=store)


def row(step: int, prompt: int = 0, size: int = 8, **good: int) -> dict:
    """A step's row: the good answers of its one group; the others have the bad answer x, or none."""
    rest = {"x": 1, "": size - 1 - sum(good.values())} if sum(good.values()) < size else {}
    return {"step": step, mode_ledger.COUNTS: [[prompt, good | rest]], mode_ledger.GOOD: [[prompt, good]]}


def opened(path, rows=(), keeps=True, **of_setup) -> ModeLedger:
    return ModeLedger(setup_of(**of_setup), path, rows, keeps)


def written(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


REFERENCE = {0: samples(a=8, b=4, x=2, none=2)}


def test_the_file_by_hand(tmp_path):
    """a and b are halves at MARA's optimum, but for e^-10; c comes later, and shares it as half a sample would."""
    path = tmp_path / "modes.jsonl"
    ledger = opened(path, known=REFERENCE)
    assert ledger.update(row(1, a=6, b=1)) == ({"modes/known": 2, "modes/lost": 0}, "")
    (one,) = written(path)
    head = {"prompt_id": 0, "prompt": "prompt 0", "completions": 8, "window": 8, "reference_samples": 16, "left_out": 0}
    a, b = one.pop("answers")
    assert one == head
    assert a.pop("optimum") == pytest.approx(0.5, abs=1e-4) == b.pop("optimum")
    steps = {"peak": 0.0, "missed": 0, "lost": False, "first_step": 1, "last_step": 1}
    assert a == {"answer": "a", "reference": 0.5, "policy": 0.75} | steps
    assert b == {"answer": "b", "reference": 0.25, "policy": 0.125} | steps
    ledger.update(row(2, a=5, c=2))
    (one,) = written(path)
    assert [each["answer"] for each in one["answers"]] == ["a", "b", "c"]
    a, b, c = one["answers"]
    assert a["optimum"] == pytest.approx(1 / 3, abs=1e-4) == b["optimum"] and c["optimum"] is None
    assert (a["policy"], b["policy"], c["policy"]) == (11 / 16, 1 / 16, 2 / 16)
    assert (b["last_step"], b["missed"]) == (1, 8) and (c["first_step"], c["reference"]) == (2, 0.0)
    for step in range(3, 11):  # 64 completions are the window: eight visits
        ledger.update(row(step, a=8 if step == 10 else 4))
    (one,) = written(path)
    assert (one["completions"], one["window"]) == (80, 64)
    assert one["answers"][0]["policy"] == (7 * 4 + 8) / 64 and one["answers"][2]["policy"] == 0
    assert one["answers"][0]["peak"] == (7 * 4 + 8) / 64


def test_the_window_is_the_fewest_visits_that_make_up_64_completions():
    one = mode_ledger.PromptModes(None, 0.5)
    for step, (given, window, share) in enumerate([(24, 24, 1.0), (12, 48, 0.75), (0, 72, 0.5), (0, 72, 12 / 72)]):
        one.add(step, mode_ledger.Visit(24, {"a": given}))
        assert (one.in_window, one.share("a")) == (window, share)
    assert one.modes["a"].peak == 0.5  # of a whole window


def test_an_answer_is_lost_once_and_again(tmp_path):
    """b, four sightings and an optimum of 1/2: (1 + .05 n / 4)^-4 is .01 at n = 172.98, so after 22 groups of eight."""
    ledger = opened(tmp_path / "modes.jsonl", known=REFERENCE)
    ledger.update(row(1, a=6, b=1))
    said = {step: ledger.update(row(step, a=7)) for step in range(2, 40)}
    assert [step for step, (_, line) in said.items() if line] == [23]
    assert [of["modes/lost"] for of, _ in said.values()] == [0] * 21 + [1] * 17
    line = said[23][1]
    assert "\n" not in line and line.startswith('WARNING: a good answer is lost: prompt 0, "b", last given at step 1,')
    assert (
        "none of the last 176 completions, where a tenth of its mass at the optimum (0.500) would give it 8.8" in line
    )
    assert written(tmp_path / "modes.jsonl")[0]["answers"][1]["lost"]
    assert ledger.update(row(40, b=1)) == ({"modes/known": 2, "modes/lost": 0}, "")
    again = [step for step in range(41, 80) if ledger.update(row(step, a=7))[1]]
    assert again == [62]


@pytest.mark.parametrize(
    ("algorithm", "known", "declared"),
    [
        (Algorithm(method="grpo"), REFERENCE, None),  # whose optimum is not known
        (MARA, None, None),  # without samples of the reference
        (MARA, {0: samples(a=255, b=1)}, None),  # b has less than a tenth of it from the beginning
        (MARA, {0: samples(a=12, x=4)}, None),  # b is in no sample
        (MARA, {0: samples(x=8, none=8)}, None),  # no sample is good
        (Algorithm(method="mara", anchor="string"), REFERENCE, None),  # over strings, of answers not declared
    ],
)
def test_what_cannot_be_lost(tmp_path, algorithm, known, declared):
    ledger = opened(tmp_path / "modes.jsonl", algorithm=algorithm, known=known, declared=declared)
    ledger.update(row(1, a=6, b=1))
    assert {ledger.update(row(step, a=7))[1] for step in range(2, 300)} == {""}


def test_mara_over_strings_where_answers_have_equally_many(tmp_path):
    strings = Algorithm(method="mara", anchor="string", beta=0.1, threshold=0.8)
    ledger = opened(
        tmp_path / "modes.jsonl", algorithm=strings, known={0: samples(a=9, b=6, none=1)}, declared=tuple("abcd")
    )
    ledger.update(row(1, a=6, b=1))
    assert [one["optimum"] for one in written(tmp_path / "modes.jsonl")[0]["answers"]] == pytest.approx(
        [0.25] * 2, abs=1e-4
    )


def test_an_answer_that_training_raised_can_be_lost(tmp_path):
    """One sighting in 256, but an eighth of a window's completions: (1 + .05 n)^-1 is .01 at n = 1980."""
    ledger = opened(tmp_path / "modes.jsonl", known={0: samples(a=255, b=1)})
    for step in range(1, 9):
        ledger.update(row(step, a=6, b=1))
    lost = [step for step in range(9, 300) if ledger.update(row(step, a=7))[1]]
    assert lost == [8 + 248]  # 248 groups are 1984 completions


def test_several_lost_at_once_are_one_line(tmp_path):
    known = {0: samples(a=8, b=4, x=2, none=2), 1: samples(a=100, b=100)}
    ledger, lines = opened(tmp_path / "modes.jsonl", known=known), []
    for step in range(1, 40):
        one, other = row(step, 0, a=7), row(step, 1, a=7)
        merged = {name: one[name] + other[name] for name in (mode_ledger.COUNTS, mode_ledger.GOOD)}
        counted, line = ledger.update({"step": step} | merged)
        lines.append((step, counted["modes/lost"], line)) if line else None
    assert [(step, count) for step, count, _ in lines] == [(12, 1), (22, 2)]
    assert 'prompt 1, "b", never given' in lines[0][2] and "more" not in lines[0][2]
    lost = [mode_ledger.Lost(1, "b", optimum, mode_ledger.Mode(missed=100)) for optimum in (0.1, 0.4, 0.2)]
    assert "(0.400) would give it 4.0 times; 2 more are lost" in mode_ledger.alarm(lost)
    assert '"b c"' in mode_ledger.alarm([lost[0]._replace(name="b\n  c")])  # one line, whatever the answer is


def test_no_more_answers_than_the_bound(tmp_path):
    """The reference's rare answers are left out of 70; of the policy's, those that come too late are counted."""
    names = [f"n{i}" for i in range(70)]
    counts = {name: 1 + (i >= 6) for i, name in enumerate(names)}
    ledger = opened(tmp_path / "modes.jsonl", known={0: samples(**counts)})
    counted, _ = ledger.update(row(1, n0=3, n6=1))
    (one,) = written(tmp_path / "modes.jsonl")
    assert counted["modes/known"] == len(one["answers"]) == mode_ledger.MOST_ANSWERS == 64
    assert {each["answer"] for each in one["answers"]} == {*names[6:]} and one["left_out"] == 3
    late = opened(tmp_path / "late.jsonl")
    for step, name in enumerate(names, 1):
        late.update(row(step, **{name: 2}))
    (one,) = written(tmp_path / "late.jsonl")
    assert [each["answer"] for each in one["answers"]] == names[:64] and one["left_out"] == 6 * 2


def random_rows(count: int) -> list[dict]:
    draw, rows = np.random.default_rng(0), []
    for step in range(1, count + 1):
        prompts, counted, good = draw.choice(3, size=2, replace=False).tolist(), [], []
        for prompt in prompts:
            given = draw.choice(
                ["a", "b", "c", "x", ""], size=16, p=[0.6, 0.3 * (step < 20), 0.01, 0.05, 0.04 + 0.3 * (step >= 20)]
            )
            of = {str(name): int(times) for name, times in zip(*np.unique(given, return_counts=True), strict=True)}
            counted.append([prompt, of])
            good.append([prompt, {name: times for name, times in of.items() if name in "abc" and name}])
        rows.append({"step": step, mode_ledger.COUNTS: counted, mode_ledger.GOOD: good})
    return rows


def test_a_resumed_run_has_the_ledger_of_an_uninterrupted_one(tmp_path):
    """Cut at every step: the same file, the same counts, and lines for what is lost from there on."""
    known = {number: samples(a=8, b=4, x=2, none=2) for number in range(3)}
    rows, texts, answers = random_rows(60), [], []
    whole = opened(tmp_path / "whole.jsonl", known=known)
    for one in rows:
        answers.append(whole.update(one))
        texts.append((tmp_path / "whole.jsonl").read_text())
    assert [bool(line) for _, line in answers].count(True) >= 2 and answers[-1][0]["modes/lost"] == 3
    for done in range(0, 60, 7):
        path = tmp_path / f"{done}.jsonl"
        path.write_text("of a step behind the checkpoint")
        stored = json.loads(json.dumps(rows[:done]))
        resumed = opened(path, stored, known=known)
        assert path.read_text() == (texts[done - 1] if done else "")
        assert [resumed.update(one) for one in rows[done:]] == answers[done:]
        assert path.read_text() == texts[-1]


def test_rows_of_earlier_versions_are_left_out(tmp_path):
    earlier = [{"step": 1, mode_ledger.COUNTS: [[0, {"a": 8}]]}]
    ledger = opened(tmp_path / "modes.jsonl", earlier, known=REFERENCE)
    ledger.update(row(2, a=6))
    assert written(tmp_path / "modes.jsonl")[0]["completions"] == 8


def test_a_large_file_is_written_with_checkpoints(tmp_path, monkeypatch):
    path = tmp_path / "modes.jsonl"
    ledger = opened(path, known=REFERENCE)
    ledger.update(row(1, a=6))
    monkeypatch.setattr(mode_ledger, "OFTEN_WRITTEN", 10)
    ledger.update(row(2, a=6))
    assert written(path)[0]["completions"] == 8
    ledger.update(row(3, a=6), to_save=True)
    assert written(path)[0]["completions"] == 24


def test_one_process_keeps_it(tmp_path):
    other = opened(tmp_path / "modes.jsonl", [row(1, a=2)], keeps=False, known=REFERENCE)
    assert other.update(row(2, a=6), True) == ({}, "") and not (tmp_path / "modes.jsonl").exists()


def test_good_completions_are_counted_by_prompt():
    answers = [["a", "a", None, "b"], ["b", "", "a", "a"], ["c", "c", "c", "c"]]
    reward = np.array([[1, 0, 1, 0.8], [0.9, 1, 0, 0], [0, 0, 0, 0]], np.float32)
    counted = group_metrics.good_by_prompt(np.array([7, 7, 9]), answers, reward, 0.8)
    empty = group_metrics.short("")
    assert counted == [[7, {"a": 1, "b": 2, empty: 1}], [9, {}]]


def test_healthy_answers_set_off_no_alarm(tmp_path):
    """Ten answers at their optimum, sampled for 1,500 completions each; then five of them go, and all five are told."""
    names = [f"n{i}" for i in range(10)]
    draw = np.random.default_rng(2)
    reference_counts = draw.multinomial(256, [0.1] * 10)
    counts = dict(zip(names, reference_counts.tolist(), strict=True))
    ledger = opened(tmp_path / "modes.jsonl", known={0: samples(**counts)})

    def lost_after(first: int, last: int, share: list[float]) -> int:
        lost = 0
        for step in range(first, last):
            given = draw.multinomial(16, share)
            good = {name: int(times) for name, times in zip(names, given, strict=True) if times}
            lost = ledger.update({"step": step, mode_ledger.COUNTS: [[0, good]], mode_ledger.GOOD: [[0, good]]})[0][
                "modes/lost"
            ]
            assert step > 94 or not lost
        return lost

    assert lost_after(1, 95, [0.1] * 10) == 0
    assert lost_after(95, 160, [0.2] * 5 + [0.0] * 5) == 5


def test_without_a_mass_to_compare_with_there_is_no_table(tmp_path):
    ledger = opened(tmp_path / mode_ledger.FILE, known={})
    ledger.update(row(1, a=6, b=2))
    console = Console(file=io.StringIO(), width=200)
    summary.show_modes(tmp_path, console)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    words = "2 of 1 prompts, 0 lost (no mass at the optimum is known, without which none counts as lost)"
    assert text == f"good answers: {words}\n"


def test_the_table_shows_what_is_furthest_below_the_optimum(tmp_path):
    path = tmp_path / mode_ledger.FILE
    ledger = opened(path, known=REFERENCE | {1: samples(a=3, b=1)})
    for step in range(1, 40):
        ledger.update(row(step, a=6, **({"[b]": 1} if step == 2 else {})))
    ledger.update(row(40, 1, a=3, b=2))
    prompts = mode_report.read(tmp_path)
    assert mode_report.line(prompts) == "good answers: 5 of 2 prompts, 1 lost"
    order = [(one.prompt_id, one.fields["answer"]) for one in mode_report.answers_of(prompts)]
    assert order == [(0, "b"), (1, "b"), (1, "a"), (0, "a"), (0, "[b]")]
    console = Console(file=io.StringIO(), width=120)
    summary.show_modes(tmp_path, console)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    lines = text.splitlines()
    assert lines[0].startswith("good answers: 5 of 2 prompts, 1 lost")
    assert [words.split() for words in lines if words.rstrip().endswith("lost")][1:] == [
        ["0", "b", "0.250", "0.000", "0.333", "-", "-", "lost"]
    ]
    assert "[b]" in text and (tmp_path / "modes.png").stat().st_size > 0
    path.write_text("{\n")
    with pytest.raises(ValueError, match=r"modes.jsonl, line 1 is not JSON: delete the file"):
        mode_report.read(tmp_path)
    path.write_text("[]\n")
    with pytest.raises(ValueError, match=r"modes.jsonl, line 1 is no prompt's"):
        mode_report.read(tmp_path)
    assert mode_report.read(tmp_path / "none") == [] and summary.show_modes(tmp_path / "none", console) is None
