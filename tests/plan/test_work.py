"""FLOPs counted from programs, against hand arithmetic; the analytic least against a count of the model's own pass."""

import jax
import jax.numpy as jnp
import pytest

from mara_jax.plan import work
from mara_jax.policies import transformer

A23, B34 = jnp.ones((2, 3)), jnp.ones((3, 4))
SQUARE = jnp.ones((4, 4))
ARCH = transformer.Architecture("qwen2", 32, 8, 2, 4, 2, 2, 16)
KERNELS = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)  # layers * (q, k and v, o, gate up down)


def test_a_matmul_is_two_flops_for_each_multiply():
    assert work.flops(jnp.dot, A23, B34) == 2 * 2 * 3 * 4
    assert work.flops(lambda x, y: jnp.einsum("bij,bkj->bik", x, y), jnp.ones((5, 2, 3)), jnp.ones((5, 4, 3))) == 240
    assert work.flops(lambda x: jnp.exp(x) + x, A23) == 0


def test_loops_count_as_often_as_they_run():
    def scanned(x):
        return jax.lax.scan(lambda c, _: (c @ SQUARE, None), x, None, length=7)[0]

    def counted(x):
        return jax.lax.fori_loop(0, 5, lambda _, c: scanned(c), x)

    assert work.flops(scanned, A23[:, :1] * jnp.ones((2, 4))) == 7 * 2 * 2 * 4 * 4
    assert work.flops(counted, jnp.ones((2, 4))) == 5 * 7 * 2 * 2 * 4 * 4


def nested(x, stop):
    def inner(carry):
        return jax.lax.while_loop(lambda c: c[0] < stop, lambda c: (c[0] + 1, c[1] @ SQUARE), (0, carry))[1]

    # The first loop holds no matmul: it takes no number from `trips`.
    start = jax.lax.while_loop(lambda i: i < stop, lambda i: i + 1, 0)
    return jax.lax.while_loop(lambda c: c[0] < stop, lambda c: (c[0] + 1, inner(c[1])), (start, x))[1]


def test_while_loops_take_their_trips_in_program_order():
    assert work.flops(nested, jnp.ones((2, 4)), 3, trips=[3, 5]) == 3 * 5 * 2 * 2 * 4 * 4
    with pytest.raises(ValueError, match="give `trips`"):
        work.flops(nested, jnp.ones((2, 4)), 3, trips=[3])
    with pytest.raises(ValueError, match="has 2 while loops"):
        work.flops(nested, jnp.ones((2, 4)), 3, trips=[3, 5, 1])


def test_a_conditional_counts_its_dearest_branch():
    def choose(which, x):
        return jax.lax.switch(which, [lambda x: x, lambda x: x @ SQUARE, lambda x: x @ SQUARE @ SQUARE], x)

    assert work.flops(choose, 1, jnp.ones((2, 4))) == 2 * (2 * 2 * 4 * 4)


def test_gradients_cost_twice_the_forward_pass_and_remat_costs_it_again():
    def loss(w1, w2, x):
        return jnp.sum(jnp.tanh(x @ w1) @ w2)

    x, forward = jnp.ones((2, 4)), 2 * 2 * 4 * 4
    both = (SQUARE, SQUARE)
    # Two matmuls forward; backward dW of both and dx of the second alone.
    assert work.flops(jax.value_and_grad(loss, (0, 1)), *both, x) == (2 + 3) * forward
    # The last matmul's value is needed by nobody in the gradient: no compiler leaves it in the program.
    assert work.flops(jax.grad(loss, (0, 1)), *both, x) == (1 + 3) * forward
    again = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))
    repeated = jax.value_and_grad(lambda w1, w2, x: jnp.sum(again(w1, x) @ w2), (0, 1))
    assert work.flops(repeated, *both, x) == (2 + 3 + 1) * forward


