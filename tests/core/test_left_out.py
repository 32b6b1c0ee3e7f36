"""Completions left out of the update: the expected gradient is that of the objective among the others."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.config import Algorithm
from mara_jax.core import advantages, method_rules
from mara_jax.core.scored import Numbers, Scored

pytestmark = pytest.mark.usefixtures("x64")

LOGITS = np.array([0.3, -0.8, 1.1, 0.2, -0.4])
REF = np.log([0.35, 0.25, 0.2, 0.15, 0.05])
REWARD = np.array([1.0, 0.2, 0.7, 0.0, 0.0])
FINISHED = np.array([1.0, 1, 1, 0, 0])
BETA, GROUP = 0.3, 3


def expected_gradient(logits):
    """Of minus the loss, over all groups of three of five outcomes, of which two are left out."""
    index_mg = np.array(list(itertools.product(range(5), repeat=GROUP)))

    def loss(logits, weight_m):
        logp = jax.nn.log_softmax(logits)[index_mg]
        # One group a prompt: the mean over prompts, times their number, is the sum over groups that is weighted here.
        scored = Scored(
            logp[..., None],
            jnp.ones((*index_mg.shape, 1)),
            jnp.asarray(REF)[index_mg],
            jnp.asarray(REWARD)[index_mg],
            jnp.asarray(index_mg),
            counted=jnp.asarray(FINISHED)[index_mg],
        )
        of_group = jax.vmap(
            lambda group: method_rules.loss(
                Algorithm(method="vanilla"), jax.tree.map(lambda x: x[None], group), None, Numbers(BETA, 0.5)
            )[0]
        )
        return weight_m @ of_group(scored)

    weight_m = jnp.exp(jnp.sum(jax.nn.log_softmax(logits)[index_mg], axis=-1))
    return -jax.grad(loss)(jnp.asarray(logits), jax.lax.stop_gradient(weight_m))


def among_finished(logits):
    """E[R | finished] - beta KL(pi(. | finished) || ref(. | finished))."""
    log_pi, log_ref = jax.nn.log_softmax(logits[:3]), jax.nn.log_softmax(jnp.asarray(REF)[:3])
    return jnp.sum(jnp.exp(log_pi) * (REWARD[:3] - BETA * (log_pi - log_ref)))


def test_the_gradient_is_that_of_the_objective_among_finished_completions():
    finished = float(jnp.sum(jax.nn.softmax(LOGITS)[:3]))
    # Of k finished ones each counts once, where at least two are: E[k; k >= 2] / g.
    share = sum(k * (3 if k == 2 else 1) * finished**k * (1 - finished) ** (3 - k) for k in (2, 3)) / GROUP
    expected = share * jax.grad(among_finished)(jnp.asarray(LOGITS))
    np.testing.assert_allclose(expected_gradient(LOGITS), expected, rtol=1e-10, atol=1e-14)
    assert abs(expected[0]) > 0.01 and float(jnp.abs(expected[3:]).max()) == 0


def test_advantages_among_some_by_hand():
    reward = jnp.array([[1.0, 4, 100, 1], [2, 5, 5, 5], [3, 1, 1, 1]])
    counted = jnp.array([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]])
    got = advantages.leave_one_out_of(counted)(reward)
    np.testing.assert_allclose(got, [[-1.5, 3, 0, -1.5], [0, 0, 0, 0], [2, -2 / 3, -2 / 3, -2 / 3]])
    np.testing.assert_allclose(got[2:], advantages.leave_one_out(reward[2:]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "reinforce"}, "algorithm.baseline=leave_one_out, not none"),
        ({"method": "grpo"}, "algorithm.objective=policy_gradient, not grpo"),
        ({"method": "darling"}, "algorithm.transform=none, not darling"),
        ({"kl": "forward"}, "algorithm.estimator=k1_in_reward, not reference_samples"),
    ],
)
def test_other_objectives_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        method_rules.check_leaving_out(Algorithm(**fields))
    method_rules.check_leaving_out(Algorithm(method="mara"))
