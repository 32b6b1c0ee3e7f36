"""What an anchor taken from the batch costs: its exact bias, and where sampled training ends."""

import itertools

import anchor_bias
import jax
import numpy as np
import pytest
import sampled_training
from scipy import special

from mara_jax.core import advantages, augment, targets


@pytest.mark.parametrize("baseline, size", [("none", 1), ("none", 3), ("leave_one_out", 2), ("leave_one_out", 3)])
def test_gradients_by_counting(x64, baseline, size):
    """Groups as counts with multinomial weights, and the policy gradient written out, without any loss."""
    logits = np.random.default_rng(1).normal(size=5)
    logp = logits - np.logaddexp.reduce(logits)
    rows = np.array(list(itertools.combinations_with_replacement(range(5), size)))
    counts = np.stack([(rows == a).sum(-1) for a in range(5)], -1)
    log_orders = special.gammaln(size + 1) - special.gammaln(counts + 1).sum(-1)
    reward = augment.mara(
        anchor_bias.REWARD[rows], anchor_bias.REF_LOGP[rows], beta=0.3, threshold=anchor_bias.THRESHOLD
    )[0]
    signal = np.asarray(reward) - 0.3 * (logp - anchor_bias.REF_LOGP)[rows]
    weight = np.exp(log_orders + counts @ logp)[:, None] / size * np.asarray(advantages.BY_NAME[baseline](signal))
    share = np.array([weight[rows == a].sum() for a in range(5)])
    got = jax.jit(anchor_bias.gradient(size, "group", baseline))(logits[None], 0.3)[0]
    np.testing.assert_allclose(got, share - np.exp(logp) * share.sum(), atol=1e-12)


def test_entries_of_the_table(x64):
    # A group of one is its own anchor: what remains is the vanilla optimum, .6/.3/.05 over .95.
    end = anchor_bias.end(1, "group", "none", 0.1)
    vanilla = targets.reverse_kl(anchor_bias.REF_LOGP, anchor_bias.REWARD, 0.1)
    np.testing.assert_allclose(end, vanilla, atol=1e-6)
    np.testing.assert_allclose(anchor_bias.distance(end, 0.1), 0.298, atol=5e-4)
    for size, baseline, beta, want in (
        (2, "none", 0.1, 0.130),
        (4, "none", 0.1, 0.044),
        (2, "leave_one_out", 1.0, 0.021),
    ):
        end = anchor_bias.end(size, "group", baseline, beta)
        np.testing.assert_allclose(anchor_bias.distance(end, beta), want, atol=6e-4)
    np.testing.assert_allclose(anchor_bias.gradient_error(2, "leave_one_out", 0.1), 0.093, atol=6e-4)


def test_with_the_anchor_over_the_good_set_the_stationary_point_is_equation_13(x64):
    for baseline, size in (("none", 2), ("leave_one_out", 3)):
        assert anchor_bias.distance(anchor_bias.end(size, "all", baseline, 1.0), 1.0) < 1e-8


def test_leave_one_out_cancels_the_anchor_in_a_group_of_good_samples():
    reward, ref_logp = np.ones((1, 4)), np.array([[-1.0, -5.0, -9.0, -2.0]])
    near, _ = augment.mara(reward, ref_logp, beta=0.3, threshold=0.8)
    far, _ = augment.mara(reward, ref_logp, beta=0.3, threshold=0.8, anchor_reward=1.0, anchor_ref_logp=7.0)
    np.testing.assert_allclose(advantages.leave_one_out(near), advantages.leave_one_out(far), atol=1e-5)


@pytest.mark.parametrize("baseline, group", [("none", 64), ("leave_one_out", 4)])
def test_sampled_mara_on_strings_converges_to_equation_13(baseline, group):
    end = sampled_training.train(0, anchor="all", baseline=baseline, group=group)
    assert sampled_training.distance(end) < 0.05


def test_sampled_mara_with_the_batchs_anchor_keeps_its_bias_in_small_groups_only():
    assert (
        sampled_training.distance(sampled_training.train(0, anchor="batch", baseline="leave_one_out", group=2)) > 0.03
    )
    assert (
        sampled_training.distance(sampled_training.train(0, anchor="batch", baseline="leave_one_out", group=64)) < 0.05
    )
