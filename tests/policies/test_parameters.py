import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stacking import to_scanned

from mara_jax.policies import parameters, transformer
from mara_jax.policies.families import FAMILIES
from mara_jax.policies.parameters import Architecture

TINY = Architecture("qwen3", 61, 32, 3, 4, 2, 12, 40, tie_embeddings=False)
PUBLISHED = {
    # parameter counts as the model cards and safetensors headers of the released models state them
    "SmolLM2-135M": (Architecture("llama", 49152, 576, 30, 9, 3, 64, 1536), 134_515_008),
    "Qwen2.5-0.5B": (Architecture("qwen2", 151936, 896, 24, 14, 2, 64, 4864), 494_032_768),
    "Qwen2.5-3B": (Architecture("qwen2", 151936, 2048, 36, 16, 2, 128, 11008), 3_085_938_688),
    "Qwen3-0.6B": (Architecture("qwen3", 151936, 1024, 28, 16, 8, 128, 3072), 596_049_920),
    "Mistral-7B-v0.3": (
        Architecture("mistral", 32768, 4096, 32, 32, 8, 128, 14336, tie_embeddings=False),
        7_248_023_552,
    ),
    "OLMo-2-0425-1B": (
        Architecture("olmo2", 100352, 2048, 16, 16, 16, 128, 8192, tie_embeddings=False),
        1_484_916_736,
    ),
    "Llama-3.2-1B": (Architecture("llama", 128256, 2048, 16, 32, 8, 64, 8192), 1_235_814_400),
}


@pytest.mark.parametrize(("arch", "expected"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_table_counts_the_parameters_of_released_models(arch, expected):
    assert parameters.count(arch) == expected


@pytest.mark.parametrize(("family", "scan"), [("qwen3", True), *((family, False) for family in FAMILIES)])
def test_every_array_of_the_table_is_there_and_reaches_the_logits(family, scan):
    arch = dataclasses.replace(TINY, family=family, scan_layers=scan)
    tokens_bt, whole = jnp.arange(4)[None], parameters.init(arch, jax.random.key(0))

    def total(params):
        hidden_btd, _ = transformer.forward(arch, params, tokens_bt, tokens_bt)
        return jnp.sum(jnp.sin(transformer.logits(arch, params, hidden_btd)))

    gradient = jax.jit(jax.grad(total))(whole)
    assert all(float(jnp.max(jnp.abs(leaf))) > 0 for leaf in jax.tree.leaves(gradient)), "what is there is used"
    for path, (shape, axes) in parameters.leaf_shapes(arch).items():
        assert parameters.at(whole, path).shape == shape
        assert len(axes) == len(shape)


def test_hugging_face_names_are_unique_and_complete():
    names = [row.name for row in parameters.table(TINY)]
    assert len(set(names)) == len(names) == 3 + 3 * 11
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < set(names)
    assert "model.layers.2.self_attn.k_norm.weight" in names


def test_init_draws_the_stated_distributions_and_the_same_numbers_when_scanned():
    arch = dataclasses.replace(TINY, embed=256, mlp=512)
    params = parameters.init(arch, jax.random.key(4))
    assert np.std(params["layers_1"]["up"]["kernel"]) == pytest.approx(256**-0.5, rel=0.02)
    assert np.std(params["layers_1"]["down"]["kernel"]) == pytest.approx((512 * 6) ** -0.5, rel=0.02)
    assert np.std(params["embed"]["embedding"]) == pytest.approx(0.02, rel=0.02)
    np.testing.assert_array_equal(params["layers_0"]["attn_norm"]["scale"], 1)
    assert not np.array_equal(params["layers_0"]["q"]["kernel"], params["layers_1"]["q"]["kernel"])
    scanned = parameters.init(dataclasses.replace(arch, scan_layers=True), jax.random.key(4))
    chex.assert_trees_all_equal(scanned, to_scanned(params, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "gpt2"}, "unknown model family 'gpt2'"),
        ({"kv_heads": 3}, "4 query heads do not divide over 3 kv heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"compute_dtype": "float16"}, "compute_dtype is 'float16'"),
    ],
)
def test_an_impossible_architecture_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        dataclasses.replace(TINY, **change)
    assert "\n" not in str(caught.value)
