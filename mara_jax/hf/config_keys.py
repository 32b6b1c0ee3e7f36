"""Which settings of config.json, adapter_config.json and GGUF metadata are known; any other is an error.

A setting that nobody here has read about may change what a model computes. So each is in one of three lists: it is
read, it has no effect on the logits, or it has none at certain values and is refused at others. Whatever is in no list
is refused by its name. docs/config_keys.md prints the lists; a test compares them with the libraries' own classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Keys:
    """What is known of the settings in one kind of file.

    read: key -> what it decides.
    harmless: key -> why its value does not matter.
    only_at: key -> (the values that change nothing, what any other value asks for, and the cure if it is not to choose
        a model without that).
    where: what holds the settings, as errors call it.
    """

    read: Mapping[str, str]
    harmless: Mapping[str, str]
    only_at: Mapping[str, tuple[tuple[Any, ...], str] | tuple[tuple[Any, ...], str, str]]
    where: str = "config.json"

    def check(self, settings: Mapping[str, Any]) -> None:
        """ValueError, one line, for the first setting that is unknown or asks for what this code does not have."""
        for key, value in settings.items():
            if key in self.read or key in self.harmless:
                continue
            if key not in self.only_at:
                raise ValueError(
                    f"{key}={shown(value)} in {self.where} is a setting that this code does not know: choose another "
                    "model, or remove the setting if it has no effect on the logits"
                )
            allowed, meaning, *cure = self.only_at[key]
            # 1 == True in Python; here a number is no switch.
            if not any(value == fine and isinstance(value, bool) == isinstance(fine, bool) for fine in allowed):
                fine = " or ".join(repr(fine) for fine in allowed if fine not in (None, {}, []))
                cure = cure or [f"choose one with {key}={fine}" if fine else "choose one without it"]
                raise ValueError(
                    f"{key}={shown(value)} in {self.where} asks for {meaning}, which this code does not have: {cure[0]}"
                )


def shown(value: Any) -> str:
    """A value of a setting on one line, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def _listed(reasons: Mapping[str, str]) -> dict[str, str]:
    """Key -> reason, of reason -> keys."""
    return {key: reason for reason, keys in reasons.items() for key in keys.split()}


_NO, _NULL = (False, None), (None,)
_QUANTISED = (_NULL, "quantised weights", "choose the model's weights in float32, bfloat16 or float16")

