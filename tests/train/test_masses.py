"""From stored samples of the reference policy to MARA's bonus of an answer, as the update computes it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.config import Algorithm
from mara_jax.core import method_rules
from mara_jax.core.scored import Numbers, Scored
from mara_jax.train import step
from mara_jax.train.state import BySampler

# Two prompts. Under the first, two samples of answer 0, one of answer 1; under the second none is good.
REF_REWARD = jnp.array([[1.0, 1.0, 1.0, 0.0], [0.0, 0.1, 0.0, 0.0]])
REF_ANSWER = jnp.array([[0, 0, 1, -1], [0, 1, -1, -1]])
# The group finds answers 0, 1 and one that is new; the last completion of the second prompt is bad.
REWARD, ANSWER = jnp.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]), jnp.array([[0, 1, 2], [0, 2, 2]])


def bonus(kl):
    """(reward - own reward, ref_logp - own) of every completion, at beta .1."""
    policy = SimpleNamespace(ref_reward=REF_REWARD, ref_answer=REF_ANSWER, reward=REWARD)
    numbers, algorithm = Numbers(0.1, 0.8), method_rules.resolved(Algorithm(kl=kl))
    masses = jax.jit(lambda: step._masses(BySampler(policy), numbers, algorithm))()
    assert masses.log_mass.shape == (2, 7)  # four samples and three completions can have seven answers
    zero = jnp.zeros((2, 3, 1))
    scored = Scored(zero, zero + 1, zero[..., 0], REWARD, ANSWER, masses.log_mass, unseen_log_mass=masses.unseen)
    after, _ = method_rules.transformed(algorithm, scored, None, numbers)
    return np.asarray(after.reward - REWARD), np.asarray(after.ref_logp)


def test_an_answer_that_is_new_has_the_bonus_of_half_a_sample():
    reward, ref = bonus("reverse")
    np.testing.assert_allclose(reward, [[0, 0.1 * np.log(2), 0.1 * np.log(4)], [0, 0, 0]], atol=1e-6)
    np.testing.assert_array_equal(ref, 0)
    reward, ref = bonus("forward")
    np.testing.assert_array_equal(reward, 0)
    np.testing.assert_allclose(ref, [[0, np.log(2), np.log(4)], [0, 0, 0]], atol=1e-6)
