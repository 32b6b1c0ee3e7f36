"""Where training ends: follow an expected gradient from a starting policy to where it vanishes.

The flow d logits / dt = natural gradient is followed by implicit steps whose length grows as long as they agree with
the flow (pseudo-transient continuation): short steps trace it, so that it ends in the attractor that belongs to the
start; long ones are Newton's. The natural gradient is the plain one over the probability of drawing the token, so that
its speed does not depend on how rare a token has become; both vanish at the same policies.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.audit import enumeration

SETTLED = 1e-9  # a gradient in a logit below this has vanished (reward units a nat)
SMALLEST = SETTLED / 100  # the search goes on until the gradient is below this
RUNAWAY = 1e6  # a logit that falls faster than this (reward units a nat) while its gradient is not zero has no end
GONE = 1e-30  # a token rarer than this is not followed any further even where its gradient does not vanish
WIDTH = 1e-5  # of the differences that give the slope of the flow (nats)
LONGEST = 30.0  # step of a logit (nats)
LOST = 1e-14  # a token rarer than this that is still losing is not followed any further: where it goes is known
KEPT = 1e-6  # only deviations among tokens likelier than this tell whether the end is an attractor

Kind = Literal["settled", "runs_away", "unsettled"]


class Flow(NamedTuple):
    """The natural gradient of a tabular policy over `strings`.

    `rows` [r] are the contexts that the strings visit; `evaluate` (params [k, c, v], further arrays) -> natural
    gradient, plain gradient and probability of each token of these contexts, all [k, r, v].
    """

    strings: enumeration.Strings
    rows: np.ndarray
    evaluate: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


class Point(NamedTuple):
    """Where the search ended.

    `logp` [n] log-probabilities of the strings (nats); `residual` the largest expected gradient in a logit; `pull` the
    largest natural gradient: above zero, a token is still to gain, however rare it is now; `growth` the fastest rate
    at which a small deviation among the tokens that are not lost grows (below zero: an attractor; zero: a continuum of
    stationary points); `kind`: "settled" (the gradient vanishes), "runs_away" (some token is driven out ever faster,
    without end) or "unsettled" (the search gave up); `steps` taken.
    """

    logp: np.ndarray
    residual: float
    pull: float
    growth: float
    kind: Kind
    steps: int

    @property
    def probability(self) -> np.ndarray:
        return np.exp(self.logp)

    @property
    def is_attractor(self) -> bool:
        """Whether the gradient vanishes, nothing rare is still to gain, and no small deviation grows."""
        return self.residual <= SMALLEST and self.pull <= 1e-4 and self.growth <= 1e-4


class _State(NamedTuple):
    """The flow at one point: logits, natural gradient, its derivative, plain gradient, probability, of d logits."""

    logits: np.ndarray
    signal: np.ndarray
    slope: np.ndarray
    gradient: np.ndarray
    probability: np.ndarray

    @property
    def residual(self) -> float:
        return float(np.abs(self.gradient).max())

    @property
    def runs_away(self) -> bool:
        return bool(np.any((self.signal < -RUNAWAY) & (self.gradient < -SETTLED)))

    @property
    def is_over(self) -> bool:
        return self.residual <= SMALLEST or bool(np.any((self.probability < GONE) & (self.gradient < -SETTLED)))


def flow(
    gradient: Callable[..., jax.Array], all_strings: enumeration.Strings, drawn_by: np.ndarray | None = None
) -> Flow:
    """The flow of an expected gradient, compiled once for all starts and further arrays.

    Args:
        gradient: (logits [c, v], further arrays) -> expected gradient in the logits of what training maximises.
        all_strings: what can be drawn.
        drawn_by: logits of what draws the strings; the policy itself by default.

    Returns:
        What `find` follows.
    """
    rows = np.unique(all_strings.context[all_strings.mask > 0])

    def evaluate(params, arrays):
        sampler = params if drawn_by is None else jnp.asarray(drawn_by)
        share = enumeration.expected_visits(sampler, all_strings)[rows, None] * jax.nn.softmax(sampler)[rows]
        plain = gradient(params, *arrays)[rows]
        return plain / jnp.maximum(share, jnp.finfo(float).tiny), plain, jax.nn.softmax(params)[rows]

    compiled = jax.jit(jax.vmap(evaluate, (0, None)))
    return Flow(all_strings, rows, lambda params, *arrays: compiled(params, arrays))


def find(along: Flow, start: np.ndarray, *arrays, max_steps: int = 600, settle_steps: int = 0) -> Point:
    """Follow a flow from a policy to where it rests.

    Args:
        along: the flow.
        start: logits [c, v].
        arrays: handed on to the gradient.
        max_steps: implicit steps at most.
        settle_steps: explicit steps of shrinking length where those did not come to rest. A gradient that jumps (ranks
            do where two probabilities cross) has no root there; these settle between its two sides.

    Returns:
        The end.
    """
    start = np.asarray(start, float)
    shape = len(along.rows), start.shape[1]

    def placed(logits_kd):
        params = np.repeat(start[None], len(logits_kd), axis=0)
        params[:, along.rows] = logits_kd.reshape(-1, *shape)
        return params

    def evaluate(logits_kd):
        values = along.evaluate(jnp.asarray(placed(logits_kd)), *arrays)
        return [np.asarray(x).reshape(len(logits_kd), -1) for x in values]

    state, steps = _follow(evaluate, start[along.rows].ravel(), max_steps)
    if settle_steps and state.residual > SMALLEST and not state.runs_away:
        state, steps = _settle(evaluate, state.logits, settle_steps), steps + settle_steps
    kind = "settled" if state.residual < SETTLED else "runs_away" if state.runs_away else "unsettled"
    growth = _growth(state, np.repeat(np.arange(shape[0]), shape[1]))
    logp = np.asarray(enumeration.string_logp(placed(state.logits[None])[0], along.strings))
    return Point(logp, state.residual, float(state.signal.max()), growth, kind, steps)


def _look(evaluate, logits: np.ndarray) -> _State:
    """The flow and its slope: by differences, as automatic ones stop where a loss stops its gradients."""
    moves = WIDTH * np.eye(logits.size)
    signals, gradients, probabilities = evaluate(logits + np.concatenate([0 * moves[:1], moves, -moves]))
    ahead, behind = np.split(signals[1:], 2)
    slope = ((ahead - behind) / (2 * WIDTH)).T
    return _State(logits, signals[0], np.nan_to_num(slope, posinf=0, neginf=0), gradients[0], probabilities[0])


def _is_live(state: _State) -> np.ndarray:
    return (state.probability > LOST) | (state.signal > 0)


def _follow(evaluate, start: np.ndarray, max_steps: int) -> tuple[_State, int]:
    """Implicit steps along the flow, until the gradient vanishes or no step is short enough to agree with the flow."""
    state, interval = _look(evaluate, start), 0.5
    for step in range(max_steps):
        if state.is_over or interval < 1e-12:
            return state, step
        live = _is_live(state)
        slope = state.slope[np.ix_(live, live)]
        # Where deviations grow, an implicit step longer than their time scale would turn round.
        interval = min(interval, 0.5 / max(np.linalg.eigvals(slope).real.max(), 1e-9))
        move = np.zeros_like(start)
        move[live] = np.linalg.solve(np.eye(live.sum()) / interval - slope, state.signal[live])
        move *= min(1.0, LONGEST / max(np.abs(move).max(), 1e-300))
        tried = _look(evaluate, state.logits + move)
        # An implicit step must agree with the flow where it arrives, as it would exactly were the flow linear.
        miss = np.abs(interval * tried.signal - move)[live].max() / (0.1 + np.abs(move).max())
        if miss < 0.5:
            state, interval = tried, 2.0 * interval
        else:
            interval *= 0.4
    return state, max_steps


def _settle(evaluate, logits: np.ndarray, count: int) -> _State:
    """Explicit natural steps of shrinking size: they end between two sides of a jump, where no root is."""
    for step in range(count):
        signals, _, probabilities = evaluate(logits[None])
        live = (probabilities[0] > LOST) | (signals[0] > 0)
        size = min(1.0, 20.0 / (step + 1)) / (1 + np.abs(signals[0][live]).max())
        logits = logits + size * np.where(live, signals[0], 0.0)
    return _look(evaluate, logits)


def _growth(state: _State, row_d: np.ndarray) -> float:
    """The fastest rate at which a deviation among the kept tokens grows; all logits of a row alike are no change."""
    kept = state.probability > KEPT
    same_row = row_d[kept, None] == row_d[kept]
    vectors, sizes, _ = np.linalg.svd(np.eye(kept.sum()) - same_row / same_row.sum(axis=1))
    basis = vectors[:, sizes > 0.5]
    if not basis.size:
        return -np.inf
    return float(np.linalg.eigvals(basis.T @ state.slope[np.ix_(kept, kept)] @ basis).real.max())
