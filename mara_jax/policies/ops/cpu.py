"""The forms of matmul, SwiGLU and attention for XLA's CPU compiler, for one device without a mesh.

XLA:CPU multiplies by Eigen, whose blocks suit results of about 256 columns; it stores what it could compute again, and
it drops optimization barriers before it schedules, so that `jax.checkpoint` saves no memory there. Each function here
has the values and gradients of the plain one of the same name, and a gradient written out: what is elementwise, and
attention's weights, are computed again in the backward pass.
"""

import functools
import itertools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from mara_jax.policies.ops.attention import KeysValues, Mask, by_prompt, by_row, masked_scores, weighted_sum
from mara_jax.policies.ops.swiglu import swiglu
from mara_jax.policies.parameters import wide

# Products of more columns go at half the rate for some numbers of rows (benchmarks/RESULTS.md).
COLUMNS = 256
MOST_PIECES = 16  # each is an operation of its own to compile
# Of causal attention's square half is needed; in n blocks of times (n + 1) / 2n of it are computed.
MOST_BLOCKS, LEAST_BLOCK = 4, 64


def schedule_after(x: jax.Array, earlier: jax.Array, offset: int = 0) -> jax.Array:
    """x, scheduled after `earlier`: a scheduling barrier for XLA:CPU, which drops `optimization_barrier`.

    It adds 0 times the sum of some elements of `earlier` (NaN where one is infinite). offset: which elements; two uses
    with different offsets are not merged into one computation, whose result would be stored.
    """
    if not earlier.size:
        return x
    # One number of each piece that `earlier` may be made of.
    numbers = earlier[(0,) * (earlier.ndim - 1)][offset :: COLUMNS // 2]
    return x + (0 * jnp.sum(numbers)).astype(x.dtype)


def piece_count(width: int) -> int:
    """The fewest equal pieces of at most COLUMNS; 1 where they would be many, small, or gain little."""
    count = next(n for n in range(-(-width // COLUMNS), width + 1) if width % n == 0)
    return count if 3 < count <= MOST_PIECES and width // count >= COLUMNS // 2 else 1


@jax.custom_vjp
def matmul(x: jax.Array, kernel_df: jax.Array) -> jax.Array:
    """As `ops.matmul`; wide results are computed in pieces of columns, one after the other."""
    return _columns(x, kernel_df, 0)


def _matmul_fwd(x, kernel_df):
    return _columns(x, kernel_df, 0), (x, kernel_df)  # by its primitives, so that `jax.checkpoint` can choose


def _matmul_bwd(saved, g):
    x, kernel_df = saved
    d_x = _columns(g, kernel_df, 1)
    # The optimiser overwrites a kernel, which XLA copies where it cannot tell that its last use comes first.
    return d_x, kernel_gradient(x, g, after_array=d_x)


matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _columns(x: jax.Array, kernel: jax.Array, axis: int) -> jax.Array:
    """x [..., c] by a kernel whose `axis` has the c contracted positions."""
    multiply = lambda piece: jax.lax.dot_general(x, piece, (((x.ndim - 1,), (axis,)), ((), ())))  # noqa: E731
    count = piece_count(kernel.shape[1 - axis])
    if count == 1:
        return multiply(kernel)
    products = [x]
    for piece in jnp.split(kernel, count, 1 - axis):
        products.append(multiply(schedule_after(piece, products[-1])))  # else XLA would cut all pieces first
    return jnp.concatenate(products[1:], -1)


def kernel_gradient(x: jax.Array, g: jax.Array, dtype: Any = None, after_array: jax.Array | None = None) -> jax.Array:
    """The sum over rows of outer products of x [..., d] and g [..., f]: [d, f] in dtype (x's by default).

    jax's own rule contracts all leading axes at once, for which XLA:CPU writes both sides transposed. after_array: an
    array that is computed before.
    """
    contract = (((0,), (0,)), ((), ()))
    multiply = lambda x, g: jax.lax.dot_general(x, g, contract, preferred_element_type=dtype)  # noqa: E731
    sides = [x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])]
    wider = int(sides[0].shape[1] <= sides[1].shape[1])  # which is cut, and which axis of the result
    count = piece_count(sides[wider].shape[1])
    earlier = g if after_array is None else after_array
    if count == 1:
        return multiply(*sides) if after_array is None else schedule_after(multiply(*sides), earlier)
    size = sides[wider].shape[1] // count

    def add_piece(i, kernel):
        cut = list(sides)
        cut[wider] = jax.lax.dynamic_slice_in_dim(sides[wider], i * size, size, 1)
        return jax.lax.dynamic_update_slice_in_dim(kernel, multiply(*cut), i * size, wider)

    # A loop is one operation: of many XLA would put some off and keep their inputs. Its result begins as a number made
    # late, since XLA would allocate the zeros of all layers first.
    zero = schedule_after(jnp.zeros((), dtype or x.dtype), earlier)
    begin = jnp.full((sides[0].shape[1], sides[1].shape[1]), zero)
    return jax.lax.fori_loop(0, count, add_piece, begin)


@jax.custom_vjp
def swiglu_matmul(gate: jax.Array, up: jax.Array, kernel_fd: jax.Array) -> jax.Array:
    """As `ops.swiglu_matmul`; only gate and up are kept, jax's rule keeps five arrays of their size."""
    return matmul(swiglu(gate, up), kernel_fd)


def _swiglu_matmul_fwd(gate, up, kernel_fd):
    return _columns(swiglu(gate, up), kernel_fd, 0), (gate, up, kernel_fd)


def _swiglu_matmul_bwd(saved, g):
    gate, up, kernel_fd = saved
    d_product = _columns(g, kernel_fd, 1)
    product = swiglu(schedule_after(gate, d_product), up)
    d_kernel_fd = kernel_gradient(product, g, after_array=d_product)
    # A sigmoid costs less than a pass over memory to store it.
    d_gate, d_up = jax.vjp(swiglu, schedule_after(gate, d_product, 1), up)[1](d_product)
    return d_gate, d_up, d_kernel_fd


swiglu_matmul.defvjp(_swiglu_matmul_fwd, _swiglu_matmul_bwd)


@jax.custom_vjp
def attention(q_bkxh: jax.Array, own: KeysValues, prefix: KeysValues | None, mask: Mask) -> jax.Array:
    """As `ops.attention` without a cache, in blocks of times, each of which leaves out the keys behind it."""
    return _attention_fwd(q_bkxh, own, prefix, mask)[0]


def _attention_fwd(q_bkxh, own, prefix, mask):
    times, outputs = own[0].shape[2], []
    for block in _blocks(times):
        cut_own, cut_mask, cut_q = _cut_block(block, times, own, mask, q_bkxh)
        outputs.append(_forward_block(cut_own, cut_mask, cut_q, prefix))
    out, lse = (_join_blocks(parts, times) for parts in zip(*outputs, strict=True))
    return out, (q_bkxh, own, prefix, mask, lse)


def _attention_bwd(saved, g):
    q_bkxh, own, prefix, mask, lse = saved
    q_bkxh, own = schedule_after(q_bkxh, g), tuple(schedule_after(keys, g) for keys in own)
    times, gradients = own[0].shape[2], []
    for block in _blocks(times):
        cut_own, cut_mask, cut_q, cut_lse, cut_g = _cut_block(block, times, own, mask, q_bkxh, lse, g)
        d_q, d_own, d_prefix = _backward_block(cut_own, cut_mask, cut_q, cut_lse, cut_g, prefix)
        padding = ((0, 0), (0, 0), (0, times - block[1]), (0, 0))
        gradients.append((d_q, tuple(jnp.pad(d_keys, padding) for d_keys in d_own), d_prefix))
    d_qs, d_owns, d_prefixes = zip(*gradients, strict=True)
    add = lambda *trees: jax.tree.map(lambda *parts: sum(parts), *trees)  # noqa: E731
    return _join_blocks(d_qs, times), add(*d_owns), add(*d_prefixes), None


attention.defvjp(_attention_fwd, _attention_bwd)


def _blocks(times: int) -> list[tuple[int, int]]:
    """The times that are attended together: from, and up to."""
    count = max(1, min(MOST_BLOCKS, times // LEAST_BLOCK))
    return list(itertools.pairwise(times * i // count for i in range(count + 1)))


def _cut_block(block, times, own, mask, *arrays_bkxc):
    """Own keys and values up to a block's end, their mask, and what arrays [b, k, x, c] have at the block's times."""
    start, end = block
    own_xs = jnp.broadcast_to(mask.own, (arrays_bkxc[0].shape[2], times)).reshape(-1, times, times)[:, start:end, :end]
    cut_mask = mask._replace(own=own_xs.reshape(-1, end))
    cut = (y.reshape(*y.shape[:2], -1, times, y.shape[-1])[:, :, :, start:end] for y in arrays_bkxc)
    return (
        tuple(keys[:, :, :end] for keys in own),
        cut_mask,
        *(y.reshape(*y.shape[:2], -1, y.shape[-1]) for y in cut),
    )


def _join_blocks(parts_bkxc, times):
    """The inverse of `_cut_block` for an array [b, k, x, c]."""
    lengths = [end - start for start, end in _blocks(times)]
    parts = [y.reshape(*y.shape[:2], -1, t, y.shape[-1]) for y, t in zip(parts_bkxc, lengths, strict=True)]
    whole = jnp.concatenate(parts, axis=3)
    return whole.reshape(*whole.shape[:2], -1, whole.shape[-1])


def _forward_block(own, mask, q, prefix):
    """The output, and the log-sum-exp of the scores [b, k, x, 1]. Weights are divided by their sum after the matmul."""
    rows, score = q.shape[0], masked_scores(q, own[0], mask.own)
    top = jnp.max(score, axis=-1, keepdims=True)
    if prefix is None:
        weight = jnp.exp(score - top)
        total = jnp.sum(weight, axis=-1, keepdims=True)
        return (weighted_sum(weight, own[1], q.dtype) / total).astype(q.dtype), top + jnp.log(total)
    prompts = prefix[0].shape[0]
    shared = masked_scores(by_prompt(q, prompts), prefix[0], mask.prefix_ps[:, None, None, :])
    top = jnp.maximum(top, by_row(jnp.max(shared, axis=-1, keepdims=True), rows))
    weight, weight_shared = jnp.exp(score - top), jnp.exp(shared - by_prompt(top, prompts))
    total = jnp.sum(weight, axis=-1, keepdims=True)
    total += by_row(jnp.sum(weight_shared, axis=-1, keepdims=True), rows)
    out = weighted_sum(weight, own[1], q.dtype)
    out += by_row(weighted_sum(weight_shared, prefix[1], q.dtype), rows)
    return (out / total).astype(q.dtype), top + jnp.log(total)


def _backward_block(own, mask, q, lse, g, prefix):
    """Gradients with respect to queries, own keys and values, and the prefix's."""
    rows, to_prompts = q.shape[0], lambda y: y
    weight, d_weight = _weights(q, own, mask.own, lse, g)
    mean = jnp.sum(weight * d_weight, axis=-1, keepdims=True)
    if prefix is not None:
        to_prompts = functools.partial(by_prompt, prompts=prefix[0].shape[0])
        visible = mask.prefix_ps[:, None, None, :]
        shared, d_shared = _weights(to_prompts(q), prefix, visible, to_prompts(lse), to_prompts(g))
        mean += by_row(jnp.sum(shared * d_shared, axis=-1, keepdims=True), rows)
    d_q, d_own = _score_gradients(q, own, weight, d_weight - mean, g)
    if prefix is None:
        return d_q.astype(q.dtype), d_own, None
    d_q_shared, d_prefix = _score_gradients(to_prompts(q), prefix, shared, d_shared - to_prompts(mean), to_prompts(g))
    return (d_q + by_row(d_q_shared, rows)).astype(q.dtype), d_own, d_prefix


def _weights(q, keys_values, mask, lse, g):
    """Attention's weights on a set of keys, and the gradient with respect to them."""
    d_weight = jnp.einsum("bkxh,bksh->bkxs", g, keys_values[1], preferred_element_type=wide(g.dtype))
    return jnp.exp(masked_scores(q, keys_values[0], mask) - lse), d_weight


def _score_gradients(q, keys_values, weight, d_weight, g):
    """Gradients with respect to queries, keys and values; d_weight: less its mean under the weights."""
    keys, values = keys_values
    d_score = (weight * d_weight).astype(q.dtype)
    d_keys = jnp.einsum("bkxs,bkxh->bksh", d_score, q, preferred_element_type=wide(q.dtype))
    d_values = jnp.einsum("bkxs,bkxh->bksh", weight.astype(q.dtype), g, preferred_element_type=wide(q.dtype))
    return weighted_sum(d_score, keys, q.dtype), (d_keys.astype(keys.dtype), d_values.astype(values.dtype))


@flax.struct.dataclass
class TransposedKernel:
    """A kernel stored as [out, in], for the few rows of a decoding step."""

    kernel_oi: jax.Array


def matmul_transposed(x: jax.Array, kernel_oi: jax.Array, dtype: Any = None) -> jax.Array:
    """As `ops.matmul_transposed`, for few rows.

    With the many outputs as its rows and the few rows of x as its columns a matmul runs 1.2 to 2 times as fast as the
    other way round. The barriers keep XLA from folding the transpositions of the small sides into it, where they cost
    more than all they save.
    """
    x_ic = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    out_oc = jnp.matmul(kernel_oi.astype(x.dtype), x_ic, preferred_element_type=dtype or x.dtype)
    return jax.lax.optimization_barrier(out_oc).T.reshape(*x.shape[:-1], -1)


def stored(x: jax.Array) -> jax.Array:
    """x [..., c], computed once: XLA:CPU would compute what is elementwise for each use again, but stores what a matmul
    makes; this one, by the identity, changes no digit."""
    return x @ jnp.eye(x.shape[-1], dtype=x.dtype)
