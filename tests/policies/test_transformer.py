import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stacking import to_scanned

from mara_jax.policies import parameters, transformer
from mara_jax.policies.ops import cpu, rotary
from mara_jax.policies.policy import Policy
from mara_jax.policies.transformer import Architecture, RopeScaling

SMALL = dict(vocab_size=61, embed=32, layers=2, heads=4, kv_heads=2, mlp=40)
MODELS = {
    "qwen2": Architecture("qwen2", head_dim=8, **SMALL),
    "qwen3": Architecture("qwen3", head_dim=12, tie_embeddings=False, **SMALL),
    "llama": Architecture("llama", head_dim=8, rope_scaling=RopeScaling("linear", 2.0), **SMALL),
    "olmo2": Architecture("olmo2", head_dim=8, tie_embeddings=False, **SMALL),
}
# Compiling is what costs here: one family with everything unrolled, the other with everything scanned.
ARCHS = {
    "qwen2-unrolled": MODELS["qwen2"],
    "qwen3-scanned": dataclasses.replace(MODELS["qwen3"], scan_layers=True),
}
every_arch = pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS.keys())
forward = jax.jit(transformer.forward, static_argnums=0)


def random_params(arch, seed=0):
    """Parameters whose biases and norm scales are random too, so that none can be dropped unnoticed."""
    rng, params = np.random.default_rng(seed), {}
    for path, (shape, _) in parameters.leaf_shapes(arch).items():
        centre = 1.0 if path[-1] == "scale" else 0.0
        parameters.put(params, path, jnp.asarray(centre + 0.2 * rng.normal(size=shape), jnp.float32))
    return params


def random_tokens(rows, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, SMALL["vocab_size"], (rows, length)), jnp.int32)


def positions(tokens_bt, start=0):
    return jnp.broadcast_to(start + jnp.arange(tokens_bt.shape[1]), tokens_bt.shape)


@every_arch
def test_cached_decode_equals_full_forward(arch):
    params, tokens_bt = random_params(arch), random_tokens(4, 10)
    expected_btd, _ = forward(arch, params, tokens_bt, positions(tokens_bt))
    cache = transformer.init_cache(arch, 4, 11)
    pieces, start = [], 0
    for size in (4, 1, 4, 1):
        piece = tokens_bt[:, start : start + size]
        hidden, cache = forward(arch, params, piece, positions(piece, start), cache=cache, index=start)
        pieces.append(hidden)
        start += size
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), expected_btd, atol=1e-5)


