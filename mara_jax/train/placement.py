"""Where the state of a run lives: what is trained as the parameter table says, each moment as its parameter."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mara_jax.core import moving_threshold
from mara_jax.parallel import hosts, sharding
from mara_jax.policies import lora, parameters
from mara_jax.policies.parameters import Architecture
from mara_jax.train.state import NOTHING, Remembered, State


def shardings(
    layout: sharding.Layout, arch: Architecture, tx: optax.GradientTransformation, more: Remembered = NOTHING
) -> State:
    """The sharding of every array of a state; more: what it holds beside parameters and their moments."""
    params = lora.shardings(arch, layout)
    shapes = abstract_params(arch)
    opt_state = sharding.opt_state_shardings(layout, tx, jax.eval_shape(tx.init, shapes), params)
    replicated = sharding.replicated(layout)
    log_z, rewards = replicated if more.log_z else None, replicated if more.rewards[0] else None
    return State(replicated, params, opt_state, log_z, rewards)  # pyright: ignore[reportArgumentType]


def abstract_params(arch: Architecture) -> dict[str, Any]:
    """Shapes of the trained parameters: the adapter's alone where the architecture has one."""
    tree: dict[str, Any] = {}
    for path, (shape, _) in lora.leaf_shapes(arch).items():
        parameters.put(tree, path, jax.ShapeDtypeStruct(shape, param_dtype(arch)))
    return tree


def param_dtype(arch: Architecture) -> Any:
    """What trained parameters and their moments are kept in: never less than float32."""
    return parameters.wide(arch.compute_dtype)


def reference_dtype(path: tuple[str, ...], arch: Architecture) -> Any:
    """What the reference's array at a path is kept in: what is computed with, if that is narrower than float32.

    Nothing changes by it: kernels and tables are read in the compute dtype alone, norms' scales in float32.
    """
    in_float32 = path[-1] == "scale" or path == parameters.SCORE
    return jnp.bfloat16 if arch.compute_dtype == "bfloat16" and not in_float32 else jnp.float32


def reference(arch: Architecture, params: Any) -> Any:
    """Parameters as a run keeps those of its reference: new arrays, or those given where none needs a cast."""
    if arch.compute_dtype != "bfloat16":
        return params
    tree: dict[str, Any] = {}
    for path in parameters.leaf_shapes(arch):
        parameters.put(tree, path, jnp.array(parameters.at(params, path), reference_dtype(path, arch)))
    return tree


def abstract_reference(arch: Architecture) -> dict[str, Any]:
    """Shapes of the reference's parameters, with their shardings in the layout in use."""
    layout, tree = sharding.current(), {}
    shardings = None if layout is None else parameters.shardings(arch, layout)
    for path, (shape, _) in parameters.leaf_shapes(arch).items():
        where = None if shardings is None else parameters.at(shardings, path)
        parameters.put(tree, path, jax.ShapeDtypeStruct(shape, reference_dtype(path, arch), sharding=where))
    return tree


def abstract(arch: Architecture, tx: optax.GradientTransformation, more: Remembered = NOTHING) -> State:
    """Shapes of a state, with its shardings in the layout in use; more: as of `fresh`."""
    params, layout = abstract_params(arch), sharding.current()
    arrays = _unknown(more)
    shapes = jax.eval_shape(lambda params: State(jnp.int32(0), params, tx.init(params), *arrays), params)
    if layout is None:
        return shapes
    return jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
        shapes,
        shardings(layout, arch, tx, more),
    )


def _unknown(more: Remembered) -> tuple[jax.Array | None, jax.Array | None]:
    """Each prompt's log Z, and the rewards of steps, before there are any; None for what is not asked for."""
    log_z = jnp.full(more.log_z, -jnp.inf) if more.log_z else None
    return log_z, moving_threshold.empty(*more.rewards) if more.rewards[0] else None


def fresh(
    arch: Architecture,
    params: Any,
    tx: optax.GradientTransformation,
    copy: bool = True,
    more: Remembered = NOTHING,
) -> State:
    """A state before its first step; it needs a copy of params that others keep, as updates give up its buffers.

    more: what it holds beside parameters and their moments, as `state.remembered` says of a run.
    """
    dtype = param_dtype(arch)
    if copy or any(leaf.dtype != dtype for leaf in jax.tree.leaves(params)):
        # One program each: outside jit every shape would be compiled by itself.
        params = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.array(x, dtype), tree))(params)
    layout, make = sharding.current(), jax.jit(tx.init)
    if layout is not None:
        params = jax.device_put(params, lora.shardings(arch, layout))
        make = jax.jit(tx.init, out_shardings=shardings(layout, arch, tx).opt_state)
    arrays = [None if array is None else hosts.replicate(array) for array in _unknown(more)]
    return State(hosts.replicate(jnp.int32(0)), params, make(params), *arrays)


def constrain(state: State, arch: Architecture, tx: optax.GradientTransformation) -> State:
    """Under jit: keeps a new state where the old one was, so that it can take its place."""
    layout = sharding.current()
    if layout is None:
        return state
    more = Remembered(state.log_z is not None, (state.rewards is not None, 0))
    return jax.lax.with_sharding_constraint(state, shardings(layout, arch, tx, more))


def constrain_replicated(array: jax.Array) -> jax.Array:
    """Under jit: the whole of an array on every device of the layout in use."""
    layout = sharding.current()
    return array if layout is None else jax.lax.with_sharding_constraint(array, sharding.replicated(layout))


def constrain_params(tree: Any, arch: Architecture) -> Any:
    """Under jit: keeps gradients where the parameters are, so that no device sums up the whole of them."""
    layout = sharding.current()
    return tree if layout is None else jax.lax.with_sharding_constraint(tree, lora.shardings(arch, layout))
