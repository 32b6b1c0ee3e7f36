"""Rows of the LM head that stand for no token: the padding of a vocabulary, and its holes, are never drawn.

Training and sampling leave them out of every softmax alike, so that log-probs are those of what is drawn.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Far below any logit, and finite: it stands in sums beside weights of 0, which an infinity would turn into NaN.
LEAST = -1e30

Ranges = tuple[tuple[int, int], ...]  # of ids, each (first, last + 1)


def known(without_token: Ranges, vocab_size: int) -> np.ndarray:
    """Where a vocabulary has a token, [v]."""
    known_v = np.ones(vocab_size, bool)
    for first, end in without_token:
        known_v[first:end] = False
    return known_v


def masked(logits: jax.Array, without_token: Ranges, axis: int = -1) -> jax.Array:
    """Logits with LEAST wherever there is no token; axis: that of the vocabulary."""
    if not without_token:
        return logits
    shape = [1] * logits.ndim
    shape[axis] = -1
    return jnp.where(known(without_token, logits.shape[axis]).reshape(shape), logits, LEAST)
