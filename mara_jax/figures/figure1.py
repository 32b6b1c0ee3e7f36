"""Figure 1: a restricted family (a Gaussian) and a flexible one (a free categorical) fitted under both KLs.

Everything lives on one grid of points, a density being the probabilities that it gives to them, so KLs are exact
sums. A family is a function from its parameters, zeros at the start, to log-probabilities on the grid.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mara_jax.core import kl, targets

Family = Literal["gaussian", "categorical"]
FAMILIES: tuple[Family, ...] = ("gaussian", "categorical")

# The Gaussian starts as the standard normal, between the modes: all parameters zero, like the free logits. From a
# much wider start the reverse KL has a second local minimum, which covers both modes.
_START = (0.0, 0.0)


class Mixture(NamedTuple):
    """A mixture of two Gaussians: weights, means and standard deviations, and the grid that carries it."""

    weight: tuple[float, float] = (0.6, 0.4)
    mean: tuple[float, float] = (-3.0, 3.0)
    deviation: tuple[float, float] = (0.6, 0.6)
    edge: float = 10.0
    points: int = 101

    @property
    def x_a(self) -> np.ndarray:
        """The grid's points, evenly spaced from -edge to edge."""
        return np.linspace(-self.edge, self.edge, self.points)

    @property
    def logp_a(self) -> np.ndarray:
        """Log-probabilities of the grid's points (nats), float64."""
        density = [
            np.log(w) - np.log(s) - ((self.x_a - m) / s) ** 2 / 2
            for w, m, s in zip(self.weight, self.mean, self.deviation, strict=True)
        ]
        log_a = np.logaddexp(*density)
        return log_a - np.logaddexp.reduce(log_a)

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation, in closed form and without the grid."""
        w, m, s = map(np.array, (self.weight, self.mean, self.deviation))
        mean = float(w @ m)
        return mean, float(np.sqrt(w @ (s**2 + m**2) - mean**2))


def gaussian(params: Float[Array, " 2"], x_a: Float[Array, " a"]) -> Float[Array, " a"]:
    """A Gaussian's log-probabilities on a grid.

    Args:
        params: mean, and logarithm of the standard deviation.
        x_a: the grid.

    Returns:
        Normalised log-probabilities (nats).
    """
    return jax.nn.log_softmax(-(((x_a - params[0]) * jnp.exp(-params[1])) ** 2) / 2)


def categorical(params: Float[Array, " a"], x_a: Float[Array, " a"]) -> Float[Array, " a"]:
    """A free categorical's log-probabilities, one logit a point.

    Args:
        params: the logits (nats).
        x_a: the grid; unused.

    Returns:
        Normalised log-probabilities (nats).
    """
    del x_a
    return jax.nn.log_softmax(params)


def fit(
    target_logp_a: np.ndarray,
    x_a: np.ndarray,
    family: Family,
    direction: targets.Direction,
    *,
    learning_rate: float,
    steps: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Fits a family to a target by gradient descent (Adam, exact gradients, float64) on a KL.

    Args:
        target_logp_a: the target's log-probabilities on the grid (nats).
        x_a: the grid.
        family: "gaussian", started as the standard normal, or "categorical", started uniform.
        direction: "reverse" for KL(q || target), "forward" for KL(target || q).
        learning_rate: Adam's step size.
        steps: number of steps.

    Returns:
        The parameters, and the fit's log-probabilities (nats), [a].

    Raises:
        ValueError: for an unknown family or direction.
    """
    targets.check_direction(direction)
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not known: use one of {', '.join(FAMILIES)}")
    model = gaussian if family == "gaussian" else categorical
    divergence = kl.reverse if direction == "reverse" else kl.forward
    with jax.enable_x64(True):
        axis_a, target_a = jnp.asarray(x_a), jnp.asarray(target_logp_a)
        tx = optax.adam(learning_rate)

        def step(carry, _):
            params, opt_state = carry
            gradient = jax.grad(lambda params: divergence(model(params, axis_a), target_a))(params)
            updates, opt_state = tx.update(gradient, opt_state)
            return (params + updates, opt_state), None

        start = jnp.array(_START) if family == "gaussian" else jnp.zeros_like(axis_a)
        (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))((start, tx.init(start)))
        return np.asarray(params), np.asarray(model(params, axis_a))


def moments(logp_a: np.ndarray, x_a: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of a distribution on a grid.

    Args:
        logp_a: its log-probabilities (nats).
        x_a: the grid.

    Returns:
        Mean and standard deviation, in the grid's unit.
    """
    p_a = np.exp(logp_a)
    mean = float(p_a @ x_a)
    return mean, float(np.sqrt(p_a @ (x_a - mean) ** 2))


def best_gaussian(target_logp_a: np.ndarray, x_a: np.ndarray, direction: targets.Direction) -> np.ndarray:
    """The Gaussian nearest to a target, by a search over a grid instead of gradient descent.

    A grid over mean and log standard deviation, refined around its best point until the spacing is below 1e-7;
    the reverse KL has several local minima, of which this returns the lowest.

    Args:
        target_logp_a: the target's log-probabilities (nats).
        x_a: the grid that carries it.
        direction: "reverse" or "forward".

    Returns:
        Its parameters: mean and log standard deviation.

    Raises:
        ValueError: for an unknown direction.
    """
    targets.check_direction(direction)
    divergence = kl.reverse if direction == "reverse" else kl.forward
    centre, width = np.array([0.0, 0.5]), np.array([x_a[-1], 2.0])
    with jax.enable_x64(True):
        axis_a, target_a = jnp.asarray(x_a), jnp.asarray(target_logp_a)
        cost = jax.jit(jax.vmap(lambda params: divergence(gaussian(params, axis_a), target_a)))
        while np.max(width) > 1e-6:
            ticks = np.linspace(-1.0, 1.0, 41)
            params_n2 = np.stack(np.meshgrid(*(centre[i] + width[i] * ticks for i in (0, 1))), -1).reshape(-1, 2)
            centre = params_n2[int(np.argmin(np.asarray(cost(params_n2))))]
            width = width / 8
    return centre


def gaussian_logp(params: np.ndarray, x_a: np.ndarray) -> np.ndarray:
    """`gaussian` in float64, as numpy; same arguments and result."""
    with jax.enable_x64(True):
        return np.asarray(gaussian(jnp.asarray(params), jnp.asarray(x_a)))
