"""Where objectives and rivals end, by exact expected gradients, against the closed form where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.audit import enumeration, fixed_point, rival_losses, rivals_table
from mara_jax.config import Algorithm
from mara_jax.core import advantages, kl, method_rules, methods, objectives, rival_optima, rivals, targets
from mara_jax.core.scored import Numbers
from mara_jax.policies import categorical

REF, REWARD, BETA = rivals_table.REF_LOGP, rivals_table.REWARD, rivals_table.BETA
GOOD = REWARD >= rivals_table.THRESHOLD
LOGITS = np.array([0.3, -1.0, 0.5, 1.2, -0.4])


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


ROWS = {row.name: row for row in rivals_table.rows()}
CASES = [(name, "vanilla") for name in ROWS] + [(name, "mara") for name, row in ROWS.items() if row.direction]
AT_A_JUMP = {("unlikeliness in RLOO, N=4", m) for m in ("vanilla", "mara")} | {("unlikeliness in GRPO, N=4", "vanilla")}
RUNS_AWAY = {("k3 in the reward, N=1", "vanilla"), ("k3 in the reward, N=1", "mara")}
_flows, _ends = {}, {}


def end(name, method="vanilla"):
    """Of one row of the table; each objective is compiled once for both methods."""
    if (name, method) not in _ends:
        flow = _flows.setdefault(name, rivals_table.flow_of(ROWS[name]))
        _ends[name, method] = rivals_table.ending(ROWS[name], method, flow)
    return _ends[name, method]


def shares(name, method="vanilla"):
    return end(name, method).point.probability


def row_of(loss, group):
    return rivals_table.Row("a loss of this file", loss, group)


def loss_of(beta=BETA, **fields):
    """Of a method, by the fields of its algorithm."""
    return rival_losses.method_loss(Algorithm(**{"method": "reinforce"} | fields), Numbers(beta, 0.8, 0.1))


def gradient(loss, group, reward=REWARD, logits=LOGITS):
    return np.asarray(jax.jit(rivals_table.gradient_of(row_of(loss, group)))(logits[None], REF, reward))[0]


def fixed_point_of(loss, group, reward):
    return fixed_point.find(rivals_table.flow_of(row_of(loss, group)), REF[None], REF, reward)


@pytest.mark.parametrize("name, method", CASES, ids=[f"{name}, {method}" for name, method in CASES])
def test_every_objective_ends_where_its_closed_form_says(name, method):
    if (name, method) in AT_A_JUMP | RUNS_AWAY:
        pytest.skip("no root: tested below")
    found = end(name, method)
    assert found.point.is_attractor
    np.testing.assert_allclose(found.point.probability.sum(), 1, rtol=1e-12)
    if found.to_closed_form is not None:
        # Of a continuum the end depends on the path, which implicit steps follow to their own accuracy only.
        assert found.to_closed_form < (1e-4 if rivals_table.rests(found.point) == "anywhere" else 1e-9)


def test_the_table_covers_both_papers_objectives_and_every_rival():
    with_closed_form = [name for name, method in CASES if end(name, method).to_closed_form is not None]
    assert len(ROWS) >= 45 and len(set(with_closed_form)) >= 39


def test_a_method_without_a_line_of_its_own_gets_one(monkeypatch):
    own = methods.Method("ips", "vargrad", "somewhere")
    monkeypatch.setitem(methods.METHODS, "added", own)
    added = [row for row in rivals_table.rows() if row.name not in ROWS]
    assert [row.name for row in added] == ["added, N=4"] and added[0].direction == "reverse"
    np.testing.assert_allclose(gradient(added[0].loss, 4), gradient(loss_of(method="added"), 4), atol=1e-14)


def test_every_method_of_the_table_has_a_row():
    """MARA's is each row with MARA."""
    there = [method_rules.resolved(row.algorithm) for row in ROWS.values() if row.algorithm is not None]
    pairs = {(algorithm.transform, algorithm.objective) for algorithm in there}
    presets = [row for name, row in methods.METHODS.items() if name != "mara"]
    assert {(row.transform, row.objective) for row in presets} <= pairs


