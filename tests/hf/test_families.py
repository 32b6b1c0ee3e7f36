"""The table of families against the configuration and model classes of transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models
import transformers
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from mara_jax import hf
from mara_jax.hf.architecture import architecture
from mara_jax.hf.export_files import config_of
from mara_jax.policies.families import FAMILIES
from mara_jax.policies.ops.rms_norm import rms_norm
from mara_jax.policies.parameters import Architecture

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_is_missing_means_what_it_means_to_transformers(family):
    config = {"model_type": family, **SIZES, "sliding_window": None}
    arch, theirs = architecture(config, "config.json"), transformers.AutoConfig.for_model(**config)
    assert transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(theirs)].__name__ == FAMILIES[family].model_class
    assert arch.kv_heads == theirs.num_key_value_heads
    assert arch.head_dim == (getattr(theirs, "head_dim", None) or 64 // 32)
    assert arch.norm_eps == theirs.rms_norm_eps
    assert arch.max_positions == theirs.max_position_embeddings
    assert arch.tie_embeddings == theirs.tie_word_embeddings
    assert arch.rope_theta == theirs.rope_parameters["rope_theta"] and arch.rope_scaling is None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_export_writes_describes_the_same_architecture_to_both(family):
    arch = Architecture(family, 97, 64, 3, 8, 2, head_dim=12, mlp=48, norm_eps=1e-4, max_positions=8192)
    assert architecture(config_of(arch), "exported") == arch
    theirs = transformers.AutoConfig.for_model(**config_of(arch))
    assert theirs.head_dim == 12 and theirs.max_position_embeddings == 8192
    assert getattr(theirs, "sliding_window", None) is None


@pytest.mark.parametrize(("window", "limit"), [(None, 512), (512, 512), (513, 512)])
def test_a_window_that_no_sequence_reaches_over_changes_nothing(window, limit):
    config = {"model_type": "mistral", **SIZES, "sliding_window": window, "max_position_embeddings": limit}
    assert architecture(config, "config.json").max_positions == limit


@pytest.mark.parametrize(
    ("changes", "window", "limit"),
    [
        ({"sliding_window": 511, "max_position_embeddings": 512}, 511, 512),
        ({"max_position_embeddings": 32768}, 4096, 32768),  # what transformers takes where the key is missing
    ],
)
def test_a_window_below_the_context_is_refused_with_its_cure(changes, window, limit):
    config = {"model_type": "mistral", **SIZES, **changes}
    with pytest.raises(ValueError) as caught:
        architecture(config, "here")
    text = str(caught.value)
    assert text.startswith("here: ") and "\n" not in text
    assert f"sliding_window={window}" in text and f"max_position_embeddings={limit}" in text
    assert f"set max_position_embeddings to {window}" in text
    assert architecture({**config, "max_position_embeddings": window}, "here").max_positions == window


def test_the_largest_context_that_is_accepted_is_the_largest_that_torch_computes_alike(tmp_path):
    """A window of 9: at 9 positions nothing is out of sight, at 10 the last token no longer sees the first."""
    model = torch_models.make("mistral-tied")
    model.config.sliding_window = model.config.max_position_embeddings = 9
    model.save_pretrained(tmp_path)
    policy, params = hf.load(tmp_path, tokenizer=False)
    tokens = torch.arange(10)[None] + 3
    ours = policy.logits(params, tokens.numpy(), [10])
    theirs = torch_models.logits(model, tokens.tolist(), [10])
    assert abs(ours[0, :9] - theirs[0, :9]).max() < 1e-4
    assert abs(ours[0, 9] - theirs[0, 9]).max() > 1e-2


def test_the_norm_of_olmo2_is_rounded_once_in_bfloat16():
    x, scale = torch.randn(50, 64).bfloat16(), 1 + 0.2 * torch.randn(64)
    theirs = Olmo2RMSNorm(64, eps=1e-5)
    theirs.weight.data = scale
    ours = rms_norm(jnp.asarray(x.float().numpy(), jnp.bfloat16), jnp.asarray(scale.numpy()), 1e-5)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs(x).detach().float().numpy())
