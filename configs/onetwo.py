"""The 1-2 task (Figures 7 to 9): does training keep both answers?

Claim: vanilla KL-regularised RL ends at the reference's own share of 1s at best; MARA makes both answers equally
likely, and validity rises in both.

  ""     Qwen2.5-3B, the paper's policy; needs an accelerator and the weights (a directory, or the hub).
  smol   SmolLM2-135M-Instruct, shipped by a Python package; two CPU cores, about ten minutes.
  nano   a two-layer model trained from scratch by the run itself; two CPU cores, under two minutes.

  python -m mara_jax.main --config=configs/onetwo.py:nano --workdir=runs/nano
  python -m mara_jax.main --config=configs/onetwo.py:smol --workdir=runs/smol --config.algorithm.method=vanilla
  python -m mara_jax.main --config=configs/onetwo.py --workdir=runs/3b --config.policy.weights=/weights/Qwen2.5-3B
"""

from mara_jax.config import (
    Algorithm,
    Checkpoint,
    LanguageRun,
    Optimiser,
    Policy,
    Rollout,
    Warmup,
    to_config_dict,
)
from mara_jax.tasks import onetwo


def get_config(variant: str = ""):
    """The run of a variant, as a ConfigDict."""
    runs = {"": qwen, "smol": smol, "nano": nano}
    if variant not in runs:
        raise ValueError(f"configs/onetwo.py has no variant {variant!r}: choose '', smol or nano")
    return to_config_dict(runs[variant]())


def qwen() -> LanguageRun:
    """The paper's task and policy. Batch, group, learning rate and steps are open in every source: our choice."""
    return LanguageRun(
        steps=300,
        policy=Policy(weights="Qwen/Qwen2.5-3B", compute_dtype="bfloat16", scan_layers=True, chat=False),
        algorithm=Algorithm(beta=0.03, threshold=0.8),
        rollout=Rollout(group_size=128, max_new_tokens=256),
        optimiser=Optimiser(learning_rate=2e-6, warmup_steps=10),
        task=onetwo.Config(lenient=True),
        checkpoint=Checkpoint(every=50, keep=2),
    )


def smol() -> LanguageRun:
    """A real pretrained model on a laptop: six supervised steps teach it the format, then 30 steps of RL."""
    return LanguageRun(
        steps=30,
        policy=Policy(weights="smollm2-135m-instruct", remat="elementwise", scan_layers=True),
        algorithm=Algorithm(beta=0.1, threshold=0.8),
        task=onetwo.Config(),
        warmup=Warmup(steps=6, batch=8, learning_rate=5e-5, max_steps=16),
        rollout=Rollout(group_size=24, max_new_tokens=36),
        optimiser=Optimiser(learning_rate=2e-5, warmup_steps=3, decay_steps=27),
        checkpoint=Checkpoint(every=15, keep=2),
    )


def nano() -> LanguageRun:
    """A model small enough for tests and sweeps; its demonstrations break the format one time in four."""
    return LanguageRun(
        steps=100,
        policy=Policy(weights="nano", layers=2, embed=128),
        algorithm=Algorithm(beta=0.1, threshold=0.8),
        task=onetwo.Config(malformed=0.25),
        warmup=Warmup(steps=250, batch=32, learning_rate=3e-3),
        rollout=Rollout(group_size=32, max_new_tokens=56),
        optimiser=Optimiser(learning_rate=5e-4, decay_steps=100),
        checkpoint=Checkpoint(every=50, keep=2),
        show_samples=1,
    )