def _plain(arch, params, prompts, completions_bt):
    """Hidden states of the completions, each row being its prompt and completion written out in full."""
    group, t = completions_bt.shape[0] // len(prompts), completions_bt.shape[1]
    width = t + max(len(prompt) for prompt in prompts)
    starts, rows = [], []
    for row, completion_t in enumerate(completions_bt):
        whole_t = jnp.concatenate([prompts[row // group], completion_t])
        rows.append(jnp.pad(whole_t, (0, width - len(whole_t))))
        starts.append(len(prompts[row // group]))
    hidden, _ = forward(arch, params, jnp.stack(rows), positions(jnp.stack(rows)))
    return jnp.stack([hidden[row, start : start + t] for row, start in enumerate(starts)])


def _parts(prompts, completions_bt):
    """Prompts right-padded with junk, their lengths, and positions of the completions."""
    lengths_p = jnp.array([len(prompt) for prompt in prompts])
    padded = jnp.stack([jnp.pad(prompt, (0, 7 - len(prompt)), constant_values=5) for prompt in prompts])
    offsets = jnp.repeat(lengths_p, completions_bt.shape[0] // len(prompts))[:, None]
    return padded, lengths_p, positions(completions_bt) + offsets


def _grouped(arch, params, prompts, completions_bt):
    """The same with prompts and completions in one pass."""
    padded, lengths_p, at_bt = _parts(prompts, completions_bt)
    return transformer.forward_group(arch, params, padded, lengths_p, completions_bt, at_bt)[1]


def _shared(arch, params, prompts, completions_bt):
    """The same through a prefix computed once per prompt."""
    padded, lengths_p, at_bt = _parts(prompts, completions_bt)
    _, prefix = transformer.forward(arch, params, padded, positions(padded))
    return transformer.forward(
        arch,
        params,
        completions_bt,
        at_bt,
        prefix=prefix,
        prefix_lengths_p=lengths_p,
    )[0]


@every_arch
def test_shared_prefix_equals_plain_concatenation_in_values_and_gradients(arch):
    params = random_params(arch)
    prompts = [random_tokens(1, length, seed=length)[0] for length in (6, 3)]
    completions_bt = random_tokens(6, 4, seed=9)
    weight = jax.random.normal(jax.random.key(3), (6, 4, arch.embed))

    def both(run):
        def loss(params):
            hidden = run(arch, params, prompts, completions_bt)
            return jnp.sum(hidden * weight), hidden

        (_, hidden), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return hidden, gradient

    plain, plain_gradient = both(_plain)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain_gradient))
    for run in (_shared, _grouped):
        shared, shared_gradient = both(run)
        np.testing.assert_allclose(shared, plain, atol=1e-5)
        chex.assert_trees_all_close(shared_gradient, plain_gradient, atol=1e-5 * largest, rtol=0)


def test_blocks_of_times_change_nothing(monkeypatch):
    arch, prompts, completions_bt = MODELS["qwen3"], random_tokens(2, 6), random_tokens(6, 5)

    def gradient():
        loss = lambda params: jnp.sum(jnp.sin(_grouped(arch, params, prompts, completions_bt)))  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    params = random_params(arch)
    whole = gradient()
    monkeypatch.setattr(cpu, "LEAST_BLOCK", 2)
    assert [len(cpu._blocks(t)) for t in (7, 5)] == [3, 2], "of padded prompts and of completions"
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    chex.assert_trees_all_close(gradient(), whole, atol=2e-6 * largest, rtol=0)


@every_arch
def test_prefix_and_cache_together_equal_plain_concatenation(arch):
    params = random_params(arch)
    prompts = [random_tokens(1, length, seed=length)[0] for length in (6, 3)]
    completions_bt = random_tokens(6, 4, seed=9)
    expected = _plain(arch, params, prompts, completions_bt)
    lengths_p = jnp.array([6, 3])
    padded = jnp.stack([jnp.pad(prompt, (0, 8 - len(prompt))) for prompt in prompts])
    _, prefix = forward(arch, params, padded, positions(padded))
    cache, got = transformer.init_cache(arch, 6, 5), []
    for index in range(4):
        token, at = completions_bt[:, index : index + 1], jnp.repeat(lengths_p, 3)[:, None] + index
        hidden, cache = forward(
            arch,
            params,
            token,
            at,
            prefix=prefix,
            prefix_lengths_p=lengths_p,
            cache=cache,
            index=jnp.int32(index),
        )
        got.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(got, 1), expected, atol=1e-5)


def _shapes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "jaxpr"):
                    inner = inner.jaxpr
                if hasattr(inner, "eqns"):
                    yield from _shapes(inner)


@every_arch
def test_prefix_is_never_repeated_per_sample(arch):
    # 23 prefix slots and 15 rows: none may hold a key of each slot for each row.
    params, prompts, completions = random_params(arch), random_tokens(3, 23), random_tokens(15, 2)
    _, prefix = forward(arch, params, prompts, positions(prompts))

    def run(prefix):
        lengths = jnp.full(3, 23)
        at = positions(completions)
        return transformer.forward(arch, params, completions, at, prefix=prefix, prefix_lengths_p=lengths)

    repeated = 15 * arch.kv_heads * 23 * arch.head_dim
    shapes = {shape for shape in _shapes(jax.make_jaxpr(run)(prefix).jaxpr) if 23 in shape}
    assert shapes
    assert not [shape for shape in shapes if np.prod(shape) >= repeated]


@every_arch
def test_later_tokens_have_no_gradient_into_earlier_logits(arch):
    arch = dataclasses.replace(arch, tie_embeddings=False)
    params = random_params(arch)
    tokens_bt = jnp.arange(8)[None]  # each token once, so that an embedding row stands for a position

    def logit_of(embedding, at):
        hidden, _ = transformer.forward(
            arch, {**params, "embed": {"embedding": embedding}}, tokens_bt, positions(tokens_bt)
        )
        return jnp.sum(jnp.sin(transformer.logits(arch, params, hidden)[0, at]))

    gradient = jax.jit(jax.vmap(jax.grad(logit_of), in_axes=(None, 0)))(params["embed"]["embedding"], jnp.arange(8))
    reach = np.abs(np.asarray(gradient)[:, :8]).max(-1) > 0
    np.testing.assert_array_equal(reach, np.tril(np.ones((8, 8), bool)))


def _policy(arch):
    return Policy(arch, None, (1,), 0, {}, "test")


@every_arch
def test_padding_changes_nothing(arch):
    params, lengths_b = random_params(arch), jnp.array([7, 4, 1])
    tokens_bt = random_tokens(3, 7)
    real = jnp.arange(7) < lengths_b[:, None]
    expected = _policy(arch).logits(params, tokens_bt, lengths_b)
    # An id far outside the vocabulary, as padding of -1 or -100 is in other code.
    junk = _policy(arch).logits(params, jnp.where(real, tokens_bt, -100), lengths_b)
    wider = _policy(arch).logits(params, jnp.pad(tokens_bt, ((0, 0), (0, 5)), constant_values=3), lengths_b)
    np.testing.assert_array_equal(junk[real], expected[real])
    np.testing.assert_allclose(wider[:, :7][real], expected[real], atol=1e-5)
    assert np.isfinite(junk).all() and np.isfinite(wider).all()
    alone = _policy(arch).logits(params, tokens_bt[1:2, :4], lengths_b[1:2])
    np.testing.assert_allclose(alone[0], expected[1, :4], atol=1e-5)


@pytest.mark.parametrize("arch", MODELS.values(), ids=MODELS.keys())
def test_scanned_equals_unrolled(arch):
    params, tokens_bt = random_params(arch), random_tokens(2, 6)
    scanned = to_scanned(params, arch.layers)
    scan_arch = dataclasses.replace(arch, scan_layers=True)
    expected, kv = forward(arch, params, tokens_bt, positions(tokens_bt))
    got, stacked = forward(scan_arch, scanned, tokens_bt, positions(tokens_bt))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(stacked.k, jnp.stack(kv.k), atol=1e-5)
    back = parameters.to_unrolled(scanned, arch.layers)
    chex.assert_trees_all_equal(back, params)
    assert jax.tree.structure(back) == jax.tree.structure(params)


@every_arch
def test_remat_changes_neither_values_nor_gradients(arch):
    params, tokens_bt = random_params(arch), random_tokens(2, 6)

    def run(arch):
        def loss(params):
            return jnp.mean(transformer.forward(arch, params, tokens_bt, positions(tokens_bt))[0] ** 3)

        return jax.jit(jax.value_and_grad(loss))(params)

    kept = run(arch)
    for remat in ("elementwise", "layer"):
        again = run(dataclasses.replace(arch, remat=remat))
        chex.assert_trees_all_close(again, kept, atol=1e-5, rtol=0)


@every_arch
def test_bfloat16_compute_is_close_to_float32(arch):
    # bfloat16 keeps 8 bits: through three layers the logits may move by 5 % of their largest magnitude.
    params, tokens_bt = random_params(arch), random_tokens(4, 8)
    lengths_b = jnp.full(4, 8)
    exact = _policy(arch).logits(params, tokens_bt, lengths_b)
    rough = _policy(dataclasses.replace(arch, compute_dtype="bfloat16")).logits(params, tokens_bt, lengths_b)
    assert rough.dtype == jnp.float32
    gap = float(jnp.abs(rough - exact).max() / jnp.abs(exact).max())
    assert 1e-5 < gap < 0.05


@every_arch
def test_only_relative_positions_matter(arch):
    params, tokens_bt = random_params(arch), random_tokens(2, 6)
    here, _ = forward(arch, params, tokens_bt, positions(tokens_bt))
    there, _ = forward(arch, params, tokens_bt, positions(tokens_bt, start=50))
    np.testing.assert_allclose(there, here, atol=5e-5)
    stretched, _ = forward(arch, params, tokens_bt, 3 * positions(tokens_bt))
    assert float(jnp.abs(stretched - here).max()) > 1e-2


def test_rope_frequencies_by_hand():
    # h = 8, theta = 10^4: so 64 positions hold 10.19, 1.019, .1019 and .01019 turns.
    plain = dataclasses.replace(MODELS["llama"], rope_scaling=None)
    np.testing.assert_allclose(rotary.inverse_frequencies(plain), [1, 0.1, 0.01, 0.001], rtol=1e-6)
    linear = dataclasses.replace(plain, rope_scaling=RopeScaling("linear", 4.0))
    np.testing.assert_allclose(rotary.inverse_frequencies(linear), [0.25, 0.025, 0.0025, 0.00025], rtol=1e-6)
    llama3 = dataclasses.replace(plain, rope_scaling=RopeScaling("llama3", 4.0, 1.0, 4.0, 64))
    blend = (64 * 0.1 / (2 * np.pi) - 1) / 3
    expected = [1, 0.1 * (blend + (1 - blend) / 4), 0.0025, 0.00025]
    np.testing.assert_allclose(rotary.inverse_frequencies(llama3), expected, rtol=1e-6)


def test_forward_refuses_half_of_a_pair_and_uneven_rows():
    arch = MODELS["qwen2"]
    params, tokens_bt = random_params(arch), random_tokens(5, 2)
    _, kv = forward(arch, params, tokens_bt[:2], positions(tokens_bt[:2]))
    run = partial(transformer.forward, arch, params, tokens_bt, positions(tokens_bt))
    with pytest.raises(ValueError, match="prefix and prefix_lengths_p go together"):
        run(prefix=kv)
    with pytest.raises(ValueError, match="cache and index go together"):
        run(cache=transformer.init_cache(arch, 5, 4))
    with pytest.raises(ValueError, match="5 rows do not divide over 2 prompts"):
        run(prefix=kv, prefix_lengths_p=jnp.array([2, 2]))


@pytest.mark.parametrize(("tokens", "lengths"), [((3,), (3,)), ((2, 3), (3,)), ((2, 3), ())])
def test_logits_of_another_shape_are_refused(tokens, lengths):
    policy = _policy(MODELS["llama"])
    with pytest.raises(AssertionError, match=r"shape|rank"):
        policy.logits({}, np.zeros(tokens, int), np.ones(lengths, int))
