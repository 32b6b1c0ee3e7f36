"""Packed against padded, chunked against whole: values and gradients; the exact KL against enumeration."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policy import all_strings, tiny

from mara_jax.policies import transformer
from mara_jax.policies.packing import bucket_size, bucket_sizes, pack, pack_lengths, unpack
from mara_jax.sampling import head, logprobs

LENGTHS = np.array([[1, 4, 7, 2], [7, 3, 1, 5]])
WIDTH = 7


def test_a_packing_by_hand():
    """Rows of 2, 0 and 3 counted positions, then of 1, 3 and 0, in two streams of six slots."""
    made = pack_lengths([2, 0, 3, 1, 3, 0], 4, streams=2, slots=6)
    assert made.slot_bt.tolist() == [
        [0, 1, -1, -1], [-1, -1, -1, -1], [2, 3, 4, -1], [0, -1, -1, -1], [1, 2, 3, -1], [-1, -1, -1, -1]
    ]  # fmt: skip
    assert made.place_cn.tolist() == [[0, 1, 8, 9, 10, -1], [0, 4, 5, 6, -1, -1]]
    x = jnp.arange(24.0).reshape(6, 4) + 1
    streams = pack(x, made)
    assert streams.tolist() == [[1, 2, 9, 10, 11, 0], [13, 17, 18, 19, 0, 0]]
    assert unpack(streams, made)[2].tolist() == [9, 10, 11, 0]
    with pytest.raises(ValueError, match="5 counted positions do not fit 4 slots"):
        pack_lengths([2, 0, 3], 4, slots=4)
    with pytest.raises(ValueError, match="6 rows do not divide over 4 streams"):
        pack_lengths([1] * 6, 4, streams=4)


def test_pack_and_unpack_are_each_others_transpose():
    made = pack_lengths(LENGTHS.ravel(), WIDTH, streams=2, slots=20)
    x, y = jax.random.normal(jax.random.key(0), (8, WIDTH, 3)), jax.random.normal(jax.random.key(1), (2, 20, 3))
    there, back = jax.vjp(lambda x: pack(x, made), x)
    assert float(jnp.vdot(there, y)) == pytest.approx(float(jnp.vdot(x, back(y)[0])), abs=1e-5)
    there, back = jax.vjp(lambda y: unpack(y, made), y)
    assert float(jnp.vdot(there, x)) == pytest.approx(float(jnp.vdot(y, back(x)[0])), abs=1e-5)


@pytest.mark.parametrize(("buckets", "slots"), [(1, 56), (4, 42), (8, 35), (56, 30), (500, 30)])
def test_a_bucket_is_the_least_fraction_that_holds_the_tokens(buckets, slots):
    assert bucket_size(LENGTHS.ravel(), WIDTH, buckets) == slots  # 30 counted positions of 56
    assert slots in bucket_sizes(56, buckets)


@pytest.mark.parametrize(
    ("streams", "changes"),
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        (4, {"scan": True, "remat": "elementwise"}),
        pytest.param(2, {"remat": "layer", "attention": "kernels"}, marks=pytest.mark.slow),
    ],
    ids=["one-unrolled", "four-scanned", "kernels"],
)
def test_packed_equals_padded_in_values_and_gradients(streams, changes, monkeypatch):
    """Every statistic at every token that counts, and the gradient of a function of all of them, chunked head too.

    Padded completions go through XLA's attention.
    """
    policy, params = tiny(**changes)
    ref_params = jax.tree.map(lambda x: x * 0.5, params)
    tokens = jax.random.randint(jax.random.key(2), (2, 4, WIDTH), 0, 16)
    prompts, lengths = jnp.array([[1, 2, 4, 0], [5, 0, 0, 0]]), jnp.array([3, 1])
    mask = logprobs.mask(jnp.asarray(LENGTHS), WIDTH)

    def total(params, made):
        arch = policy.architecture if made else dataclasses.replace(policy.architecture, attention="xla")
        of = lambda params: logprobs.completion_hidden(arch, params, prompts, lengths, tokens, made)  # noqa: E731
        stats = logprobs.token_stats(
            arch, params, of(params), tokens, made, ref_params=ref_params, ref_hidden=of(ref_params)
        )
        stats = jax.tree.map(lambda x: x * mask, stats)
        return jnp.sum(jnp.sin(stats.logp)), stats

    made = logprobs.packed(LENGTHS, WIDTH, 8, shards=streams)
    assert made is not None and made.place_cn.shape[1] * streams < 8 * (WIDTH - 1)
    monkeypatch.setitem(head.MAX_LOGITS, jax.default_backend(), 1e9)
    (_, padded), grads = jax.jit(lambda p: jax.value_and_grad(total, has_aux=True)(p, None))(params)
    monkeypatch.setitem(head.MAX_LOGITS, jax.default_backend(), 70)
    (_, packed), packed_grads = jax.jit(lambda p: jax.value_and_grad(total, has_aux=True)(p, made))(params)
    assert float(jnp.abs(padded.kl).max()) > 0.05 and float(padded.entropy.max()) > 0.1
    for name, ours, theirs in zip(head.Stats._fields, packed, padded, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=name)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    chex.assert_trees_all_close(packed_grads, grads, atol=1e-5 * scale, rtol=0)


def test_what_lies_at_padding_changes_nothing():
    """Other tokens behind the completions' ends leave the packed hidden states as they are, bit for bit."""
    policy, params = tiny()
    made = logprobs.packed(LENGTHS, WIDTH, 8)
    tokens = jax.random.randint(jax.random.key(2), (2, 4, WIDTH), 0, 16)
    other = jnp.where(logprobs.mask(jnp.asarray(LENGTHS), WIDTH) > 0, tokens, 9)
    prompts, lengths = jnp.array([[1, 2, 4, 0], [5, 0, 0, 0]]), jnp.array([3, 1])
    of = jax.jit(lambda tokens: logprobs.completion_hidden(policy.architecture, params, prompts, lengths, tokens, made))
    assert jnp.any(tokens != other)
    chex.assert_trees_all_equal(of(tokens), of(other))


