"""One device and 8 simulated ones, in three layouts: the same tokens and losses (slow)."""

import json
import os
import pathlib
import subprocess
import sys

import hand_made_policy
import numpy as np
import pytest

pytestmark = pytest.mark.slow

HERE = pathlib.Path(__file__).parent
LAYOUTS = [None, [8, 1, 1], [1, 8, 1], [2, 2, 2]]


def train(
    out: pathlib.Path, weights: pathlib.Path, layouts: list, steps: int, fields: dict, nudges=(), **environment
) -> list:
    asked = {"weights": str(weights), "layouts": layouts, "steps": steps, "fields": fields, "nudges": nudges}
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    environment = (
        os.environ
        | {
            "PYTHONPATH": paths,
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        | environment
    )
    done = subprocess.run(
        [sys.executable, str(HERE / "layouts_program.py"), json.dumps(asked), str(out)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def losses(run: dict) -> np.ndarray:
    return np.array([row["loss"] for row in run["rows"]])


def apart(run: dict, other: dict) -> np.ndarray:
    """Distances of losses at each step of equal tokens, 0 from there on."""
    return np.where(np.arange(len(run["rows"])) < run["differs"]["step"], np.abs(losses(run) - losses(other)), 0)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> pathlib.Path:
    return hand_made_policy.write(tmp_path_factory.mktemp("weights") / "small")


def test_ten_steps_of_nano(tmp_path):
    """From one and the same warmed-up reference: 10 steps as in the config, the same but for draws on a border.

    Losses are within 1e-5, or no farther apart than twice what one device's are once its weights change in their last
    digit: there are references from which a step makes ten times as much of any rounding.
    """
    workdir = tmp_path / "nano"
    command = [sys.executable, "-m", "mara_jax.main", "--config=configs/onetwo.py:nano", f"--workdir={workdir}"]
    done = subprocess.run([*command, "--config.steps=1"], cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fields = {
        "task.malformed": 0.25, "rollout.group_size": 32, "rollout.max_new_tokens": 48,
        "optimiser.learning_rate": 5e-4, "optimiser.decay_steps": 100,
    }  # fmt: skip
    found = train(tmp_path / "out", workdir / "reference", LAYOUTS, 10, fields, nudges=[1, 2, 3])
    alone, spread, moved = found[0], found[1 : len(LAYOUTS)], found[len(LAYOUTS) :]
    limit = np.maximum(1e-5, 2 * np.max([np.maximum.accumulate(apart(run, alone)) for run in moved], axis=0))
    print("limit", " ".join(f"{x:.1e}" for x in limit))
    assert limit.max() < 1e-4
    for run in spread:
        same, distance = run["differs"]["step"], apart(run, alone)
        print(f"{same} steps of equal tokens, losses apart by", *(f"{x:.1e}" for x in distance), run["differs"]["rows"])
        assert same >= 5
        assert np.all(distance <= limit)
        # Sums of float32 depend on their order. A token may differ where its uniform lies between the two runs' own
        # cumulative probabilities, and nowhere else; from there on the runs are two different ones.
        assert all(row["explained"] for row in run["differs"]["rows"]), run["differs"]


def test_a_whole_run_in_float64(small, tmp_path):
    """Beyond rounding: 30 steps agree to 1e-9."""
    fields = {
        "policy.compute_dtype": "float64", "rollout.group_size": 16, "rollout.max_new_tokens": 10,
        "rollout.length_buckets": 2, "optimiser.learning_rate": 1e-3,
    }  # fmt: skip
    alone, *spread = train(tmp_path / "out", small, LAYOUTS, 30, fields, JAX_ENABLE_X64="1")
    difference = [float(np.abs(losses(run) - losses(alone)).max()) for run in spread]
    print("largest difference of losses:", difference)
    assert abs(alone["rows"][-1]["kl/reverse"]) > 1e-2  # it went somewhere
    for run in spread:
        assert run["tokens"] == alone["tokens"]
        np.testing.assert_allclose(losses(run), losses(alone), rtol=0, atol=1e-9)
        np.testing.assert_allclose(run["params"], alone["params"], rtol=1e-8)


def test_micro_batches_and_reference_samples_are_spread_too(small, tmp_path):
    fields = {
        "rollout.group_size": 16, "rollout.max_new_tokens": 10, "rollout.length_buckets": 1,
        "optimiser.micro_batches": 2, "algorithm.kl": "forward", "optimiser.learning_rate": 5e-4,
        "policy.scan_layers": True,
    }  # fmt: skip
    alone, spread = train(tmp_path / "out", small, [None, [2, 2, 2]], 3, fields)
    assert spread["tokens"] == alone["tokens"]
    np.testing.assert_allclose(losses(spread), losses(alone), rtol=0, atol=1e-5)


def test_a_state_is_cut_and_stays_cut(small, tmp_path):
    """Bytes on each device, counted by hand: an eighth of parameters and moments, biases, which no axis cuts, whole."""
    fields = {"rollout.group_size": 8, "rollout.max_new_tokens": 4, "rollout.length_buckets": 1}
    (run,) = train(tmp_path / "out", small, [[1, 8, 1]], 2, fields)
    biases = 4 * 3 * (4 * 16 + 2 * 2 * 16)  # float32, the parameter and two moments
    steps = 4  # Adam's count
    (whole,), held = run["bytes_before"]
    assert held == [(whole - biases - steps) // 8 + biases + steps] * 8
    assert run["bytes_after"] == run["bytes_before"]


def test_a_moving_threshold_is_the_same_on_every_layout(small, tmp_path):
    """Rewards before a step are one multiset however devices hold them: equal numbers, not near ones."""
    fields = {
        "policy.compute_dtype": "float64", "rollout.group_size": 16, "rollout.max_new_tokens": 10,
        "rollout.length_buckets": 1, "optimiser.micro_batches": 1, "algorithm.anchor": "string",
        "algorithm.threshold": 0.02, "algorithm.threshold_percentile": 75.0, "algorithm.threshold_window": 2,
    }  # fmt: skip
    alone, *spread = train(tmp_path / "out", small, [None, [8, 1, 1], [2, 2, 2]], 4, fields, JAX_ENABLE_X64="1")
    taus = [row["mara/threshold"] for row in alone["rows"]]
    assert taus[0] == float("inf") and len(set(taus[1:])) > 1
    for run in spread:
        assert run["tokens"] == alone["tokens"]
        for name in ("mara/threshold", "mara/groups_with_two_good", "mara/augmented_fraction"):
            assert [row[name] for row in run["rows"]] == [row[name] for row in alone["rows"]]
