"""What an export says beside its weights, to readers old and new, and that it is read back before it gets its name."""

import dataclasses
import json

import gguf
import jax
import numpy as np
import pytest
from small_tokenizers import BOS, END, EOS, MARKS, byte_level, pieces

from mara_jax import hf
from mara_jax.hf import export_check, export_files
from mara_jax.hf import tokenizer as tokenizers
from mara_jax.policies import encoding, transformer
from mara_jax.policies.parameters import RopeScaling
from mara_jax.policies.policy import Policy

ARCH = transformer.Architecture("qwen3", 320, 16, 1, heads=2, kv_heads=1, head_dim=8, mlp=16)
TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end_of_turn>\n{% endfor %}"
EOS_ID, END_ID = MARKS.index(EOS), MARKS.index(END)
PARAMS = transformer.init(ARCH, jax.random.key(0))


def policy_with(tokenizer=None, **changes) -> Policy:
    return dataclasses.replace(Policy(ARCH, tokenizer, (EOS_ID,), 0, {}, "made here"), **changes)


def written(policy, out) -> dict:
    """The JSON files of an export, by their names."""
    hf.export(policy, PARAMS, out)
    return {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}


def test_names_that_transformers_4_knows(tmp_path):
    """Class, list of special tokens and template under the older keys; the id of every added token."""
    tokenizer = byte_level(BOS, EOS, additional_special_tokens=[END], chat_template=TURNS)
    said = written(policy_with(tokenizer), tmp_path / "out")["tokenizer_config"]
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in said
    assert said["additional_special_tokens"] == [END] and said["chat_template"] == TURNS
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TURNS
    assert {int(key): token["content"] for key, token in said["added_tokens_decoder"].items()} == dict(enumerate(MARKS))
    again = tokenizers.from_directory(tmp_path / "out")
    assert END in again.all_special_tokens
    assert again("ab").input_ids == tokenizer("ab").input_ids and again.chat_template == TURNS


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, None),
        (RopeScaling("linear", 2.0), {"rope_type": "linear", "factor": 2.0}),
        (
            RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ],
)
def test_rotary_settings_in_both_spellings(scaling, expected):
    arch = dataclasses.replace(ARCH, family="llama", rope_theta=5e5, rope_scaling=scaling)
    said = export_files.config(policy_with(architecture=arch), "bfloat16")
    assert said["rope_theta"] == said["rope_parameters"]["rope_theta"] == 5e5 and said.get("rope_scaling") == expected
    assert said["dtype"] == said["torch_dtype"] == "bfloat16"
    assert {"rope_theta": 5e5} | (expected or {"rope_type": "default"}) == said["rope_parameters"]
    # A source in one spelling is written in both, with its other keys.
    source = said | {"attention_dropout": 0.0} | {key: None for key in ("rope_parameters", "torch_dtype")}
    again = export_files.config(policy_with(architecture=arch, config=source), "bfloat16")
    assert again == said | {"attention_dropout": 0.0}


def test_ids_and_generation_settings(tmp_path):
    """Those of the source stay, in their order; what ends completions of the policy is among them."""
    source = {"eos_token_id": [END_ID, EOS_ID], "temperature": 0.7, "top_p": 0.8, "do_sample": True, "bos_token_id": 1}
    policy = policy_with(byte_level(), eos_ids=(EOS_ID, END_ID), generation=source)
    said = written(policy, tmp_path / "out")
    assert said["generation_config"] == source | {"pad_token_id": 0}
    assert said["config"]["eos_token_id"] == EOS_ID and said["config"]["bos_token_id"] == 1
    again, _ = hf.load(tmp_path / "out")
    assert again.eos_ids == (EOS_ID, END_ID) and again.generation == said["generation_config"]
    # The end of a turn was added to what the source named.
    assert export_files.generation(policy_with(eos_ids=(EOS_ID, END_ID), generation={"eos_token_id": EOS_ID})) == {
        "eos_token_id": [EOS_ID, END_ID],
        "pad_token_id": 0,
    }
    assert "eos_token_id" not in export_files.generation(policy_with(eos_ids=()))


