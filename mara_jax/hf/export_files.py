"""The files beside an export's weights, as transformers 4 and 5, vLLM and llama.cpp's converter read them.

Transformers 5 renamed some keys and reads the older ones; 4 knows only those. So both spellings are written.
"""

import json
from pathlib import Path
from typing import Any

from mara_jax.policies import encoding
from mara_jax.policies.parameters import Architecture
from mara_jax.policies.policy import Policy

# A class that all versions have, and that splits text exactly as tokenizer.json says: those named after a model put
# rules of their own in its place.
_TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# What transformers 5 notes about how it loaded a tokenizer.
_NOTES = ("backend", "is_local", "local_files_only", "name_or_path", "extra_special_tokens", "tokenizer_file")
# What transformers reads of a classifier with one label, in place of what the source's config.json says of labels.
_SCORE_HEAD = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
_LABELS = ("id2label", "label2id", "num_labels", "problem_type")
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "rope_type")


def config_of(arch: Architecture) -> dict[str, Any]:
    """The config.json of an architecture, for a model that did not come with one."""
    # Where that key is missing, transformers takes a window of 4,096 tokens.
    window = {"sliding_window": None} if arch.traits.sliding_window else {}
    return (
        window
        | {
            "architectures": [arch.traits.class_with(arch.score_head)],
            "model_type": arch.family,
            "vocab_size": arch.vocab_size,
            "hidden_size": arch.embed,
            "num_hidden_layers": arch.layers,
            "num_attention_heads": arch.heads,
            "num_key_value_heads": arch.kv_heads,
            "head_dim": arch.head_dim,
            "intermediate_size": arch.mlp,
            "hidden_act": "silu",
            "rms_norm_eps": arch.norm_eps,
            "tie_word_embeddings": arch.tie_embeddings,
            "max_position_embeddings": arch.max_positions,
        }
        | rope_settings(arch)
    )


def rope_settings(arch: Architecture) -> dict[str, Any]:
    """The rotary embedding in the keys of transformers 5 (rope_parameters) and 4 (rope_theta, rope_scaling)."""
    kind: dict[str, Any] = {"rope_type": "default"}
    if arch.rope_scaling is not None:
        scaling = arch.rope_scaling
        kind = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            kind |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
    scaled = {"rope_scaling": kind} if arch.rope_scaling is not None else {}
    return scaled | {"rope_theta": arch.rope_theta, "rope_parameters": {"rope_theta": arch.rope_theta} | kind}


def config(policy: Policy, dtype: str) -> dict[str, Any]:
    """config.json: the one that the policy came with, or its architecture's, in both spellings."""
    arch, tokenizer = policy.architecture, policy.tokenizer
    replaced = (*_ROPE, *_LABELS) if arch.score_head else _ROPE
    source = {key: value for key, value in policy.config.items() if key not in replaced}
    head = _SCORE_HEAD | {"architectures": [arch.traits.class_with(True)]} if arch.score_head else {}
    return config_of(arch) | source | head | _token_ids(policy, tokenizer) | {"dtype": dtype, "torch_dtype": dtype}


def _token_ids(policy: Policy, tokenizer: Any) -> dict[str, Any]:
    """The ids in config.json: its own, else the tokenizer's; null where there is none.

    Without them, a class of transformers takes the ids of its family's first tokenizer.
    """
    ends, ids = list(policy.eos_ids), {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own = None if tokenizer is None else getattr(tokenizer, name)
        ids[name] = own if policy.config.get(name) is None else policy.config[name]
    if policy.config.get("eos_token_id") is None and ids["eos_token_id"] not in ends:
        ids["eos_token_id"] = ends or None
    if not policy.config and tokenizer is None:
        ids["pad_token_id"] = policy.pad_id
    return ids


def generation(policy: Policy) -> dict[str, Any]:
    """generation_config.json: the one that the policy came with, and what ends its completions."""
    out = {"pad_token_id": policy.pad_id} | policy.generation
    ends = out.pop("eos_token_id", None)
    same = sorted(set(ends if isinstance(ends, list) else [ends])) == list(policy.eos_ids)
    return out | ({"eos_token_id": ends if same else list(policy.eos_ids)} if policy.eos_ids else {})


def write_tokenizer(tokenizer: Any, directory: Path) -> None:
    """The tokenizer's files: tokenizer.json, its settings and its chat template."""
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    # A list under the new name of this key stops transformers 4; both versions know the old name.
    named = settings.get("extra_special_tokens")
    extra = settings.get("additional_special_tokens") or (named if isinstance(named, list) else [])
    settings = {key: value for key, value in settings.items() if key not in _NOTES}
    settings |= {"tokenizer_class": _TOKENIZER_CLASS, "clean_up_tokenization_spaces": False}
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    settings["add_bos_token"] = tokenizer.bos_token_id in encoding.front_ids(tokenizer)  # as tokenizer.json does
    if extra:
        settings["additional_special_tokens"] = extra
    if isinstance(tokenizer.chat_template, str):
        settings["chat_template"] = tokenizer.chat_template
    settings["added_tokens_decoder"] = {
        str(token): {
            key: getattr(added, key) for key in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        }
        for token, added in sorted(tokenizer.added_tokens_decoder.items())
    }
    _write(file, settings)
    special = {role: str(token) for role, token in tokenizer.special_tokens_map.items()}
    _write(directory / "special_tokens_map.json", special | ({"additional_special_tokens": extra} if extra else {}))


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
