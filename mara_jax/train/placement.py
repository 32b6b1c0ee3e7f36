"""Where the state of a run lives: what is trained as the parameter table says, each moment as its parameter."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mara_jax.parallel import hosts, sharding
from mara_jax.policies import lora, parameters
from mara_jax.policies.parameters import Architecture
from mara_jax.train.state import State


def shardings(
    layout: sharding.Layout, arch: Architecture, tx: optax.GradientTransformation, log_z: bool = False
) -> State:
    """The sharding of every array of a state; log_z: whether it has each prompt's log Z."""
    params = lora.shardings(arch, layout)
    shapes = abstract_params(arch)
    opt_state = sharding.opt_state_shardings(layout, tx, jax.eval_shape(tx.init, shapes), params)
    replicated = sharding.replicated(layout)
    return State(replicated, params, opt_state, replicated if log_z else None)  # pyright: ignore[reportArgumentType]


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


def abstract(arch: Architecture, tx: optax.GradientTransformation, prompts: int = 0) -> State:
    """Shapes of a state, with its shardings in the layout in use; prompts: as of `fresh`."""
    params, layout = abstract_params(arch), sharding.current()
    log_z = jnp.full(prompts, -jnp.inf) if prompts else None
    shapes = jax.eval_shape(lambda params: State(jnp.int32(0), params, tx.init(params), log_z), params)
    if layout is None:
        return shapes
    return jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
        shapes,
        shardings(layout, arch, tx, log_z is not None),
    )


def fresh(
    arch: Architecture, params: Any, tx: optax.GradientTransformation, copy: bool = True, prompts: int = 0
) -> State:
    """A state before its first step; it needs a copy of params that others keep, as updates give up its buffers.

    prompts: how many the task has, where the objective learns a log Z of each; else 0.
    """
    dtype = param_dtype(arch)
    if copy or any(leaf.dtype != dtype for leaf in jax.tree.leaves(params)):
        # One program each: outside jit every shape would be compiled by itself.
        params = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.array(x, dtype), tree))(params)
    layout, make = sharding.current(), jax.jit(tx.init)
    if layout is not None:
        params = jax.device_put(params, lora.shardings(arch, layout))
        make = jax.jit(tx.init, out_shardings=shardings(layout, arch, tx).opt_state)
    log_z = hosts.replicate(jnp.full(prompts, -jnp.inf)) if prompts else None
    return State(hosts.replicate(jnp.int32(0)), params, make(params), log_z)


def constrain(state: State, arch: Architecture, tx: optax.GradientTransformation) -> State:
    """Under jit: keeps a new state where the old one was, so that it can take its place."""
    layout = sharding.current()
    if layout is None:
        return state
    return jax.lax.with_sharding_constraint(state, shardings(layout, arch, tx, state.log_z is not None))


def constrain_params(tree: Any, arch: Architecture) -> Any:
    """Under jit: keeps gradients where the parameters are, so that no device sums up the whole of them."""
    layout = sharding.current()
    return tree if layout is None else jax.lax.with_sharding_constraint(tree, lora.shardings(arch, layout))
