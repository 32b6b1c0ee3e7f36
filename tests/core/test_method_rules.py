"""The tables of methods: what "auto" stands for, which combinations are refused or described, what a run must have."""

import dataclasses
import itertools

import numpy as np
import pytest

from mara_jax.config import Algorithm, LanguageRun, Optimiser, Rollout
from mara_jax.config import algorithm_checks as checks
from mara_jax.core import advantages, kl, method_rules, methods

ESTIMATORS = ("auto", *kl.PLACED, "reference_samples", "ratio")


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"method": "vanilla"}, ("none", "policy_gradient", "leave_one_out", "k1_in_reward")),
        ({"method": "reinforce"}, ("none", "policy_gradient", "none", "k1_in_reward")),
        ({"method": "mara"}, ("mara_answers", "policy_gradient", "leave_one_out", "k1_in_reward")),
        (
            {"method": "mara", "kl": "forward"},
            ("mara_answers", "policy_gradient", "leave_one_out", "reference_samples"),
        ),
        ({"method": "grpo"}, ("none", "grpo", "group_normalised", "auto")),
        ({"method": "dr_grpo"}, ("none", "dr_grpo", "mean", "auto")),
        ({"method": "darling", "objective": "grpo"}, ("darling", "grpo", "group_normalised", "auto")),
        (
            {"method": "grpo", "objective": "policy_gradient"},
            ("none", "policy_gradient", "leave_one_out", "k1_in_reward"),
        ),
        ({"method": "mara", "objective": "vargrad"}, ("mara_answers", "vargrad", "leave_one_out", "auto")),
        ({"method": "vanilla", "baseline": "mean"}, ("none", "policy_gradient", "mean", "k1_in_reward")),
    ],
)
def test_auto_stands_for_the_presets_choice(fields, want):
    algorithm = method_rules.resolved(Algorithm(**fields))
    assert (algorithm.transform, algorithm.objective, algorithm.baseline, algorithm.estimator) == want
    assert method_rules.resolved(algorithm) == algorithm
    checks.check(algorithm)


@pytest.mark.parametrize("field", ["method", "transform", "objective"])
def test_a_name_that_is_in_no_table_is_refused_in_one_line(field):
    """As it may stand in the config.json of another version."""
    with pytest.raises(ValueError, match=rf"^algorithm.{field}='other' is no row of core/methods.py: choose one of "):
        method_rules.rows(Algorithm(**{field: "other"}))


def test_a_transform_that_is_named_sets_the_anchor():
    assert method_rules.resolved(Algorithm(method="mara", anchor="string")).transform == "mara_strings"
    assert method_rules.resolved(Algorithm(transform="mara_strings")).anchor == "string"
    assert method_rules.needs(Algorithm(transform="mara_strings")) == {"groups", "positive_beta"}
    assert method_rules.needs(Algorithm()) == {"groups", "positive_beta", "answers", "masses"}


def accepted(**fields) -> bool:
    """Whether training takes it; what it refuses is one line with a cure."""
    try:
        checks.check(Algorithm(**fields))
    except ValueError as error:
        assert "\n" not in str(error) and ("use" in str(error).lower() or "set" in str(error)), error
        return False
    return True


# Those whose combinations were counted by hand; a row that is added is described by the test that follows.
COUNTED_TRANSFORMS = ("none", "mara_strings", "mara_answers", "entropy_bonus", "unlikeliness", "darling", "ips")
COUNTED_OBJECTIVES = (
    "policy_gradient", "grpo", "dr_grpo", "dapo", "raft", "maxrl", "pass_at_k", "trajectory_balance", "vargrad",
    "reinvent",
)  # fmt: skip


@pytest.mark.parametrize("method", tuple(methods.METHODS))
def test_every_preset_is_accepted_and_described(method):
    assert accepted(method=method, beta=0.1)
    assert method_rules.describe(Algorithm(method=method)).startswith(("maximises ", "minimises "))


