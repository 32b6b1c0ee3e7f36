"""The architecture that a Hugging Face config.json describes."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from mara_jax.policies.families import FAMILIES
from mara_jax.policies.parameters import Architecture, RopeScaling

# What a config.json means where it lacks a key, in families whose row says nothing else.
_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}


def _number(config: Mapping[str, Any], key: str) -> float:
    """A positive number of a configuration; one line that names its key where it is anything else."""
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{key}={value!r} must be a positive number: fetch the file again")
    return float(value)


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """As `_number`, whole; `default` stands for one that is missing or null."""
    if default is not None and config.get(key) is None:
        return default
    value = _number(config, key)
    if not value.is_integer():
        raise ValueError(f"{key}={value!r} must be a whole number: fetch the file again")
    return int(value)


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from the keys of transformers 5 (rope_parameters) or of earlier versions."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"its rope settings are {rope!r}, not an object: fetch the file again")
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **rope}
    theta = _number(rope, "rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("it rotates only a part of each head: this code rotates all of it, choose another model")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _number(rope, "factor"))
    if kind == "llama3":
        low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        positions = _count(rope, "original_max_position_embeddings")
        return theta, RopeScaling("llama3", _number(rope, "factor"), low, high, positions)
    raise ValueError(f"rope scaling {kind!r} is unknown: this code knows 'default', 'linear' and 'llama3'")


def _positions(config: Mapping[str, Any], sliding_window: bool) -> int:
    """Positions of the longest sequence; ValueError where a sliding window would hide some of them."""
    limit = _count(config, "max_position_embeddings")
    if not sliding_window or config.get("sliding_window") is None:
        return limit
    window = _count(config, "sliding_window")
    if window < limit:
        raise ValueError(
            f"sliding_window={window} is below max_position_embeddings={limit}, and this code attends to every token "
            f"of a sequence: set max_position_embeddings to {window}, so that no sequence is longer, or choose a model "
            "whose sliding_window is null"
        )
    return limit


def architecture(config: Mapping[str, Any], source: str, **choices: Any) -> Architecture:
    """What a Hugging Face config.json describes.

    args: config: as read; source: named in errors; choices: scan_layers, compute_dtype, remat, attention.
    returns: the Architecture.
    errors: ValueError for a model type, an activation, a rope scaling or a bias that the transformer does not
        have, and for a key that is missing.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{source} has the unknown model_type {family!r}: this code knows {', '.join(FAMILIES)}")
    traits = FAMILIES[family]
    config = {**_DEFAULTS, **traits.defaults, **config}
    if config["hidden_act"] != "silu":
        raise ValueError(f"{source} has hidden_act {config['hidden_act']!r}: this code knows 'silu'")
    for key in traits.refuses:
        if config.get(key):
            raise ValueError(f"{source} sets {key}, which this code does not have: choose a model without it")
    try:
        theta, scaling = _rope(config)
        heads, embed = _count(config, "num_attention_heads"), _count(config, "hidden_size")
        return Architecture(
            family=family,
            vocab_size=_count(config, "vocab_size"),
            embed=embed,
            layers=_count(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=_count(config, "num_key_value_heads", heads),
            head_dim=_count(config, "head_dim", embed // heads),
            mlp=_count(config, "intermediate_size"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=_number(config, "rms_norm_eps"),
            tie_embeddings=bool(config["tie_word_embeddings"]),
            max_positions=_positions(config, traits.sliding_window),
            **choices,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except KeyError as error:
        raise ValueError(f"{source} lacks {error.args[0]!r} in its configuration: fetch the file again") from None
