"""What a resumed run must not lose."""

import json

import pytest

from mara_jax.train import checkpoint


def workdir(tmp_path, *, rows: int, saved: list[int], every: int = 4, steps: int = 10):
    """A run's folder with so many steps told and these checkpoints."""
    (tmp_path / "config.json").write_text(json.dumps({"steps": steps, "checkpoint": {"every": every}}))
    (tmp_path / "metrics.jsonl").write_text("{}\n" * rows)
    for step in saved:
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("rows", "saved", "steps"),
    [(3, [], 10), (10, [8, 10], 10), (9, [8], 20), (0, [], 10)],
    ids=["killed before the first checkpoint", "finished", "made longer", "nothing yet"],
)
def test_what_may_be_resumed(tmp_path, rows, saved, steps):
    assert checkpoint.check(workdir(tmp_path, rows=rows, saved=saved), steps) is None


def test_fewer_steps_than_done_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"steps=6, but .* has done 8: give at least 8"):
        checkpoint.check(workdir(tmp_path, rows=9, saved=[4, 8]), 6)


@pytest.mark.parametrize(("rows", "every"), [(4, 4), (10, 400)], ids=["one was due", "the last was due"])
def test_lost_checkpoints_do_not_cost_the_metrics(tmp_path, rows, every):
    with pytest.raises(ValueError, match=rf"tells of {rows} steps, but .* holds no checkpoint: put it back"):
        checkpoint.check(workdir(tmp_path, rows=rows, saved=[], every=every), 10)


def test_a_file_in_place_of_the_checkpoints_is_refused(tmp_path):
    (workdir(tmp_path, rows=2, saved=[]) / "checkpoints").write_text("")
    with pytest.raises(ValueError, match="checkpoints is not a folder"):
        checkpoint.check(tmp_path, 10)
