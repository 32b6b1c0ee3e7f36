"""The config.json of well-known models, key for key as their authors published them, odd ones included."""

_COMMON = {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
_QWEN = _COMMON | {"attention_dropout": 0.0, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False}
_QWEN2 = _QWEN | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": 151643}
_LLAMA = _COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
                    "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None}  # fmt: skip


def _sizes(vocab: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int, positions: int, tied: bool):
    return {
        "vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }  # fmt: skip


LLAMA3_SCALING = {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
_LLAMA32 = _LLAMA | _sizes(128256, 2048, 8192, 16, 32, 8, 131072, True) | {
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "mlp_bias": False,
    "attention_dropout": 0.0, "rope_scaling": LLAMA3_SCALING, "rope_theta": 500000.0, "transformers_version": "4.45.0",
}  # fmt: skip
_SMOL = _LLAMA | _sizes(49152, 576, 1536, 30, 9, 3, 8192, True) | {
    "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.041666666666666664,
    "is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000, "transformers_version": "4.40.1",
}  # fmt: skip

PUBLISHED = {
    "Qwen2.5-0.5B": _QWEN2 | _sizes(151936, 896, 4864, 24, 14, 2, 32768, True) | {
        "eos_token_id": 151643, "max_window_layers": 24, "sliding_window": 32768, "transformers_version": "4.40.1",
        "use_mrope": False,
    },
    "Qwen2.5-1.5B written by transformers 5": {
        key: value for key, value in _QWEN2.items() if key not in ("torch_dtype", "rope_theta")
    } | _sizes(151936, 1536, 8960, 28, 12, 2, 131072, True) | {
        "dtype": "bfloat16", "eos_token_id": 151643, "layer_types": ["full_attention"] * 28, "max_window_layers": 28,
        "pad_token_id": None, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_window": None, "transformers_version": "5.17.0", "use_mrope": False,
    },
    "Qwen3-0.6B": _QWEN | _sizes(151936, 1024, 3072, 28, 16, 8, 40960, True) | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "max_window_layers": 28, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "transformers_version": "4.51.0",
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": _QWEN2 | _sizes(151936, 1536, 8960, 28, 12, 2, 131072, False) | {
        "bos_token_id": 151646, "eos_token_id": 151643, "max_window_layers": 21, "rope_theta": 10000,
        "sliding_window": 4096, "transformers_version": "4.44.0", "use_mrope": False,
    },
    "Llama-3.2-1B-Instruct": _LLAMA32,
    "Llama-3.2-1B by unsloth": _LLAMA32 | {
        "_name_or_path": "meta-llama/Llama-3.2-1B", "pad_token_id": 128004, "unsloth_fixed": True,
        "unsloth_version": "2024.9", "_attn_implementation_autoset": True,
    },
    "Llama-2-13b": _LLAMA | _sizes(32000, 5120, 13824, 40, 40, 40, 4096, False) | {
        "_name_or_path": "meta-llama/Llama-2-13b-hf", "pretraining_tp": 2, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "float16", "transformers_version": "4.32.0.dev0",
    },
    "TinyLlama-1.1B": _LLAMA | _sizes(32000, 2048, 5632, 22, 32, 4, 2048, False) | {
        "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 10000.0, "transformers_version": "4.35.0",
    },
    "deepseek-coder-1.3b": _LLAMA | _sizes(32256, 2048, 5504, 24, 16, 16, 16384, False) | {
        "bos_token_id": 32013, "eos_token_id": 32014, "rms_norm_eps": 1e-6, "rope_theta": 100000,
        "rope_scaling": {"factor": 4.0, "type": "linear"}, "transformers_version": "4.33.1",
    },
    "Falcon3-1B": _LLAMA | _sizes(131072, 2048, 8192, 18, 8, 4, 4096, False) | {
        "activation": "swiglu", "attention_dropout": 0.0, "eos_token_id": 11, "head_dim": 256, "mlp_bias": False,
        "rms_norm_eps": 1e-6, "rope_theta": 1000042, "transformers_version": "4.46.1",
    },
    "SmolLM2-135M": _SMOL,
    "SmolLM2-135M-Instruct": _SMOL | {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "mlp_bias": False, "transformers_version": "4.42.3",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "Mistral-7B-v0.3": _COMMON | _sizes(32768, 4096, 14336, 32, 32, 8, 32768, False) | {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None,
        "transformers_version": "4.42.0.dev0",
    },
    "OLMo-2-0425-1B": _COMMON | _sizes(100352, 2048, 8192, 16, 16, 16, 4096, False) | {
        "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False,
        "attention_dropout": 0.0, "eos_token_id": 100257, "pad_token_id": 100277, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 500000, "torch_dtype": "float32", "transformers_version": "4.47.0.dev0",
    },
}  # fmt: skip
