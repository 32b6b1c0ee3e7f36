"""Weights kept in bfloat16: the forward pass in one program a layer, against float32 copies of the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.policies import layerwise, model, transformer


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
def test_logits_are_those_of_the_whole_model_on_wider_copies(scan, tied):
    arch = transformer.Architecture(
        family="qwen2", vocab_size=40, embed=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=24,
        qkv_bias=True, tie_embeddings=tied, scan_layers=scan,
    )  # fmt: skip
    shapes = jax.eval_shape(lambda: transformer.init(arch, jax.random.key(0)))
    draw = np.random.default_rng(0)
    narrow = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape), jnp.bfloat16), shapes)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    assert layerwise.pays(arch, narrow) and not layerwise.pays(arch, wide)
    policy = model.Policy(arch, None, (), 0, {}, "test")
    tokens, lengths = draw.integers(0, 40, (3, 7)), np.array([7, 2, 5])
    found, expected = (np.asarray(policy.logits(params, tokens, lengths)) for params in (narrow, wide))
    assert found.dtype == np.float32 and expected.std() > 1
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(found[row, :length], expected[row, :length], rtol=1e-4, atol=1e-4)
