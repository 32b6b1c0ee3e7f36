"""Attention without its scores in memory: three Pallas kernels over one set of keys, for GPUs (Triton) and TPUs.

A set of keys serves one row or several in turn (a prompt's samples), and is seen either up to a count of its own or
causally. The softmax over several sets is joined afterwards by their log-sum-exps, and so is its gradient: a set's part
of the backward pass needs no more than the joint log-sum-exp (Dao et al. 2022, section 3.1; Milakov & Gimelshein 2018).
A tile of queries that nobody counts, and a tile of keys that nobody sees, are not computed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton
from jax.sharding import PartitionSpec as P

from mara_jax.parallel import sharding
from mara_jax.policies.ops.attention import MASKED, SAVED, KeysValues, Mask

# Of a TPU core, as much as its compiler gives a kernel unless told otherwise: two arrays, twice each, and room to work.
VMEM = 16 * 2**20


def attention(q_bkxh: jax.Array, own: KeysValues, prefix: KeysValues | None, mask: Mask) -> jax.Array:
    """As `ops.attention.attention` for whole rows: own keys [b, k, t, h] are seen causally.

    args: mask: its lengths are used, not its arrays of bool; every prompt has at least one token. On a CPU the kernels
        are interpreted, which is slow.
    returns: [b, k, x, h]; what stands at positions past a row's length means nothing.
    """
    (b, k, x, h), t = q_bkxh.shape, own[0].shape[2]
    lengths_b = jnp.full(b, t, jnp.int32) if mask.lengths_b is None else mask.lengths_b
    platform = "interpret" if sharding.platform() == "cpu" else sharding.platform()
    run = functools.partial(_attend_on_shard, platform)
    shared = None if prefix is None else (*prefix, mask.prefix_lengths_p)
    args = (q_bkxh.reshape(b, k, x // t, t, h), own, lengths_b, shared)
    layout = sharding.current()
    if layout is not None:
        specs, out = _specs(layout, *args)
        # Kernels do not tell over which mesh axes their results vary.
        run = jax.shard_map(run, mesh=layout.mesh, in_specs=specs, out_specs=out, check_vma=False)
    return run(*args).reshape(b, k, x, h)


def _specs(layout: sharding.Layout, q_bkmth, own, counts_b, prefix):
    """Rows over their mesh axes; kv heads over theirs or, where they stay whole, the query heads of each."""
    b, k, m = q_bkmth.shape[:3]
    kv = "kv_heads" if k % sharding.shard_count("kv_heads", layout) == 0 else None
    whole = kv is None or sharding.shard_count("kv_heads", layout) == 1
    heads = "heads" if whole and m % sharding.shard_count("heads", layout) == 0 else None
    p = b if prefix is None else prefix[0].shape[0]
    groups, samples = (named.spec for named in sharding.row_shardings(layout, p, b // p))
    rows, (by_kv, by_head) = (
        tuple(axis for axes in samples for axis in _names(axes)) or None,
        tuple(sharding.partition_spec(layout, (kv, heads))),
    )
    mine = P(rows, by_kv)
    shared = None if prefix is None else (*(P(*groups, by_kv),) * 2, P(*groups))
    return (P(rows, by_kv, by_head), (mine, mine), P(rows), shared), P(rows, by_kv, by_head)


def _names(axes: Any) -> tuple[str, ...]:
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def _attend_on_shard(platform: str, q_bkmth, own, counts_b, prefix):
    """Attention of the rows and heads that one device has."""
    (b, k, m, t, h), s = q_bkmth.shape, 0 if prefix is None else prefix[0].shape[2]
    backend = Backend(platform, *_tiles(platform, t, s))
    t_tiles, s_tiles = (-(-size // backend.size) * backend.size for size in (t, s))
    q_bnth = _padded(q_bkmth.reshape(b, k * m, t, h), t_tiles)
    sets = [(*(_padded(x, t_tiles) for x in own), counts_b)]
    if prefix is not None:
        lengths_b = jnp.repeat(prefix[2], b // prefix[2].shape[0])
        sets.append((*(_padded(x, s_tiles) for x in prefix[:2]), lengths_b))
    out_bnth: jax.Array = _attend(backend, q_bnth, counts_b, tuple(sets))  # pyright: ignore[reportAssignmentType]
    return out_bnth[:, :, :t].reshape(q_bkmth.shape)


def _padded(x, size):
    return jnp.pad(x, [(0, 0), (0, 0), (0, size - x.shape[2]), (0, 0)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(backend, q, counts_b, sets):
    return _attend_fwd(backend, q, counts_b, sets)[0]


def _attend_fwd(backend, q, counts_b, sets):
    parts = [forward(backend, q, counts_b, keys) for keys in _keys(sets)]
    lse = functools.reduce(jnp.logaddexp, (part for _, part in parts))
    share = [jnp.exp(part - lse).swapaxes(2, 3) for _, part in parts]
    out: Any = sum(part * weight for (part, _), weight in zip(parts, share, strict=True))
    # Said to be one array: else XLA keeps the parts for the backward pass and joins them there again.
    out = checkpoint_name(jax.lax.optimization_barrier(out.astype(q.dtype)), SAVED)
    lse = checkpoint_name(lse, SAVED)
    return out, (q, counts_b, sets, out, lse)


def _attend_bwd(backend, saved, g):
    q, counts_b, sets, out, lse = saved
    along = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    d_qs, d_sets = [], []
    for keys in _keys(sets):
        d_q, d_k, d_v = backward(backend, q, counts_b, keys, g, lse, along)
        d_qs.append(d_q)
        d_sets.append((_of_group(d_k, keys.k), _of_group(d_v, keys.v), None))
    return functools.reduce(jnp.add, d_qs).astype(q.dtype), None, tuple(d_sets)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _keys(sets):
    """The rows' own keys, causal, come first."""
    return [Keys(*one, causal=i == 0) for i, one in enumerate(sets)]