def test_bos_by_setting_is_in_tokenizer_json_after_an_export(tmp_path):
    """add_bos_token of tokenizer_config.json, which transformers 5 overlooks beside a tokenizer.json."""
    byte_level().save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / "tokenizer_config.json"
    for name, setting in (("LlamaTokenizerFast", True), ("PreTrainedTokenizerFast", True), ("Other", None)):
        settings = json.loads(file.read_text()) | {"tokenizer_class": name, "add_bos_token": setting}
        file.write_text(json.dumps(settings))
        tokenizer = tokenizers.from_directory(tmp_path / "in")
        (row,) = encoding.encode_prompts(tokenizer, ["ab"], chat=False)
        assert row[0] == tokenizer("ab").input_ids[0]
        assert (row[0] == tokenizer.bos_token_id) == bool(setting)
        written(policy_with(tokenizer), tmp_path / f"out {name}")
        assert tokenizers.from_directory(tmp_path / f"out {name}")("ab").input_ids == row
    byte_level(BOS).save_pretrained(tmp_path / "with")
    file = tmp_path / "with" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": False}))
    assert tokenizers.from_directory(tmp_path / "with")("ab").input_ids[0] == 1  # its class does not heed it
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))
    assert tokenizers.from_directory(tmp_path / "with")("ab").input_ids[0] != 1


@pytest.mark.parametrize("tokenizer", [byte_level(BOS, chat_template=TURNS), pieces("", EOS), byte_level()])
def test_what_llama_cpps_converter_reads(tokenizer, tmp_path):
    """Its own reader of special tokens (in the package gguf); architectures and rope_theta stand in config.json."""
    said = written(policy_with(tokenizer), tmp_path / "out")
    found = gguf.SpecialVocab(tmp_path / "out", load_merges=True, n_vocab=ARCH.vocab_size)
    assert found.special_token_ids == {"bos": 1, "eos": EOS_ID, "unk": 0}
    assert found.chat_template == tokenizer.chat_template and found.merges
    assert found.add_special_token.get("bos", False) == (encoding.front_ids(tokenizer) == [1])
    assert said["config"]["architectures"] == ["Qwen3ForCausalLM"] and said["config"]["rope_theta"] == 1e4
    assert len(tokenizer) <= said["config"]["vocab_size"] == 320


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (1e6, "float16", r"model\.norm\.weight holds 1e\+06, which is infinity in float16: .*bfloat16"),
        (np.nan, None, r"model\.norm\.weight holds NaN or infinity"),
        (np.inf, "bfloat16", r"model\.norm\.weight holds NaN or infinity"),
    ],
)
def test_values_that_are_not_finite_in_the_dtype_are_refused(value, dtype, words, tmp_path):
    scale = PARAMS["final_norm"]["scale"].at[3].set(value)
    with pytest.raises(ValueError, match=words):
        hf.export(policy_with(), PARAMS | {"final_norm": {"scale": scale}}, tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []
    if value == 1e6:
        hf.export(policy_with(), PARAMS | {"final_norm": {"scale": scale}}, tmp_path / "out", dtype="bfloat16")


def test_an_export_that_reads_back_differently_is_not_kept(tmp_path, monkeypatch):
    """A byte that the disk changed, an embedding that the reader turns round, a config of another model."""
    read = export_check.read_params

    def turned(*args):
        params = read(*args)
        table = params["embed"]["embedding"]
        return params | {"embed": {"embedding": table[::-1]}}

    wrong = {"rms_norm_eps": 1e-2}
    cases = [
        ({}, ("read_params", turned), "logits differ by"),
        ({}, ("checksum", lambda array: 0), "is not what was written"),
        ({"config": export_files.config_of(ARCH) | wrong}, None, "norm_eps was 1e-06 and is 0.01"),
    ]
    for changes, patch, words in cases:
        with monkeypatch.context() as patched, pytest.raises(ValueError, match=words) as caught:
            if patch is not None and patch[0] == "checksum":
                sums = iter(range(10**6))
                patched.setattr(export_check, "checksum", lambda array, sums=sums: next(sums))
            elif patch is not None:
                patched.setattr(export_check, *patch)
            hf.export(policy_with(**changes), PARAMS, tmp_path / "out")
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
