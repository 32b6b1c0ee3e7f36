"""What the audit says of gradients on strings that the present policy did not draw."""

import jax
import numpy as np
import pytest

from mara_jax.audit import gradients, off_policy, problems, published, verdict
from mara_jax.config import Algorithm

BETA = 0.3
VANILLA = Algorithm(method="vanilla", anchor="string", beta=BETA, importance="sequence")


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def test_what_is_shipped_is_exact_at_every_distance():
    setting = published.configured("several", Algorithm(importance="sequence", truncate=100.0))
    found = off_policy.rows(setting, problems.strings(), 2)
    assert [row["between"] for row in found] == ["updates"] * 3 + ["sampler"] * 3
    assert all(row["relative_error"] < 1e-9 for row in found)
    assert found[2]["nats"] > 0.05 and found[2]["effective_share"] < 0.9
    assert verdict._stale({"stale": found}) == (
        "at later updates of a rollout the gradient is the present policy's, exactly; "
        "with a sampler that is not the trainer the gradient is the present policy's, exactly"
    )


def test_one_update_has_nothing_to_compare():
    assert off_policy.rows(published.configured("one", Algorithm()), problems.strings(), 2) == []


def five(clip: float, old_k1: bool):
    """Outcomes of one token by hand: the error of the gradient at the farthest policies, and their distance.

    Without a baseline, old(y) x ratio x A(y) x (1[y] - pi), summed over the outcomes whose ratio is not clipped.
    """
    problem = problems.five()
    errors, nats = [], []
    away = off_policy.SCALES[-1] * np.random.default_rng(5).normal(size=problem.params.shape)
    for old_logits, logits in zip(problem.params[:, 0], (problem.params + away)[:, 0], strict=True):
        old, new = (np.exp(x) / np.exp(x).sum() for x in (old_logits, logits))
        ref = np.exp(problem.ref_logp)
        exact = problem.reward - BETA * np.log(new / ref)
        used = problem.reward - BETA * np.log((old if old_k1 else new) / ref)
        ratio = new / old
        kept = ~(((ratio > 1 + clip) & (used > 0)) | ((ratio < 1 - clip) & (used < 0))) if clip else True
        want, got = (w - new * w.sum() for w in (new * exact, old * ratio * kept * used))
        errors.append(np.linalg.norm(got - want) / np.linalg.norm(want))
        nats.append(np.sum(old * np.log(old / new)))
    return max(errors), np.mean(nats)


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_five_outcomes_by_hand(clip):
    algorithm = Algorithm(method="vanilla", anchor="string", beta=BETA, importance="token", clip=clip, baseline="none")
    row = off_policy.rows(published.configured("by hand", algorithm), problems.five(), 1)[-1]
    error, nats = five(clip, False)
    assert row["nats"] == pytest.approx(nats, rel=1e-9)
    assert row["relative_error"] == pytest.approx(error, rel=1e-9, abs=1e-9)
    # With one token a string, unclipped ratios of tokens are those of strings.
    assert (error < 1e-9) == (clip == 0)


def test_the_samplers_own_k1_is_another_objective_from_the_second_update_on():
    """On-policy it is leave-one-out with k1 in the reward, exactly; group of two, so the baseline drops out."""
    setting, problem = published.setting("rloo_updates", VANILLA), problems.five()
    row = off_policy.rows(setting, problem, 2)[-1]
    error, _ = five(0.0, True)
    assert error > 0.1 and row["relative_error"] == pytest.approx(error, rel=1e-9)
    found = gradients.at_policies(setting, problem, 2, problems.FROM_GROUP)
    want = gradients.at_policies(published.setting("rloo", VANILLA), problem, 2, problems.FROM_GROUP)
    np.testing.assert_allclose(found, want, atol=1e-12)


def test_a_bias_is_told_with_its_distance():
    rows = [
        {"between": "updates", "nats": n, "cosine": 0.9, "relative_error": e, "smallest_error": e / 2}
        for n, e in ((0.01, 0.05), (0.1, 0.4))
    ]
    assert verdict._stale({"stale": rows}) == (
        "at later updates of a rollout the gradient is biased, by 20-40 % once 0.1 nats lie between"
    )
