"""Where REINVENT's squared gap ends on strings of a tiny alphabet, and what centring changes off-policy, in float64.

Fifteen strings of three letters, all of them listed: the policy can reach every distribution over them. Off-policy,
each string is drawn with a fixed probability (replay, or repeats removed), whatever the policy is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import small_policy

from mara_jax.audit import enumeration
from mara_jax.core import augment, kl, rivals, targets

pytestmark = pytest.mark.usefixtures("x64")

SIGMA = 4.0
THRESHOLD = 0.6
STRINGS = enumeration.strings(end=2)
COUNT = len(STRINGS.tokens)
REWARD = np.random.default_rng(7).uniform(size=COUNT)
GOOD = REWARD >= THRESHOLD
ANSWER = np.where(GOOD, np.arange(COUNT) % 3, -1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


REF_LOGP = (log_softmax(enumeration.random_logits(2))[STRINGS.context, STRINGS.tokens] * STRINGS.mask).sum(-1)


def mara_rewards() -> np.ndarray:
    return np.asarray(augment.mara(REWARD[None], REF_LOGP[None], beta=1 / SIGMA, threshold=THRESHOLD)[0][0])


def optimum(reward: np.ndarray) -> np.ndarray:
    return np.exp(np.asarray(targets.reverse_kl(REF_LOGP, reward, 1 / SIGMA)))


@jax.jit
@jax.value_and_grad
def off_policy_loss(flat, centred, reward, drawn):
    """The expected squared gap of strings drawn with `drawn`, less its mean or not, of a policy's logits."""
    logp = enumeration.string_logp(flat.reshape(enumeration.CONTEXTS, enumeration.VOCAB), STRINGS)
    gap = logp - REF_LOGP - SIGMA * reward
    return drawn @ jnp.square(gap - centred * (drawn @ gap))