def test_a_barrier_keeps_nothing_alive():
    """XLA drops from a barrier what nobody uses after it, so what only that array needs is not counted."""

    def both(x):
        return jax.lax.optimization_barrier((x @ SQUARE, x @ SQUARE.T))

    x, forward = jnp.ones((2, 4)), 2 * 2 * 4 * 4
    assert work.flops(both, x) == 2 * forward
    assert work.flops(lambda x: both(x)[0], x) == forward
    assert jax.jit(lambda x: both(x)[0]).lower(x).compile().as_text().count(" dot(") == 1


def test_custom_derivatives_are_counted_by_the_pass_that_runs():
    @jax.custom_vjp
    def double(x, w):
        return x @ w

    double.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g @ saved[1]))
    forward = 2 * 2 * 4 * 4
    assert work.flops(double, jnp.ones((2, 4)), SQUARE) == forward
    by_kernel = jax.value_and_grad(lambda w: jnp.sum(double(jnp.ones((2, 4)), w)))
    assert work.flops(by_kernel, SQUARE) == forward * 2 + 2 * 4**3
    assert work.flops(jax.value_and_grad(lambda x: jnp.sum(double(x, SQUARE))), jnp.ones((2, 4))) == forward * 2


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="conv_general_dilated is not counted"):
        work.flops(lambda x: jnp.convolve(x, x), jnp.ones(3))


def test_kernel_parameters_by_hand():
    assert work.layer_parameters(ARCH) == KERNELS


def test_the_least_by_hand():
    # One prompt of 3 tokens, two completions of 2 and 1: one token of the first completion is read, at position 3.
    pairs = (1 + 2 + 3) + (3 + 1)
    layers = 2 * KERNELS * (3 + 1) + 4 * 2 * 4 * 2 * pairs
    head = 2 * 8 * 32 * (1 + 1)  # both first tokens come from the prompt's last position
    least = work.least(ARCH, [3], [[2, 1]], exact_kl=False)
    assert least == (layers + head, layers + head, 3 * (layers + head))
    least = work.least(ARCH, [3], [[2, 1]], exact_kl=True, chunked=True)
    assert least == (layers + head, layers, 3 * layers + 5 * head)


def test_a_plain_forward_pass_does_the_least_but_for_attention_above_the_diagonal():
    """What XLA computes of a prompt's attention is the whole square; all else is what `least` says, but for the matmul
    that has a CPU store the rotary embedding's cosines and sines."""
    params = transformer.init(ARCH, jax.random.key(0))
    tokens_bt, length = jnp.zeros((1, 6), jnp.int32), 6
    positions_bt = jnp.arange(length)[None]
    counted = work.flops(lambda p: transformer.forward(ARCH, p, tokens_bt, positions_bt)[0], params)
    least = work.least(ARCH, [length], [[1]], exact_kl=True).reference
    above = 4 * 2 * 4 * 2 * (length * length - length * (length + 1) // 2)
    stored = length * ARCH.head_dim**2
    assert counted == least + above + stored


def test_kernels_count_the_pairs_that_they_do_not_skip_and_every_shard_of_them():
    """Causal attention of 4 heads over 16 times of 8 channels: 4 FLOPs a pair forward, 14 backward."""
    from mara_jax.policies.ops import pallas
    from mara_jax.policies.ops.attention import Mask, causal_mask

    q, own = jnp.ones((3, 2, 2 * 16, 8)), (jnp.ones((3, 2, 16, 8)),) * 2
    attend = lambda q: pallas.attention(q, own, None, Mask(causal_mask(16, 2)))  # noqa: E731
    pairs = 3 * 4 * 16 * 17 // 2
    assert work.flops(attend, q) == 4 * 8 * pairs
    assert work.flops(jax.grad(lambda q: jnp.sum(attend(q))), q) == (4 + 14) * 8 * pairs
    mesh = jax.sharding.AbstractMesh((2,), ("data",))
    cut = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"))
    assert work.flops(cut, jnp.ones((4, 3)), B34) == 2 * 4 * 3 * 4
