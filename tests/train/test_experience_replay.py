"""Experience replay: what is remembered and drawn, and the loss of a batch that holds replayed completions."""

import dataclasses
import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax import config
from mara_jax.config import Algorithm, LanguageRun, Optimiser, Rollout, Warmup
from mara_jax.core import method_rules
from mara_jax.core.scored import Numbers
from mara_jax.sampling import head
from mara_jax.tasks import onetwo
from mara_jax.train import replay, step
from mara_jax.train.replay import Remembered, Replay
from mara_jax.train.scoring import GroupScores
from mara_jax.train.state import Batch, BySampler

IDS, WIDTH = np.array([0]), 4


def completions_of(rows, finished=None):
    """One group, from lists of tokens."""
    tokens, lengths = np.zeros((1, len(rows), WIDTH), np.int32), np.array([[len(row) for row in rows]], np.int32)
    for place, row in enumerate(rows):
        tokens[0, place, : len(row)] = row
    ended = np.array([[True] * len(rows) if finished is None else finished])
    fields = replay.Rollout._fields
    known = {"tokens": tokens, "lengths": lengths, "finished": ended}
    return replay.Rollout(**{name: known.get(name) for name in fields})


def scores_of(rewards):
    return GroupScores(np.array([rewards], np.float32), [[str(reward) for reward in rewards]], {})


@pytest.fixture
def memory():
    """The best three of five: [1] is drawn twice, [9] was cut."""
    made = Replay(count=2, best=3, seed=0)
    made.add(IDS, completions_of([[1], [2, 2], [1], [9, 9, 9, 9]], [1, 1, 1, 0]), scores_of([0.5, 0.25, 0.5, 0.9]))
    made.add(IDS, completions_of([[3], [4, 0], [5]]), scores_of([1.0, 0.125, 0.25]))
    return made


def test_the_best_are_remembered_once_each_and_of_equal_ones_the_earlier(memory):
    assert memory.memory[0] == [
        Remembered((3,), 1.0, "1.0"), Remembered((1,), 0.5, "0.5"), Remembered((2, 2), 0.25, "0.25")
    ]  # fmt: skip


def test_nothing_is_drawn_before_there_are_more_than_are_wanted():
    made = Replay(count=2, best=3, seed=0)
    assert made.drawn(IDS, 0) is None
    made.add(IDS, completions_of([[1], [2], [3]]), scores_of([0.5, 0.25, 0.0]))
    assert made.drawn(IDS, 1) is None  # what has no reward is not drawn
    made.add(IDS, completions_of([[4]]), scores_of([0.1]))
    assert len(made.drawn(IDS, 2)[0]) == 2


def test_draws_are_in_proportion_to_rewards_without_repeats_and_a_function_of_the_step(memory):
    """Two of 1, 1/2, 1/4: the pair without the third comes with probability 4/7 * 2/3 + 2/7 * 4/5 = .6095."""
    pairs = [memory.drawn(IDS, done)[0] for done in range(2000)]
    assert all(len({one.tokens for one in pair}) == 2 for pair in pairs)
    share = np.mean([{one.reward for one in pair} == {1.0, 0.5} for pair in pairs])
    assert abs(share - (4 / 7 * 2 / 3 + 2 / 7 * 4 / 5)) < 4 * np.sqrt(0.24 / 2000)
    again = Replay(2, 3, 0)
    again.restore(json.loads(json.dumps(memory.state())))
    assert again.memory == memory.memory and [again.drawn(IDS, done)[0] for done in range(50)] == pairs[:50]
    other = Replay(2, 3, 1)
    other.restore(memory.state())
    assert [other.drawn(IDS, done)[0] for done in range(50)] != pairs[:50]


def test_replayed_completions_stand_behind_the_groups_own(memory):
    (group,) = drawn = [[memory.memory[0][2], memory.memory[0][0]]]
    joined = replay.joined(completions_of([[7, 0], [8]]), drawn)
    np.testing.assert_array_equal(joined.tokens, [[[7, 0, 0, 0], [8, 0, 0, 0], [2, 2, 0, 0], [3, 0, 0, 0]]])
    np.testing.assert_array_equal(joined.lengths, [[2, 1, 2, 1]])
    scores = replay.joined_scores(scores_of([0.75, 0.0]), drawn)
    np.testing.assert_array_equal(scores.reward, [[0.75, 0, 0.25, 1]])
    assert scores.answer == [["0.75", "0.0", *(one.answer for one in group)]]


