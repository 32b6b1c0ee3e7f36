"""The table of families against the configuration and model classes of transformers."""

import pytest
import transformers

from mara_jax.hf.architecture import architecture
from mara_jax.policies.families import FAMILIES

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
