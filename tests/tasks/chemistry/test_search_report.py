"""What a search leaves: the table in the order of the calls, and the best of each circle, best first."""

import csv

from mara_jax.tasks.chemistry import metrics, report

SERIES = {"CCO": 0.2, "c1ccccc1": 0.9, "Cc1ccccc1": 0.95, "CCCCCCCC": 0.8, "CCCCCCC": 0.7, "N#CC1CC1": 0.8}


def test_the_table_and_the_words(tmp_path):
    words = report.write(SERIES, 0.5, tmp_path)
    assert words.startswith("6 molecules, 5 hits (score from 0.5), ") and "best 0.950: Cc1ccccc1" in words
    with (tmp_path / report.TABLE).open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["smiles"], float(row["score"])) for row in rows] == list(SERIES.items())
    assert [row["oracle_call"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert (tmp_path / report.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_the_best_of_each_circle_comes_first():
    hits = sorted((smiles for smiles in SERIES if SERIES[smiles] >= 0.5), key=lambda smiles: -SERIES[smiles])
    taken = report.best_of_circles(hits)
    assert taken[0] == "Cc1ccccc1" and "CCCCCCCC" in taken and "CCCCCCC" not in taken  # heptane lies in octane's circle
    assert len(taken) == metrics.circles(hits)


def test_a_search_without_a_call_has_no_picture(tmp_path):
    assert report.write({}, 0.5, tmp_path) == "0 molecules, 0 hits (score from 0.5), 0 circles"
    assert not (tmp_path / report.PICTURE).exists()
