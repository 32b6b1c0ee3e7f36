"""A tabular autoregressive policy so small that every string, and every group of strings, can be enumerated."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, LENGTH = 3, 3
CONTEXTS = 1 + VOCAB + VOCAB**2
ORDERED_AT_MOST = 3  # groups up to this size are listed in every order, larger ones once with their multiplicity


class Strings(NamedTuple):
    """All strings: tokens, the row of the table each is drawn from, and 1 where it counts; all [n, t]."""

    tokens: np.ndarray
    context: np.ndarray
    mask: np.ndarray


def strings(end: int | None = None) -> Strings:
    """Every string of three tokens, cut after the first `end` token; what follows is filled with token 1.

    The filling has log-probabilities of its own, with gradients: code that ignored the mask would see them.

    Args:
        end: the token that ends a string, or None for strings of equal length.

    Returns:
        15 strings with an end token, 27 without.
    """
    rows = {}
    for tokens in itertools.product(range(VOCAB), repeat=LENGTH):
        stop = tokens.index(end) + 1 if end in tokens else LENGTH
        tokens = tokens[:stop] + (1,) * (LENGTH - stop)
        context = [0, 1 + tokens[0], 1 + VOCAB + VOCAB * tokens[0] + tokens[1]]
        rows[tokens[:stop]] = (tokens, context, [int(t < stop) for t in range(LENGTH)])
    return Strings(*(np.array(column) for column in zip(*rows.values(), strict=True)))


def outcomes(count: int) -> Strings:
    """A single categorical: `count` strings of one token.

    Args:
        count: number of outcomes.

    Returns:
        The strings, all drawn from row 0.
    """
    return Strings(np.arange(count)[:, None], np.zeros((count, 1), int), np.ones((count, 1), int))


def table(seed: int, scale: float = 1.0) -> np.ndarray:
    """Random logits, one row a context.

    Args:
        seed: of the generator.
        scale: standard deviation (nats).

    Returns:
        Logits [CONTEXTS, VOCAB].
    """
    return scale * np.random.default_rng(seed).normal(size=(CONTEXTS, VOCAB))


def token_logp(params, all_strings: Strings) -> jax.Array:
    """[n, t] log-probabilities of every token (nats), masked ones included."""
    return jax.nn.log_softmax(params)[all_strings.context, all_strings.tokens]


def string_logp(params, all_strings: Strings) -> jax.Array:
    """[n] log-probabilities of the strings (nats)."""
    return jnp.sum(token_logp(params, all_strings) * all_strings.mask, axis=-1)


def reach(params, all_strings: Strings) -> jax.Array:
    """How often a string visits each row of the table, in expectation [c]; not differentiated."""
    visits_nt = jnp.exp(string_logp(jax.lax.stop_gradient(params), all_strings))[:, None] * all_strings.mask
    return jnp.zeros(np.shape(params)[0]).at[all_strings.context].add(visits_nt)


def tuples(n: int, group: int) -> np.ndarray:
    """All ordered groups of indices, [n ** group, group]."""
    return np.array(list(itertools.product(range(n), repeat=group)))


def groups(n: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """All groups of indices, and the logarithm of how many orders each row stands for.

    Args:
        n: number of strings.
        group: strings a group.

    Returns:
        Indices [m, group] and log-counts [m]: every order, or, for groups above ORDERED_AT_MOST, one row for all
        orders of it. The counts sum to n ** group.
    """
    if group <= ORDERED_AT_MOST:
        rows = tuples(n, group)
        return rows, np.zeros(len(rows))
    rows = np.array(list(itertools.combinations_with_replacement(range(n), group)))
    repeats = np.stack([(rows == a).sum(-1) for a in range(n)], axis=-1)
    factorial = np.array([math.lgamma(k + 1) for k in range(group + 1)])
    return rows, factorial[group] - factorial[repeats].sum(-1)


def group_weight(params, all_strings: Strings, rows: np.ndarray, log_orders: np.ndarray | float = 0.0) -> jax.Array:
    """Probability of each group under the policy [m]; not differentiated."""
    logp_m = jnp.sum(string_logp(params, all_strings)[rows], axis=-1)
    return jax.lax.stop_gradient(jnp.exp(logp_m + log_orders))


def expected_gradient(loss: Callable, params, all_strings: Strings, group: int, drawn_by=None) -> jax.Array:
    """Gradient of `loss`, averaged over all groups by probability; the probabilities are not differentiated.

    Args:
        loss: of one group, from (logp [1, g, t], mask [1, g, t], indices [g]).
        params: logits of the policy.
        all_strings: what can be drawn.
        group: strings a group, in every order.
        drawn_by: logits of another policy, which draws the groups.

    Returns:
        An array like `params`.
    """
    rows = tuples(len(all_strings.tokens), group)
    mask_nt = jnp.asarray(all_strings.mask)

    def mean_loss(params):
        logp_nt = token_logp(params, all_strings)

        def one(index):
            return loss(logp_nt[index][None], mask_nt[index][None], index)

        weight_m = group_weight(params if drawn_by is None else drawn_by, all_strings, rows)
        return jnp.sum(weight_m * jax.vmap(one)(rows))

    return jax.grad(mean_loss)(params)


def relative_error(got, want) -> float:
    """Norm of the difference over the norm of what was wanted."""
    return float(np.linalg.norm(np.asarray(got) - np.asarray(want)) / np.linalg.norm(np.asarray(want)))