def _of_group(d_bksh, shared):
    """The sum over the rows that share a set, in its dtype."""
    p = shared.shape[0]
    return jnp.sum(d_bksh.reshape(p, -1, *d_bksh.shape[1:]), axis=1).astype(shared.dtype)


def _tiles(platform: str, t: int, s: int) -> tuple[int, int]:
    """Positions in a tile of queries and of keys: a TPU's rows of sums are lanes, which come in 128."""
    if platform == "tpu":
        return 128, 128
    short = max(16, 1 << (max(t, s) - 1).bit_length())
    return min(64, short), min(64, short)


class Backend(NamedTuple):
    """What the kernels are compiled for, "gpu", "tpu" or "interpret" (slow, anywhere), and a tile's positions."""

    platform: str
    queries: int
    keys: int

    @property
    def size(self) -> int:
        """What positions are padded to a multiple of."""
        return max(self.queries, self.keys)


class Keys(NamedTuple):
    """One set of keys and values [p, k, s, h], and who sees what of it.

    b / p consecutive rows share each; seen_b: int32, a row's queries see so many slots, the first ones; causal: and
    none past a query's own time.
    """

    k: jax.Array
    v: jax.Array
    seen_b: jax.Array
    causal: bool


def forward(backend: Backend, q_bnth: jax.Array, counts_b: jax.Array, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """Attention over one set of keys.

    Args:
      q_bnth: scaled queries, n a multiple of k; t and the keys' s are multiples of the backend's tiles.
      counts_b: int32, queries of each row that count; tiles past them are left at zero.

    Returns:
      [b, n, t, h] in q's dtype, and the log-sum-exp of the scores, float32 [b, n, 1, t].
    """
    b, n, t, h = q_bnth.shape
    tile, sums = _by_queries(backend, h)
    return _call(backend, _forward_kernel, keys, q_bnth, 4, grid=(b, n, t // backend.queries))(
        in_specs=[_limits(backend), tile, *_all_slots(keys, q_bnth)],
        out_specs=[tile, sums],
        out_shape=[jax.ShapeDtypeStruct(q_bnth.shape, q_bnth.dtype), jax.ShapeDtypeStruct((b, n, 1, t), jnp.float32)],
    )(_limit(counts_b, keys), q_bnth, keys.k, keys.v)


def backward(
    backend: Backend, q_bnth: jax.Array, counts_b: jax.Array, keys: Keys, g: jax.Array, lse: jax.Array, along: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients by queries, and by this set's keys and values.

    Args:
      q_bnth, counts_b, keys: as in `forward`; g: gradient by the joint output, in q's dtype; lse: the joint
      log-sum-exp; along: sum over channels of g times the joint output; both float32 [b, n, 1, t].

    Returns:
      float32 [b, n, t, h], and twice [b, k, s, h]: each row's own, its group not yet summed.
    """
    (b, n, t, h), (p, k, s, _) = q_bnth.shape, keys.k.shape
    arrays = (_limit(counts_b, keys), q_bnth, keys.k, keys.v, g, lse, along)
    tile, sums = _by_queries(backend, h)
    by_queries = _call(backend, _queries_kernel, keys, q_bnth, 6, grid=(b, n, t // backend.queries))(
        in_specs=[_limits(backend), tile, *_all_slots(keys, q_bnth), tile, sums, sums],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(q_bnth.shape, jnp.float32),
    )(*arrays)
    m = _heads(backend, n // k, t * h * q_bnth.dtype.itemsize)
    heads, all_sums = (
        pl.BlockSpec((None, m, *size), lambda row, head, i: (row, head, 0, 0)) for size in ((t, h), (1, t))
    )
    shared = pl.BlockSpec(
        (None, None, backend.keys, h), lambda row, head, i: (row // (b // p), head * m * k // n, i, 0)
    )
    mine = pl.BlockSpec((None, None, backend.keys, h), lambda row, head, i: (row, head, i, 0))
    by_slots = _call(backend, _keys_kernel, keys, q_bnth, 8, grid=(b, n // m, s // backend.keys))(
        in_specs=[_limits(backend), heads, shared, shared, heads, all_sums, all_sums],
        out_specs=[mine, mine],
        out_shape=[jax.ShapeDtypeStruct((b, n // m, s, h), jnp.float32)] * 2,
    )(*arrays)
    d_k, d_v = (x if m * k == n else jnp.sum(x.reshape(b, k, -1, s, h), axis=2) for x in by_slots)
    return by_queries, d_k, d_v


def _heads(backend: Backend, shared: int, bytes_each: int) -> int:
    """Query heads of one kv head whose queries and gradients a program of the slots' kernel holds.

    All of them, but on a TPU, which copies what a program may read into 16 MiB beforehand (and the next one's, too),
    only one where all are too long.
    """
    return 1 if backend.platform == "tpu" and shared * bytes_each > VMEM // 8 else shared


def _forward_kernel(limits, q_ref, k_ref, v_ref, out_ref, lse_ref, *, causal: bool, tiles: Backend):
    first, end, seen = _span(limits, q_ref.shape[0], causal)
    q = q_ref[...]

    def step(i, carry):
        out, top, total = carry
        at = pl.ds(pl.multiple_of(i * tiles.keys, tiles.keys), tiles.keys)
        score = _masked(_dot(q, k_ref[at, :].T), first, i * tiles.keys, seen, causal)
        new = jnp.maximum(top, jnp.max(score, axis=1, keepdims=True))
        weight, old = jnp.exp(score - new), jnp.exp(top - new)
        v = v_ref[at, :]
        return out * old + _dot(weight.astype(v.dtype), v), new, total * old + jnp.sum(weight, axis=1, keepdims=True)

    column = jnp.zeros((q.shape[0], 1), jnp.float32)
    start = (jnp.zeros(q.shape, jnp.float32), column + MASKED, column)
    out, top, total = jax.lax.fori_loop(0, pl.cdiv(end, tiles.keys), step, start)
    total = jnp.where(total > 0, total, 1.0)
    out_ref[...] = (out / total).astype(out_ref.dtype)
    lse_ref[...] = _transposed(top + jnp.log(total), tiles)


def _queries_kernel(limits, q_ref, k_ref, v_ref, g_ref, lse_ref, along_ref, d_q_ref, *, causal: bool, tiles: Backend):
    first, end, seen = _span(limits, q_ref.shape[0], causal)
    q, g = q_ref[...], g_ref[...]
    lse, along = _transposed(lse_ref[...], tiles), _transposed(along_ref[...], tiles)

    def step(i, d_q):
        at = pl.ds(pl.multiple_of(i * tiles.keys, tiles.keys), tiles.keys)
        k = k_ref[at, :]
        weight = jnp.exp(_masked(_dot(q, k.T), first, i * tiles.keys, seen, causal) - lse)
        d_score = weight * (_dot(g, v_ref[at, :].T) - along)
        return d_q + _dot(d_score.astype(k.dtype), k)

    d_q_ref[...] = jax.lax.fori_loop(0, pl.cdiv(end, tiles.keys), step, jnp.zeros(q.shape, jnp.float32))


def _keys_kernel(limits, q_ref, k_ref, v_ref, g_ref, lse_ref, along_ref, d_k_ref, d_v_ref, *, causal, tiles: Backend):
    """Scores lie [keys, queries] here, so that the sums over queries of all heads are matmuls as they lie."""
    row, tile = pl.program_id(0), pl.program_id(2)
    counts, seen = limits[row, 0], limits[row, 1]
    k, v = k_ref[...], v_ref[...]
    first = tile * k.shape[0]
    begin = first // tiles.queries if causal else 0
    end = jnp.where(first < seen, pl.cdiv(counts, tiles.queries), 0)

    def add_head(head, carry):
        def step(i, carry):
            d_k, d_v = carry
            at = pl.ds(pl.multiple_of(i * tiles.queries, tiles.queries), tiles.queries)
            q, g = q_ref[head, at, :], g_ref[head, at, :]
            score = _masked(_dot(k, q.T), first, i * tiles.queries, seen, causal, transposed=True)
            weight = jnp.exp(score - lse_ref[head, :, at])
            d_score = weight * (_dot(v, g.T) - along_ref[head, :, at])
            return d_k + _dot(d_score.astype(q.dtype), q), d_v + _dot(weight.astype(g.dtype), g)

        return jax.lax.fori_loop(begin, end, step, carry)

    zero = jnp.zeros(k.shape, jnp.float32)
    d_k_ref[...], d_v_ref[...] = jax.lax.fori_loop(0, q_ref.shape[0], add_head, (zero, zero))


def _span(limits, rows, causal):
    """The first query of this program's tile, the slots that any of its queries sees, and those that its row sees."""
    row, first = pl.program_id(0), pl.program_id(2) * rows
    seen = limits[row, 1]
    end = jnp.minimum(seen, first + rows) if causal else seen
    return first, jnp.where(first < limits[row, 0], end, 0), seen


def _masked(score, first, other, seen, causal, transposed=False):
    """Scores of a tile, those that nobody may see at MASKED.

    first: where the program's own tile begins; other: where the one met begins: queries and keys, or keys and queries
    where the scores lie turned.
    """
    own = first + jax.lax.broadcasted_iota(jnp.int32, score.shape, 0)
    met = other + jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
    query, slot = (met, own) if transposed else (own, met)
    visible = slot < seen
    if causal:
        visible &= slot <= query
    return jnp.where(visible, score, MASKED)


def _dot(x, y):
    # Said here, as a TPU's kernels refuse more than bfloat16 has where the default asks for float32's digits.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.dot(x, y, preferred_element_type=jnp.float32, precision=precision)


def _transposed(x, tiles: Backend):
    """A column as a row, or a row as a column; a TPU transposes whole tiles only."""
    if tiles.platform != "tpu":
        return x.T
    n = max(x.shape)
    square = jnp.broadcast_to(x, (n, n)).T
    return square[:1] if x.shape[1] == 1 else square[:, :1]


def _call(backend: Backend, kernel: Any, keys: Keys, q_bnth: jax.Array, each: int, grid: tuple[int, ...]) -> Any:
    """pallas_call, but for its specifications; each: FLOPs for a channel of a query and a slot that it sees."""
    b, n, t, h = q_bnth.shape
    pairs = b * n * (t * (t + 1) // 2 if keys.causal else t * keys.k.shape[2])
    return functools.partial(
        pl.pallas_call,
        functools.partial(kernel, causal=keys.causal, tiles=backend),
        grid=grid,
        interpret=backend.platform == "interpret",
        compiler_params=_compiler_params(backend),
        cost_estimate=pl.CostEstimate(flops=each * h * pairs, transcendentals=pairs, bytes_accessed=2 * q_bnth.nbytes),
        name=kernel.__name__.strip("_"),
    )


def _compiler_params(backend: Backend) -> Any:
    if backend.platform == "gpu":
        return triton.CompilerParams(num_warps=4 if backend.queries <= 64 else 8, num_stages=2)
    if backend.platform == "tpu":
        return tpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
    return None


def _by_queries(backend: Backend, h: int) -> list[pl.BlockSpec]:
    """A tile of one head's queries and its sums, the grid being (row, head, tile)."""
    return [
        pl.BlockSpec((None, None, backend.queries, h), lambda row, head, i: (row, head, i, 0)),
        pl.BlockSpec((None, None, 1, backend.queries), lambda row, head, i: (row, head, 0, i)),
    ]


def _all_slots(keys: Keys, q_bnth: jax.Array) -> list[pl.BlockSpec]:
    """The keys and values that a program's head and row read, whole."""
    (b, n), (p, k, s, h) = q_bnth.shape[:2], keys.k.shape
    return [pl.BlockSpec((None, None, s, h), lambda row, head, i: (row // (b // p), head // (n // k), 0, 0))] * 2


def _limit(counts_b, keys: Keys):
    """Per row: queries that count, slots that they see."""
    return jnp.stack([counts_b, keys.seen_b], axis=1).astype(jnp.int32)


def _limits(backend: Backend) -> Any:
    return pl.BlockSpec(memory_space=tpu.SMEM) if backend.platform == "tpu" else pl.BlockSpec()
