"""All strings of a policy small enough to list them, and expected gradients over all groups of them.

The policy is a table of logits with a row for each context (the tokens so far). A single categorical over outcomes is
the case of strings of one token, all drawn from row 0.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

VOCAB, LENGTH = 3, 3
CONTEXTS = 1 + VOCAB + VOCAB**2
ORDERED_AT_MOST = 3  # groups up to this size are listed in every order, larger ones once with their number of orders
MAX_GROUPS = 50_000  # more than this say that enumeration is the wrong tool

# (log-probability of each token of each string [n, t], differentiable; indices of one group [g]) -> that group's loss
Loss = Callable[[jax.Array, jax.Array], jax.Array]


class Strings(NamedTuple):
    """All strings: tokens, the row of the table each is drawn from, and 1 where a token counts; all [n, t]."""

    tokens: Int[np.ndarray, "n t"]
    context: Int[np.ndarray, "n t"]
    mask: Int[np.ndarray, "n t"]


class Groups(NamedTuple):
    """Groups of strings: indices, and the logarithm of the number of orders that each row stands for."""

    index: Int[np.ndarray, "m g"]
    log_orders: Float[np.ndarray, " m"]


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


def random_logits(seed: int, scale: float = 1.0) -> Float[np.ndarray, "c v"]:
    """A random policy over `strings`.

    Args:
        seed: of the generator.
        scale: standard deviation of the logits (nats).

    Returns:
        Logits, one row a context.
    """
    return scale * np.random.default_rng(seed).normal(size=(CONTEXTS, VOCAB))


def token_logp(params: Float[ArrayLike, "c v"], all_strings: Strings) -> Float[Array, "n t"]:
    """Log-probabilities of every token (nats), masked ones included."""
    return jax.nn.log_softmax(jnp.asarray(params))[all_strings.context, all_strings.tokens]


def string_logp(params: Float[ArrayLike, "c v"], all_strings: Strings) -> Float[Array, " n"]:
    """Log-probabilities of the strings (nats)."""
    return jnp.sum(token_logp(params, all_strings) * all_strings.mask, axis=-1)


def expected_visits(params: Float[ArrayLike, "c v"], all_strings: Strings) -> Float[Array, " c"]:
    """How often a string visits each row of the table, in expectation; not differentiated."""
    visits_nt = jnp.exp(string_logp(jax.lax.stop_gradient(params), all_strings))[:, None] * all_strings.mask
    return jnp.zeros(np.shape(params)[0]).at[all_strings.context].add(visits_nt)


def groups(count: int, size: int) -> Groups:
    """All groups of strings.

    Args:
        count: number of strings.
        size: strings a group.

    Returns:
        Every order of every group, or, for groups above ORDERED_AT_MOST, one row for all orders of a group. The
        numbers of orders sum to count ** size.

    Raises:
        ValueError: for more than MAX_GROUPS rows.
    """
    ordered = size <= ORDERED_AT_MOST
    rows = count**size if ordered else math.comb(count + size - 1, size)
    if rows > MAX_GROUPS:
        raise ValueError(f"{count} strings in groups of {size} make {rows} groups, over {MAX_GROUPS}: use fewer")
    if ordered:
        return Groups(np.array(list(itertools.product(range(count), repeat=size))), np.zeros(rows))
    index_mg = np.array(list(itertools.combinations_with_replacement(range(count), size)))
    repeats_mn = np.stack([(index_mg == n).sum(-1) for n in range(count)], axis=-1)
    log_factorial = np.array([math.lgamma(k + 1) for k in range(size + 1)])
    return Groups(index_mg, log_factorial[size] - log_factorial[repeats_mn].sum(-1))


def group_probability(params: Float[ArrayLike, "c v"], all_strings: Strings, over: Groups) -> Float[Array, " m"]:
    """Probability that a policy draws each group, in any of the orders that its row stands for; not differentiated."""
    logp_n = string_logp(params, all_strings)
    return jax.lax.stop_gradient(jnp.exp(jnp.sum(logp_n[over.index], axis=-1) + over.log_orders))


def expected_gradient(
    loss: Loss,
    params: Float[ArrayLike, "c v"],
    all_strings: Strings,
    over: Groups,
    drawn_by: Float[ArrayLike, "c v"] | None = None,
) -> Float[Array, "c v"]:
    """Gradient of a loss, averaged over groups by their probability, which is not differentiated.

    Args:
        loss: of one group. For groups above ORDERED_AT_MOST it must not depend on their order.
        params: logits of the policy.
        all_strings: what can be drawn.
        over: all groups of one size.
        drawn_by: logits of what draws the groups; the policy itself by default.

    Returns:
        One derivative a logit.
    """
    probability_m = group_probability(params if drawn_by is None else drawn_by, all_strings, over)

    def mean_loss(params):
        logp_nt = token_logp(params, all_strings)
        return probability_m @ jax.vmap(lambda index_g: loss(logp_nt, index_g))(jnp.asarray(over.index))

    return jax.grad(mean_loss)(params)