MODEL = Keys(
    read={
        "model_type": "the family",
        "architectures": "must name the family's class, as other classes compute other things from the same weights",
        "vocab_size": "rows of the embedding",
        "hidden_size": "width",
        "intermediate_size": "width of the feed-forward",
        "num_hidden_layers": "layers",
        "num_attention_heads": "query heads",
        "num_key_value_heads": "key and value heads; null: as many as query heads",
        "head_dim": "channels of a head; null: width / query heads",
        "rms_norm_eps": "added to the mean square of a norm",
        "tie_word_embeddings": "whether the LM head is the embedding",
        "max_position_embeddings": "positions of the longest sequence",
        "layer_types": "must be 'full_attention' for each layer",
        "sliding_window": "must not be below max_position_embeddings; not used where use_sliding_window is a switch",
        "rope_theta": "rotary base; must agree with the one inside the rope settings",
        "rope_parameters": "rotary settings as transformers 5 writes them",
        "rope_scaling": "rotary settings as earlier versions wrote them; must agree with rope_parameters",
        "original_max_position_embeddings": "of llama3 scaling; must agree with the one inside the rope settings",
        "eos_token_id": "ends a completion, where generation_config.json names no other",
        "pad_token_id": "fills the end of shorter sequences",
    },
    harmless=_listed(
        {
            "bookkeeping": """_name_or_path name_or_path _commit_hash transformers_version torch_dtype dtype
                use_bfloat16 unsloth_fixed unsloth_version transformers.js_config is_decoder tokenizer_class
                max_sequence_length model_max_length seq_length""",
            "the tokenizer decides": "bos_token_id unk_token_id sep_token_id cls_token_id mask_token_id prefix",
            "training alone": "initializer_range attention_dropout gradient_checkpointing neftune_noise_alpha",
            "how a library computes or returns the same numbers": """use_cache pretraining_tp chunk_size_feed_forward
                torchscript tf_legacy_loss return_dict output_attentions output_hidden_states attn_implementation
                _attn_implementation _attn_implementation_autoset _attn_implementation_internal
                _flash_attn_2_enabled use_flash_attn use_flash_attention_2 experts_implementation
                _experts_implementation _experts_implementation_internal tie_last_hidden_states""",
            "of classifiers alone (a reward model must have one label)": """id2label label2id num_labels problem_type
                finetuning_task task_specific_params""",
            "use_sliding_window must be false": "max_window_layers",
            "defaults of another sampler; this one's are those of the run": """max_length min_length do_sample
                early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
                repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
                num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
                remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
                epsilon_cutoff eta_cutoff encoder_repetition_penalty num_assistant_tokens
                num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind
                decoder_start_token_id""",
        }
    ),
    only_at={
        "hidden_act": (("silu",), "another activation: this code knows 'silu'"),
        "activation": (("swiglu", None), "another feed-forward: this code knows 'swiglu'"),
        "attention_bias": (_NO, "biases of attention beyond the family's own"),
        "mlp_bias": (_NO, "biases of the feed-forward"),
        "use_sliding_window": (_NO, "a window of tokens, beyond which some layers do not attend"),
        "partial_rotary_factor": ((1.0, None), "a rotation of a part of each head"),
        "rope_interleaved": (_NO, "a rotation of neighbouring channels"),
        "use_mrope": (_NO, "rotary angles of several axes"),
        "is_llama_config": ((True, None), "another family than llama"),
        "is_causal": ((True, None), "attention to later tokens"),
        "use_bidirectional_attention": (_NO, "attention to later tokens"),
        "is_encoder_decoder": (_NO, "an encoder"),
        "add_cross_attention": (_NO, "an encoder"),
        "tie_encoder_decoder": (_NO, "an encoder"),
        "cross_attention_hidden_size": (_NULL, "an encoder"),
        "pruned_heads": (({}, None), "heads taken out of some layers"),
        "per_layer_config": (({}, None), "settings of single layers"),
        "dual_chunk_attention_config": (_NULL, "attention by chunks"),
        "clip_qkv": (_NULL, "queries, keys and values cut to a range"),
        "attn_logit_softcapping": (_NULL, "capped attention scores"),
        "final_logit_softcapping": (_NULL, "capped logits"),
        "text_config": (_NULL, "a language model nested in a multimodal one"),
        "vision_config": (_NULL, "images beside text"),
        "audio_config": (_NULL, "audio beside text"),
        "auto_map": (({}, None), "the author's own Python code"),
        "quantization_config": _QUANTISED,
        "compression_config": _QUANTISED,
        "quantization": _QUANTISED,
        "quant_config": _QUANTISED,
    },
)

_ROPE_READ = {
    "rope_type": "how frequencies are scaled",
    "type": "older name of rope_type; must agree with it",
    "rope_theta": "rotary base; must agree with the one beside the rope settings",
}
_SCALED = {"factor": "what frequencies are divided by"}
_LLAMA3 = {
    "low_freq_factor": "original positions / this: wavelengths above are divided by the factor",
    "high_freq_factor": "original positions / this: wavelengths below stay; must be above low_freq_factor",
    "original_max_position_embeddings": "positions before scaling",
}
# Null stands for a setting that is not there; so does the value at which each changes nothing.
_ROPE_UNUSED = {
    "factor": ((1.0, None), "scaling without a type of scaling"),
    "partial_rotary_factor": MODEL.only_at["partial_rotary_factor"],
    "attention_factor": ((1.0, None), "scaled attention scores"),
    "mscale": (_NULL, "scaled attention scores"),
    "mscale_all_dim": (_NULL, "scaled attention scores"),
    "beta_fast": (_NULL, "YaRN scaling"),
    "beta_slow": (_NULL, "YaRN scaling"),
    "truncate": (_NULL, "YaRN scaling"),
    "short_factor": (_NULL, "LongRoPE scaling"),
    "long_factor": (_NULL, "LongRoPE scaling"),
    "low_freq_factor": (_NULL, "llama3 scaling"),
    "high_freq_factor": (_NULL, "llama3 scaling"),
    "mrope_section": (_NULL, "rotary angles of several axes"),
    "mrope_interleaved": (_NULL, "rotary angles of several axes"),
}


def _rope(read: dict[str, str], **harmless: str) -> Keys:
    known = _ROPE_READ | read
    unused = {key: row for key, row in _ROPE_UNUSED.items() if key not in known}
    return Keys(known, harmless, unused, "the rope settings")


