"""Two and four processes joined over loopback take a whole step together: what one process computes, written once."""

import json
import os
import pathlib
import subprocess
import sys

import hand_made_policy
import numpy as np
import pytest
from safetensors.numpy import load_file

HERE = pathlib.Path(__file__).parent
FIELDS = {
    "rollout.group_size": 16,
    "rollout.max_new_tokens": 10,
    "rollout.length_buckets": 0,
    "optimiser.learning_rate": 1e-3,
}
# By number of processes: data x fsdp x tensor. The slow tests have tensor axes, packed streams, and the command itself.
MESHES = {2: [1, 2, 1], 4: [2, 2, 1]}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ran(request, quick_environment, tmp_path_factory) -> tuple[pathlib.Path, int]:
    """The folder of a job of one process and of one of several, and how many: all are forks of one interpreter."""
    number = request.param
    jobs = [[1, None], [number, MESHES[number]]]
    out = tmp_path_factory.mktemp("jobs")
    weights = hand_made_policy.write(out / "small")
    asked = {"weights": str(weights), "steps": 1, "fields": FIELDS, "jobs": jobs}
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    environment = os.environ | quick_environment | {"PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, str(HERE / "processes_program.py"), json.dumps(asked), str(out)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    said = "".join(file.read_text(errors="replace")[-2000:] for file in sorted(out.glob("*/*.said")))
    assert done.returncode == 0 and json.loads(done.stdout) == [[0] * count for count, _ in jobs], done.stderr + said
    return out, number


def seen(folder: pathlib.Path, number: int) -> list[dict]:
    """What each process of a job saw."""
    return [json.loads((folder / str(number) / f"{index}.json").read_text()) for index in range(number)]


def test_a_step_of_several_processes_is_that_of_one(ran):
    folder, number = ran
    (alone,), together = seen(folder, 1), seen(folder, number)
    (expected,) = alone["rows"]
    assert 0 < expected["valid/fraction"] < 1  # rewards differ, so there is something to reduce over the group
    for one in together:
        (row,) = one["rows"]
        assert one["tokens"] == alone["tokens"]
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert row["grad/norm"] == pytest.approx(expected["grad/norm"], rel=1e-4)
        assert one["rows"] == together[0]["rows"]  # every process knows the same numbers
        for name, value in expected.items():
            assert isinstance(value, float) or row[name] == value, name


def test_several_processes_write_once(ran):
    jobs, number = ran
    folder, lines = jobs / str(number), []
    for job in (jobs / "1", folder):
        lines.append((job / "metrics.jsonl").read_text().splitlines())
        assert sorted(file.name for file in job.iterdir() if file.suffix not in (".json", ".said")) == [
            "metrics.jsonl",
            "model",
        ]
    assert len(lines[0]) == len(lines[1]) == 1
    assert json.loads(lines[1][0]) == seen(jobs, number)[0]["rows"][0]
    models = [load_file(job / "model" / "model.safetensors") for job in (jobs / "1", folder)]
    before = load_file(jobs / "small" / "model.safetensors")
    assert models[0].keys() == models[1].keys() == before.keys()
    moved = max(float(np.abs(models[0][name] - before[name]).max()) for name in before)
    assert moved > 5e-4  # Adam's first step is the learning rate
    # Where a gradient is rounding alone, Adam's first step is too: such entries may differ by more.
    apart = np.concatenate([np.abs(models[0][name] - models[1][name]).ravel() for name in before])
    assert np.mean(apart > 1e-6) < 1e-4
