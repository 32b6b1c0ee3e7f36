"""Configurations of runs: their schema, what is refused, and the way from a config file to them.

A config file's ``get_config(variant)`` returns ``LanguageRun(...)`` or ``ToyRun(...)`` turned into a
``ConfigDict`` by ``to_config_dict``, so that every field can be overridden from the command line;
``resolve`` turns it back and refuses what cannot work, with one line that names the cure.
"""

from mara_jax.config.build import build, kind_of, resolve, unknown_field
from mara_jax.config.checks import check
from mara_jax.config.schema import (
    ANCHORS,
    BASELINES,
    ESTIMATORS,
    KL_BESIDE_REWARD,
    LORA_TARGETS,
    METHODS,
    TRAINABLE,
    Algorithm,
    Checkpoint,
    LanguageRun,
    Lora,
    Mesh,
    Optimiser,
    Policy,
    Profile,
    Rollout,
    Run,
    Sweep,
    Task,
    Toy,
    ToyRun,
    Warmup,
    estimator_of,
    lora_targets,
    sweep_algorithms,
    to_config_dict,
)

__all__ = [
    "ANCHORS",
    "BASELINES",
    "ESTIMATORS",
    "KL_BESIDE_REWARD",
    "LORA_TARGETS",
    "METHODS",
    "TRAINABLE",
    "Algorithm",
    "Checkpoint",
    "LanguageRun",
    "Lora",
    "Mesh",
    "Optimiser",
    "Policy",
    "Profile",
    "Rollout",
    "Run",
    "Sweep",
    "Task",
    "Toy",
    "ToyRun",
    "Warmup",
    "build",
    "check",
    "estimator_of",
    "kind_of",
    "lora_targets",
    "resolve",
    "sweep_algorithms",
    "to_config_dict",
    "unknown_field",
]
