"""Programs compiled before they are needed: the reference's pass and the update, for every declared size."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mara_jax.parallel import hosts, sharding
from mara_jax.policies.packing import Packing, bucket_sizes
from mara_jax.sampling import logprobs
from mara_jax.train import memory
from mara_jax.train.state import Batch


def place(packing: Packing | None, parts: int) -> Packing | None:
    """A packing made on the host, on the devices of its rows."""
    return jax.tree.map(lambda array: hosts.shard_rows(array, axis=int(parts > 1)), packing)


def packings(shape_pg: tuple[int, int], width: int, buckets: int, parts: int) -> list[Packing | None]:
    """One packing of every size that completions of shape [p, g], at most `width` tokens each, can be given."""
    shards = sharding.shard_count("rows")
    p, g = shape_pg
    rows = p * g // (parts * shards)  # of a stream
    if not buckets or width == 1:
        return [None]
    found = []
    for size in bucket_sizes(rows * (width - 1), buckets):
        # So many tokens in each stream, row after row.
        read_r = np.clip(size - (width - 1) * np.arange(rows), 0, width - 1)
        lengths_pg = logprobs.joined(1 + np.tile(read_r, shards * parts).reshape(parts, p, g // parts))
        found.append(logprobs.packed(lengths_pg, width, buckets, shards=shards, parts=parts))
    return found


def compile_all(
    batch: Batch,
    other: Batch | None,
    refer: Callable[[Batch], Any],
    update: Callable[[Batch, Batch | None], Any],
    buckets: int,
    parts: int,
) -> None:
    """Compiles the update for batches such as these in every size, and runs the reference on each.

    Args:
      batch, other: of a step, the second where the objective reads two.
      refer: the reference's hidden states of a batch.
      update: a lowering of the update: of the sizes it only compiles, so that nothing is trained.
      buckets, parts: as in `packings`.
    """

    def sized(one: Batch) -> list[Batch]:
        p, g, width = one.tokens.shape
        resized = [dataclasses.replace(one, packing=place(x, parts)) for x in packings((p, g), width, buckets, parts)]
        return [dataclasses.replace(x, ref_hidden=refer(x)) for x in resized]

    for pair in itertools.product(sized(batch), [None] if other is None else sized(other)):
        compile_one(lambda pair=pair: update(*pair))


def compile_one(lower: Callable[[], Any]) -> None:
    """Compiles what `lower` lowers, and gives back the memory that this and earlier compilations have left behind.

    Large arrays have pages of their own: the heap's freed pieces would lie unused beside them.
    """
    memory.give_back()
    lower().compile()
    memory.give_back()
