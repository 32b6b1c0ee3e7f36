"""What sampling has made already: the products of every kernel at every token, for the update that follows it.

The policy that a rollout's first update trains is the one that drew it. Its forward pass would multiply the same tokens
by the same kernels once more. Given the products, the update makes only attention and what is elementwise: two FLOPs of
six a parameter and token are saved, and its log-probs are those of the sampler. Decoding writes the products in the
order in which it makes them, and that order is the packing of the update, for which nothing is moved.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

COLLECTION, NAME = "products", "product"  # flax's variables, one of each kernel


class Kept(NamedTuple):
    """The products of a rollout.

    products: a tree like that of the kernels, [p s + n, f] each, scanned [l, p s + n, f]: the prompts', one after the
    other, then those of all tokens of completions but each one's last; place: int32 [n], row * (t - 1) + time of each
    of the latter, -1 where there is none.
    """

    products: Any
    place: jax.Array


class Room(NamedTuple):
    """What `Kept` becomes while decoding goes on, and how many places are filled."""

    products: Any
    place: jax.Array
    count: jax.Array


def room(of_prompts: Any, positions: int, rows: int) -> Room:
    """Room for so many positions, written `rows` at a time, behind the prompts' products: [p, s, f] each, scanned
    [l, p, s, f]."""

    def behind(made: jax.Array) -> jax.Array:
        flat = made.reshape(*made.shape[:-3], -1, made.shape[-1])
        return jnp.pad(flat, [*[(0, 0)] * (flat.ndim - 2), (0, positions + rows), (0, 0)])

    return Room(jax.tree.map(behind, of_prompts), jnp.full(positions + rows, -1, jnp.int32), jnp.int32(0))


def write(space: Room, made: Any, place_r: jax.Array, live_r: jax.Array) -> Room:
    """The room with the products of one step of an unrolled decoder, those of live rows.

    args: made: [r, 1, f] each; place_r: as in `Kept`; live_r: which rows count. The others come last, and the next step
        writes over them.
    """
    order_r = jnp.argsort(~live_r, stable=True)
    place_r = jnp.where(live_r, place_r, -1).astype(space.place.dtype)[order_r]
    made = jax.tree.map(lambda x: x[order_r, 0], made)
    if "layers" in space.products:
        layers = [made[f"layers_{i}"] for i in range(len(made))]
        made = {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}

    def put(whole: jax.Array, rows: jax.Array) -> jax.Array:
        of_prompts = whole.shape[-2] - space.place.size
        return jax.lax.dynamic_update_slice_in_dim(whole, rows, of_prompts + space.count, rows.ndim - 2)

    place = jax.lax.dynamic_update_slice(space.place, place_r, (space.count,))
    return Room(jax.tree.map(put, space.products, made), place, space.count + jnp.sum(live_r, dtype=jnp.int32))


def variables(kept: Kept | None) -> dict[str, Any]:
    """What a decoder's pass over prompts and completions is given beside its parameters."""
    return {} if kept is None else {COLLECTION: kept.products}


def instead(made: jax.Array, kept: jax.Array) -> jax.Array:
    """The kept product in place of the one just made, which XLA then need not make; its gradient goes to that.

    args: made: [n, f]; kept: [m, f], of which the first n are meant.
    """
    return _instead(made, kept[: made.shape[0]])


@jax.custom_vjp
def _instead(made, kept):
    return kept


_instead.defvjp(lambda made, kept: (kept, None), lambda _, g: (g, None))
