"""Creative question answering (the papers' second experiment): does training keep different good texts?

Question: a reward model scores short texts, good is what reaches the 90th percentile of earlier rewards; which method
gains reward, also by a score that it was not trained for, and keeps texts different?

  ""      Qwen3-1.7B, scored by Skywork-Reward-V2-Qwen3-4B; needs an accelerator and both weights (directories, or the
          hub). 625 steps of 16 prompts see each of 10,000 prompts once: bring yours, the 40 that come with it are few.
          Published, by another reward model on NoveltyBench (reward / EAD / distinct of 10): base 1.17 / .41 / 4.0;
          GRPO 1.32 / .50 / 4.0; RLOO 1.28 / .51 / 3.9; entropy bonus .79 / .27 / 3.5; unlikeliness 1.38 / .53 / 4.2;
          MARA 1.45 / .54 / 4.1, with the forward KL 1.60 / .57 / 4.6. Not measured here yet.
  smol    SmolLM2-135M on the 40 prompts, 48 tokens, 25 steps, scored by a reward model that you train first.
  nano    a two-layer model from scratch and a reward model as small: the whole path in minutes, only to try it out.

Batch, group, length, learning rate, beta and eta are open in every source: our choice.

  python -m mara_jax.reward_model --prompts=configs/prompts/creative_train.jsonl --workdir=runs/creative-reward \
      --weights=smollm2-135m-instruct --steps=60 --batch=8
  python -m mara_jax.main --config=configs/creative.py:smol --workdir=runs/creative
  python -m mara_jax.main --config=configs/creative.py:smol --workdir=runs/rloo --config.algorithm.method=vanilla
  python -m mara_jax.main --config=configs/creative.py --workdir=runs/wildchat --config.task.prompts=wildchat.jsonl \
      --config.policy.weights=/weights/Qwen3-1.7B --config.task.reward_model=/weights/Skywork-Reward-V2-Qwen3-4B

The other methods: docs/creative.md.
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
    Reference,
    Rollout,
    Warmup,
    to_config_dict,
)
from mara_jax.tasks import prompts

FOLDER = pathlib.Path(__file__).resolve().parent / "prompts"
TRAIN, HELD_OUT = str(FOLDER / "creative_train.jsonl"), str(FOLDER / "creative_heldout.jsonl")
# Good: the best tenth of the last eight steps' rewards, if the reward model prefers it to a text of score 0. Groups of
# 20 have two good completions on average, which is the least that MARA needs.
MOVING = Algorithm(beta=0.05, threshold=0.0, threshold_percentile=90.0)
GROUP = 20


def qwen() -> LanguageRun:
    """The paper's policy, reward model and threshold."""
    return LanguageRun(
        steps=625,
        policy=Policy(
            weights="Qwen/Qwen3-1.7B",
            template_options="enable_thinking=False",
            compute_dtype="bfloat16",
            remat="layer",
            scan_layers=True,
        ),
        algorithm=MOVING,
        task=prompts.Config(
            prompts=TRAIN,
            reward_model="Skywork/Skywork-Reward-V2-Qwen3-4B",
            reward_model_dtype="bfloat16",
            equivalence="rouge1",
        ),
        reference=Reference(samples=2 * GROUP),
        rollout=Rollout(prompts_per_step=16, group_size=GROUP, max_new_tokens=512, long_prompts="replace"),
        optimiser=Optimiser(learning_rate=1e-6, warmup_steps=10, max_grad_norm=1.0, micro_batches=10),
        checkpoint=Checkpoint(every=125, keep=1),
        evaluation=Evaluation(prompts=HELD_OUT, every=125, samples=GROUP),
    )


def smol() -> LanguageRun:
    """A real pretrained model on two CPU cores; twenty supervised steps teach it to answer in a sentence."""
    return LanguageRun(
        steps=25,
        policy=Policy(weights="smollm2-135m-instruct", remat="elementwise", scan_layers=True),
        algorithm=MOVING,
        task=prompts.Config(prompts=TRAIN, reward_model="runs/creative-reward/model", equivalence="rouge1"),
        warmup=Warmup(steps=20, batch=8, learning_rate=5e-5),
        reference=Reference(samples=2 * GROUP),
        rollout=Rollout(prompts_per_step=4, group_size=GROUP, max_new_tokens=48),
        optimiser=Optimiser(learning_rate=2e-5, warmup_steps=3, decay_steps=22),
        checkpoint=Checkpoint(every=5, keep=1),
        evaluation=Evaluation(prompts=HELD_OUT, every=25, samples=10),
    )


def nano() -> LanguageRun:
    """Two layers from scratch, scored by two layers from scratch."""
    run = smol()
    return dataclasses.replace(
        run,
        policy=Policy(weights="nano"),
        task=dataclasses.replace(run.task, reward_model="runs/creative-reward-nano/model"),
        warmup=Warmup(steps=300, batch=32, learning_rate=3e-3),
        rollout=dataclasses.replace(run.rollout, max_new_tokens=64),  # its tokens are shorter
        optimiser=dataclasses.replace(run.optimiser, learning_rate=3e-4),
    )


def get_config(variant: str = ""):
    """The run of a variant, as a ConfigDict."""
    runs = {"": qwen, "smol": smol, "nano": nano}
    if variant not in runs:
        raise ValueError(f"configs/creative.py has no variant {variant!r}: choose '', smol or nano")
    return to_config_dict(runs[variant]())
