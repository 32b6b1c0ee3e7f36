"""Runs whose threshold is a percentile of earlier rewards: thresholds by hand, resumed bit for bit, one program."""

import dataclasses
import json
import math

import chex
import jax
import numpy as np
import pytest
import test_loop
import test_updates
from test_loop import rows_of, trained

from mara_jax import config
from mara_jax.config import Algorithm, LanguageRun, Population, Rollout, ToyRun
from mara_jax.core import method_rules
from mara_jax.predict import reference_samples
from mara_jax.tasks import onetwo
from mara_jax.tasks.base import Score
from mara_jax.train import checkpoint, reference, rollouts, step, warnings
from mara_jax.train.state import BySampler, Hyperparameters, Remembered, remembered

setup = test_loop.setup  # the fixture
MOVING = Algorithm(method="mara", anchor="string", threshold=0.05, threshold_percentile=50.0, threshold_window=2)
TWO_PROMPTS = dataclasses.replace(test_loop.RUN.rollout, prompts_per_step=2)
RUN = dataclasses.replace(test_loop.RUN, algorithm=MOVING, rollout=TWO_PROMPTS)


class Graded(test_loop.Ended):
    """Rewards that depend on the completion, its place and the step: seldom two equal ones."""

    def score_in_run(self, prompt_index, texts, finished, context) -> Score:
        score = self.score(prompt_index, texts, finished)
        place = np.arange(len(texts))
        return Score(np.asarray(score.reward) + 0.01 * ((7 * place + 3 * context.step) % 11), score.answer)


@pytest.fixture(scope="module")
def whole(setup, tmp_path_factory):
    """A run from beginning to end, and how many programs its updates were."""
    workdir, before = tmp_path_factory.mktemp("moving") / "run", step.update._cache_size()
    with pytest.MonkeyPatch.context() as patch:
        trained(patch, setup, workdir, Graded(), RUN)
    return workdir, step.update._cache_size() - before


