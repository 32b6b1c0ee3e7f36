"""Runs side by side, from folders whose every number was chosen by hand."""

import json
from pathlib import Path

import pytest
from written_runs import ROWS, printed, row, write_run

from mara_jax.evaluate import comparison


def test_a_vanilla_run_is_measured_against_the_vanilla_optimum(tmp_path):
    workdir = write_run(tmp_path / "run", ROWS, method="vanilla", optimum={"vanilla": [0.75, 0.25, 0.0]})
    assert comparison.compare([workdir]).rows[0][-1] == "0.250"


def test_comparison_of_seeds_and_methods(tmp_path):
    first = write_run(tmp_path / "a", ROWS, seed=0)
    second = write_run(tmp_path / "b", [*ROWS[:4], *(row(t, 9, 0, kl=2.0) for t in range(5, 15))], seed=1)
    other = write_run(tmp_path / "c", ROWS, anchor="string", optimum={"vanilla": [0.75, 0.25, 0.0]}, beta=0.05)
    compared = comparison.compare([first, second, other])
    assert compared.header == [
        "run",
        "method",
        "beta",
        "seed",
        "valid",
        "bits",
        "KL",
        "slope",
        "length",
        "TV",
    ]
    assert compared.rows == [
        ["a", "MARA over answers", "0.1", "0", "0.900", "1.000", "1.38", "+0.050", "19.2", "0.000"],
        ["b", "MARA over answers", "0.1", "1", "0.900", "0.000", "2.00", "+0.000", "20.0", "0.500"],
        ["c", "MARA over strings", "0.05", "0", "0.900", "1.000", "1.38", "+0.050", "19.2", "-"],
        [
            "mean of 2", "MARA over answers", "0.1", "0, 1", "0.900", "0.500 ± 0.707", "1.69 ± 0.44",
            "+0.025 ± 0.035", "19.6 ± 0.6", "0.250 ± 0.354",
        ],
    ]  # fmt: skip
    lines = compared.markdown.splitlines()
    assert lines[1].count("---") == 10 and lines[2].startswith("| a | MARA over answers | 0.1 | 0 | 0.900 |")
    text = printed(compared.table)
    assert "…" not in text and "± 0.354" in text and "+0.050" in text


def test_searches_have_what_they_found_until_their_last_step(tmp_path):
    def search(name, seed, *found):
        last = dict(zip(("task/oracle_calls", "task/hits", "task/circles", "task/top10"), found, strict=True))
        return write_run(tmp_path / name, [*ROWS[:-1], ROWS[-1] | last], seed=seed)

    searches = [search("a", 0, 10_000.0, 300.0, 4.0, 0.5), search("b", 1, 9_000.0, 302.0, 4.0, 0.75)]
    compared = comparison.compare(searches)
    assert compared.header[-4:] == ["calls", "hits", "circles", "best ten"] and "oracle calls" in compared.note
    assert [cells[-4:] for cells in compared.rows] == [
        ["10,000", "300", "4", "0.500"], ["9,000", "302", "4", "0.750"],
        ["9,500 ± 707", "301 ± 1", "4", "0.625 ± 0.177"],
    ]  # fmt: skip
    beside = comparison.compare([searches[0], write_run(tmp_path / "c", ROWS)])
    assert beside.rows[1][-4:] == ["-", "-", "-", "-"]
    assert "calls" not in comparison.compare([tmp_path / "c"]).header


def change(workdir: Path, **fields) -> Path:
    """Puts fields of the run's config in place."""
    path = workdir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return workdir


def test_only_seeds_of_one_setting_are_averaged_and_each_once(tmp_path):
    def means(*runs):
        return [cells[0] for cells in comparison.compare(list(runs)).rows[len(runs) :]]

    first, second, again = (write_run(tmp_path / f"run{i}", ROWS, seed=seed) for i, seed in enumerate((0, 1, 0)))
    assert means(first, second) == means(first, second, again) == means(second, first, second) == ["mean of 2"]
    assert means(first, again) == []
    change(second, steps=200, mesh={"data": 2}, checkpoint={"every": 3})  # what a resumption may change
    assert means(first, second) == ["mean of 2"]
    change(second, rollout={"group_size": 8})
    assert means(first, second) == []
    change(first, rollout={"group_size": 8}, policy={"weights": str(tmp_path / "run2")})
    for weights, words in ((tmp_path / "run0" / ".." / "run2", ["mean of 2"]), (tmp_path / "run1", [])):
        assert means(first, change(second, policy={"weights": str(weights)})) == words


def test_a_run_that_made_its_reference_is_averaged_with_those_that_start_from_it(tmp_path):
    runs = [write_run(tmp_path / f"run{seed}", ROWS, seed=seed) for seed in range(3)]
    change(runs[0], policy={"weights": "a name", "scan_layers": False}, warmup={"steps": 6})
    (tmp_path / "run0" / "reference").mkdir()
    for run in runs[1:]:
        weights = str(tmp_path / "run0" / "reference")
        change(
            run, policy={"weights": weights, "scan_layers": True}, warmup={"steps": 0}, rollout={"length_buckets": 4}
        )
    assert [cells[0] for cells in comparison.compare(runs).rows[3:]] == ["mean of 3"]
    change(runs[2], warmup={"steps": 0}, policy={"weights": "another name"})
    assert [cells[0] for cells in comparison.compare(runs).rows[3:]] == ["mean of 2"]


def test_forward_kl_is_named_and_kept_apart(tmp_path):
    runs = [write_run(tmp_path / kl, ROWS, kl=kl) for kl in ("reverse", "forward")]
    assert [cells[1] for cells in comparison.compare(runs).rows] == [
        "MARA over answers", "MARA over answers, forward KL",
    ]  # fmt: skip


def test_comparing_nothing_or_an_unstarted_run_gives_one_line(tmp_path):
    with pytest.raises(ValueError, match="0 runs to compare"):
        comparison.compare([])
    with pytest.raises(ValueError, match="no finished step"):
        comparison.compare([write_run(tmp_path / "run", [])])
