"""A study of many runs is its single runs, whatever the chunks and the devices, and covers what it says."""

import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.toy import phase_diagram, problems, study, training

VARIANTS = (
    training.Choices(method="mara", steps=40, every=20),
    training.Choices(direction="forward", steps=40, every=20),
)


def plan(**changes):
    settings = {
        "variants": VARIANTS,
        "problems": (problems.figure2(), problems.figure6()),
        "betas": (0.1, 1.0),
        "thresholds": (0.5, 0.9),
        "seeds": (3, 4, 5),
        "learning_rate": 5e-2,
    }
    return study.Plan(**(settings | changes))


@pytest.fixture(scope="module")
def whole():
    return study.run(plan())


def test_every_run_is_the_single_run_of_its_settings(whole):
    assert whole["logp_a"].shape == (2, 2, 2, 2, 3, 100) and whole["reward_s"].shape == (2, 2, 2, 2, 3, 2)
    for at in [(0, 0, 0, 1, 2), (1, 1, 1, 0, 0), (0, 1, 0, 0, 1)]:
        v, p, b, t, s = at
        problem = plan().problems[p]
        swept = training.Swept(plan().betas[b], plan().thresholds[t], 5e-2, plan().seeds[s])
        single = training.train(problem.ref_logp, problem.reward, swept, VARIANTS[v])
        for name in training.Run._fields:
            np.testing.assert_allclose(whole[name][at], getattr(single, name), atol=1e-6, rtol=2e-5, err_msg=name)
    assert np.ptp(whole["logp_a"][0, 0, 0, 0], axis=0).max() > 1e-2  # seeds differ


def test_chunks_change_nothing_and_progress_counts_runs(whole):
    calls = []
    cut = study.run(plan(chunk=7), progress=lambda done, total: calls.append((done, total)))
    for name, array in whole.items():
        np.testing.assert_allclose(cut[name], array, atol=1e-6, rtol=2e-5, err_msg=name)
    assert calls == [(14, 48), (28, 48), (42, 48), (48, 48)]


ON_DEVICES = """
import json, sys
sys.path[:0] = {folders!r}
import jax, test_study as t
assert len(jax.devices()) == 4
ended = t.study.run(t.plan())
print(json.dumps(ended["logp_a"].tolist()))
"""


def test_devices_change_nothing(whole, quick_environment):
    """24 runs a variant over four devices, in a process of its own that has them."""
    flags = quick_environment["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
    environment = os.environ | quick_environment | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    script = ON_DEVICES.format(folders=[str(folder) for folder in pathlib.Path(__file__).parents[:2]])
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    got = np.array(json.loads(done.stdout.splitlines()[-1]), np.float32)
    np.testing.assert_allclose(got, whole["logp_a"], atol=1e-6, rtol=2e-5)


def test_coverage_uses_each_problem_and_threshold(whole):
    """Of the uniform policy, 1 whatever is good; of a trained one, by the definition."""
    at = (0, 0, 1, 1, 0)
    p = np.exp(whole["logp_a"][at][problems.figure2().reward >= 0.9].astype(float))
    p /= p.sum()
    np.testing.assert_allclose(whole["coverage"][at], np.exp(-np.sum(p * np.log(p))) / len(p), rtol=1e-5)
    still = study.run(plan(learning_rate=0.0, seeds=(0,)))
    np.testing.assert_allclose(still["coverage"], 1, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"betas": ()}, "the study has 0 betas"),
        ({"chunk": 0}, "chunk 0 is not a number of runs"),
        ({"variants": (training.Choices(baseline="best"),)}, "'best' is not known"),
        (
            {"problems": (problems.figure2(), problems.Problem("two", jnp.zeros(2), jnp.zeros(2), 0.5))},
            "2 and 100 outcomes",
        ),
    ],
)
def test_plans_that_cannot_run_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        study.run(plan(**changes))


SMALL = ("--config.sweep.betas=(0.1,1.0)", "--config.sweep.gaps=(0.0,0.25)", "--config.sweep.seeds=2")


def test_the_command_writes_what_it_trained(main, tmp_path):
    """A tiny study: numbers, axes, picture; every array is that of the same plan."""
    done = main("--config=configs/toy.py:sweep", f"--workdir={tmp_path / 'run'}", *SMALL, "--config.steps=20")
    assert done.returncode == 0, done.stderr
    assert "32 runs of 20 steps: 4 variants x 2 gaps x 2 betas x 1 thresholds x 2 seeds" in done.stdout
    axes = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [v["kl"] for v in axes["variants"]] == ["reverse", "forward"] * 2 and axes["gaps"] == [0.0, 0.25]
    with np.load(tmp_path / "run" / "sweep.npz") as arrays:
        swept = training.Swept(0.1, 0.4, 2e-2, 1)
        problem = problems.figure2(left=0.75)
        choices = training.Choices(method="mara", direction="forward", baseline="leave_one_out", steps=20)
        single = training.train(problem.ref_logp, problem.reward, swept, choices)
        np.testing.assert_allclose(arrays["logp_a"][3, 1, 0, 0, 1], single.logp_a, atol=1e-5)
    assert (tmp_path / "run" / "phase.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.toy.figure=6", "sweep.gaps means nothing for toy.figure=6"),
        ("--config.sweep.betas=(0.1,-1.0)", "must be numbers above 0 and at most 1e6"),
        ("--config.sweep.methods=('best',)", "sweep.methods='best' is unknown: choose one of vanilla, reinforce, mara"),
        ("--config.algorithm.baseline=mean", "algorithm.baseline='mean' shrinks the reward's gradient"),
    ],
)
def test_the_command_refuses_what_it_cannot_train(main, tmp_path, flag, message):
    done = main("--config=configs/toy.py:sweep", f"--workdir={tmp_path / 'other'}", *SMALL, flag)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "other").exists()


def test_cells_of_the_phase_diagram_meet_half_way():
    np.testing.assert_allclose(phase_diagram.edges([1.0, 2.0, 4.0]), [0.5, 1.5, 3.0, 5.0])
    np.testing.assert_allclose(phase_diagram.edges([3.0]), [2.5, 3.5])