def test_thresholds_are_the_percentiles_of_the_two_steps_before(whole):
    """By sorting what the run has stored; the eight rewards of a step, of two prompts, go into one window."""
    workdir, _ = whole
    table = rollouts.read(workdir)
    steps, rewards = (table[name].to_numpy() for name in ("step", "reward"))
    for row in rows_of(workdir):
        own = rewards[steps == row["step"]].astype(np.float32).reshape(2, 4)
        before = np.sort(rewards[(steps < row["step"]) & (steps >= row["step"] - 2)])[::-1].astype(np.float32)
        if not len(before):
            assert row["step"] == 1 and row["mara/threshold"] is None
            assert row["mara/augmented_fraction"] == row["mara/groups_with_two_good"] == 0
            assert row["reward/augmented_mean"] == row["reward/mean"]
            continue
        tau = max(before[len(before) // 2 - 1], np.float32(0.05))
        assert before[-1] < row["mara/threshold"] == float(tau)
        assert row["mara/groups_with_two_good"] == np.mean((own >= tau).sum(axis=1) >= 2)
    assert len({row["mara/threshold"] for row in rows_of(workdir)}) > 3
    assert any(row["mara/augmented_fraction"] > 0 for row in rows_of(workdir))


def test_a_moving_threshold_compiles_nothing(whole):
    """As many programs as there are shapes of a step's prompts and packed sequences: not one a threshold."""
    assert whole[1] <= 2


def arrays_of(workdir) -> dict[str, bytes]:
    """The bytes of every array of the last checkpoint's rows, and its files of completions."""
    return {path.name: path.read_bytes() for path in sorted((workdir / rollouts.FOLDER).iterdir())}


@pytest.mark.parametrize("planted", [False, True])
def test_stopped_at_a_checkpoint_and_resumed_is_the_same_bit_for_bit(monkeypatch, setup, whole, tmp_path, planted):
    """A planted error, a window that begins anew, is seen in the rows."""
    task = Graded()
    task.fails = 4  # the fourth step's verdict: the last checkpoint is of step 2
    with pytest.raises(KeyboardInterrupt):
        trained(monkeypatch, setup, tmp_path, task, RUN)
    assert checkpoint.saved_steps(tmp_path) == [2]
    restore = checkpoint.Checkpoints.restore
    if planted:

        def forgets(self, state, number=None):
            restored = restore(self, state, number)
            return restored.replace(rewards=jax.numpy.full_like(restored.rewards, -jax.numpy.inf))

        monkeypatch.setattr(checkpoint.Checkpoints, "restore", forgets)
    trained(monkeypatch, setup, tmp_path, Graded(), RUN)
    same = rows_of(tmp_path) == rows_of(whole[0]) and arrays_of(tmp_path) == arrays_of(whole[0])
    assert same is not planted


def test_the_update_puts_its_batch_into_the_window_after_it_has_used_the_others(setup):
    """The batch's own rewards change neither its threshold nor its signal; several updates make one step."""
    batch, tx = test_updates.batch(), test_updates._adam()
    algorithm = dataclasses.replace(MOVING, beta=test_updates.BETA, importance="sequence", threshold=-10.0)
    window = np.array([[-math.inf] * 4, [0.5, 0.6, 0.7, 0.9]], np.float32)
    # Of four rewards the better half begins at .7: the completions with 1 and .8 are good.
    fixed = Hyperparameters(np.float32(test_updates.BETA), np.float32(0.7))
    hyper = fixed._replace(threshold=np.float32(-10.0))
    choices = step.Choices(test_updates.ARCH, algorithm, tx, 1, 2)
    ref = test_updates.params_of(2)
    state = test_updates.fresh(tx).replace(rewards=jax.numpy.array(window))
    moved, metrics = step.update(state, ref, BySampler(batch), hyper, choices)
    constant, others = step.update(test_updates.fresh(tx), ref, BySampler(batch), fixed, choices)
    assert float(metrics.pop("mara/threshold")) == np.float32(0.7)
    assert float(metrics.pop("mara/groups_with_two_good")) == 1.0
    chex.assert_trees_all_close((moved.params, metrics), (constant.params, others), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(moved.rewards, np.array([window[1], [1.0, 0.0, 0.8, 0.3]], np.float32))


def run_with(**fields) -> LanguageRun:
    return LanguageRun(algorithm=Algorithm(**fields), rollout=Rollout(group_size=16), task=onetwo.Config())


def refused(run, *words) -> None:
    with pytest.raises(ValueError) as caught:
        config.check(run)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_with_fewer_than_two_good_completions_a_group_are_refused():
    few = run_with(threshold_percentile=90.0)
    refused(few, "makes 1.6 completions of a group good", "rollout.group_size=20 or more", "threshold_percentile=87.5")
    config.check(dataclasses.replace(few, rollout=Rollout(group_size=20), policy=config.Policy(weights="x")))
    config.check(dataclasses.replace(run_with(threshold_percentile=87.5), policy=config.Policy(weights="x")))
    one = dataclasses.replace(few, rollout=Rollout(group_size=2))
    refused(one, "makes 0.2 completions", "use rollout.group_size=20 or more")
    # RAFT keeps a lone one; vanilla has no threshold.
    for method in ("raft", "vanilla"):
        run = run_with(method=method, threshold_percentile=90.0)
        config.check(dataclasses.replace(run, policy=config.Policy(weights="x")))
    # The bound of the message: with two good completions of g on average, the share of groups with two or more.
    shares = [1 - (1 - 2 / g) ** g - 2 * (1 - 2 / g) ** (g - 1) for g in range(3, 2000)]
    assert min(shares) > 1 - 3 * math.exp(-2) > 0.59 and min(shares) < 0.595


def test_what_has_no_effect_or_no_meaning_is_refused():
    refused(run_with(threshold_window=4), "algorithm.threshold_window=4 has no effect")
    refused(run_with(threshold_percentile=100.0), "algorithm.threshold_percentile=100.0 must be at least 0")
    refused(ToyRun(algorithm=Algorithm(anchor="string", threshold_percentile=50.0)), "is for runs of language models")
    with pytest.raises(ValueError, match=r"a prediction is of one constant threshold.*--threshold=R"):
        reference_samples.settings_of(run_with(threshold_percentile=50.0))
    vanilla = run_with(method="vanilla", threshold_percentile=50.0)
    assert reference_samples.settings_of(vanilla).threshold == 0.8
    fixed = reference_samples.at_constant_threshold(run_with(threshold_percentile=50.0, threshold_window=3), 0.3)
    assert reference_samples.settings_of(fixed) == ("answers", "reverse", 0.1, 0.3)


def test_what_a_run_remembers():
    run = run_with(threshold_percentile=50.0, threshold_window=3)
    assert remembered(run, 5) == Remembered(0, (3, 16)) and remembered(run_with(), 5) == Remembered()
    assert remembered(run_with(method="vanilla", threshold_percentile=50.0), 5) == Remembered()
    balance = run_with(method="trajectory_balance")
    assert remembered(balance, 5) == Remembered(5)


def test_there_is_no_forecast_and_a_run_says_so():
    run = run_with(threshold_percentile=87.5)
    assert method_rules.forecast_method(run.algorithm) is None
    words = reference.describe(run.algorithm)
    assert "good are the best 12.5 % of the rewards of the 8 steps before, from 0.8 on" in words
    line = warnings.of_moving_threshold(run)
    assert line and line.startswith("WARNING: the threshold moves") and "\n" not in line
    assert warnings.of_moving_threshold(run_with()) is None
    assert warnings.of_moving_threshold(run_with(method="vanilla", threshold_percentile=50.0)) is None


def test_groups_with_lone_good_completions_are_told_after_three_steps():
    run = dataclasses.replace(run_with(threshold_percentile=87.5), steps=9)

    def said(shares, tau=1.0):
        watch, lines = warnings.Warnings(run, onetwo.OneTwo()), []
        for number, share in enumerate(shares, 1):
            row = {"step": number, "completions/truncated": 0, "completions/commonest": 0.1}
            row |= {"mara/threshold": tau, "mara/groups_with_two_good": share}
            lines += watch.of_step(row, np.array([0]), np.array([[0.0, 1.0, 2.0]]))
        return lines

    (line,) = said([0.4] * 5)
    assert "only 40% of the groups have two completions" in line and "threshold_percentile=87.5" in line
    assert said([0.4, 0.4, 0.6] * 3) == [] and said([0.0] * 9, math.inf) == []


def test_members_of_a_population_have_windows_of_their_own():
    run = dataclasses.replace(
        run_with(threshold_percentile=50.0),
        population=Population(methods=("mara", "vanilla"), thresholds=(0.0, 0.5)),
        policy=config.Policy(weights="x"),
    )
    config.check(run)
    assert [remembered(member.run, 1).rewards for member in config.members(run)] == [(8, 16)] * 2 + [(0, 0)] * 2


def test_json_has_null_before_there_is_a_threshold(whole):
    first = (whole[0] / "metrics.jsonl").read_text().splitlines()[0]
    assert '"mara/threshold": null' in first and json.loads(first)["mara/groups_with_two_good"] == 0
