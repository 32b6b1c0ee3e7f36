"""A threshold that moves: known rewards, numpy's percentile by another way, and what a window may not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.core import augment, moving_threshold

INF = float("inf")


def of(rewards, percentile=90.0, floor=-1e6, width=None) -> float:
    """The threshold after one batch of these rewards."""
    window = moving_threshold.empty(3, width or len(rewards))
    if len(rewards):
        window = moving_threshold.with_batch(window, jnp.array(rewards, jnp.float32)[None])
    return float(moving_threshold.threshold(window, percentile, floor))


@pytest.mark.parametrize(
    ("rewards", "percentile", "expected"),
    [
        (range(100), 90.0, 90),  # the ten best: 90 to 99
        (range(10), 90.0, 9),
        (range(11), 90.0, 9),  # a tenth of eleven, rounded up, is two
        (range(8), 75.0, 6),
        (range(8), 62.5, 5),
        ([0.0] * 6 + [1.0] * 4, 50.0, 1),  # the percentile is 0, the least reward: good is what lies above it
        ([0.0] * 9 + [1.0], 90.0, 1),
        ([-3.0, -2.0, -1.0], 10.0, -2),  # all three reach the percentile, but the least is never good
        ([2.0] * 5, 50.0, INF),  # nothing is above the least
        ([], 90.0, INF),  # no batch yet
    ],
)
def test_known_rewards(rewards, percentile, expected):
    assert of(list(rewards), percentile, width=len(list(rewards)) or 4) == expected


def test_no_reward_below_the_floor_is_good():
    assert of(range(10), floor=9.5) == 9.5 and of(range(10), floor=3.0) == 9
    assert of([0.0] * 9, floor=0.5) == INF


@pytest.mark.parametrize("percentile", [10.0, 50.0, 70.0, 87.5, 90.0, 99.9])
def test_the_share_that_is_good_is_the_best_part_rounded_up(percentile):
    """numpy's percentile takes another way: from below, with the next larger reward of two."""
    random = np.random.default_rng(0)
    for count in (3, 10, 64, 333):
        reward = random.normal(size=count).astype(np.float32)
        tau = of(reward, percentile)
        share = (100 - percentile) / 100
        assert np.sum(reward >= tau) == min(max(int(np.ceil(round(share * count, 9))), 1), count - 1)
        assert tau in reward and tau >= np.percentile(reward, percentile, method="lower")


def test_ranks_are_exact_for_counts_beyond_floats():
    """Seven tenths of ten are seven, not eight; counts near the end of int32 do not overflow."""
    for percentile, share in ((70.0, 3), (90.0, 1)):
        for count in (10, 2_000_000_010):
            assert int(moving_threshold.rank_of(jnp.int32(count), percentile)) == share * count // 10
    assert int(moving_threshold.rank_of(jnp.int32(2**31 - 1), 99.99)) == 214749


def test_the_window_holds_the_latest_batches_and_not_the_one_at_hand():
    window, taus = moving_threshold.empty(2, 2), []
    for batch in ([0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [-9.0, -8.0]):
        taus.append(float(moving_threshold.threshold(window, 50.0, -1e6)))
        window = moving_threshold.with_batch(window, jnp.array(batch)[:, None])
    # Nothing; of 0 1; of 0 1 2 3 the better half; of 2 3 4 5.
    assert taus == [INF, 1.0, 2.0, 4.0]
    np.testing.assert_array_equal(window, [[4, 5], [-9, -8]])


def test_what_is_left_out_of_the_update_is_no_reward():
    window = moving_threshold.empty(1, 4)
    window = moving_threshold.with_batch(window, jnp.array([[0.0, 5.0], [6.0, 7.0]]), jnp.array([[0, 1], [1, 1]]))
    assert float(moving_threshold.threshold(window, 50.0, 0.0)) == 6.0  # of 5 6 7 the better two, and 5 is the least
    reward, counted = jnp.array([[1.0, 1.0], [1.0, 1.0]]), jnp.array([[1, 0], [1, 1]])
    assert float(moving_threshold.groups_with_two(reward, 1.0)) == 1.0
    assert float(moving_threshold.groups_with_two(reward, 1.0, counted)) == 0.5


def test_neither_order_nor_shape_of_the_rewards_matters():
    """A planted dependence on the place of a reward, the oldest batch's, is caught by the same comparison."""
    random = np.random.default_rng(1)
    window = random.normal(size=(4, 12)).astype(np.float32)
    shuffled = random.permutation(window.ravel()).reshape(6, 8)

    def same(rule) -> bool:
        return float(rule(jnp.array(window))) == float(rule(jnp.array(shuffled)))

    assert same(jax.jit(lambda window: moving_threshold.threshold(window, 90.0, -1.0)))
    assert not same(lambda window: moving_threshold.threshold(window[1:], 90.0, -1.0))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_without_a_threshold_mara_changes_nothing(direction):
    """+inf is no number that rewards are reckoned with: nothing becomes NaN."""
    reward, ref = jnp.array([[1.0, 0.0, 3.0]]), jnp.array([[-1.0, -2.0, -3.0]])
    settings = {"beta": 0.1, "threshold": jnp.float32(INF), "direction": direction}
    answer, known = jnp.array([[0, 1, 1]]), (jnp.array([[1.0, 2.0]]), jnp.array([[0, 1]]))
    mass = augment.answer_log_mass(*known, 3, *settings.values())
    unseen = augment.unseen_log_mass(known[0], *settings.values())
    for after in (
        augment.mara(reward, ref, **settings),
        augment.mara_answers(reward, ref, answer, mass, unseen_log_mass=unseen, **settings),
    ):
        np.testing.assert_array_equal(after[0], reward)
        np.testing.assert_array_equal(after[1], ref)
