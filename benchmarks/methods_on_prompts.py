"""Finished runs on the prompts that come with configs/prompts.py: how good, how diverse, how far from their optima.

  python -m mara_jax.main --config=configs/prompts.py:nano --workdir=runs/methods \
      --config.task.demonstrations=configs/prompts/demonstrations.jsonl --config.population.seeds=3 \
      --config.population.methods=vanilla,grpo,mara --config.population.anchors=answer,string
  python benchmarks/methods_on_prompts.py runs/methods/members/* --reference=runs/methods/reference

All runs start from one reference policy and draw equally many completions of the same prompts. Prints one JSON object a
run, the reference policy first, of both files of prompts: reward (which is pass@1), pass@16, different and effective
number of answers, of 32 completions a prompt. `tv`, of training prompts: the total variation of the answers' shares
(with "none") to the run's own optimum, meant over prompts, as 128 samples of the reference policy give it; `tv_noise`,
what it would be of as many draws from that optimum; KL of the last steps (nats).
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from mara_jax import config, tasks
from mara_jax.train import evaluation, optim, reference
from mara_jax.train.prompts import EncodedPrompts
from mara_jax.train.reference_samples import PromptSamples
from mara_jax.train.setup import Setup

SAMPLES, REFERENCE_SAMPLES, LAST, DRAWS = 32, 128, 6, 200
SHOWN = ("reward", "pass@16", "answers/distinct", "answers/effective", "valid")


def run_of(workdir: pathlib.Path) -> config.LanguageRun:
    """The config of a run directory."""
    run = config.resolve(json.loads((workdir / "config.json").read_text()))
    assert isinstance(run, config.LanguageRun)
    return run


def measured(run: config.LanguageRun, task: Any, weights: pathlib.Path) -> dict[str, Any]:
    """`evaluation.measure` of weights on a task's prompts."""
    policy, params = reference.load(str(weights), run.policy)
    group, prompts = run.rollout.group_size, run.rollout.prompts_per_step
    sizes = evaluation.Sizes(SAMPLES, run.rollout.max_new_tokens, run.algorithm.threshold, prompts, group)
    encoded = list(EncodedPrompts(run, policy, task))
    return evaluation.measure(task, policy, params, encoded, reference.stream(1, "evaluation"), sizes)


def on_both_files(run: config.LanguageRun, weights: pathlib.Path) -> tuple[dict[str, float], list[dict]]:
    """Measures on training and held-out prompts, and the rows of the training prompts."""
    held_out = dataclasses.replace(run.task, prompts=run.evaluation.prompts)  # pyright: ignore
    out, rows = {}, []
    for name, section in (("train", run.task), ("held-out", held_out)):
        result = measured(run, tasks.make(dataclasses.replace(run, task=section)), weights)
        rows = result["prompts"] if name == "train" else rows
        out |= {f"{name}/{key}": round(result["metrics"][key], 4) for key in SHOWN}
    return out, rows


def reference_samples(run: config.LanguageRun, task: Any, weights: pathlib.Path) -> list[PromptSamples]:
    """Samples of the reference policy to each training prompt."""
    policy, params = reference.load(str(weights), run.policy)
    setup = Setup(run, task, policy, params, EncodedPrompts(run, policy, task), optim.make(run.optimiser))
    samples, at_once = [], run.rollout.prompts_per_step
    for first in range(0, len(task), at_once):
        ids = np.resize(np.arange(first, min(first + at_once, len(task))), at_once)
        samples += reference.draw_samples(setup, ids, "measure", REFERENCE_SAMPLES)[: len(task) - first]
    return samples


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


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdirs", type=pathlib.Path, nargs="+")
    parser.add_argument("--reference", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    first = run_of(arguments.workdirs[0])
    task = tasks.make(first)
    print(json.dumps({"run": "reference"} | on_both_files(first, arguments.reference)[0]), flush=True)
    samples = reference_samples(first, task, arguments.reference)
    for workdir in arguments.workdirs:
        run = run_of(workdir)
        row, rows = on_both_files(run, workdir / "model")
        gap = distance(run.algorithm, samples, task, rows)
        row |= {"tv": None, "tv_noise": None} if gap is None else {"tv": gap[0], "tv_noise": gap[1]}
        metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        row["kl"] = float(np.mean([one["kl/reverse"] for one in metrics[-LAST:]]))
        row["tokens"] = sum(one["tokens/generated"] for one in metrics)
        named = {"run": workdir.name, "method": run.algorithm.method, "seed": run.seed}
        print(json.dumps(named | row), flush=True)


if __name__ == "__main__":
    main()
