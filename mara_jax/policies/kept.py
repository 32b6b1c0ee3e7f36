"""What sampling has made already: the products of every kernel at every token, for the update that follows it.

The policy that a rollout's first update trains is the one that drew it. Its forward pass would multiply the same tokens
by the same kernels once more. Given the products, the update makes only attention and what is elementwise: two FLOPs of
six a parameter and token are saved, and its log-probs are those of the sampler. Decoding writes the products in the
order in which it makes them, and that order is the packing of the update, for which nothing is moved.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax.policies import params as table
from mara_jax.policies.params import Architecture

COLLECTION, NAME = "products", "product"  # flax's variables, one of each kernel


class Kept(NamedTuple):
    """The products of a rollout, in trees like that of the kernels.

    prompts: [p, s, f] each, scanned [l, p, s, f]; rest: of all tokens of completions but each one's last, [n, f],
    scanned [l, n, f]; place: int32 [n], row * (t - 1) + time of each, -1 where there is none.
    """

    prompts: Any
    rest: Any
    place: jax.Array


class Room(NamedTuple):
    """What `Kept` becomes while decoding goes on, and how many of its positions are filled."""

    rest: Any
    place: jax.Array
    count: jax.Array


def room(arch: Architecture, positions: int, rows: int) -> Room:
    """Room for so many positions, written `rows` at a time; scanned where the architecture is."""
    tree: dict[str, Any] = {}
    for path, (shape, _) in table.leaf_shapes(arch).items():
        if path[-1] == "kernel":
            shape = (*shape[:-2], positions + rows, shape[-1])
            table.put(tree, (*path[:-1], NAME), jnp.zeros(shape, arch.compute_dtype))
    return Room(tree, jnp.full(positions + rows, -1, jnp.int32), jnp.int32(0))


def write(space: Room, made: Any, place_r: jax.Array, live_r: jax.Array) -> Room:
    """The room with the products of one step of an unrolled decoder, those of live rows.

    args: made: [r, 1, f] each; place_r: as in `Kept`; live_r: which rows count. The others come last, and the next step
        writes over them.
    """
    order_r = jnp.argsort(~live_r, stable=True)
    place_r = jnp.where(live_r, place_r, -1).astype(space.place.dtype)[order_r]
    made = jax.tree.map(lambda x: x[order_r, 0], made)
    if "layers" in space.rest:
        layers = [made[f"layers_{i}"] for i in range(len(made))]
        made = {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}
    put = lambda whole, rows: jax.lax.dynamic_update_slice_in_dim(whole, rows, space.count, rows.ndim - 2)  # noqa: E731
    place = jax.lax.dynamic_update_slice(space.place, place_r, (space.count,))
    return Room(jax.tree.map(put, space.rest, made), place, space.count + jnp.sum(live_r, dtype=jnp.int32))


def variables(kept: Kept | None) -> dict[str, Any]:
    """What a decoder's pass over prompts and completions is given beside its parameters."""
    if kept is None:
        return {}
    return {COLLECTION: jax.tree.map(lambda *pair: pair, kept.prompts, kept.rest)}


def instead(made: jax.Array, kept: jax.Array) -> jax.Array:
    """The kept product in place of the one just made, which XLA then need not make; its gradient goes to that.

    args: made: [..., n, f]; kept: the same, or of one stream [m, f], of which the first n are meant.
    """
    return _instead(made, kept if kept.ndim == made.ndim else kept[None, : made.shape[-2]])


@jax.custom_vjp
def _instead(made, kept):
    return kept


_instead.defvjp(lambda made, kept: (kept, None), lambda _, g: (g, None))
