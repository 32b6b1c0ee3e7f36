"""The categorical policy and whole toy trainings: exact draws, exact gradients, and where runs end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from mara_jax.core import kl, method_rules, methods, targets
from mara_jax.core.scored import Numbers, Scored
from mara_jax.policies import categorical
from mara_jax.toy import problems, training


def run(problem, choices, *, betas, learning_rate, seeds=(0,)):
    return training.grid(
        problem.ref_logp, problem.reward, betas=np.array(betas), seeds=np.array(seeds),
        threshold=problem.threshold, learning_rate=learning_rate, choices=choices,
    )  # fmt: skip


def test_draws_follow_the_distribution_by_chi_square():
    logp = jnp.asarray(special.log_softmax(np.append(np.random.default_rng(0).normal(size=30), [-np.inf] * 3)))
    drawn = np.asarray(categorical.sample(jax.random.key(1), logp, 200_000))
    counts = np.bincount(drawn, minlength=33)
    assert counts[30:].sum() == 0
    assert stats.chisquare(counts[:30], np.exp(np.asarray(logp, float)[:30]) * 200_000, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_closed_form_gradients_are_those_of_the_objective(x64, direction):
    rng = np.random.default_rng(3)
    logits, reward = rng.normal(size=(2, 8))
    ref_logp = rng.normal(size=8) if direction == "forward" else special.log_softmax(rng.normal(size=8))
    divergence = kl.reverse if direction == "reverse" else kl.forward

    def objective(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * reward) - 0.3 * divergence(logp, ref_logp)

    want = jax.grad(objective)(logits)
    got = categorical.exact_gradient(logits, ref_logp, reward, 0.3, direction)
    np.testing.assert_allclose(got, want, atol=1e-14)


def test_distance_of_the_papers_settings_from_their_optimum():
    """Adam at 5e-3 for 1000 steps stops far from the optimum of beta .01, at 5e-2 it does not."""
    exact = training.Choices(gradients="exact")
    for problem, choices, lr, want in (
        (problems.figure6(), exact, 5e-3, 0.24),
        (problems.figure6(), exact, 5e-2, 0.012),
        (problems.figure2(), exact, 5e-3, 0.28),
        (problems.figure2(), training.Choices(gradients="exact", direction="forward"), 5e-3, 0.49),
    ):
        end = run(problem, choices, betas=[0.01], learning_rate=lr)
        np.testing.assert_allclose(end.distance_to_target[0, 0], want, atol=0.006)
    sampled = run(problems.figure6(), training.Choices(), betas=[0.01], learning_rate=5e-3, seeds=range(4))
    assert np.all((sampled.distance_to_target > 0.40) & (sampled.distance_to_target < 0.48))


@pytest.mark.parametrize("method, direction", [("vanilla", "reverse"), ("mara", "reverse"), ("mara", "forward")])
def test_exact_gradients_reach_the_target(method, direction):
    choices = training.Choices(method=method, direction=direction, gradients="exact", steps=2000)
    end = run(problems.figure6(), choices, betas=[0.05, 0.3], learning_rate=5e-2)
    assert np.all(end.distance_to_target < 2e-3)
    # The target it names is the one that core computes; MARA's is flat on the good set, the other is not.
    good = problems.figure6().reward == 1
    spread = np.ptp(np.exp(np.asarray(end.logp_a))[..., good], axis=-1)
    assert np.all(spread < 1e-3) if method == "mara" else np.all(spread > 0.01)


def test_sampled_gradients_with_leave_one_out_reach_the_target():
    common = {"baseline": "leave_one_out", "batch": 64}
    for choices in (
        training.Choices(**common, method="mara", anchor="all"),
        training.Choices(**common, direction="forward", method="mara", anchor="all"),
    ):
        end = run(problems.figure6(), choices, betas=[0.5], learning_rate=2e-2, seeds=range(2))
        assert np.all(end.distance_to_target < 0.12), choices
        assert np.all(end.distance_s[..., -100:].mean(-1) < end.distance_s[..., :20].mean(-1) / 2), choices


def test_five_outcomes_with_mara_become_flat(x64):
    ref_logp, reward = np.log([0.60, 0.30, 0.05, 0.04, 0.01]), np.array([1.0, 1, 1, 0, 0])
    problem = problems.Problem("five", ref_logp, reward, 0.8)
    end = run(problem, training.Choices(method="mara", gradients="exact"), betas=[0.1], learning_rate=5e-2)
    np.testing.assert_allclose(np.exp(end.logp_a[0, 0, :3]), 1 / 3, atol=1e-3)
    np.testing.assert_allclose(np.exp(end.logp_a[0, 0]), np.exp(targets.mara(ref_logp, reward, 0.1, 0.8)), atol=1e-3)
    np.testing.assert_allclose(end.distance_to_uniform[0, 0], 0, atol=1e-3)


def test_a_grid_is_its_single_runs_and_repeats_itself():
    p, choices = problems.figure6(), training.Choices(method="mara", steps=30)
    grid = run(p, choices, betas=[0.1, 1.0], learning_rate=5e-2, seeds=(3, 4))
    again = run(p, choices, betas=[0.1, 1.0], learning_rate=5e-2, seeds=(3, 4))
    np.testing.assert_array_equal(grid.logp_a, again.logp_a)
    assert np.abs(grid.logp_a[0, 0] - grid.logp_a[0, 1]).max() > 1e-2  # seeds differ
    single = training.train(p.ref_logp, p.reward, training.Swept(1.0, p.threshold, 5e-2, 4), choices)
    np.testing.assert_allclose(grid.logp_a[1, 1], single.logp_a, atol=1e-5)
    np.testing.assert_allclose(grid.reward_s[..., 0], 0.5, rtol=1e-6)  # uniform at the start: half is good


def test_the_course_is_what_the_policy_was_before_each_recorded_step():
    p = problems.figure6()
    every = run(p, training.Choices(method="mara", steps=30), betas=[0.3], learning_rate=5e-2)
    tenth = run(p, training.Choices(method="mara", steps=30, every=10), betas=[0.3], learning_rate=5e-2)
    np.testing.assert_allclose(tenth.logp_a, every.logp_a, atol=1e-6)
    for name in ("reward_s", "distance_s", "uniform_distance_s", "kl_to_target_s", "kl_from_target_s"):
        assert getattr(tenth, name).shape == (1, 1, 3)
        np.testing.assert_allclose(getattr(tenth, name), getattr(every, name)[..., ::10], atol=1e-6)
    # Every run starts uniform over the 100 outcomes, of which 50 are good.
    g = special.log_softmax(np.where(p.reward == 1, p.ref_logp.max() + 1 / 0.3, p.ref_logp))
    start = {name: float(getattr(tenth, name)[0, 0, 0]) for name in tenth._fields if name.endswith("_s")}
    np.testing.assert_allclose(start["uniform_distance_s"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(start["distance_s"], np.abs(np.exp(g) - 0.01).sum() / 2, rtol=1e-5)
    np.testing.assert_allclose(start["kl_to_target_s"], np.sum(0.01 * (np.log(0.01) - g)), rtol=1e-5)
    np.testing.assert_allclose(start["kl_from_target_s"], np.sum(np.exp(g) * (g - np.log(0.01))), rtol=1e-5)


@pytest.mark.parametrize("direction, estimator", [("reverse", "k2_in_loss"), ("forward", "k3_in_loss")])
def test_estimators_in_the_loss_reach_the_same_target(direction, estimator):
    choices = training.Choices(
        direction=direction, baseline="leave_one_out", batch=64, **{f"{direction}_estimator": estimator}
    )
    end = run(problems.figure6(), choices, betas=[0.5], learning_rate=2e-2, seeds=range(2))
    assert np.all(end.distance_to_target < 0.12)
    assert np.all(end.distance_s[..., -100:].mean(-1) < end.distance_s[..., :20].mean(-1) / 2)


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="every 7 does not divide the 1000 steps"):
        run(problems.figure6(), training.Choices(every=7), betas=[1.0], learning_rate=1.0)
    with pytest.raises(ValueError, match="'pull' is not known: use one of vanilla, reinforce, mara"):
        run(problems.figure6(), training.Choices(method="pull"), betas=[1.0], learning_rate=1.0)


# Every method of the table.

FIVE = problems.Problem("five", np.log([0.60, 0.30, 0.05, 0.04, 0.01]), np.array([1.0, 1, 1, 0, 0]), 0.8)
BETA = 0.1
TOWARD_G = ("vanilla", "reinforce", "trajectory_balance", "vargrad", "reinvent")
WITHOUT_KL = ("dapo", "raft", "maxrl", "pass_at_k")


def ends(method, seeds=8, **changes):
    """Mean policy of some seeds after training on the five outcomes, and the optimum that the run names."""
    baseline = methods.METHODS[method].baseline
    settings = {"method": method, "baseline": baseline, "batch": 64, "steps": 1500, "every": 1500} | changes
    end = run(FIVE, training.Choices(**settings), betas=[BETA], learning_rate=1e-2, seeds=range(seeds))
    return (
        np.exp(np.asarray(end.logp_a[0], float)).mean(axis=0),
        np.exp(np.asarray(end.target_logp_a[0, 0], float)),
        end,
    )


@pytest.mark.parametrize("method", [*TOWARD_G, "grpo", "dr_grpo", "entropy_bonus", "darling", "ips"])
def test_methods_end_at_the_optimum_of_their_row(method):
    """With 64 samples a step. The closed forms themselves are held against enumeration in tests/audit."""
    policy, optimum, end = ends(method)
    assert np.abs(policy - optimum).sum() / 2 < 0.02, (policy, optimum)
    np.testing.assert_allclose(end.distance_to_target, np.abs(np.exp(end.logp_a) - optimum).sum(-1) / 2, atol=1e-5)
    if method in TOWARD_G:
        np.testing.assert_allclose(optimum, np.exp(targets.reverse_kl(FIVE.ref_logp, FIVE.reward, BETA)), atol=1e-6)
    elif method == "dr_grpo":
        np.testing.assert_allclose(
            optimum, np.exp(targets.forward_kl(FIVE.ref_logp, FIVE.reward, BETA * 64 / 63)), atol=1e-6
        )


@pytest.mark.parametrize("method", WITHOUT_KL)
def test_methods_without_a_kl_end_on_the_good_outcomes_and_name_no_optimum(method):
    # Of 64 samples two are nearly always good, and pass@64 then has nothing to learn.
    policy, optimum, end = ends(method, seeds=2, **({"batch": 2} if method == "pass_at_k" else {}))
    assert policy[:3].sum() > 0.95 and np.all(np.isnan(optimum)) and np.all(np.isnan(end.distance_to_target))
    assert np.all(np.isfinite(end.distance_to_uniform)) and np.all(np.isfinite(end.reward_s))


def test_unlikeliness_ends_between_vanilla_and_flat():
    """benchmarks/RESULTS.md has .415 .415 .171 for groups of 4, which tie at a jump of the gradient."""
    policy, _, _ = ends("unlikeliness", batch=4, steps=6000, every=6000, seeds=16)
    np.testing.assert_allclose(policy[:3], [0.415, 0.415, 0.171], atol=0.06)


@pytest.mark.parametrize("method", sorted(methods.METHODS))
def test_a_toy_gradient_is_that_of_the_language_models_loss(x64, method):
    """One draw: the outcomes as completions of one token under one prompt, each its own answer."""
    choices = training.Choices(method=method, batch=6, baseline=methods.METHODS[method].baseline, eta=0.2)
    logits, key = jnp.array([0.3, -1.0, 0.5, 1.2, -0.4]), jax.random.key(9)
    swept = training.Swept(BETA, FIVE.threshold, 1.0, 0)
    ref, reward = jnp.asarray(FIVE.ref_logp), jnp.array([0.9, 0.7, 1.0, 0.1, 0.3])
    got, _ = training._gradient(logits, jnp.asarray(-jnp.inf), ref, reward, swept, choices, key)
    drawn = categorical.sample(jax.random.split(key)[0], jax.nn.log_softmax(logits), 6)

    def loss(logits):
        logp = jax.nn.log_softmax(logits)[drawn][None, :, None]
        scored = Scored(logp, jnp.ones((1, 6, 1)), ref[drawn][None], reward[drawn][None], drawn[None])
        scored = scored._replace(ref_token_logp=ref[drawn][None, :, None])
        estimate = method_rules.log_z_estimate(choices.algorithm, scored, Numbers(BETA, FIVE.threshold, 0.2))
        scored = scored._replace(prompt_log_z=estimate)  # a first visit's
        return method_rules.loss(choices.algorithm, scored, None, Numbers(BETA, FIVE.threshold, 0.2))[0]

    assert sorted(np.asarray(drawn).tolist()) == [0, 0, 2, 3, 3, 4]  # some twice, and a best one that is alone
    np.testing.assert_allclose(got, jax.grad(loss)(logits), atol=1e-12)
    assert np.abs(got).max() > 1e-3


def test_trajectory_balance_learns_log_z():
    """At the optimum of the five outcomes it is log of .95 e^10 + .05."""
    choices = training.Choices(method="trajectory_balance", batch=64)
    swept = training.Swept(BETA, FIVE.threshold, 1.0, 0)
    ref, reward = jnp.asarray(FIVE.ref_logp, jnp.float32), jnp.asarray(FIVE.reward, jnp.float32)
    logits, log_z = targets.reverse_kl(ref, reward, BETA), jnp.asarray(0.0)
    for step in range(30):
        _, log_z = training._gradient(logits, log_z, ref, reward, swept, choices, jax.random.key(step))
    np.testing.assert_allclose(log_z, np.log(0.95 * np.exp(10) + 0.05), atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "grpo", "gradients": "exact"}, "gradients 'exact' are known for vanilla and MARA, not for method"),
        ({"method": "grpo", "transform": "mara_strings"}, "MARA with objective 'grpo': its KL is k3 in the loss"),
        ({"transform": "mara_answers"}, "'mara_answers' means nothing where each outcome is its own answer"),
        ({"augmentation": "reverse"}, "augmentation 'reverse' with method 'vanilla'"),
        ({"objective": "best"}, "objective 'best' is not known: use one of auto, policy_gradient"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run(FIVE, training.Choices(**changes), betas=[1.0], learning_rate=1.0)


def test_negative_rewards_are_refused_where_a_method_multiplies_them():
    problem = FIVE._replace(reward=FIVE.reward - 0.5)
    with pytest.raises(ValueError, match=r"a completion has the reward -0\.5"):
        run(problem, training.Choices(method="ips"), betas=[1.0], learning_rate=1.0)
