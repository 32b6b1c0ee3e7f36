"""Every form of an operation against the plain definition, values and gradients, in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.policies.ops import cpu
from mara_jax.policies.ops.attention import Mask, attention, behind_prefix, cache_mask, causal_mask
from mara_jax.policies.ops.matmul import matmul, matmul_transposed
from mara_jax.policies.ops.rms_norm import rms_norm
from mara_jax.policies.ops.swiglu import swiglu_matmul

B, P, K, M, T, S, H = 6, 2, 2, 3, 5, 7, 8  # rows, prompts, key heads, queries of each, times, prefix slots, channels


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def drawn(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape))


def assert_equal_in_values_and_gradients(one, other, *args):
    """Of the tanh of the results by random weights, with respect to all arguments."""

    def loss(function):
        return lambda *args: jnp.sum(drawn(*jax.eval_shape(other, *args).shape) * jnp.tanh(function(*args)))

    np.testing.assert_allclose(jax.jit(one)(*args), jax.jit(other)(*args), rtol=1e-12, atol=1e-12)
    gradients = (jax.jit(jax.grad(loss(form), range(len(args))))(*args) for form in (one, other))
    chex.assert_trees_all_close(*gradients, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("widths", [(3, 4), (8, 1024), (1024, 8), (1024, 1280), (8, 1000)])
def test_the_cpus_matmul(float64, widths):
    assert [cpu.piece_count(width) for width in (4, 1000, 1024, 1280)] == [1, 4, 4, 5]
    assert_equal_in_values_and_gradients(cpu.matmul, matmul, drawn(2, 5, widths[0]), drawn(*widths))


def test_no_rows_have_no_gradient():
    gradient = jax.grad(lambda kernel: jnp.sum(cpu.matmul(jnp.zeros((0, 3)), kernel)))(jnp.ones((3, 1024)))
    np.testing.assert_array_equal(gradient, np.zeros((3, 1024)))


def test_no_kernel_gradient_is_transposed():
    x, kernel = jnp.ones((5, 3)), jnp.ones((3, 4))
    program = jax.make_jaxpr(jax.grad(lambda kernel: jnp.sum(jnp.sin(cpu.matmul(x, kernel)))))(kernel)
    assert "transpose" not in str(program)
    assert program.out_avals[0].shape == (3, 4)


def test_the_cpus_matmul_of_few_rows(float64):
    x, kernel_fd = drawn(2, 3, 6), drawn(5, 6)
    np.testing.assert_allclose(cpu.matmul_transposed(x, kernel_fd), x @ kernel_fd.T, rtol=1e-13)
    np.testing.assert_allclose(matmul_transposed(x, kernel_fd), x @ kernel_fd.T, rtol=1e-13)


@pytest.mark.parametrize(("inner", "width"), [(12, 5), (1024, 6)])
def test_the_cpus_swiglu(float64, inner, width):
    gate, up, kernel = drawn(2, 3, inner), drawn(2, 4, inner)[:, :3], drawn(inner, width)
    gate = gate.at[..., 0].set(-100.0)  # the sigmoid's far ends
    gate = gate.at[..., 1].set(100.0)
    assert_equal_in_values_and_gradients(cpu.swiglu_matmul, swiglu_matmul, gate, up, kernel)


def test_swiglu_by_hand():
    gate, up = jnp.array([0.0, np.log(3.0)]), jnp.array([5.0, 2.0])  # silu: 0 and 3/4 log 3
    np.testing.assert_allclose(swiglu_matmul(gate, up, jnp.ones((2, 1))), [1.5 * np.log(3.0)], rtol=1e-6)


def temporaries(form) -> float:
    """Temporary memory of the gradient of a stack of feed-forwards, in arrays of their width a layer."""
    rows, width, inner, layers = 256, 16, 512, 6

    def loss(kernels, x):
        for gate_df, up_df, down_fd in kernels:
            x = x + form(x @ gate_df, x @ up_df, down_fd)
        return jnp.sum(x * x)

    shapes = [(width, inner), (width, inner), (inner, width)]
    kernels = [[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes] for _ in range(layers)]
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    memory = jax.jit(jax.grad(loss)).lower(kernels, x).compile().memory_analysis()
    return memory.temp_size_in_bytes / (4 * rows * inner * layers)


def test_the_cpus_swiglu_saves_gate_and_up_alone():
    # Beside the two of every layer a few of the layer that is at work, and narrow ones.
    assert temporaries(swiglu_matmul) > 4
    assert temporaries(cpu.swiglu_matmul) < 3


def test_rms_norm_by_hand():
    # The root of the mean of 1, 1, 1 and 9 and of eps = 1 is 2.
    x, scale = jnp.array([1.0, -1.0, 1.0, 3.0]), jnp.array([2.0, 2.0, 4.0, 2.0])
    np.testing.assert_allclose(rms_norm(x, scale, 1.0), [1, -1, 2, 3], rtol=1e-6)


def test_narrow_rows_are_normed_in_float32():
    # Squares of 300 and their sum are no bfloat16 numbers, the normed row is.
    x, scale = jnp.array([300.0, -300.0, 300.0, 300.0], jnp.bfloat16), jnp.full(4, 2.0, jnp.bfloat16)
    d_x, d_scale = jax.grad(lambda x, scale: jnp.sum(rms_norm(x, scale, 0.0)), (0, 1))(x, scale)
    np.testing.assert_array_equal(rms_norm(x, scale, 0.0), [2, -2, 2, 2])
    assert d_x.dtype == d_scale.dtype == jnp.bfloat16
    np.testing.assert_array_equal(d_scale, [1, -1, 1, 1])
    # 2 (g - u mean(g u)) / 300 with u = (1, -1, 1, 1) and g all ones.
    np.testing.assert_allclose(d_x.astype(float), np.array([0.5, 1.5, 0.5, 0.5]) * 2 / 300, rtol=4e-3)


def repeated(q, own, prefix, mask):
    """Attention with each row's own copy of all keys, one softmax over the visible ones."""
    keys, values = own
    visible = jnp.broadcast_to(mask.own, (B, K, M * T, T))
    if prefix is not None:
        keys, values = (
            jnp.concatenate([jnp.repeat(shared, B // P, axis=0), mine], axis=2)
            for shared, mine in zip(prefix, own, strict=True)
        )
        before = jnp.broadcast_to(jnp.repeat(mask.prefix_ps, B // P, axis=0)[:, None, None, :], (B, K, M * T, S))
        visible = jnp.concatenate([before, visible], axis=-1)
    score = jnp.where(visible, jnp.einsum("bkxh,bksh->bkxs", q, keys), -jnp.inf)
    return jnp.einsum("bkxs,bksh->bkxh", jax.nn.softmax(score, axis=-1), values)


@pytest.mark.parametrize(("form", "least_block", "blocks"), [
    (attention, 64, 1), (cpu.attention, 64, 1), (cpu.attention, 2, 2), (cpu.attention, 1, 4),
])  # fmt: skip
@pytest.mark.parametrize("shared", [False, True])
def test_attention_is_one_softmax_over_repeated_keys(float64, monkeypatch, shared, form, least_block, blocks):
    monkeypatch.setattr(cpu, "LEAST_BLOCK", least_block)
    assert len(cpu._blocks(T)) == blocks
    q, own = drawn(B, K, M * T, H) * 3, (drawn(B, K, T, H), drawn(B, K, T, H) + 1)
    prefix = (drawn(P, K, S, H), drawn(P, K, S, H) - 1) if shared else None
    mask = behind_prefix(Mask(causal_mask(T, M)), S, jnp.array([3, 7]))
    assert_equal_in_values_and_gradients(
        lambda *args: form(*args, mask), lambda *args: repeated(*args, mask), q, own, prefix
    )


@pytest.mark.parametrize("form", [attention, cpu.attention])
def test_far_scores_neither_overflow_nor_vanish(form):
    """A softmax of scores 1e4 apart is one at the highest, wherever that key lies, and its gradient is finite."""
    q = jnp.full((2, 1, 1, 2), 100.0)
    own = (jnp.full((2, 1, 1, 2), 1.0), jnp.full((2, 1, 1, 2), 7.0))
    prefix = (jnp.array([[[[50.0, 50.0], [-50.0, -50.0]]]]), jnp.array([[[[3.0, 4.0], [9.0, 9.0]]]]))
    mask = Mask(jnp.ones((1, 1), bool), jnp.ones((1, 2), bool))
    run = jax.jit(lambda q: form(q, own, prefix, mask))
    np.testing.assert_array_equal(run(q)[0, 0, 0], [3.0, 4.0])
    np.testing.assert_array_equal(run(-q)[0, 0, 0], [9.0, 9.0])
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda q: jnp.sum(run(q))))(q), jnp.zeros_like(q))


def test_masks_by_hand():
    np.testing.assert_array_equal(causal_mask(2, 2), [[1, 0], [1, 1], [1, 0], [1, 1]])
    np.testing.assert_array_equal(cache_mask(2, 1, 4, 1), [[1, 1, 0, 0], [1, 1, 1, 0]])
    # A ring of 4 slots, the newest in slot 1: a row of 3 tokens sees slots 3, 0 and 1.
    ring = cache_mask(1, 1, 4, 1, counts_b=jnp.array([1, 3]))
    np.testing.assert_array_equal(ring[:, 0, 0], [[0, 1, 0, 0], [1, 1, 0, 1]])
    np.testing.assert_array_equal(behind_prefix(Mask(ring), 3, jnp.array([1, 2])).prefix_ps, [[1, 0, 0], [1, 1, 0]])