# rope_type -> the keys beside it.
ROPE = {
    "default": _rope({}, original_max_position_embeddings="of scaled positions alone"),
    "linear": _rope(_SCALED, original_max_position_embeddings="linear scaling does not read it"),
    "llama3": _rope(_SCALED | _LLAMA3),
}

ADAPTER = Keys(
    read={
        "peft_type": "must be LORA",
        "r": "rank",
        "lora_alpha": "the update is scaled by lora_alpha / r",
        "use_rslora": "scaled by lora_alpha / sqrt(r) instead",
    },
    harmless=_listed(
        {
            "bookkeeping": """auto_mapping peft_version base_model_name_or_path revision inference_mode
                runtime_config""",
            "the tensors say what is adapted": """target_modules exclude_modules layers_to_transform
                layers_pattern""",
            "training alone": "lora_dropout",
            "read only with a setting that is refused": """megatron_core qalora_group_size loftq_config eva_config
                corda_config lora_ga_config""",
        }
    ),
    only_at={
        "task_type": (("CAUSAL_LM", None), "a task that is not language modelling"),
        "init_lora_weights": (
            # With these the base stays as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA subtract from it.
            (True, False, "gaussian", "orthogonal", "eva", "mica", None),
            "a start that changes the base weights",
            "let peft convert the adapter, by save_pretrained with path_initial_model_for_weight_conversion",
        ),
        "bias": (("none", None), "trained biases"),
        "lora_bias": (_NO, "trained biases"),
        "use_dora": (_NO, "DoRA"),
        "use_qalora": (_NO, "QA-LoRA"),
        "use_bdlora": (_NULL, "block-diagonal factors"),
        "fan_in_fan_out": (_NO, "transposed kernels"),
        "modules_to_save": (([], None), "modules that are trained whole"),
        "rank_pattern": (({}, None), "ranks that differ by module"),
        "alpha_pattern": (({}, None), "scales that differ by module"),
        "layer_replication": (([], None), "repeated layers"),
        "trainable_token_indices": (_NULL, "trained embeddings"),
        "target_parameters": (([], None), "parameters outside linear layers"),
        "alora_invocation_tokens": (_NULL, "an adapter that acts from a certain token on"),
        "ensure_weight_tying": (_NO, "an adapted embedding"),
        "megatron_config": (_NULL, "Megatron's layers"),
        "velora_config": (_NULL, "VeLoRA"),
        "monteclora_config": (_NULL, "MonteCLoRA"),
        "arrow_config": (_NULL, "Arrow's routing between adapters"),
        "kasa_config": (_NULL, "KaSA"),
        "enable_lora": (_NULL, "merged projections"),
        "merge_weights": (_NO, "an adapter that is merged into its base"),
    },
    where="adapter_config.json",
)

# Below the name of the architecture; llama.cpp reads what a model computes from there alone.
GGUF = Keys(
    read={
        "block_count": "layers",
        "context_length": "positions of the longest sequence",
        "embedding_length": "width",
        "feed_forward_length": "width of the feed-forward",
        "attention.head_count": "query heads",
        "attention.head_count_kv": "key and value heads",
        "attention.key_length": "channels of a head",
        "attention.value_length": "must equal attention.key_length",
        "attention.layer_norm_rms_epsilon": "added to the mean square of a norm",
        "attention.sliding_window": "must not be below context_length",
        "rope.dimension_count": "must be all channels of a head",
        "rope.freq_base": "rotary base",
        "rope.scaling.type": "how frequencies are scaled; linear where only a factor is there",
        "rope.scaling.factor": "what frequencies are divided by",
        "rope.scale_linear": "older name of rope.scaling.factor",
    },
    harmless=_listed(
        {
            "the embedding's rows decide": "vocab_size",
            "the norms are RMS norms": "attention.layer_norm_epsilon",
            "bookkeeping": "rope.scaling.finetuned",
            "scaling other than YaRN does not read it": "rope.scaling.original_context_length",
        }
    ),
    only_at={
        "attention.causal": ((True,), "attention to later tokens"),
        "expert_count": ((0,), "a mixture of experts"),
        "expert_used_count": ((0,), "a mixture of experts"),
        "attention.clamp_kqv": ((0.0,), "queries, keys and values cut to a range"),
        "attention.max_alibi_bias": ((0.0,), "ALiBi"),
        "rope.scaling.attn_factor": ((1.0,), "scaled attention scores"),
        "pooling_type": ((0,), "one vector for a text"),
        "tensor_data_layout": (("Meta AI original pth",), "another order of the rows of q and k"),
    },
    where="the GGUF metadata",
)
