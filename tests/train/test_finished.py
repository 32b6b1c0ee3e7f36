"""A run that has nothing left to do says so, and only such a run."""

import json

import pytest

from mara_jax.train import finished


def run(workdir, *saved: int):
    """A folder with checkpoints of these steps."""
    for step in saved:
        (workdir / "checkpoints" / str(step)).mkdir(parents=True)
    return workdir


def test_a_finished_run_is_refused_unless_more_is_asked_for(tmp_path):
    run(tmp_path, 4, 6)
    assert finished.check(tmp_path, 6) is None
    finished.record(tmp_path, 6)
    assert json.loads((tmp_path / "finished.json").read_text()) == {"steps": 6, "newest": {".": 6}}
    with pytest.raises(ValueError, match=r"^no step is left: .* ended after step 6 \(steps=6\): ask for more by --con"):
        finished.check(tmp_path, 6)
    assert finished.check(tmp_path, 7) is None


def test_a_run_that_its_task_has_ended_cannot_be_made_longer(tmp_path):
    finished.record(run(tmp_path, 4), 6)
    for steps in (6, 7):
        with pytest.raises(ValueError, match=r"after step 4 .* which its task does not allow"):
            finished.check(tmp_path, steps)


def test_a_run_whose_newest_checkpoint_has_gone_has_steps_left(tmp_path):
    finished.record(run(tmp_path, 4, 6), 6)
    (tmp_path / "checkpoints" / "6").rmdir()
    assert finished.check(tmp_path, 6) is None
    (tmp_path / "checkpoints" / "4").rmdir()
    assert finished.check(tmp_path, 6) is None


def test_of_a_population_every_member_counts(tmp_path):
    for name in "ab":
        run(tmp_path / "members" / name, 6)
    finished.record(tmp_path, 6)
    with pytest.raises(ValueError, match="no step is left"):
        finished.check(tmp_path, 6)
    (tmp_path / "members" / "b" / "checkpoints" / "6").rmdir()
    assert finished.check(tmp_path, 6) is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"steps": null, "newest": {}}', '{"steps": 6, "newest": {}}'])
def test_a_file_that_says_nothing_refuses_nothing(tmp_path, content):
    (run(tmp_path, 6) / "finished.json").write_text(content)
    assert finished.check(tmp_path, 6) is None
