"""Runs of configs/chemistry.py with a tiny prior: killed and resumed, ended by the budget, and with another oracle."""

import csv
import json

import pytest
import small_prior
from small_run import refused, rows

pytestmark = pytest.mark.slow

# It ends the process, once, at its first molecule after the checkpoint of step 2 of the run that a file names.
ORACLE = """
import os, pathlib
ARMED = pathlib.Path(__file__).with_name("armed")

def score(smiles):
    if ARMED.exists() and pathlib.Path(ARMED.read_text(), "checkpoints", "2").is_dir():
        ARMED.unlink()
        os._exit(9)
    return [min(one.count("C") / 4, 1.0) for one in smiles]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("molecules")
    small_prior.random_prior(place / "prior")
    (place / "oracle.py").write_text(ORACLE)
    return place


@pytest.fixture
def flags(folder):
    return f"""--config=configs/chemistry.py --config.policy.weights={folder}/prior --config.rollout.group_size=16
        --config.rollout.max_new_tokens=8 --config.rollout.length_buckets=1 --config.algorithm.transform=mara_answers
        --config.algorithm.threshold=.2 --config.algorithm.threshold_percentile=75 --config.algorithm.beta=.05
        --config.optimiser.learning_rate=1e-2
        --config.task.oracle={folder}/oracle.py:score --config.task.answer=scaffold --config.task.bucket_size=4
        --config.task.bucket_score=.2 --config.task.hit=.5 --config.checkpoint.every=2 --config.steps=6
        --config.rollout.replay=2""".split()


def last_state(workdir):
    """What the newest file beside a checkpoint holds."""
    return json.loads(max((workdir / "task_state").iterdir()).read_text())


def test_a_run_that_is_killed_and_resumed_is_the_run_that_is_not(main, folder, flags, tmp_path):
    assert main(*flags, f"--workdir={tmp_path / 'whole'}").returncode == 0
    (folder / "armed").write_text(str(tmp_path / "parts"))
    killed = main(*flags, f"--workdir={tmp_path / 'parts'}")
    assert killed.returncode == 9 and not (folder / "armed").exists()
    assert 2 <= len(rows(tmp_path / "parts")) < 6
    done = main(*flags, f"--workdir={tmp_path / 'parts'}")
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout and "circles" in done.stdout
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert last_state(tmp_path / "parts") == last_state(tmp_path / "whole")
    kept = last_state(tmp_path / "whole")
    calls = [row["task/oracle_calls"] for row in rows(tmp_path / "whole")]
    assert calls == sorted(calls) and calls[-1] == len(kept["task"]["calls"]["series"]) > calls[0]
    assert kept["known_strings"]["log_mass"] and kept["task"]["filter"]["molecules"] and len(kept["replay"][0][1]) > 2
    assert any(row["task/filtered"] > 0 for row in rows(tmp_path / "whole"))
    with (tmp_path / "whole" / "molecules.csv").open() as file:
        table = [(one["smiles"], float(one["score"])) for one in csv.DictReader(file)]
    assert table == [tuple(entry) for entry in kept["task"]["calls"]["series"]]
    assert (tmp_path / "whole" / "molecules.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_ends_with_its_budget_and_has_nothing_left_to_do(main, flags, tmp_path):
    flags = [*flags, "--config.steps=30", "--config.task.budget=9", f"--workdir={tmp_path / 'run'}"]
    first = main(*flags)
    assert first.returncode == 0, first.stderr
    made, kept = rows(tmp_path / "run"), last_state(tmp_path / "run")
    assert len(made) < 30 and made[-1]["task/oracle_calls"] == 9 == len(kept["task"]["calls"]["series"])
    assert kept["step"] == len(made)
    again = main(*flags)
    refused(again, f"no step is left: {tmp_path / 'run'} has ended after step {len(made)}")
    refused(main(*flags, "--config.steps=31"), "ask for more by --config.steps, which its task does not allow")
    assert rows(tmp_path / "run") == made and last_state(tmp_path / "run") == kept


def test_a_run_is_not_resumed_with_another_oracle(main, flags, tmp_path):
    flags = [*flags, "--config.steps=1", f"--workdir={tmp_path / 'run'}"]
    assert main(*flags).returncode == 0
    refused(main(*flags, "--config.task.oracle=qed"), "task.oracle")
