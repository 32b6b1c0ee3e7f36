"""Methods compared on the prompts that come with configs/prompts.py: how good, how diverse, how far from their optima.

  python benchmarks/methods_on_prompts.py --workdir=runs/methods                 the six rows, one seed
  python benchmarks/methods_on_prompts.py --workdir=runs/methods --seeds=3 --steps=60 --variant=nano

All runs start from one warmed-up reference policy and draw equally many completions of the same prompts. What is there
already is not trained again. Prints one JSON object a method and seed, of both files of prompts: reward (which is
pass@1), pass@16, different and effective number of answers; `tv`, of training prompts, the total variation of the
answers' shares (with "none") to the method's own optimum, meant over prompts, as 128 samples of the reference policy
give it; `tv_noise`, what it would be of as many draws from that optimum; KL of the last steps (nats).
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np

from mara_jax import config, tasks
from mara_jax.main import parse, run_of
from mara_jax.train import evaluation, optim, reference
from mara_jax.train.prompts import EncodedPrompts
from mara_jax.train.setup import Setup

METHODS = {
    "vanilla": {"method": "vanilla"},
    "GRPO": {"method": "grpo"},
    "MARA over strings": {"method": "mara", "anchor": "string"},
    "MARA over answers": {"method": "mara"},
    "MARA over answers, forward KL": {"method": "mara", "kl": "forward"},
}
SAMPLES, REFERENCE_SAMPLES, LAST, DRAWS = 32, 128, 6, 200


def run_from(arguments: argparse.Namespace, method: str, seed: int, where: pathlib.Path) -> config.LanguageRun:
    """Trains one method where that was not done, and returns its config."""
    flags = [f"--config=configs/prompts.py:{arguments.variant}".rstrip(":"), f"--workdir={where}"]
    flags += [f"--config.{name}={value}" for name, value in ({
        "policy.weights": arguments.workdir / "reference" / "model", "warmup.steps": 0, "steps": arguments.steps,
        "optimiser.decay_steps": arguments.steps, "checkpoint.every": arguments.steps, "evaluation.every": 0,
        "rollout.save": False, "reference.seed": 0, "seed": seed,
    } | {f"algorithm.{name}": value for name, value in METHODS[method].items()}).items()]  # fmt: skip
    if not (where / "model").is_dir():
        subprocess.run([sys.executable, "-m", "mara_jax.main", *flags], check=True, stdout=subprocess.DEVNULL)
    run = run_of(parse(["main", *flags]))
    assert isinstance(run, config.LanguageRun)
    return run


def warmed_up(arguments: argparse.Namespace) -> pathlib.Path:
    """The reference policy: the warm-up of the config, then a step whose learning rate changes nothing."""
    where = arguments.workdir / "reference"
    if not (where / "model").is_dir():
        flags = [f"--config=configs/prompts.py:{arguments.variant}".rstrip(":"), f"--workdir={where}"]
        flags += ["--config.steps=1", "--config.optimiser.learning_rate=1e-30", "--config.evaluation.every=0"]
        subprocess.run([sys.executable, "-m", "mara_jax.main", *flags], check=True, stdout=subprocess.DEVNULL)
    return where / "model"


def measured(run: config.LanguageRun, task: Any, weights: pathlib.Path) -> dict[str, Any]:
    """`evaluation.measure` of weights on a task's prompts."""
    policy, params = reference.load(str(weights), run.policy)
    group, prompts = run.rollout.group_size, run.rollout.prompts_per_step
    sizes = evaluation.Sizes(SAMPLES, run.rollout.max_new_tokens, run.algorithm.threshold, prompts, group)
    encoded = list(EncodedPrompts(run, policy, task))
    return evaluation.measure(task, policy, params, encoded, reference.stream(1, "evaluation"), sizes)


def distance(algorithm: config.Algorithm, samples: list, task: Any, rows: list[dict]) -> tuple[float, float] | None:
    """Total variation of the answers given to the optimum, and of as many draws from it; means over the prompts."""
    gaps, noise, random = [], [], np.random.default_rng(0)
    for number, (one, row) in enumerate(zip(samples, rows, strict=True)):
        answers = reference.answers_of(task, number, one)
        log_optimum = reference.log_optimum(algorithm, one, answers, task)
        if log_optimum is None:
            return None
        optimum = np.exp(log_optimum) / np.exp(log_optimum).sum()
        counts = np.array([row["counts"].get(name, 0) for name in answers])
        others = sum(row["counts"].values()) - counts.sum()  # answers that no sample of the reference gave
        shares = np.append(counts, SAMPLES - counts.sum() - others) / SAMPLES
        gaps.append(0.5 * (np.abs(shares - optimum).sum() + others / SAMPLES))
        drawn = random.multinomial(SAMPLES, optimum, size=DRAWS) / SAMPLES
        noise.append(0.5 * np.abs(drawn - optimum).sum(axis=1).mean())
    return float(np.mean(gaps)), float(np.mean(noise))


def row_of(run: config.LanguageRun, weights: pathlib.Path) -> tuple[dict[str, Any], list[dict]]:
    """Measures on both files of prompts, and the rows of the training prompts."""
    held_out = dataclasses.replace(run.task, prompts=run.task.prompts.replace("train.jsonl", "heldout.jsonl"))  # pyright: ignore
    out, rows = {}, []
    for name, section in (("train", run.task), ("held-out", held_out)):
        result = measured(run, tasks.make(dataclasses.replace(run, task=section)), weights)
        rows = result["prompts"] if name == "train" else rows
        shown = ("reward", "pass@16", "answers/distinct", "answers/effective", "valid")
        out |= {f"{name}/{key}": round(result["metrics"][key], 4) for key in shown}
    return out, rows


def main() -> None:
    """Trains and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--variant", default="")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    weights, samples = warmed_up(arguments), []
    for seed in range(arguments.seeds):
        for name in METHODS:
            where = arguments.workdir / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
            run = run_from(arguments, name, seed, where)
            task = tasks.make(run)
            if not samples:
                policy, params = reference.load(str(weights), run.policy)
                setup = Setup(run, task, policy, params, EncodedPrompts(run, policy, task), optim.make(run.optimiser))
                at_once = run.rollout.prompts_per_step
                for first in range(0, len(task), at_once):
                    ids = np.resize(np.arange(first, min(first + at_once, len(task))), at_once)
                    drawn = reference.draw_samples(setup, ids, "measure", REFERENCE_SAMPLES)
                    samples += drawn[: len(task) - first]
                row, rows = row_of(run, weights)
                print(json.dumps({"method": "reference", "seed": None} | row), flush=True)
            row, rows = row_of(run, where / "model")
            metrics = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
            gap = distance(run.algorithm, samples, task, rows)
            row |= {"tv": None, "tv_noise": None} if gap is None else {"tv": gap[0], "tv_noise": gap[1]}
            row["kl"] = float(np.mean([one["kl/reverse"] for one in metrics[-LAST:]]))
            row["tokens"] = sum(one["tokens/generated"] for one in metrics)
            print(json.dumps({"method": name, "seed": seed} | row), flush=True)


if __name__ == "__main__":
    main()
