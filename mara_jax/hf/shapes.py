"""Shapes of models without their weights: a config.json as read, or the published numbers of well-known models."""

import re
from pathlib import Path
from typing import Any

from mara_jax.hf.architecture import architecture
from mara_jax.hf.files import read_config
from mara_jax.hf.load import EMBEDDED, embedded_file
from mara_jax.policies.parameters import Architecture

_QWEN25 = {"model_type": "qwen2", "hidden_act": "silu", "rope_theta": 1e6}
_QWEN3 = {"model_type": "qwen3", "hidden_act": "silu", "rope_theta": 1e6, "head_dim": 128}
_MISTRAL = {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": None}
_OLMO2 = {"model_type": "olmo2", "rope_theta": 5e5}
_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
    "rms_norm_eps",
    "max_position_embeddings",
)

# What the config.json of each published model says: what its family has in common, then numbers in the order of _KEYS.
_NUMBERS = {
    "qwen2.5-0.5b": (_QWEN25, 151936, 896, 4864, 24, 14, 2, True, 1e-6, 32768),
    "qwen2.5-1.5b": (_QWEN25, 151936, 1536, 8960, 28, 12, 2, True, 1e-6, 32768),
    "qwen2.5-3b": (_QWEN25, 151936, 2048, 11008, 36, 16, 2, True, 1e-6, 32768),
    "qwen2.5-7b": (_QWEN25, 152064, 3584, 18944, 28, 28, 4, False, 1e-6, 131072),
    "qwen2.5-32b": (_QWEN25, 152064, 5120, 27648, 64, 40, 8, False, 1e-5, 131072),
    "qwen3-0.6b": (_QWEN3, 151936, 1024, 3072, 28, 16, 8, True, 1e-6, 40960),
    "qwen3-1.7b": (_QWEN3, 151936, 2048, 6144, 28, 16, 8, True, 1e-6, 40960),
    "qwen3-4b": (_QWEN3, 151936, 2560, 9728, 36, 32, 8, True, 1e-6, 40960),
    "skywork-reward-v2-qwen3-4b": (_QWEN3, 151936, 2560, 9728, 36, 32, 8, True, 1e-6, 40960),  # Qwen3-4B with a score
    "mistral-7b-v0.3": (_MISTRAL, 32768, 4096, 14336, 32, 32, 8, False, 1e-5, 32768),
    "olmo-2-0425-1b": (_OLMO2, 100352, 2048, 8192, 16, 16, 16, False, 1e-6, 4096),
    "olmo-2-1124-7b": (_OLMO2, 100352, 4096, 11008, 32, 32, 32, False, 1e-6, 4096),
}
PUBLISHED: dict[str, dict[str, Any]] = {
    name: family | dict(zip(_KEYS, numbers, strict=True)) for name, (family, *numbers) in _NUMBERS.items()
}


def architecture_of(where: str, **choices: Any) -> Architecture:
    """The architecture that weights of this name have; the weights are neither read nor fetched.

    Args:
      where: a directory (its config.json), a .gguf file (its metadata), an embedded model, or a published name such
        as "qwen2.5-3b" or "Qwen/Qwen2.5-3B".
      choices: scan_layers, compute_dtype, remat, attention; score_head of a reward model.

    Raises:
      ValueError, FileNotFoundError: the shape is not known, or its description is not what it should be.
    """
    path = embedded_file(where) if where in EMBEDDED else Path(where)
    if path.suffix == ".gguf":
        from mara_jax.hf.gguf import GGUF

        return architecture(GGUF(path).config, where, **choices)
    if path.is_dir():
        return architecture(read_config(path), where, **choices)
    name = re.sub("-instruct(?=-v|$)", "", where.split("/")[-1].lower())
    if name in PUBLISHED:
        return architecture(PUBLISHED[name], where, **choices)
    raise FileNotFoundError(
        f"the shape of {where!r} is not known: give a directory with a config.json, a .gguf file, one of "
        f"{', '.join((*EMBEDDED, *PUBLISHED))}, or nano"
    )
