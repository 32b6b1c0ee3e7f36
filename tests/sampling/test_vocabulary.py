"""Rows of the head without a token, padding and holes: never drawn, and in no softmax, of sampler and trainer alike."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policy import tiny

from mara_jax import sampling
from mara_jax.policies import vocabulary
from mara_jax.sampling import head, logprobs

V, WITHOUT = 40, ((5, 9), (30, 40))
KNOWN = np.flatnonzero(vocabulary.known(WITHOUT, V))


@pytest.fixture(scope="module")
def case():
    """A policy whose likeliest rows are those without a token, and a random reference."""
    policy, params = tiny(vocab=V)
    policy = dataclasses.replace(policy, architecture=dataclasses.replace(policy.architecture, without_token=WITHOUT))
    return policy, params


def test_known_is_what_the_ranges_leave():
    assert KNOWN.tolist() == [*range(5), *range(9, 30)]
    logits = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(vocabulary.masked(logits, ((1, 3),))[:, 1:3], np.float32(vocabulary.LEAST))
    np.testing.assert_array_equal(vocabulary.masked(logits, ((0, 1),), axis=0)[1:], logits[1:])


@pytest.mark.parametrize("chunks", [1, 3])
def test_statistics_are_those_of_a_vocabulary_without_these_rows(case, chunks):
    """Log-probs, entropy, KL and gradients of a head that has only the other rows; theirs have no gradient."""
    random = np.random.default_rng(0)
    rows, ref_rows = (jnp.asarray(random.normal(size=(V, 8)), jnp.float32) for _ in range(2))
    hidden, ref_hidden = (jnp.asarray(random.normal(size=(2, 6, 8)), jnp.float32) for _ in range(2))
    place = jnp.asarray(random.integers(0, len(KNOWN), (2, 6)))

    def summed(without, rows, ref_rows, tokens, hidden):
        stats: Any = head._stats(chunks, 1, without, rows, hidden, tokens, (ref_rows, ref_hidden))
        return jnp.sum(stats[0]), stats

    def gradients(*args):
        return jax.value_and_grad(summed, (1, 4), has_aux=True)(*args)

    (_, stats), (d_rows, d_hidden) = gradients(WITHOUT, rows, ref_rows, jnp.asarray(KNOWN)[place], hidden)
    (_, expected), (d_few, d_expected) = gradients((), rows[KNOWN], ref_rows[KNOWN], place, hidden)
    for ours, theirs in zip(stats, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(d_hidden, d_expected, atol=1e-5)
    np.testing.assert_allclose(d_rows[KNOWN], d_few, atol=1e-5)
    np.testing.assert_array_equal(np.delete(np.asarray(d_rows), KNOWN, axis=0), 0)


@pytest.mark.parametrize(
    ("slots", "options"), [(0, {}), (6, {}), (0, {"top_k": 39, "temperature": 1e-3, "top_p": 0.9})]
)
def test_they_are_never_drawn_and_log_probs_agree(case, slots, options):
    policy, params = case
    drawn = sampling.sample(
        policy, params, [[1, 2], [3]], key=jax.random.key(1), group_size=24, max_new_tokens=6, slots=slots, **options
    )
    assert set(np.asarray(drawn.tokens).ravel().tolist()) <= set(KNOWN.tolist())
    again = logprobs.completion_logps(
        policy.architecture, params, drawn.prompt_tokens, drawn.prompt_lengths, drawn.tokens
    )
    mask = np.asarray(logprobs.mask(drawn.lengths, 6))
    np.testing.assert_allclose(np.asarray(drawn.logp), np.asarray(again) * mask, atol=2e-5)
    # By hand, of the first completion's first token: the softmax of policy.logits over the rows with a token.
    logits = np.asarray(policy.logits(params, np.array([[1, 2]]), np.array([2])))[0, -1].astype(np.float64)
    first = int(drawn.tokens[0, 0, 0])
    expected = logits[first] - np.log(np.exp(logits[KNOWN]).sum())
    np.testing.assert_allclose(float(drawn.logp[0, 0, 0]), expected, atol=2e-5)
    assert policy.logits(params, np.array([[1]]), np.array([1])).shape[-1] == V