def test_known_ends_with_mara():
    balanced = []
    np.testing.assert_allclose(shares("k1 in the reward, N=1", "mara")[:3], 1 / 3, atol=1e-4)
    np.testing.assert_allclose(shares("k3 in the loss, N=1", "mara")[:3], [0.23, 0.16, 0.60], atol=5e-3)
    assert shares("k1 in the loss, N=1", "mara")[2] > 0.9999
    for name, row in ROWS.items():
        own = row.optimum(REF, REWARD) if row.optimum is not None and row.direction else None
        if own is not None and np.allclose(own, rivals_table._reverse(REF, REWARD), atol=1e-12):
            assert end(name, "mara").to_mara < 1e-9 and end(name, "vanilla").to_vanilla < 1e-9
            balanced.append(name)
    assert len(balanced) == 14, balanced


@pytest.mark.parametrize("use", sorted(kl._EFFECTIVE), ids="-".join)
def test_every_placement_on_one_token_has_the_field_of_its_row(use):
    """Levels are the same on one token; the ends of the sequence's level are in the table."""
    estimator, placement, level = use
    expected = {
        "reverse": -BETA * jax.grad(lambda x: kl.reverse(jax.nn.log_softmax(x), REF))(LOGITS),
        "forward": -BETA * jax.grad(lambda x: kl.forward(jax.nn.log_softmax(x), REF))(LOGITS),
        "none": np.zeros(5),
    }
    expected["reverse_minus_forward"] = expected["reverse"] - expected["forward"]
    logp = jax.nn.log_softmax(LOGITS)
    square = jax.grad(lambda x: jnp.sum(jnp.exp(jax.nn.log_softmax(x)) * kl.k2(logp, REF)))(LOGITS)
    expected["square"] = -BETA * square
    names = {"k1": {"reward": "reverse", "loss": "none"}, "k2": {"reward": "square", "loss": "reverse"}}
    names |= {"k3": {"reward": "reverse_minus_forward", "loss": "forward"}, "k1_ratio": {"loss": "reverse"}}
    reward_part = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * REWARD))(LOGITS)
    got = gradient(rival_losses.placed_loss(estimator, placement, level, BETA), 1)
    np.testing.assert_allclose(got, reward_part + expected[names[estimator][placement]], atol=1e-13)


@pytest.mark.parametrize("group", [2, 3, 4])
def test_leave_one_out_over_all_groups_is_the_gradient_of_the_objective(group):
    loss = loss_of(baseline="leave_one_out")
    want = categorical.exact_gradient(jnp.asarray(LOGITS), jnp.asarray(REF), jnp.asarray(REWARD), BETA)
    np.testing.assert_allclose(gradient(loss, group), want, atol=1e-14)


# GRPO and Dr. GRPO: the target each really has.


def test_dr_grpo_is_the_forward_kl_at_a_larger_beta():
    for group in (2, 4):
        want = np.exp(targets.forward_kl(REF, REWARD, BETA * group / (group - 1)))
        np.testing.assert_allclose(shares(f"Dr. GRPO with k3, N={group}"), want, atol=1e-10)


def test_grpo_with_mara_is_not_flat():
    assert shares("GRPO, N=4", "mara")[2] > 0.9
    assert shares("GRPO, N=2", "mara")[2] > 0.8


LENGTHS = np.array([1, 2, 4, 1, 2])


