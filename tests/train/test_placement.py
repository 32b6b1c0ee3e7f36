"""The reference as a run keeps it: what a bfloat16 policy reads of it, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mara_jax.policies import transformer
from mara_jax.sampling import logprobs
from mara_jax.train import placement

ARCH = transformer.Architecture(
    "qwen2", vocab_size=64, embed=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=32,
    scan_layers=True, compute_dtype="bfloat16", tie_embeddings=False,
)  # fmt: skip
init = jax.jit(transformer.init, static_argnums=0)


def test_a_kept_reference_says_the_same_to_the_last_bit():
    params = init(ARCH, jax.random.key(0))
    # Biases and scales that bfloat16 rounds, too.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + jnp.float32(0.3 * rng.normal(size=x.shape)), params)
    kept = placement.reference(ARCH, params)
    prompts, lengths = jnp.arange(6).reshape(2, 3), jnp.array([3, 2])
    tokens = jnp.arange(20).reshape(2, 2, 5)
    stats = []
    for tree in (params, kept):
        hidden = logprobs.reference_hidden(ARCH, tree, prompts, lengths, tokens)
        stats.append(jax.jit(logprobs.token_stats, static_argnums=0)(ARCH, tree, hidden, tokens))
    np.testing.assert_array_equal(stats[0].logp, stats[1].logp)
    np.testing.assert_array_equal(stats[0].entropy, stats[1].entropy)
    dtypes = {path[-1].key: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(kept)}
    assert dtypes == {"embedding": jnp.bfloat16, "kernel": jnp.bfloat16, "bias": jnp.bfloat16, "scale": jnp.float32}
    assert jax.tree.map(lambda x: (x.shape, x.dtype), kept) == jax.tree.map(
        lambda x: (x.shape, x.dtype), placement.abstract_reference(ARCH)
    )


def test_a_float32_reference_is_the_one_given_and_the_state_has_a_copy():
    arch = dataclasses.replace(ARCH, compute_dtype="float32")
    params = init(arch, jax.random.key(0))
    assert placement.reference(arch, params) is params
    state = placement.fresh(arch, params, optax.sgd(0.1))
    scale = params["final_norm"]["scale"]
    assert state.params["final_norm"]["scale"].unsafe_buffer_pointer() != scale.unsafe_buffer_pointer()
    own = placement.fresh(ARCH, params, optax.sgd(0.1), copy=False)
    assert own.params["final_norm"]["scale"].unsafe_buffer_pointer() == scale.unsafe_buffer_pointer()
    kept = placement.reference(ARCH, params)["final_norm"]["scale"]
    assert kept.unsafe_buffer_pointer() != scale.unsafe_buffer_pointer()
