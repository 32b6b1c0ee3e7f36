"""Settings of config.json: what is accepted computes torch's logits, and what is unknown is refused by its name."""

import json
import shutil

import numpy as np
import published_configs
import pytest
import torch
import torch_models
from transformers import AutoConfig, AutoModelForCausalLM

from mara_jax import hf
from mara_jax.hf.architecture import architecture
from mara_jax.policies.parameters import RopeScaling

TOKENS = np.random.default_rng(0).integers(3, 97, (1, 40))
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A Llama whose config.json has no word about rotary embedding."""
    directory = tmp_path_factory.mktemp("model")
    torch_models.save("llama-linear", directory)
    file = directory / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in config.items() if not key.startswith("rope")}))
    return directory


def changed(plain, tmp_path, **settings):
    """A copy of the model whose config.json has these settings, too."""
    directory = shutil.copytree(plain, tmp_path / "model")
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return directory


def our_logits(directory):
    policy, params = hf.load(directory, tokenizer=False)
    return np.asarray(policy.logits(params, TOKENS, [TOKENS.shape[1]]))


def torch_logits(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def refusal(config, **settings):
    """The one line with which a config.json is refused."""
    with pytest.raises(ValueError) as caught:
        architecture(config | settings, "here")
    text = str(caught.value)
    assert text.startswith("here") and "\n" not in text
    return text


@pytest.mark.parametrize("name", published_configs.PUBLISHED)
def test_published_configurations_are_accepted(name):
    config = published_configs.PUBLISHED[name]
    arch = architecture(config, name)
    assert (arch.embed, arch.layers, arch.max_positions) == (
        config["hidden_size"], config["num_hidden_layers"], config["max_position_embeddings"]
    )  # fmt: skip
    theta = config["rope_parameters"]["rope_theta"] if "rope_parameters" in config else config.get("rope_theta", 1e4)
    assert arch.rope_theta == theta
    factor = (config.get("rope_scaling") or {}).get("factor")
    assert factor == (arch.rope_scaling.factor if arch.rope_scaling else None)


@pytest.mark.parametrize("name", published_configs.PUBLISHED)
def test_what_transformers_5_writes_for_a_published_configuration_is_the_same_architecture(name):
    config = published_configs.PUBLISHED[name]
    written = json.loads(AutoConfig.for_model(**config).to_json_string(use_diff=False))
    assert architecture(written, "written") == architecture(config, name)


ROPES = {
    "missing": {},
    "base alone": {"rope_theta": 500.0},
    "empty": {"rope_theta": 500.0, "rope_parameters": {}, "rope_scaling": None},
    "new": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "new, base beside it": {"rope_parameters": LINEAR, "rope_theta": 500.0},
    "new, linear": {"rope_parameters": LINEAR | {"rope_theta": 500.0}},
    "new, llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
    "new, without a type": {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    "old, type": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "old, rope_type": {"rope_theta": 500.0, "rope_scaling": LINEAR},
    "old, both names of the type": {"rope_theta": 500.0, "rope_scaling": LINEAR | {"type": "linear"}},
    "old, without a base": {"rope_scaling": LLAMA3},
    "old, base in both places": {"rope_theta": 500.0, "rope_scaling": LLAMA3 | {"rope_theta": 500.0}},
    "old, positions in both places": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
    "both, alike": {
        "rope_theta": 500.0, "rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 500.0}
    },
    "both, alike, llama3": {
        "rope_theta": 500.0, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 500.0}
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_rotary_settings_in_every_accepted_spelling_give_torchs_logits(plain, tmp_path, name):
    directory = changed(plain, tmp_path, **ROPES[name])
    np.testing.assert_allclose(our_logits(directory), torch_logits(directory), rtol=0, atol=5e-5)


def test_the_spellings_differ_in_what_they_compute(plain):
    """Otherwise a setting that is ignored on both sides would pass."""
    config = json.loads((plain / "config.json").read_text())
    names = ("base alone", "new, linear", "new, llama3", "missing")
    means = {name: architecture(config | ROPES[name], name) for name in names}
    assert [arch.rope_theta for arch in means.values()] == [500.0, 500.0, 500.0, 10000.0]
    assert means["new, linear"].rope_scaling == RopeScaling("linear", 4.0)
    assert means["new, llama3"].rope_scaling == RopeScaling("llama3", 4.0, 1.0, 4.0, 64)


BASE = {
    "model_type": "qwen2", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": LINEAR, "rope_theta": 1e6},
            ("rope_parameters={'rope_type': 'default'", "rope_scaling={'rope_type': 'linear'", "differ"),
        ),
        (
            {"rope_parameters": LINEAR, "rope_scaling": LINEAR | {"factor": 8.0}},
            ("'factor': 4.0", "'factor': 8.0", "differ"),
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5, "rope_type": "default"}}},
            ("rope_parameters holds settings for layers of type 'full_attention'", "one rotation for all layers"),
        ),
        ({"rope_parameters": LINEAR | {"rope_theta": 1e6}, "rope_theta": 1e4}, ("=1000000.0, but beside it rope_",)),
        ({"rope_scaling": LINEAR | {"rope_theta": 1e6}}, ("rope_scaling has rope_theta=1000000.0", "write rope_theta")),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 128}, ("=64, but beside it", "=128")),
        ({"rope_scaling": LINEAR | {"type": "dynamic"}}, ("rope_type='linear' and type='dynamic'",)),
        ({"rope_scaling": {"factor": 4.0}}, ("factor=4.0", "scaling without a type")),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ("rope scaling 'yarn' in rope_scaling is unknown",)),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, ("rope scaling 'dynamic'",)),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, ("rope scaling 'longrope'",)),
        ({"rope_scaling": {"type": None, "factor": 2.0}}, ("rope scaling None",)),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, ("rope scaling 'proportional'",)),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}, ("rope scaling 'mrope'",)),
        ({"rope_scaling": LINEAR | {"attention_factor": 1.5}}, ("attention_factor=1.5", "scaled attention scores")),
        ({"rope_scaling": LINEAR | {"finetuned": True}}, ("finetuned=True in the rope settings", "does not know")),
        ({"rope_scaling": LINEAR | {"partial_rotary_factor": 0.5}}, ("partial_rotary_factor=0.5", "a part of each")),
        ({"partial_rotary_factor": 0.25}, ("partial_rotary_factor=0.25 in config.json", "a part of each head")),
        ({"rope_parameters": {"rope_theta": None}}, ("rope_theta=None must be a positive number",)),
        ({"rope_theta": None, "rope_scaling": LINEAR}, ("rope_theta=None must be a positive number",)),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, ("high_freq_factor=1.0 must be above low_freq",)),
        ({"rope_scaling": "linear"}, ("rope_scaling is 'linear', not an object",)),
    ],
)  # fmt: skip
def test_rotary_settings_that_are_ambiguous_or_unknown_are_refused(settings, parts):
    text = refusal(BASE, **settings)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"residual_multiplier": 0.5}, ("residual_multiplier=0.5 in config.json", "not know", "remove the setting")),
        ({"hidden_act": "gelu"}, ("hidden_act='gelu'", "choose one with hidden_act='silu'")),
        ({"attention_bias": True}, ("attention_bias=True", "biases of attention", "attention_bias=False")),
        ({"mlp_bias": True}, ("mlp_bias=True",)),
        ({"attention_bias": "false"}, ("attention_bias='false'",)),
        ({"use_sliding_window": True}, ("use_sliding_window=True", "a window of tokens")),
        ({"use_mrope": True}, ("use_mrope=True",)),
        ({"rope_interleaved": True}, ("rope_interleaved=True", "neighbouring channels")),
        ({"is_causal": False}, ("is_causal=False", "later tokens")),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types=", "'full_attention' for each of")),
        ({"layer_types": ["full_attention"]}, ("num_hidden_layers=2",)),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, ("not ['Qwen2ForCausalLM']",)),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Other"}}, ("auto_map=", "own Python code")),
        ({"tie_word_embeddings": "false"}, ("tie_word_embeddings='false' must be true or false",)),
        ({"per_layer_config": {"1": {"sliding_window": 8}}}, ("per_layer_config=", "settings of single layers")),
        ({"dual_chunk_attention_config": {"chunk_size": 4}}, ("dual_chunk_attention_config=", "choose one without it")),
        ({"text_config": {"model_type": "qwen2"}}, ("text_config=", "nested in a multimodal one")),
        ({"model_type": "llava", "text_config": {}}, ("unknown model_type 'llava', which nests text_config",)),
        ({"model_type": ["qwen2"]}, ("unknown model_type ['qwen2']",)),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("'gptq'", "quantised weights")),
        ({"compression_config": {"format": "pack-quantized"}}, ("compression_config=", "quantised weights")),
        ({"quantization": {"group_size": 64, "bits": 4}}, ("quantization=", "quantised weights")),
        ({"model_type": "llama", "sliding_window": 16, "max_position_embeddings": 64}, ("sliding_window=16 is below",)),
    ],
)  # fmt: skip
def test_settings_that_are_unknown_or_ask_for_more_are_refused(settings, parts):
    text = refusal(BASE, **settings)
    assert all(part in text for part in parts), text


HARMLESS = {
    "quantization_config": None, "attention_bias": False, "mlp_bias": False, "layer_types": ["full_attention"] * 3,
    "partial_rotary_factor": 1, "attention_dropout": 0.1, "pretraining_tp": 2, "num_key_value_heads": 2,
    "use_cache": False, "temperature": 0.7, "id2label": {"0": "a"}, "_name_or_path": "x", "is_decoder": True,
}  # fmt: skip


def test_harmless_settings_give_torchs_logits(plain, tmp_path):
    directory = changed(plain, tmp_path, **HARMLESS)
    ours = our_logits(directory)
    np.testing.assert_array_equal(ours, our_logits(plain))
    np.testing.assert_allclose(ours, torch_logits(directory), rtol=0, atol=5e-5)