def off_policy_end(centred: bool, reward: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """[n] probabilities of the strings where that loss is least."""
    start, settings = enumeration.random_logits(3).ravel(), (float(centred), reward, drawn)
    done = scipy.optimize.minimize(off_policy_loss, start, settings, jac=True, method="BFGS", tol=1e-9)
    logp = log_softmax(done.x.reshape(enumeration.CONTEXTS, enumeration.VOCAB))[STRINGS.context, STRINGS.tokens]
    return np.exp((logp * STRINGS.mask).sum(-1))


def stationary_uncentred(reward: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The same for the uncentred loss from Lagrange's equation: drawn (log ref + sigma R - log p) = m p, sum of p 1."""
    wanted = REF_LOGP + SIGMA * reward

    def probability(multiplier: float) -> np.ndarray:
        def gap(logp, target, weight):
            return weight * (target - logp) - multiplier * np.exp(logp)

        return np.exp(
            [scipy.optimize.brentq(gap, -60, 3, (c, q), xtol=1e-14) for c, q in zip(wanted, drawn, strict=True)]
        )

    multiplier = scipy.optimize.brentq(lambda m: probability(m).sum() - 1, 0.0, 50.0, xtol=1e-14)
    return probability(multiplier)


def distance(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.abs(p - q).sum() / 2)


UNIFORM = np.full(COUNT, 1 / COUNT)
SKEWED = np.random.default_rng(8).dirichlet(np.full(COUNT, 2.0))


def test_the_losses_above_are_those_of_training():
    """On every string once, with equal weights: the mean square, and the variance with the divisor n."""
    logp, mask = (
        np.asarray(x)[None] for x in (enumeration.token_logp(enumeration.random_logits(1), STRINGS), STRINGS.mask)
    )
    gap = (logp * mask).sum(-1)[0] - REF_LOGP - SIGMA * REWARD
    uncentred = rivals.reinvent(logp, mask, REF_LOGP[None], REWARD[None], sigma=SIGMA)[0]
    np.testing.assert_allclose(uncentred, np.mean(gap**2), rtol=1e-12)
    centred = rivals.vargrad(logp, mask, REF_LOGP[None], REWARD[None], beta=1 / SIGMA)[0]
    np.testing.assert_allclose(centred * (COUNT - 1) / COUNT, np.mean((gap - gap.mean()) ** 2), rtol=1e-12)


def test_on_policy_with_mara_reinvent_is_minus_two_sigma_the_gradient_of_the_augmented_objective():
    """Without MARA: tests/core/test_rivals.py."""
    params, reward = enumeration.random_logits(1), mara_rewards()

    def loss(logp, mask, index):
        return rivals.reinvent(
            logp, mask, jnp.asarray(REF_LOGP)[index][None], jnp.asarray(reward)[index][None], sigma=SIGMA
        )[0]

    def objective(params):
        logp = enumeration.string_logp(params, STRINGS)
        return jnp.exp(logp) @ reward - kl.reverse(logp, REF_LOGP) / SIGMA

    got = jax.jit(lambda params: small_policy.expected_gradient(loss, params, STRINGS, 1))(jnp.asarray(params))
    assert small_policy.relative_error(got, -2 * SIGMA * jax.grad(objective)(jnp.asarray(params))) < 1e-10


def test_mara_makes_the_augmented_likelihood_of_good_strings_one_constant():
    likelihood = REF_LOGP + SIGMA * mara_rewards()
    anchor = np.argmax(np.where(GOOD, REF_LOGP, -np.inf))
    np.testing.assert_allclose(likelihood[GOOD], REF_LOGP[anchor] + SIGMA * REWARD[anchor], rtol=1e-12)
    np.testing.assert_array_equal(likelihood[~GOOD], (REF_LOGP + SIGMA * REWARD)[~GOOD])


def test_over_answers_the_augmented_likelihood_of_good_answers_is_one_constant():
    """The sum over an answer's strings, as over the SMILES of a molecule."""
    log_mass = np.array([np.logaddexp.reduce((REF_LOGP + SIGMA * REWARD)[a == ANSWER]) for a in range(3)])
    settings = {"beta": 1 / SIGMA, "threshold": THRESHOLD}
    augmented = jax.jit(lambda *arrays: augment.mara_answers(*arrays, **settings)[0])
    reward = augmented(REWARD[None], REF_LOGP[None], ANSWER[None], log_mass[None])
    likelihood = REF_LOGP + SIGMA * np.asarray(reward)[0]
    sums = [np.logaddexp.reduce(likelihood[a == ANSWER]) for a in range(3)]
    np.testing.assert_allclose(sums, log_mass.max(), rtol=1e-12)


def test_the_likelihood_penalty_lowers_each_reward():
    """By c / (2 sigma log pi^2), gradient by gradient; probability 1 is no division by zero."""
    c, logp = 3.0, -jnp.array([[[2.0], [0.5], [9.0]]])
    mask, ref, reward = jnp.ones_like(logp), jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[0.3, 0.9, 0.1]])
    gradient = jax.jit(
        jax.grad(
            lambda logp, reward, c: rivals.reinvent(logp, mask, ref, reward, sigma=SIGMA, likelihood_penalty=c)[0]
        ),
        static_argnums=2,
    )
    lowered = reward - c / (2 * SIGMA * logp[..., 0] ** 2)
    np.testing.assert_allclose(gradient(logp, reward, c), gradient(logp, lowered, 0.0), rtol=1e-12)
    assert np.isfinite(gradient(jnp.zeros_like(logp), reward, c)).all()


@pytest.mark.parametrize("drawn", [UNIFORM, SKEWED], ids=["uniform", "skewed"])
def test_off_policy_the_centred_loss_ends_at_the_optimum_and_the_uncentred_one_does_not(drawn):
    plain = off_policy_end(False, REWARD, drawn)
    np.testing.assert_allclose(plain, stationary_uncentred(REWARD, drawn), atol=1e-7)
    assert distance(plain, optimum(REWARD)) > 0.1
    assert distance(off_policy_end(True, REWARD, drawn), optimum(REWARD)) < 1e-6
    # A constant added to all rewards leaves the optimum where it is; the uncentred loss ends elsewhere, and at the
    # optimum where the constant makes log Z zero.
    log_z = np.logaddexp.reduce(REF_LOGP + SIGMA * REWARD)
    assert distance(off_policy_end(False, REWARD + 1, drawn), plain) > 0.05
    assert distance(off_policy_end(False, REWARD - log_z / SIGMA, drawn), optimum(REWARD)) < 1e-6


def test_off_policy_with_mara_the_centred_loss_is_flat_on_the_good_strings_and_the_uncentred_one_not_always():
    want = np.exp(np.asarray(targets.mara(REF_LOGP, REWARD, 1 / SIGMA, THRESHOLD)))
    assert distance(off_policy_end(True, mara_rewards(), SKEWED), want) < 1e-6
    even, uneven = (off_policy_end(False, mara_rewards(), drawn) for drawn in (UNIFORM, SKEWED))
    assert np.ptp(even[GOOD]) < 1e-7 and distance(even, want) > 0.02
    assert np.ptp(np.log(uneven[GOOD])) > 0.3
