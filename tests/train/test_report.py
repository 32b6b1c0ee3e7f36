"""Tables and figures from folders whose every number was chosen by hand."""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from written_runs import OBJECTIVE, ROWS, printed, row, write_run

from mara_jax.train import plots, report, summary


def test_final_rows_are_the_hand_made_numbers(tmp_path):
    reference, vanilla, own, reached = report.final_rows(report.read(write_run(tmp_path / "run", ROWS)))
    assert reference.shares.tolist() == [0.6, 0.2, 0.2] and reference.samples == 100
    assert np.isclose(reference.valid, 0.8) and np.isclose(reference.entropy_bits, 2 - 0.75 * np.log2(3))
    assert np.allclose(reference.intervals[0], (0.502003, 0.690599), atol=2e-6)
    assert vanilla.shares.tolist() == [0.75, 0.25, 0] and vanilla.intervals is None
    assert own.answer_shares.tolist() == [0.5, 0.5]
    assert np.allclose(reached.shares, [0.45, 0.45, 0.1]) and reached.samples == 80
    assert reached.entropy_bits == 1.0
    assert [r.name for r in (vanilla, own, reached)] == [
        "optimum: vanilla", "optimum: MARA over answers", "this run, last 8 batches",
    ]  # fmt: skip


def test_final_table_prints_them_whole_in_80_columns(tmp_path):
    text = printed(summary.final_table(write_run(tmp_path / "run", ROWS)))
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line.strip()}
    assert lines["reference"][1:] == ["0.600", "0.200", "0.200", "0.811", "0.250"]
    assert lines["optimum: vanilla"][2:] == ["0.750", "0.250", "0.000", "0.811", "0.250"]
    assert lines["optimum: MARA over answers"][4:] == ["0.500", "0.500", "0.000", "1.000", "0.000"]
    assert lines["this run, last 8 batches"][5:] == ["0.450", "0.450", "0.100", "1.000", "0.000"]
    assert "0.50-0.69" in text and "1.38 nats, slope +0.050 a step" in text and "…" not in text


def test_a_vanilla_run_is_measured_against_the_vanilla_optimum(tmp_path):
    workdir = write_run(tmp_path / "run", ROWS, method="vanilla", optimum={"vanilla": [0.75, 0.25, 0.0]})
    assert [r.name for r in report.final_rows(report.read(workdir))] == [
        "reference", "optimum: vanilla", "this run, last 8 batches",
    ]  # fmt: skip


def test_start_summary_says_objective_reference_and_optima(tmp_path):
    known = report.read(write_run(tmp_path / "run", ROWS)).reference
    assert report.start_summary(known) == [
        'reference: 80.0% of 100 samples valid (71.1% to 86.7%); "1" 75.0%, "2" 25.0% of the valid ones; '
        "entropy 0.81 bits",
        'optimum (vanilla): valid 100.0%; "1" 75.0%, "2" 25.0% of the valid ones; entropy 0.81 bits',
        'optimum (mara): valid 100.0%; "1" 50.0%, "2" 50.0% of the valid ones; entropy 1.00 bits',
    ]


def test_start_summary_warns_of_a_collapse_with_its_cure(tmp_path):
    known = report.read(write_run(tmp_path / "run", ROWS)).reference
    found = {"answer": "1", "share": 0.971, "low": 0.952, "high": 0.99, "raise_above": 0.0312, "seen": 2}
    found |= {"method": "vanilla", "prompts": 1, "collapsing": 1}
    assert report.start_summary(known | {"collapse": None}) == report.start_summary(known)
    assert report.start_summary(known | {"collapse": found})[3:] == [
        'WARNING: the optimum of these settings is a collapse: 97.1% [95.2%, 99.0%] of the answers "1"; '
        "raise algorithm.beta above 0.0312 or set algorithm.method=mara"
    ]
    alone = found | {"raise_above": None, "seen": 1, "prompts": 5, "collapsing": 2}
    assert report.collapse_warning(alone) == (
        "WARNING: the optimum of these settings is a collapse: under 2 of 5 prompts, at worst 97.1% [95.2%, 99.0%] of "
        'the answers "1"; no beta helps, for the reference itself gives hardly any other: warm it up on more'
    )


def test_start_summary_warns_where_nothing_is_rewarded(tmp_path):
    known = report.read(write_run(tmp_path / "run", ROWS, **NOTHING_VALID)).reference
    assert report.start_summary(known)[-1] == (
        "WARNING: none of 100 samples of the reference has an answer, so there may be no reward to learn from: teach "
        "the format by warmup.steps, or choose other policy.weights"
    )
    assert not any("WARNING" in line for line in report.start_summary(known | {"counts": [0, 1], "valid": 0.01}))


NOTHING_VALID = {"counts": (0, 0), "optimum": {"vanilla": [0.0, 0.0, 1.0]}}


