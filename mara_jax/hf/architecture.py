"""The architecture that a Hugging Face config.json describes."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from mara_jax.hf.config_keys import MODEL, ROPE, shown
from mara_jax.policies.families import FAMILIES, Family
from mara_jax.policies.parameters import Architecture, RopeScaling

# What a config.json means where it lacks a key, in families whose row says nothing else.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}
_ROPE_THETA = 10000.0
# What may stand beside the rope settings instead of in them.
_BESIDE_ROPE = ("rope_theta", "original_max_position_embeddings")


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


def _rope_of(config: Mapping[str, Any], place: str) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling that one of the two spellings, `rope_parameters` or `rope_scaling`, asks for.

    Raises:
      ValueError: also where readers differ about what is meant: transformers 5 prefers what stands inside to what
        stands beside it, transformers 4 the other way round.
    """
    rope = config[place]
    if not isinstance(rope, Mapping):
        raise ValueError(f"{place} is {rope!r}, not an object: fetch the file again")
    nested = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        raise ValueError(
            f"{place} holds settings for layers of type {nested[0]!r}, and this code has one rotation for all layers: "
            f"write those settings into {place} itself if all layers share them, or choose another model"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        raise ValueError(f"{place} has rope_type={kind!r} and type={rope['type']!r}: keep the one that is right")
    if not isinstance(kind, str) or kind not in ROPE:
        raise ValueError(f"rope scaling {kind!r} in {place} is unknown: this code knows {', '.join(map(repr, ROPE))}")
    ROPE[kind].check(rope)
    beside = {key: config[key] for key in _BESIDE_ROPE if config.get(key) is not None}
    for key in beside.keys() & rope.keys():
        if rope[key] != beside[key] and key in ROPE[kind].read:
            raise ValueError(
                f"{place} has {key}={rope[key]!r}, but beside it {key}={beside[key]!r}: keep the right one"
            )
    if place == "rope_scaling" and "rope_theta" in rope and "rope_theta" not in beside:
        raise ValueError(
            f"rope_scaling has rope_theta={rope['rope_theta']!r}, where only some readers look: write rope_theta "
            "beside it, too"
        )
    return _frequencies(kind, {key: config[key] for key in _BESIDE_ROPE if key in config} | dict(rope))


def _frequencies(kind: str, rope: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling of settings whose keys are known."""
    theta = _number(rope, "rope_theta") if "rope_theta" in rope else _ROPE_THETA
    if kind == "default":
        return theta, None
    factor = _number(rope, "factor")
    if kind == "linear":
        return theta, RopeScaling("linear", factor)
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    if not low < high:
        raise ValueError(f"high_freq_factor={high} must be above low_freq_factor={low}: fetch the file again")
    return theta, RopeScaling("llama3", factor, low, high, _count(rope, "original_max_position_embeddings"))


def _rope(config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, from the settings of transformers 5 (rope_parameters) or of earlier versions."""
    places = [place for place in ("rope_parameters", "rope_scaling") if config.get(place) not in (None, {})]
    if not places:
        return _frequencies("default", {key: config[key] for key in ("rope_theta",) if key in config})
    meant = {place: _rope_of(config, place) for place in places}
    if len(set(meant.values())) > 1:
        raise ValueError(
            f"rope_parameters={shown(config['rope_parameters'])} and rope_scaling={shown(config['rope_scaling'])} "
            "differ, and each is read by some libraries alone: keep the one that is right"
        )
    return meant[places[0]]


def _positions(config: Mapping[str, Any], window_is_switched: bool) -> int:
    """Positions of the longest sequence; ValueError where a sliding window would hide some of them."""
    limit = _count(config, "max_position_embeddings")
    if window_is_switched or config.get("sliding_window") is None:
        return limit
    window = _count(config, "sliding_window")
    if window < limit:
        raise ValueError(
            f"sliding_window={window} is below max_position_embeddings={limit}, and this code attends to every token "
            f"of a sequence: set max_position_embeddings to {window}, so that no sequence is longer, or choose a model "
            "whose sliding_window is null"
        )
    return limit


def _check_class(config: Mapping[str, Any], traits: Family, score_head: bool) -> None:
    """ValueError where the model has another class than its family's, or layers of several types."""
    named, model_class = config.get("architectures"), traits.class_with(score_head)
    if named and named != [model_class] and score_head:
        raise ValueError(
            f"architectures={shown(named)} is not [{model_class!r}], a reward model of its model_type: choose one, or "
            "train one from these weights with python -m mara_jax.reward_model"
        )
    if named and named == [traits.class_with(True)] and not score_head:
        raise ValueError(
            f"architectures={shown(named)} is not [{model_class!r}]: it is a reward model, which writes no text: name "
            "it in task.reward_model, or choose a language model"
        )
    if named and named != [model_class]:
        raise ValueError(
            f"architectures={shown(named)} is not [{model_class!r}], the language model of its model_type: choose a "
            "model of that class, or correct the setting if the weights are its"
        )
    types = config.get("layer_types")
    if types is not None and types != ["full_attention"] * _count(config, "num_hidden_layers"):
        raise ValueError(
            f"layer_types={shown(types)} must be 'full_attention' for each of num_hidden_layers="
            f"{config['num_hidden_layers']}: choose a model whose layers attend to every token"
        )


def _check_one_label(config: Mapping[str, Any]) -> None:
    """ValueError for a classifier of several labels, by whichever key of config.json says how many they are."""
    labels, count = config.get("id2label"), config.get("num_labels")
    if count is None:
        count = len(labels) if isinstance(labels, Mapping) else 1
    if count != 1:
        raise ValueError(
            f"its head has {count} labels, and a reward model has one: choose one with num_labels=1, whose "
            "score.weight has one row"
        )


def _is_tied(config: Mapping[str, Any]) -> bool:
    tied = config["tie_word_embeddings"]
    if not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings={tied!r} must be true or false: correct it")
    return tied


def architecture(config: Mapping[str, Any], source: str, **choices: Any) -> Architecture:
    """What a Hugging Face config.json describes.

    args: config: as read; source: named in errors; choices: scan_layers, compute_dtype, remat, attention,
        score_head.
    returns: the Architecture.
    errors: ValueError for a model type or a setting that the transformer does not have, for one that is in no list of
        `config_keys`, and for a key that is missing.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        nested = [key for key in config if key.endswith("_config") and isinstance(config[key], Mapping)]
        what = f", which nests {' and '.join(nested)}" if "text_config" in nested else ""
        raise ValueError(f"{source} has the unknown model_type {family!r}{what}: this code knows {', '.join(FAMILIES)}")
    traits = FAMILIES[family]
    try:
        MODEL.check(config)
        theta, scaling = _rope(config)
        config = {**_DEFAULTS, **traits.defaults, **config}
        _check_class(config, traits, bool(choices.get("score_head")))
        if choices.get("score_head"):
            _check_one_label(config)
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
            tie_embeddings=_is_tied(config),
            max_positions=_positions(config, traits.window_is_switched),
            **choices,
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except KeyError as error:
        raise ValueError(f"{source} lacks {error.args[0]!r} in its configuration: fetch the file again") from None