def test_the_head_is_log_softmax_entropy_and_kl(monkeypatch):
    """Against the plain formulas on whole logits, differentiated by jax."""
    policy, params = tiny()
    arch, other = policy.architecture, jax.tree.map(lambda x: x * 0.5, params)
    hidden = jax.random.normal(jax.random.key(3), (2, 23, 16))
    tokens = jax.random.randint(jax.random.key(4), (2, 23), 0, 16)

    def plain(params, hidden):
        logp = jax.nn.log_softmax(transformer.logits(arch, params, hidden))
        ref = jax.nn.log_softmax(transformer.logits(arch, other, hidden[::-1]))
        chosen, ref_chosen = (jnp.take_along_axis(x, tokens[..., None], -1)[..., 0] for x in (logp, ref))
        stats = (chosen, -jnp.sum(jnp.exp(logp) * logp, -1), ref_chosen, jnp.sum(jnp.exp(logp) * (logp - ref), -1))
        return jnp.sum(jnp.sin(chosen)), stats

    def ours(params, hidden):
        stats = head.token_stats(arch, params, hidden, tokens, ref_params=other, ref_hidden_rnd=hidden[::-1])
        return jnp.sum(jnp.sin(stats.logp)), tuple(stats)

    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1), has_aux=True))(params, hidden)
    for most in (10**9, 100):
        monkeypatch.setitem(head.MAX_LOGITS, jax.default_backend(), most)
        got = jax.jit(jax.value_and_grad(lambda *xs: ours(*xs), argnums=(0, 1), has_aux=True))(params, hidden)
        chex.assert_trees_all_close(got, expected, atol=2e-5, rtol=0)


def test_token_kl_is_exact_and_its_sum_has_the_sequence_kl_as_mean():
    """Over all strings of up to 3 of 4 words: sum of pi(string) x summed token KL = KL of the string distributions."""
    policy, params = tiny(vocab=4)
    other = jax.tree.map(lambda x: x * 0.5, params)
    arch, prompt, length = policy.architecture, jnp.array([[1, 2]]), jnp.array([2])
    strings = all_strings(3)
    tokens = jnp.array([[*s, *[0] * (3 - len(s))] for s in strings])[None]
    mask = logprobs.mask(jnp.array([[len(s) for s in strings]]), 3)

    @jax.jit
    def both(params, other):
        hidden, ref_hidden = (logprobs.completion_hidden(arch, x, prompt, length, tokens) for x in (params, other))
        return logprobs.token_stats(arch, params, hidden, tokens, ref_params=other, ref_hidden=ref_hidden)

    stats = both(params, other)
    total, ref_total = jnp.sum(stats.logp * mask, -1), jnp.sum(stats.ref_logp * mask, -1)
    exact = jnp.sum(jnp.exp(total) * (total - ref_total))
    assert exact > 0.1 and stats.kl.min() >= -1e-6
    np.testing.assert_allclose(jnp.sum(jnp.exp(total) * jnp.sum(stats.kl * mask, -1)), exact, rtol=1e-5)
    surprise = -jnp.sum(jnp.exp(total) * total)
    np.testing.assert_allclose(jnp.sum(jnp.exp(total) * jnp.sum(stats.entropy * mask, -1)), surprise, rtol=1e-5)


def test_the_transformer_leaves_whole_rows_to_the_kernels():
    """Hidden states of packed completions behind a prompt, by kernels and by XLA, each of which there is."""
    policy, params = tiny()
    made = logprobs.packed(np.array([[4, 1]]), 5, 8)
    tokens = jax.random.randint(jax.random.key(2), (1, 2, 5), 0, 16)
    args = (params, jnp.array([[1, 2, 4, 0]]), jnp.array([3]), tokens, made)

    def program(attention):
        arch = dataclasses.replace(policy.architecture, attention=attention)
        return jax.jit(functools.partial(logprobs.completion_hidden, arch)).trace(*args)

    by_kernels, by_xla = program("kernels"), program("auto")
    assert str(by_kernels.jaxpr).count("name=forward_kernel") == 2 * 3  # two layers: a prompt, completions and prefix
    assert "pallas_call" not in str(by_xla.jaxpr)
    results = (traced.lower().compile()(*args) for traced in (by_kernels, by_xla))
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-5)
