"""A tabular autoregressive policy so small that every string, and every group of them, can be enumerated."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, LENGTH = 3, 3
CONTEXTS = 1 + VOCAB + VOCAB**2


class Strings(NamedTuple):
    """All strings: tokens, the row of the table each is drawn from, and 1 where it counts; all [n, t]."""

    tokens: np.ndarray
    context: np.ndarray
    mask: np.ndarray


def strings(end: int | None = None) -> Strings:
    """Every string of three tokens, cut after the first `end` token; what follows is filled with token 1.

    The filling has log-probabilities of its own, with gradients: code that ignored the mask would see them.
    """
    rows = {}
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        stop = tokens.index(end) + 1 if end in tokens else LENGTH
        tokens = tokens[:stop] + (1,) * (LENGTH - stop)
        context = [0, 1 + tokens[0], 1 + VOCAB + VOCAB * tokens[0] + tokens[1]]
        rows[tokens[:stop]] = (tokens, context, [int(t < stop) for t in range(LENGTH)])
    return Strings(*(np.array(column) for column in zip(*rows.values(), strict=True)))


def table(seed: int, scale: float = 1.0) -> np.ndarray:
    """Random logits, one row a context."""
    return scale * np.random.default_rng(seed).normal(size=(CONTEXTS, VOCAB))


def token_logp(params, all_strings: Strings):
    """[n, t] log-probabilities of every token, masked ones included."""
    return jax.nn.log_softmax(params)[all_strings.context, all_strings.tokens]


def string_logp(params, all_strings: Strings):
    """[n] log-probabilities of the strings."""
    return jnp.sum(token_logp(params, all_strings) * all_strings.mask, axis=-1)


def tuples(n: int, group: int) -> np.ndarray:
    """All ordered groups of indices, [n ** group, group]."""
    return np.array(list(itertools.product(range(n), repeat=group)))


def expected_gradient(loss, params, all_strings: Strings, group: int):
    """Gradient of `loss`, averaged over all groups by probability; the probabilities are not differentiated.

    `loss(logp_1gt, mask_1gt, index_g)` is the loss of one group.
    """
    groups = tuples(len(all_strings.tokens), group)
    weight = jax.lax.stop_gradient(jnp.exp(jnp.sum(string_logp(params, all_strings)[groups], axis=-1)))
    mask_nt = jnp.asarray(all_strings.mask)

    def mean_loss(params):
        logp_nt = token_logp(params, all_strings)

        def one(index):
            return loss(logp_nt[index][None], mask_nt[index][None], index)

        return jnp.sum(weight * jax.vmap(one)(groups))

    return jax.grad(mean_loss)(params)


def relative_error(got, want) -> float:
    return float(np.linalg.norm(np.asarray(got) - np.asarray(want)) / np.linalg.norm(np.asarray(want)))