def test_the_loss_is_a_mean_over_all_and_metrics_are_of_the_policys_own():
    """REINVENT by hand, beta 1/2: gaps of log ref + 2 R - log pi."""
    logp, ref = np.array([[-1.0, -2.0, -4.0]]), np.array([[-1.5, -2.0, -3.0]])
    reward = np.array([[0.5, 0.0, 1.0]], np.float32)
    numbers = jnp.ones((1, 3), jnp.int32)
    stats = head.Stats(*(jnp.asarray(x, jnp.float32)[..., None] for x in (logp, logp, ref, [[0.1, 0.3, 9.0]])))
    batch = Batch(
        None, None, numbers[..., None], numbers, jnp.asarray(reward), -numbers, numbers[0, :1], None, replayed=1
    )
    algorithm = method_rules.resolved(Algorithm(method="reinvent"))
    choices = step.Choices(None, algorithm, None)
    value, auxiliary = step._loss_of_stats(BySampler(stats), BySampler(batch), Numbers(0.5, 0.8), choices, None, None)
    np.testing.assert_allclose(value, np.mean((ref + 2 * reward - logp) ** 2), rtol=1e-6)
    metrics = auxiliary.metrics
    want = {"reward/mean": 0.25, "logp/mean": -1.5, "kl/k1": (0.5 + 0) / 2, "kl/reverse": 0.2, "length/mean": 1}
    assert {name: float(metrics[name]) for name in want} == pytest.approx(want)
    np.testing.assert_allclose(metrics[step.REF_LOGP], ref[:, :2])
    whole = dataclasses.replace(batch, replayed=0)
    _, auxiliary = step._loss_of_stats(BySampler(stats), BySampler(whole), Numbers(0.5, 0.8), choices, None, None)
    assert float(auxiliary.metrics["reward/mean"]) == pytest.approx(0.5)


def test_a_moving_threshold_counts_the_policys_own_rewards():
    """Replayed completions were chosen for their reward: the window of the next threshold has none of them."""
    reward, window = jnp.asarray([[0.5, 0.1, 1.0]]), jnp.asarray([[0.2, 0.4]])
    batch = Batch(*[None] * 4, reward, *[None] * 3, replayed=1)
    algorithm = Algorithm(threshold_percentile=50.0)
    moved, after, metrics = step._at_moved_threshold(window, batch, Numbers(0.5, 0.0), algorithm)
    assert float(moved.threshold) == pytest.approx(0.4) and after.tolist() == [reward[0, :2].tolist()]
    assert float(metrics["mara/groups_with_two_good"]) == 0.0


def run_with(algorithm=None, rollout=None, **sections) -> LanguageRun:
    return LanguageRun(
        algorithm=Algorithm(**(algorithm or {})), rollout=Rollout(**(rollout or {})), warmup=Warmup(steps=1),
        task=onetwo.Config(), **sections,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (run_with({}, {"replay": 4}), "takes completions for the policy's own"),
        (run_with({"method": "trajectory_balance"}, {"replay": 4}), "algorithm.method=vargrad"),
        (run_with({"method": "reinvent"}, {"replay": 100}), "is not below rollout.replay_best=100"),
        (run_with({"method": "vargrad"}, {"replay": 3}, optimiser=Optimiser(micro_batches=2)), "must divide"),
        (run_with({"method": "vargrad", "likelihood_penalty": 1.0}), "is a term of algorithm.objective=reinvent alone"),
        (run_with({"likelihood_penalty": 1.0}), "is a term of algorithm.objective=reinvent alone"),
    ],
)
def test_replay_and_penalty_beside_what_does_not_take_them_are_refused(run, words):
    with pytest.raises(ValueError) as caught:
        config.check(run)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_replay_beside_squared_gaps_is_accepted():
    config.check(run_with({"method": "reinvent", "likelihood_penalty": 5e3}, {"replay": 24}))
    config.check(run_with({"method": "vargrad", "transform": "mara_strings"}, {"replay": 24}))


def test_a_penalty_has_no_known_optimum_and_says_so():
    algorithm = Algorithm(method="reinvent", likelihood_penalty=5e3)
    assert "it does not end at G" in method_rules.describe(algorithm)
    assert method_rules.forecast_method(algorithm) is None
    assert method_rules.optimum(algorithm, SimpleNamespace(), Numbers(1.0, 0.5), 4) is None
