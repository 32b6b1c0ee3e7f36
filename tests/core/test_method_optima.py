"""Where a row says that training ends: the expected gradient of its loss vanishes there, and not elsewhere.

Five outcomes of one token, each an answer of its own, groups of three, all enumerated in float64. MARA's anchor is that
of the whole set, as its optimum has it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.audit import enumeration, problems
from mara_jax.config import Algorithm
from mara_jax.core import method_rules, methods, targets
from mara_jax.core.method_rows import Outcomes
from mara_jax.core.scored import Numbers, Scored

pytestmark = pytest.mark.usefixtures("x64")

NUMBERS = Numbers(0.1, 0.8, 0.1)
REF = np.log([0.60, 0.30, 0.05, 0.04, 0.01])
REWARD, ANSWER = np.array([1.0, 1, 1, 0, 0]), np.array([0, 1, 2, -1, -1])
GROUP = 3
STRINGS = enumeration.outcomes(5)
ELSEWHERE = np.log([0.1, 0.2, 0.3, 0.15, 0.25])


@functools.cache
def field(algorithm: Algorithm, numbers: Numbers = NUMBERS, group: int = GROUP):
    """The expected gradient at a policy's log-probs [a], through the rewards and the loss that the tables name."""
    over = enumeration.groups(5, group)
    alike = problems.Problem(STRINGS, REF[None], REF[None, None], REF, REWARD, ANSWER)
    settings = Algorithm(anchor=algorithm.anchor, kl=algorithm.kl, beta=numbers.beta, threshold=numbers.threshold)
    log_mass, anchor = jnp.asarray(problems.log_mass(alike, settings)), problems.anchors(alike, settings)

    def scored(logp_nt, index_g, reference: bool = False):
        logp, ref = logp_nt[index_g][None], jnp.asarray(REF)[index_g][None]
        score = Scored(
            logp, jnp.ones_like(logp), ref, jnp.asarray(REWARD)[index_g][None], jnp.asarray(ANSWER)[index_g][None]
        )
        score = score._replace(log_mass=log_mass, ref_token_logp=ref[..., None], prompt_log_z=jnp.array([3.0]))
        return score._replace(anchor_reward=anchor.reward, anchor_ref_logp=anchor.ref_logp)

    def loss(logp_nt, index_g):
        group = scored(logp_nt, index_g)
        if not method_rules.reads_reference_samples(algorithm):
            return method_rules.loss(algorithm, group, None, numbers)[0]
        of = [method_rules.loss(algorithm, group, scored(logp_nt, jnp.array([i])), numbers)[0] for i in range(5)]
        return jnp.exp(jnp.asarray(REF)) @ jnp.stack(of)

    return jax.jit(lambda logp: -enumeration.expected_gradient(loss, logp[None], STRINGS, over)[0])


PRESETS = [Algorithm(method=name) for name in methods.METHODS]
OTHERS = [
    Algorithm(method="reinforce", transform="darling"),
    Algorithm(method="reinforce", transform="ips"),
    Algorithm(method="mara", anchor="string"),
    Algorithm(method="mara", objective="vargrad", anchor="answer"),
    Algorithm(method="mara", objective="reinvent", anchor="string"),
    Algorithm(method="vanilla", kl="forward"),
    Algorithm(method="mara", kl="forward", estimator="ratio", anchor="string"),
    Algorithm(method="entropy_bonus", objective="trajectory_balance"),
    Algorithm(method="ips", objective="vargrad"),
]
WITHOUT = ("unlikeliness", "dapo", "raft", "maxrl", "pass_at_k")
WITH_OPTIMUM = [algorithm for algorithm in PRESETS + OTHERS if algorithm.method not in WITHOUT]


def name(algorithm):
    return "-".join((algorithm.method, algorithm.transform, algorithm.objective, algorithm.kl, algorithm.anchor))


@pytest.mark.parametrize("algorithm", WITH_OPTIMUM, ids=name)
def test_the_gradient_vanishes_at_the_optimum_and_nowhere_else(algorithm):
    optimum = method_rules.optimum(algorithm, Outcomes(REF, REWARD, ANSWER), NUMBERS, GROUP)
    assert optimum is not None
    logp = np.maximum(np.asarray(optimum), -60.0)
    assert np.exp(logp).sum() == pytest.approx(1, abs=1e-9)
    away = np.abs(field(algorithm)(jnp.asarray(ELSEWHERE))).max()
    assert away > 1e-2
    assert np.abs(field(algorithm)(jnp.asarray(logp))).max() < 1e-9 * max(away, 1)


ANYWHERE = ["dapo", "raft", "maxrl", "pass_at_k", "vanilla", "dr_grpo"]


@pytest.mark.parametrize("method", ANYWHERE)
def test_without_a_kl_every_policy_on_the_good_outcomes_is_stationary(method):
    """vanilla and Dr. GRPO at beta 0; the others have no KL."""
    algorithm = Algorithm(method=method)
    numbers = NUMBERS._replace(beta=0.0) if method in ("vanilla", "dr_grpo") else NUMBERS
    for shares in ((0.2, 0.5, 0.3), (0.9, 0.05, 0.05)):
        logp = jnp.asarray([*np.log(shares), -60.0, -61.0])
        assert np.abs(field(algorithm, numbers)(logp)).max() < 1e-12
    assert np.abs(field(algorithm, numbers)(jnp.asarray(ELSEWHERE))).max() > 1e-2
    if method not in ("vanilla", "dr_grpo"):
        assert method_rules.optimum(algorithm, Outcomes(REF, REWARD, ANSWER), numbers, GROUP) is None


def test_optima_are_none_where_no_closed_form_is_known():
    graded, shared = np.array([1.0, 0.5, 1, 0, 0]), np.array([0, 0, 1, -1, -1])

    def optimum(reward=REWARD, answer=ANSWER, group=GROUP, **fields):
        return method_rules.optimum(Algorithm(**fields), Outcomes(REF, reward, answer), NUMBERS, group)

    assert optimum(method="grpo", reward=graded) is None
    assert optimum(method="darling", answer=shared) is None
    assert optimum(method="ips", group=2) is None  # leave-one-out in pairs: no effect, so no optimum of its own
    assert optimum(method="entropy_bonus", kl="forward") is None
    assert optimum(method="unlikeliness") is None
    assert optimum(method="darling", objective="grpo") is None
    np.testing.assert_allclose(
        optimum(method="dr_grpo", group=4), targets.forward_kl(jnp.asarray(REF), REWARD, 0.1 * 4 / 3), rtol=1e-12
    )
