"""Where an objective really ends: the distribution at which its exact expected gradient vanishes.

The policy is one free categorical, a string is one token. Expectations run over every outcome or every
group of outcomes, through the same loss functions that training uses, in float64.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

# More groups than this say that enumeration is the wrong tool.
MAX_GROUPS = 50_000

# (live log-probabilities of all outcomes, indices of one group, further arrays) -> that group's loss
Loss = Callable[..., Float[Array, ""]]
# (logits, further arrays) -> expected gradient of what is maximised, in the logits
Field = Callable[..., Float[Array, " a"]]

# An outcome below this that is still losing is taken to be lost: where it goes is known.
_LOST = 1e-14


class Point(NamedTuple):
    """Where the search ended.

    `logp_a` log-probabilities (nats); `residual` the largest expected gradient in a logit; `pull` the largest
    expected gradient over its outcome's probability: above zero, an outcome is still to gain, however rare it
    is now; `growth` the fastest rate at which a small deviation among the outcomes that are not lost grows
    (below zero: an attractor; zero: a continuum of stationary points); `converged` whether all of these are as
    small as asked; `steps` taken.
    """

    logp_a: np.ndarray
    residual: float
    pull: float
    growth: float
    converged: bool
    steps: int


def expected_field(loss: Loss, outcomes: int, group: int, sampler_logp: ArrayLike | None = None) -> Field:
    """The expected gradient of minus a loss, over all groups of outcomes by their probability.

    Groups that differ in their order alone are taken once, with their number of orders.

    Args:
        loss: of one group, given (live log-probabilities, indices of the group, any further arrays); the
            groups' own probabilities are not differentiated, as in training. It must not depend on the order
            of a group.
        outcomes: number of outcomes.
        group: samples in a group.
        sampler_logp: log-probabilities of what draws the samples; the policy itself by default.

    Returns:
        A function of the logits and of the further arrays.

    Raises:
        ValueError: for more than `MAX_GROUPS` groups.
    """
    count = math.comb(outcomes + group - 1, group)
    if count > MAX_GROUPS:
        raise ValueError(f"{outcomes} outcomes in groups of {group} make {count} groups, over {MAX_GROUPS}")
    groups = np.array(list(itertools.combinations_with_replacement(range(outcomes), group)))
    orders = np.array([_orders(row) for row in groups])

    def mean_loss(logits_a, *arrays):
        logp_a = jax.nn.log_softmax(logits_a)
        drawn_a = jax.lax.stop_gradient(logp_a) if sampler_logp is None else jnp.asarray(sampler_logp)
        weight = orders * jnp.exp(jnp.sum(drawn_a[groups], axis=-1))
        return -jnp.sum(weight * jax.vmap(lambda index: loss(logp_a, index, *arrays))(groups))

    return jax.grad(mean_loss)


def _orders(row):
    repeats = np.unique(row, return_counts=True)[1]
    return math.factorial(len(row)) // math.prod(math.factorial(int(n)) for n in repeats)


def find(
    field: Field,
    start_logp: ArrayLike,
    *arrays: ArrayLike,
    metric_logp: ArrayLike | None = None,
    tolerance: float = 1e-11,
    max_steps: int = 400,
    settle_steps: int = 1500,
) -> Point:
    """Follow the natural gradient flow from a start to where it rests.

    The flow d logits / dt = gradient / p is followed by implicit steps whose length grows as the gradient falls
    (pseudo-transient continuation): small steps trace the flow, so that it ends in the attractor that belongs to
    the start; long ones are Newton's. A field that jumps (ranks do where two probabilities cross) has no root
    there; then shrinking explicit steps settle between the two sides and the point is not called converged.

    Args:
        field: expected gradient in the logits.
        start_logp: log-probabilities to start from (nats).
        arrays: passed on to the field after the logits.
        metric_logp: what the gradient is divided by (nats), the policy itself by default; with samples from
            elsewhere, give what draws them.
        tolerance: largest gradient in a logit that counts as none.
        max_steps: implicit steps at most.
        settle_steps: explicit steps where those did not converge.

    Returns:
        The point; read its `converged` before its `logp_a`.
    """
    with jax.enable_x64(True):
        arrays = tuple(jnp.asarray(x, float) for x in arrays)

        def signal_of(logp_na):
            metric = np.exp(logp_na if metric_logp is None else np.asarray(metric_logp))
            return np.asarray(_batched(field, len(arrays))(jnp.asarray(logp_na), *arrays)) / metric

        logp, steps = _flow(signal_of, _normalised(np.asarray(start_logp, float)), tolerance, max_steps)
        point = _judge(signal_of, logp, tolerance, steps)
        return point if point.residual <= tolerance else _settle(signal_of, point, tolerance, settle_steps)


def _flow(signal_of, logp, tolerance, max_steps):
    """Implicit steps along the flow: (log-probabilities, steps taken)."""
    interval = 1.0
    signal, slope = _signal_and_slope(signal_of, logp)
    for step in range(max_steps):
        residual = _residual(logp, signal)
        if residual <= tolerance:
            return logp, step
        live = (np.exp(logp) > _LOST) | (signal > 0)
        # Never so long a step that it would turn round where the flow runs away.
        growth = np.linalg.eigvals(slope[np.ix_(live, live)]).real.max()
        interval = min(interval, 1e8, 0.5 / max(growth, 1e-9))
        change = _implicit_step(signal, slope, live, interval)
        tried = _normalised(logp + change)
        tried_signal, tried_slope = _signal_and_slope(signal_of, tried)
        ratio = residual / max(_residual(tried, tried_signal), 1e-300)
        along = np.exp(logp) * (change - np.exp(logp) @ change)
        turned = along @ tried_signal < -0.5 * (along @ signal)
        if (ratio < 0.5 or turned) and interval > 1e-4:  # overshot: nothing of this step is kept
            interval /= 5
            continue
        interval *= np.clip(ratio, 0.2, 3.0)
        logp, signal, slope = tried, tried_signal, tried_slope
    return logp, max_steps


def _residual(logp, signal):
    return np.abs(np.exp(logp) * signal).max()


@functools.lru_cache(maxsize=128)
def _batched(field, count):
    return jax.jit(jax.vmap(field, (0, *[None] * count)))


def _normalised(logits):
    return np.asarray(logits - np.logaddexp.reduce(logits))


def _implicit_step(signal, slope, live, interval, longest=1.0):
    """One step of the implicit flow among the live outcomes, at most `longest` nats."""
    change = np.zeros_like(signal)
    matrix = np.eye(live.sum()) / interval - slope[np.ix_(live, live)]
    change[live] = np.linalg.solve(matrix, signal[live])
    spread = np.abs(change[live] - change[live].mean()).max()
    return change * min(1.0, longest / max(spread, 1e-300))


def _signal_and_slope(signal_of, logp, width=1e-5):
    """Gradient over p, and its derivative in the logits: by differences, as losses stop gradients on purpose."""
    steps = width * np.eye(len(logp))
    signal = signal_of(np.stack([_normalised(row) for row in (logp, *(logp + steps), *(logp - steps))]))
    ahead, behind = np.split(signal[1:], 2)
    return signal[0], ((ahead - behind) / (2 * width)).T


def _judge(signal_of, logp, tolerance, steps):
    signal, slope = _signal_and_slope(signal_of, logp)
    residual, pull = _residual(logp, signal), signal.max()
    kept = np.exp(logp) > 1e-6
    growth = -np.inf
    if kept.sum() > 1:
        # All logits alike is no change: take that direction out.
        basis = np.linalg.svd(np.eye(kept.sum()) - 1 / kept.sum())[0][:, :-1]
        growth = np.linalg.eigvals(basis.T @ slope[np.ix_(kept, kept)] @ basis).real.max()
    converged = residual <= tolerance and pull <= 1e-4 and growth <= 1e-4
    return Point(logp, float(residual), float(pull), float(growth), bool(converged), steps)


def _settle(signal_of, point, tolerance, count):
    """Explicit natural steps of shrinking size: they end between two sides of a jump, where no root is."""
    logp = point.logp_a
    for step in range(count):
        signal = signal_of(logp[None])[0]
        live = (np.exp(logp) > _LOST) | (signal > 0)
        change = np.where(live, signal, 0.0) / (1 + np.abs(signal[live]).max()) * min(1.0, 20.0 / (step + 1))
        logp = _normalised(logp + change)
    return _judge(signal_of, logp, tolerance, point.steps + count)
