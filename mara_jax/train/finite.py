"""Whether what a step computed is finite, from numbers that it computes anyway, and whether a state is, array by array.

A mean, and the norm of a gradient, is finite only where everything in it is (and where their sum does not overflow, at
which Adam's moments would overflow, too). So an update that can be told of costs nothing more than one that cannot.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mara_jax.parallel import hosts
from mara_jax.train.state import State

# Metrics of an update, in the order in which a step computes them -> what each of them is a summary of. The first mean
# is that of the rollout, known to the host; kl/k1 is the mean of the policy's log-probs less the reference's.
SUMMARIES = {
    "sampler/logp_gap": "a log-prob that the sampler recorded",
    "reward/mean": "a reward",
    "logp/mean": "a log-prob of the policy",
    "kl/k1": "a log-prob of the reference policy",
    "reward/augmented_mean": "a reward after the reward transform",
    "loss": "the loss",
    "grad/norm": "the gradient (or its squared norm)",
}


def is_finite(metrics: Mapping[str, jax.Array]) -> jax.Array:
    """Whether all that an update's metrics summarise is finite: a bool scalar, or one an update [u]; on the device."""
    finite = [jnp.isfinite(metrics[name]) for name in SUMMARIES if name in metrics]
    return jnp.all(jnp.stack(finite), axis=0)


def first_nonfinite(row: Mapping[str, Any]) -> str | None:
    """What is not finite in a step's row, in words, the first in the order of computation; None where all is."""
    for name, words in SUMMARIES.items():
        if not math.isfinite(row[name]):
            return words
    return None


def all_usable(params: Any) -> jax.Array:
    """Whether every parameter is finite, and its square, too; a bool scalar, traced.

    Where squares overflow, RMSNorm returns zeros: all tokens are then equally likely, and nothing else is amiss.
    """
    return jnp.all(jnp.stack([_is_usable(x) for x in jax.tree.leaves(params)]))


@jax.jit
def _is_usable(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(jnp.square(x)))


@jax.jit
def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x))


@jax.jit
def _is_log(x: jax.Array) -> jax.Array:
    """Finite, or the log of 0, which stands for none."""
    return jnp.all(jnp.isfinite(x) | (x == -jnp.inf))


def _parts(x: jax.Array) -> list[jax.Array]:
    """The parts of an array on this process's devices, of equal ones the first.

    Each is looked at where it lies. A program of all devices would exchange their answers, and of many such programs
    that are under way on CPUs at once, two processes may each wait for another one.
    """
    return [shard.data for shard in x.addressable_shards if shard.replica_id == 0]


def all_finite(tree: Any) -> bool:
    """Whether every number of a tree of arrays is finite, on every process alike; waits for them."""
    answers = [_is_finite(part) for x in jax.tree.leaves(tree) for part in _parts(x)]
    return all(hosts.gather_json(all([bool(answer) for answer in answers])))


def nonfinite_array(state: State) -> str | None:
    """The name of a state's first array that holds NaN or infinity, parameters first; None where all are finite.

    The same on every process. A parameter's square must be finite, too, see `all_usable`; a prompt's log Z is -inf
    before its first visit, a reward of a step before the first one.
    """
    checks = [
        (f"{part}{jax.tree_util.keystr(path)}", check, x)
        for part, tree, check in (("params", state.params, _is_usable), ("opt_state", state.opt_state, _is_finite))
        for path, x in _leaves(tree)
    ]
    more = {"log_z": state.log_z, "rewards": state.rewards}
    checks += [(name, _is_log, array) for name, array in more.items() if array is not None]
    # One small program a shape, all of them dispatched before the first answer is waited for.
    answers = [(name, [check(part) for part in _parts(x)]) for name, check, x in checks]
    bad = [name for name, finite in answers if not all([bool(answer) for answer in finite])]
    anywhere = {name for names in hosts.gather_json(bad) for name in names}
    return next((name for name, _ in answers if name in anywhere), None)


def _leaves(tree: Any) -> list[tuple[Any, jax.Array]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]
