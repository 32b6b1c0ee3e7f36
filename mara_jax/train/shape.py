"""The shape of the policy that a config names, known before any weights are."""

import dataclasses
from typing import Any

from mara_jax.config import LanguageRun, Policy, lora_targets
from mara_jax.hf import shapes
from mara_jax.policies.parameters import Architecture, Lora

NANO = "nano"
NANO_VOCABULARY = 512


def nano(cfg: Policy) -> Architecture:
    """The Qwen2-shaped model that "nano" stands for, of the config's depth and width."""
    heads = max(2, cfg.embed // 32)
    return Architecture(
        family="qwen2",
        vocab_size=NANO_VOCABULARY,
        embed=cfg.embed,
        layers=cfg.layers,
        heads=heads,
        kv_heads=heads // 2,
        head_dim=32,
        mlp=4 * cfg.embed,
        rope_theta=10_000.0,
        rope_scaling=None,
        norm_eps=1e-6,
        tie_embeddings=True,
        max_positions=512,
        **choices(cfg),
    )


def choices(cfg: Policy) -> dict[str, Any]:
    """What the config says of how an architecture is computed, whatever its weights."""
    return {name: getattr(cfg, name) for name in ("scan_layers", "compute_dtype", "remat", "attention")}


def policy_architecture(cfg: Policy) -> Architecture:
    """The architecture of `policy.weights`; nothing is loaded or fetched.

    Raises:
      ValueError, FileNotFoundError: its shape is not known (a hub id that is not cached has none).
    """
    if cfg.weights == NANO:
        return nano(cfg)
    return shapes.architecture_of(cfg.weights, **choices(cfg))


def run_architecture(run: LanguageRun) -> Architecture:
    """As `policy_architecture`, with the adapter that the run trains, if any."""
    arch = policy_architecture(run.policy)
    if not run.lora.rank:
        return arch
    return dataclasses.replace(arch, lora=Lora(run.lora.rank, run.lora.alpha, lora_targets(run.lora)))


def reward_architecture(run: LanguageRun) -> Architecture | None:
    """The architecture of the reward model that the run's task names, as it is computed; None where it names none.

    Raises:
      ValueError, FileNotFoundError: as of `policy_architecture`, or no reward model.
    """
    where = getattr(run.task, "reward_model", "")
    if not where:
        return None
    return shapes.architecture_of(where, **reward_choices(getattr(run.task, "reward_model_dtype", "float32")))


def reward_choices(compute_dtype: str) -> dict[str, Any]:
    """How a reward model is computed, with matmuls in this dtype."""
    # Scanned layers compile fast, and only XLA:CPU is slow with them; bfloat16 is for accelerators.
    return {"compute_dtype": compute_dtype, "scan_layers": compute_dtype == "bfloat16", "score_head": True}
