"""The model families, one row each: where a family differs from Llama's decoder, and how its config.json is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """What a model_type of Hugging Face means.

    model_class: of transformers, which loads an exported model.
    qkv_bias: whether the projections to queries, keys and values add a bias.
    qk_norm: how queries and keys are normed before they are rotated: not at all, the channels of each head alone, or
        those of all heads together.
    norm_outputs: whether the norms of attention and feed-forward follow them, before their outputs are added to the
        residual stream, rather than precede them.
    sliding_window: whether a config.json without the key sliding_window limits attention.
    window_is_switched: whether sliding_window means nothing unless use_sliding_window, which is refused, is true; in
        other families no sequence may be longer than the window.
    defaults: what config.json means where it lacks a key; `hf.architecture` has the rest, which are the same for all.
    """

    model_class: str
    qkv_bias: bool = False
    qk_norm: Literal["none", "each_head", "all_heads"] = "none"
    norm_outputs: bool = False
    sliding_window: bool = False
    window_is_switched: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def class_with(self, score_head: bool) -> str:
        """The class of transformers that loads a model with this head."""
        return self.model_class.replace("CausalLM", "SequenceClassification") if score_head else self.model_class


FAMILIES: dict[str, Family] = {
    "qwen2": Family(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        window_is_switched=True,
        defaults={"num_key_value_heads": 32},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm="each_head",
        window_is_switched=True,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    "llama": Family("LlamaForCausalLM", defaults={"max_position_embeddings": 2048}),
    "mistral": Family(
        "MistralForCausalLM",
        sliding_window=True,
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        qk_norm="all_heads",
        norm_outputs=True,
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    ),
}