def test_dividing_by_the_length_does_not_move_an_end_that_balances_outcome_by_outcome():
    """The first token decides, the others are certain, under the reference too: only lengths differ.

    At the forward-KL optimum of a centred advantage, p A + beta (ref - p) is zero for each outcome by itself, so
    that any weight of the outcomes leaves it where it is.
    """
    mask_at = jnp.asarray(np.arange(4) < LENGTHS[:, None], float)

    def loss(logp_a, index, ref, reward):
        def tokens(x):
            return jnp.zeros((1, len(index), 4)).at[0, :, 0].set(x[index])

        logp = tokens(logp_a)
        old = jax.lax.stop_gradient(logp)
        return rivals.grpo(logp, mask_at[index][None], old, tokens(ref), reward[index][None], beta=BETA)[0]

    point = fixed_point_of(loss, 3, REWARD)
    assert point.is_attractor
    np.testing.assert_allclose(point.probability, np.exp(rival_optima.grpo_optimum(REF, GOOD, BETA, 3)), atol=1e-9)
    # On the way there it does matter.
    assert np.abs(gradient(loss, 3) - gradient(loss_of(method="grpo"), 3)).max() > 0.02


# Rewards that look at the group.


def test_inverse_probability_with_true_frequencies_ends_in_proportion_to_the_reward():
    reward = np.array([1.0, 0.5, 0.25, 0.2, 0.05])

    def loss(logp_a, index, ref, reward):
        scaled = reward[index] / jnp.exp(jax.lax.stop_gradient(logp_a[index]))
        logp = logp_a[index][None, :, None]
        return objectives.reverse_kl(
            logp, jnp.ones_like(logp), ref[index][None], scaled[None], beta=0.0, advantage=advantages.none
        )[0]

    point = fixed_point_of(loss, 1, reward)
    assert point.is_attractor
    np.testing.assert_allclose(point.probability, reward / reward.sum(), atol=1e-10)


def test_inverse_probability_with_the_frequencies_of_a_small_group_collapses():
    """Two samples: the signal is R (2 - p), so that the worse of 1 and .5 is lost; with four, .7 and .3 stand."""
    reward = np.array([1.0, 0.5, 0.0, 0.0, 0.0])
    for group, want in ((2, [1, 0]), (4, None)):
        point = fixed_point_of(loss_of(0.0, transform="ips"), group, reward)
        p = point.probability
        if want is not None:
            np.testing.assert_allclose(p[:2], want, atol=2e-2)
        else:
            seen = 1 - (1 - p[:2]) ** 4
            np.testing.assert_allclose(seen[0] / p[0], seen[1] / 2 / p[1], rtol=1e-8)
            assert p[0] > 2.2 * p[1]


@pytest.mark.parametrize("transform, scale", [("darling", 1), ("ips", 2)])
def test_in_groups_of_two_a_centred_diversity_reward_says_nothing_of_diversity(transform, scale):
    """Twins share one reward, which the baseline takes off; other pairs are paid as without it."""
    reward = np.array([1.0, 0.7, 0.3, 0.2, 0.0])
    plain, paid = (loss_of(0.0, transform=name, baseline="leave_one_out") for name in ("none", transform))
    np.testing.assert_allclose(gradient(paid, 2, reward), scale * gradient(plain, 2, reward), atol=1e-14)


def test_the_deviation_of_the_group_makes_darling_and_inverse_probability_alike():
    difference = shares("DARLING in GRPO, N=4") - shares("IPS in GRPO, N=4")
    assert np.abs(difference).max() < 1e-3


@pytest.mark.parametrize("name, method", sorted(AT_A_JUMP))
def test_ranks_have_no_root_where_probabilities_tie(name, method):
    found = end(name, method)
    assert not found.point.is_attractor and rivals_table.rests(found.point) == "at a jump"
    assert abs(found.point.logp[0] - found.point.logp[1]) < 0.02


def test_where_ranks_tie_the_signals_agree_on_average():
    """The two tied outcomes share their ranks: what the third gets equals the mean of what they get."""
    p = shares("unlikeliness in RLOO, N=4")
    tied = np.log(np.array([p[:2].mean()] * 2 + list(p[2:])))
    signal = gradient(ROWS["unlikeliness in RLOO, N=4"].loss, 4, logits=tied) / np.exp(tied)
    np.testing.assert_allclose(signal[:2].mean(), signal[2], atol=2e-3)


# Off the policy's own samples.