def test_every_combination_is_refused_with_a_cure_or_described():
    """Of 5,880 combinations 270 are accepted, counted by hand.

    Policy gradient: of the reverse KL auto and k1_in_reward with 4 baselines each, k2_in_loss with 3 (mean shrinks only
    the reward); of the forward KL auto and reference_samples with 3, ratio with 4, k3_in_loss with 3: 24 for each of 7
    transforms. The 9 others have one KL and estimator, with auto or their own baseline: 2 for each of 5 transforms, and
    for both MARAs beside the 3 squared losses.
    """
    axes = {
        "transform": COUNTED_TRANSFORMS,
        "objective": COUNTED_OBJECTIVES,
        "kl": ("reverse", "forward"),
        "estimator": ESTIMATORS,
        "baseline": ("auto", *advantages.BY_NAME),
    }
    count = 0
    for values in itertools.product(*axes.values()):
        fields = dict(zip(axes, values, strict=True))
        if not accepted(**fields):
            continue
        count += 1
        sentence = method_rules.describe(Algorithm(**fields))
        assert sentence.startswith(("maximises ", "minimises ")) and not sentence.endswith(".")
        ours = fields["objective"] == "policy_gradient"
        if ours:
            assert ("KL(ref || pi)" if fields["kl"] == "forward" else "KL(pi || ref)") in sentence
        assert ("; with rewards" in sentence) == (fields["transform"] != "none")
        # Neither holds of rewards that a transform changes beside an objective that does not end where its KL says.
        plain, balanced = fields["transform"] == "none", not methods.OBJECTIVES[fields["objective"]].refuses_mara
        assert plain or "stationary" not in sentence
        assert ("eta H(pi)" in sentence) == (fields["transform"] == "entropy_bonus" and balanced)
    assert count == 7 * 24 + 9 * 5 * 2 + 3 * 2 * 2 == 270


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "grpo"}, "on one categorical KL(ref || pi), on sequences neither"),
        ({"method": "grpo", "beta": 0.0}, "without a KL: every policy on the best outcomes is stationary"),
        ({"method": "entropy_bonus"}, "-log pi, which adds eta H(pi)"),
        ({"method": "entropy_bonus", "beta": 0.0}, "E[R], without a KL; with rewards plus eta"),
        ({"method": "dr_grpo", "beta": 0.0}, "without a KL (as published)"),
        ({"method": "dr_grpo"}, "forward KL(ref || pi) at beta N / (N - 1)"),
        ({"method": "vanilla", "beta": 0.0}, "maximises E[R], without a KL"),
        ({"method": "vanilla"}, "E[R] - beta KL(pi || ref) of whole completions, exactly (k1 in reward)"),
        ({"kl": "forward"}, "E[R] - beta KL(ref || pi) of whole completions, exactly (reference samples)"),
        ({}, "gives every good answer the same mass"),
        ({"anchor": "string"}, "gives every good completion the same mass"),
        ({"method": "vargrad"}, "minimises KL(pi || G)"),
    ],
)
def test_descriptions_say_which_kl(fields, words):
    assert words in method_rules.describe(Algorithm(**fields))


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo", "maxrl", "pass_at_k", "raft"])
def test_mara_is_refused_beside_what_does_not_balance_it(objective):
    for anchor in ("string", "answer"):
        with pytest.raises(ValueError, match=rf"is not balanced beside algorithm.objective={objective}: .*: use"):
            checks.check(Algorithm(anchor=anchor, objective=objective))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "grpo", "kl": "forward"}, "algorithm.kl=forward is not read by algorithm.objective=grpo"),
        ({"method": "grpo", "estimator": "k3_in_loss"}, "leave it at auto"),
        ({"method": "vargrad", "level": "token"}, "algorithm.level=token is not read"),
        ({"method": "raft", "baseline": "mean"}, "algorithm.baseline=mean is not read by algorithm.objective=raft"),
        ({"method": "dapo", "importance": "token"}, "algorithm.importance=token is not read"),
        ({"method": "maxrl", "truncate": 2.0}, "algorithm.truncate=2.0 is not read"),
        ({"method": "entropy_bonus", "eta": 0.0}, "algorithm.eta=0.0"),
        ({"method": "vargrad", "beta": 0.0}, "divides rewards by beta"),
        ({"method": "mara", "objective": "reinvent", "beta": 0.0}, "the augmentation is beta times a log-ratio"),
    ],
)
def test_what_is_not_read_or_does_nothing_is_refused_in_one_line(fields, words):
    with pytest.raises(ValueError) as caught:
        checks.check(Algorithm(**fields))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def run_of(updates=1, group=8, **fields):
    sizes = dataclasses.replace(Rollout(), group_size=group)
    return LanguageRun(algorithm=Algorithm(**fields), optimiser=Optimiser(updates=updates), rollout=sizes)


def test_own_ratios_serve_several_updates_and_other_forms_do_not():
    for method in ("grpo", "dr_grpo", "dapo"):
        checks.check_updates(run_of(2, method=method))
    checks.check_updates(run_of(2, method="darling", importance="token"))
    for method in ("raft", "maxrl", "pass_at_k", "trajectory_balance", "vargrad", "reinvent"):
        with pytest.raises(ValueError, match=r"which has no importance ratios: use optimiser.updates=1"):
            checks.check_updates(run_of(2, method=method))
    with pytest.raises(ValueError, match=r"use algorithm.importance=sequence"):
        checks.check_updates(run_of(2, method="entropy_bonus"))


@pytest.mark.parametrize("method", methods.METHODS)
def test_groups_of_one_are_for_methods_that_compare_nothing(method):
    alone = method in ("reinforce", "raft", "trajectory_balance", "reinvent")
    if alone:
        checks.check_group(run_of(group=1, method=method))
        return
    with pytest.raises(ValueError, match=r"rollout.group_size=1 leaves algorithm.*nothing to compare with"):
        checks.check_group(run_of(group=1, method=method))


def test_rewards_that_are_multiplied_must_not_be_negative():
    batch = np.array([[0.5, -0.25], [1.0, 0.0]])
    for method in ("darling", "ips", "unlikeliness", "maxrl"):
        method_rules.check_rewards(Algorithm(method=method), np.abs(batch))
        with pytest.raises(ValueError, match=r"a completion has the reward -0.25.*add a constant"):
            method_rules.check_rewards(Algorithm(method=method), batch)
    for method in ("vanilla", "mara", "grpo", "pass_at_k"):
        method_rules.check_rewards(Algorithm(method=method), batch)


def test_a_log_z_for_each_prompt_needs_visits():
    balance = Algorithm(method="trajectory_balance")
    method_rules.check_prompts(balance, 10, 100)
    with pytest.raises(ValueError, match=r"100 visits in all.*use algorithm.method=vargrad"):
        method_rules.check_prompts(balance, 11, 100)
    method_rules.check_prompts(Algorithm(method="vargrad"), 10**6, 1)


def test_forecasts_are_of_the_objectives_own_optimum():
    known = {name: method_rules.forecast_method(Algorithm(method=name)) for name in methods.METHODS}
    plain = ("vanilla", "reinforce", "trajectory_balance", "vargrad", "reinvent")
    assert known == {name: "vanilla" if name in plain else "answers" if name == "mara" else None for name in known}
    assert method_rules.forecast_method(Algorithm(anchor="string", objective="vargrad")) == "strings"