@pytest.mark.parametrize(
    ("rows", "kwargs", "reached"),
    [
        ([row(1, 3, 1), row(2, 2, 2, kl=-0.1)], {}, "this run, last 2 batches"),
        ([row(1, 3, 1)], {}, "this run, last batch"),
        ([row(t, 0, 0) for t in range(1, 5)], NOTHING_VALID, "no answers"),
        ([row(t, 5, 5, kl=float("nan")) for t in range(1, 5)], {}, "this run, last 4 batches"),
        ([], {}, "no step yet"),
    ],
)
def test_short_or_empty_runs_give_table_and_figure_without_a_warning(tmp_path, rows, kwargs, reached):
    workdir = write_run(tmp_path / "run", rows, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = summary.final_figure(workdir)
        text = printed(summary.final_table(workdir))
        start = report.start_summary(report.read(workdir).reference)
    shown = text + "".join(start) + path.with_suffix(".svg").read_text()
    assert reached in shown and "nan" not in text + "".join(start)


def test_figure_holds_the_numbers_and_is_the_same_each_time(tmp_path):
    workdir = write_run(tmp_path / "run", ROWS)
    path = summary.final_figure(workdir)
    assert path == workdir / "figure.png"
    pixels = imread(path)
    assert pixels.shape == (990, 1800, 4) and pixels[..., :3].std() > 0.05  # not an empty sheet
    svg = path.with_suffix(".svg").read_text()
    for text in [
        "0.60",
        "0.75",
        "0.45",
        "0.10",
        "slope over the last 10 steps: +0.050 a step",
        OBJECTIVE[:20],
    ]:
        assert text in svg
    for text in [
        "reference (measured)",
        "optimum: vanilla (predicted)",
        "optimum: MARA over answers (predicted)",
    ]:
        assert text in svg
    before = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, path.with_suffix(".svg"))]
    summary.final_figure(workdir)
    assert before == [hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, path.with_suffix(".svg"))]


@pytest.mark.parametrize(
    ("first", "last", "ticks"),
    [
        (1, 100, [20, 40, 60, 80, 100]),
        (1, 130, [20, 40, 60, 80, 100, 130]),
        (1, 30, [5, 10, 15, 20, 25, 30]),
        (1, 3, [1, 2, 3]),
        (1, 1, [1]),
    ],
)
def test_the_last_step_has_a_tick(first, last, ticks):
    assert plots.step_ticks(first, last) == ticks


def test_a_line_still_being_written_is_left_out(tmp_path):
    workdir = write_run(tmp_path / "run", ROWS)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(13, 1, 1))[:20])
    assert len(report.read(workdir).rows) == len(ROWS)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("reference.json", None, ["does not exist"]),
        ("metrics.jsonl", None, ["does not exist"]),
        ("config.json", b"{", ["not JSON"]),
        ("config.json", b"{}", ["lacks algorithm, seed"]),
        ("metrics.jsonl", b'{"step": 1}\n', ["line 1", "answers/by_prompt"]),
        ("metrics.jsonl", b"cut\n", ["line 1", "not JSON"]),
        ("reference.json", b"\xff", ["not UTF-8"]),
        ("reference.json", b"[]", ["lacks samples"]),
    ],
)
def test_a_folder_that_is_no_run_gives_one_line(tmp_path: Path, name, content, words):
    workdir = write_run(tmp_path / "run", ROWS)
    if content is None:
        (workdir / name).unlink()
    else:
        (workdir / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        report.read(workdir)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in [str(workdir / name), *words])


def test_a_run_with_open_answers_shows_its_first_and_last_steps(tmp_path):
    """Ten steps: means of the first five and of the last five, which share none."""
    lines = [
        row(t, 0, 0, kl=0.1 * t) | {"reward/mean": float(t), "answers/effective": 2.0, "answers/distinct": 3.0}
        for t in range(1, 11)
    ]
    workdir = write_run(tmp_path / "run", lines, method="grpo")
    known = json.loads((workdir / "reference.json").read_text()) | {"answers": None, "optimum": {}, "samples": 0}
    (workdir / "reference.json").write_text(json.dumps(known))
    assert report.start_summary(known) == ["reference: not measured before training"]
    text = printed(summary.final_table(workdir))
    rows = {line[:15].strip(): line.split() for line in text.splitlines()}
    # Means of 1 to 5 and of 6 to 10, with the deviation of five consecutive numbers, the root of 2.5.
    assert rows["first 5 steps"][3:] == ["3.000", "0.000", "0.000", "2.000", "3.000", "0.300"]
    assert rows["last 5 steps"][3:] == ["8.000", "0.000", "0.000", "2.000", "3.000", "0.800"]
    assert "1.581" in text and "grpo, beta 0.1" in text
    path = summary.final_figure(workdir)
    svg = path.with_suffix(".svg").read_text()
    assert path == workdir / "figure.png" and imread(path).shape == (990, 1800, 4)
    assert "effective number of a prompt" in svg and OBJECTIVE[:20] in svg
    (workdir / "metrics.jsonl").write_text("")
    assert "first" not in printed(summary.final_table(workdir))
    summary.final_figure(workdir)