def test_away_from_its_own_samples_only_reinvent_leaves_its_optimum():
    assert end("VarGrad, uniform samples, N=2").to_vanilla < 1e-9
    assert end("trajectory balance, true log Z, uniform samples").to_vanilla < 1e-9
    assert end("REINVENT, N=1").to_vanilla < 1e-9 and end("REINVENT, uniform samples").to_vanilla > 0.2


# Nothing to hold it.


def test_without_a_penalty_every_policy_on_the_best_outcomes_rests():
    loss = loss_of(0.0, baseline="leave_one_out")
    for good in ([0.6, 0.3, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.01, 0.01, 0.98]):
        logits = np.log(np.array([*good, 1e-300, 1e-300]))
        np.testing.assert_allclose(gradient(loss, 2, logits=logits), 0, atol=1e-14)


def test_without_a_penalty_plain_gradients_sharpen_what_natural_gradients_keep():
    kept = shares("RLOO without a penalty (beta 0), N=2")
    np.testing.assert_allclose(kept[0] / kept[1], 2, rtol=1e-6)

    def ascend(logits, _):
        p = jax.nn.softmax(logits)
        return logits + 0.5 * p * (REWARD - p @ REWARD), None

    uneven = np.log(np.array([0.2, 0.1, 0.05, 0.35, 0.3]))
    p = np.asarray(jax.nn.softmax(jax.lax.scan(ascend, jnp.asarray(uneven), length=4000)[0]))
    assert p[GOOD].sum() > 0.99 and p[0] / p[1] > 3


# The tool.


def test_what_does_not_rest_is_said_not_to():
    for name, method in RUNS_AWAY:
        assert rivals_table.rests(end(name, method).point) == "runs away"
    flow = _flows.setdefault("GRPO, N=2", rivals_table.flow_of(ROWS["GRPO, N=2"]))
    stopped = fixed_point.find(flow, REF[None], REF, REWARD, max_steps=2)
    assert not stopped.is_attractor and stopped.kind == "unsettled"
    # At a corner the gradient is tiny, but the lost outcomes pull.
    corner = np.log(np.array([1e-14, 1e-14, 1e-14, 1 - 4e-14, 1e-14]))
    flow = rivals_table.flow_of(ROWS["reverse_kl, no baseline, N=1"])
    point = fixed_point.find(flow, corner[None], REF, REWARD, max_steps=0)
    assert point.residual < 1e-11 and point.pull > 0.5 and not point.is_attractor


def test_an_unstable_root_is_not_called_an_attractor():
    """Ascent away from the middle: d p/dt grows with p itself."""

    def gradient(logits):
        p = jax.nn.softmax(logits)
        return p * (p - jnp.sum(p * p))

    flow = fixed_point.flow(gradient, enumeration.outcomes(3))
    point = fixed_point.find(flow, np.zeros((1, 3)))
    assert point.residual < 1e-11 and point.growth > 0.1 and not point.is_attractor
    tilted = fixed_point.find(flow, np.log([[0.34, 0.33, 0.33]]))
    assert tilted.is_attractor and tilted.probability[0] > 1 - 1e-9


def test_mara_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="use 'vanilla'"):
        rivals_table.ending(ROWS["RAFT on its own samples, N=2"], "mara")


# The closed forms.


def test_separable_finds_known_optima():
    reward = np.array([1.0, 0.4, 0.9, 0.0, 0.2])
    reverse = rival_optima.separable(lambda p: reward - BETA * (np.log(p) - REF))
    np.testing.assert_allclose(reverse, targets.reverse_kl(REF, reward, BETA), atol=1e-9)
    forward = rival_optima.separable(lambda p: reward + BETA * np.exp(REF) / p)
    np.testing.assert_allclose(forward, targets.forward_kl(REF, reward, BETA), atol=1e-9)
    # Shares p = 1 - c / R of DARLING without a penalty: .5 and 0 for rewards 1, .5 and .1, c = .5.
    darling = rival_optima.separable(lambda p: np.array([1.0, 1.0, 0.1, 0.1, 0.1]) * (1 - p))
    np.testing.assert_allclose(np.exp(darling), [0.5, 0.5, 0, 0, 0], atol=1e-12)
