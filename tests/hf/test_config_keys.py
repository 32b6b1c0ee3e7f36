"""The lists of known settings against the classes of transformers and peft, and the page that prints them."""

import config_keys_page
import pytest
import transformers

from mara_jax.hf import config_keys
from mara_jax.hf.config_keys import ADAPTER, GGUF, MODEL, ROPE, Keys
from mara_jax.policies.families import FAMILIES

LISTS = {"model": MODEL, "adapter": ADAPTER, "gguf": GGUF, **{f"rope {kind}": keys for kind, keys in ROPE.items()}}


def test_every_field_of_the_libraries_is_in_a_list():
    """After an update of transformers or peft: read what the new field does, then put it into one of the lists."""
    assert config_keys_page.model_fields() - config_keys_page.known(MODEL) == set()
    assert config_keys_page.adapter_fields() - config_keys_page.known(ADAPTER) == set()
    for kind, keys in ROPE.items():
        assert config_keys_page.rope_fields() - config_keys_page.known(keys) == set(), kind


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_for_a_family_is_accepted(family):
    MODEL.check(transformers.AutoConfig.for_model(family).to_dict())


def test_what_peft_writes_is_accepted():
    import peft

    ADAPTER.check(peft.LoraConfig(peft_type="LORA").to_dict())


@pytest.mark.parametrize("name", LISTS)
def test_a_key_is_in_one_list_alone(name):
    keys = LISTS[name]
    assert len(config_keys_page.known(keys)) == len(keys.read) + len(keys.harmless) + len(keys.only_at)


def test_the_page_is_what_the_lists_say():
    text = config_keys_page.PAGE.read_text()
    assert text == config_keys_page.page(), "run: python tests/hf/config_keys_page.py"
    for keys in LISTS.values():
        for key in config_keys_page.known(keys):
            assert f"| `{key}` |" in text


def test_values_are_compared_as_what_they_are():
    keys = Keys({"read": ""}, {"idle": ""}, {"off": ((False, None), "a switch"), "one": ((1.0,), "a number")}, "a file")
    keys.check({"read": 7, "idle": [3], "off": False, "one": 1})
    keys.check({"off": None})
    for wrong in ({"off": 0}, {"off": True}, {"off": "false"}, {"one": True}, {"one": None}, {"one": 2.0}):
        ((key, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{key}={value!r} in a file asks for"):
            keys.check(wrong)
    with pytest.raises(ValueError, match=r"other=\[1, .*\.\.\. in a file is a setting that this code does not know"):
        keys.check({"other": [1] * 100})


def test_refusals_name_the_value_that_is_fine():
    with pytest.raises(ValueError, match="choose one with hidden_act='silu'"):
        MODEL.check({"hidden_act": "gelu"})
    with pytest.raises(ValueError, match=r"quantised weights, .* choose the model's weights in float32"):
        MODEL.check({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    assert "\n" not in config_keys.shown("a\nb" * 100) and len(config_keys.shown("x" * 200)) == 80
