"""The adapter of a run: what of its policy is trained, where that starts, and what the run leaves of it."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax

from mara_jax import hf
from mara_jax.config import LanguageRun, lora_targets
from mara_jax.parallel import sharding
from mara_jax.policies import lora, parameters
from mara_jax.policies.policy import Policy
from mara_jax.train import reference

NAME = "adapter"  # the folder in WORKDIR


def trained(cfg: LanguageRun, policy: Policy) -> Policy:
    """The policy as the run trains it: its architecture has the adapter that the config asks for, if any.

    Raises:
      ValueError: a rank that is larger than the model's width.
    """
    if not cfg.lora.rank:
        return policy
    settings = parameters.Lora(cfg.lora.rank, cfg.lora.alpha, lora_targets(cfg.lora))
    try:
        return dataclasses.replace(policy, architecture=dataclasses.replace(policy.architecture, lora=settings))
    except ValueError as error:
        raise ValueError(f"lora.rank={cfg.lora.rank} with {policy.source}: {error}") from error


def start(cfg: LanguageRun, policy: Policy, ref_params: Any) -> Any:
    """The trained parameters before the first step: the reference's own, a new adapter, or that of `lora.adapter`.

    Args:
      policy: as from `trained`.

    Raises:
      ValueError, FileNotFoundError: an adapter that cannot be read, or is not the one that the config describes.
    """
    arch, layout = policy.architecture, sharding.current()
    if arch.lora is None:
        return ref_params
    if cfg.lora.adapter:
        loaded, adapter = hf.load_adapter(policy, cfg.lora.adapter, layout=layout)
        _check_same(cfg, loaded.architecture.lora)
        return adapter
    make = functools.partial(lora.init, arch)
    if layout is not None:
        make = jax.jit(make, out_shardings=lora.shardings(arch, layout))
    return make(reference.stream(cfg.seed, "adapter"))


def check(cfg: LanguageRun, policy: Policy) -> None:
    """Refuses, before anything is written, an adapter that the policy's model cannot have; errors as of `start`."""
    adapted = trained(cfg, policy)
    if cfg.lora.adapter:
        start(cfg, adapted, None)


def _check_same(cfg: LanguageRun, saved: parameters.Lora | None) -> None:
    assert saved is not None
    for name, configured, stored in (
        ("rank", cfg.lora.rank, saved.rank),
        ("alpha", cfg.lora.alpha, saved.alpha),
        ("targets", ",".join(lora_targets(cfg.lora)), ",".join(saved.targets)),
    ):
        if configured != stored:
            raise ValueError(
                f"lora.{name}={configured}, but {cfg.lora.adapter} has {stored}: set --config.lora.{name}={stored}"
            )


def base(cfg: LanguageRun, workdir: pathlib.Path) -> str:
    """The weights that the run's adapter belongs to."""
    if cfg.warmup.steps:
        return str((workdir / "reference").absolute())
    weights = cfg.policy.weights
    return weights if pathlib.Path(weights).exists() else weights.partition("@")[0]  # peft knows no owner/name@revision


def describe(policy: Policy) -> str:
    """In words, what is trained."""
    arch, count = policy.architecture, lora.count(policy.architecture)
    if arch.lora is None:
        return f"training all {count:,} parameters"
    return (
        f"training an adapter of rank {arch.lora.rank} (alpha {arch.lora.alpha:g}) on {', '.join(arch.lora.targets)}: "
        f"{count:,} parameters beside {parameters.count(arch):,} that stay"
    )
