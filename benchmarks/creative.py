"""Creative question answering by seven methods: the papers' table, from a reward model to the last row.

  python benchmarks/creative.py --folder=runs/creative-table                    SmolLM2: hours on two cores
  python benchmarks/creative.py --folder=runs/creative-nano --variant=nano      a model from scratch, to see it work
  python benchmarks/creative.py --folder=runs/creative-table --table            what there is so far

Trains the reward model, makes one reference policy, trains every method from it (RLOO and MARA over answers by --seeds
seeds, the others by one), and measures each policy on the held-out prompts. The same command goes on where it was
stopped. What is measured is a line of FOLDER/runs.jsonl (`--runs=FILE`; benchmarks/measured/creative_runs.jsonl holds
those of this project), and is not made again; another machine trains the reward model and the reference policy again,
by the same seeds. What follows `--config.` goes to every run. Prints one JSON object a method, then two tables: means
over the prompts, of a prompt's mean over the seeds, with the standard error of a bootstrap over the prompts; and what
each method has more than RLOO by the same seeds, with the 95 % interval of a paired bootstrap over the prompts, starred
where 0 is outside. Neither knows how much another seed would change: `seeds_std` of the objects says it, where there
are several.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from mara_jax.measures import bootstrap

PROMPTS = pathlib.Path(__file__).resolve().parents[1] / "configs" / "prompts"
CONFIG = PROMPTS.parent / "creative.py"
METHODS = {
    "RLOO": ["--config.algorithm.method=vanilla"],
    "GRPO": ["--config.algorithm.method=grpo"],
    "entropy bonus": ["--config.algorithm.method=entropy_bonus"],
    "unlikeliness": ["--config.algorithm.method=unlikeliness", "--config.task.reward_model_form=probability"],
    "MARA": ["--config.algorithm.anchor=string"],
    "MARA, forward KL": ["--config.algorithm.anchor=string", "--config.algorithm.kl=forward"],
    "MARA over answers": [],
}
BASE, COMPARED_WITH = "base", "RLOO"
REPEATED = ("RLOO", "MARA over answers")  # by several seeds
COLUMNS = {
    "reward": "reward, in distribution",
    "task/grammar": "grammar, out of it",
    "ngrams/ead": "EAD",
    "embeddings/distance": "embedding distance",
    "novelty/distinct_10": "distinct of 10",
    "truncated": "truncated",
}
REWARD_MODELS = {
    "smol": ["--weights=smollm2-135m-instruct", "--steps=60", "--batch=8", "--every=20"],
    "nano": ["--steps=300"],
}
RESAMPLES = 2000


def run(command: str, *flags: str) -> None:
    """Runs a command of the package; ends with its status where that is not 0."""
    words = [sys.executable, "-m", f"mara_jax.{command}", *flags]
    print(" ".join(words), file=sys.stderr, flush=True)
    status = subprocess.run(words, stdout=sys.stderr).returncode
    if status:
        raise SystemExit(status)


def reward_model(folder: pathlib.Path, variant: str, flags: Sequence[str]) -> pathlib.Path:
    """The reward model's directory, trained or trained further where it is not there."""
    model = folder / "reward" / "model"
    if not model.exists():
        prompts = f"--prompts={PROMPTS / 'creative_train.jsonl'}"
        run("reward_model", prompts, f"--workdir={folder / 'reward'}", *REWARD_MODELS[variant], *flags)
    return model


def reference_policy(folder: pathlib.Path, config: Sequence[str]) -> pathlib.Path:
    """The directory of the policy that every run starts from."""
    base = folder / "base"
    if not (base / "model").exists():
        run("main", *config, f"--workdir={base}", *METHODS["RLOO"], "--config.steps=1", "--config.evaluation.every=0")
    return base / "reference"


def trained(folder: pathlib.Path, name: str, seed: int, config: Sequence[str]) -> pathlib.Path:
    """The directory of a policy, trained, or trained further, where it is not there."""
    workdir = folder / folder_of(name, seed)
    if not (workdir / "model").exists():
        start = [f"--config.policy.weights={reference_policy(folder, config)}", "--config.warmup.steps=0"]
        start += ["--config.evaluation.every=0"]  # measured() does it
        run("main", *config, *start, f"--workdir={workdir}", *METHODS[name], f"--config.seed={seed}")
    return workdir / "model"


def runs(seeds: int) -> list[tuple[str, int]]:
    """Method and seed of each run: one of each method, those of several seeds before the others, then other seeds."""
    first = [*REPEATED, *(name for name in METHODS if name not in REPEATED)]
    return [(name, 0) for name in first] + [(name, seed) for seed in range(1, seeds) for name in REPEATED]


def folder_of(name: str, seed: int) -> str:
    """Of a run, below --folder."""
    return f"{name.replace(',', '').replace(' ', '_')}-{seed}"


def measured(out: pathlib.Path, weights: pathlib.Path, model: pathlib.Path, flags: Sequence[str]) -> list[dict]:
    """The measures of a policy, of every prompt."""
    if not (out / "evaluation.json").exists():
        run(
            "evaluate", "run", f"--weights={weights}", f"--prompts={PROMPTS / 'creative_heldout.jsonl'}",
            f"--reward_model={model}", "--reward=mara_jax.tasks.rewards.grammar:grammar", "--threshold=0",
            "--embedder=installed", "--samples=10", "--max_new_tokens=48", f"--out={out}", *flags,
        )  # fmt: skip
    prompts = json.loads((out / "evaluation.json").read_text())["prompts"]
    return [{name: prompt[name] for name in COLUMNS} for prompt in prompts]


def recorded(path: pathlib.Path, variant: str) -> dict[tuple[str, int], list[dict]]:
    """Measures of the runs of a file, by method and seed; of the reference policy as BASE."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row["method"], row["seed"]): row["prompts"] for row in rows if row["variant"] == variant}


def make(arguments: argparse.Namespace, path: pathlib.Path, fields: Sequence[str]) -> None:
    """Trains and measures what the file of runs does not have, and adds it."""
    folder, flags = arguments.folder, arguments.evaluate.split()
    done = recorded(path, arguments.variant)
    wanted = [one for one in [(BASE, 0), *runs(arguments.seeds)] if one not in done]
    if not wanted:
        return
    model = reward_model(folder, arguments.variant, arguments.reward_model.split())
    config = [f"--config={CONFIG}:{arguments.variant}", f"--config.task.reward_model={model}", *fields]
    for name, seed in wanted:
        weights = reference_policy(folder, config) if name == BASE else trained(folder, name, seed, config)
        prompts = measured(folder / "evaluations" / folder_of(name, seed), weights, model, flags)
        row = {"variant": arguments.variant, "method": name, "seed": seed, "prompts": prompts}
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def rows_of(found: dict[tuple[str, int], list[dict]]) -> list[dict[str, Any]]:
    """A row for the reference policy and for each method that has been measured so far."""
    by_method = {name: [found[one] for one in sorted(found) if one[0] == name] for name in (BASE, *METHODS)}
    return [row_of(name, prompts) for name, prompts in by_method.items() if prompts]


def row_of(name: str, prompts: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Means and bootstrap standard errors of a method.

    Args:
      prompts: of each seed, the measures of every prompt.
    """
    row: dict[str, Any] = {"method": name, "seeds": len(prompts), "prompts": len(prompts[0])}
    for measure in COLUMNS:
        values_p = np.mean([[one[measure] for one in seed] for seed in prompts], axis=0)
        draws = np.random.default_rng(0).integers(0, len(values_p), (RESAMPLES, len(values_p)))
        row[measure] = float(values_p.mean())
        row[f"{measure}/sem"] = float(values_p[draws].mean(axis=1).std())
        if len(prompts) > 1:
            row[f"{measure}/seeds_std"] = float(np.std([_mean(seed, measure) for seed in prompts], ddof=1))
    return row


def _mean(prompts: Sequence[dict[str, Any]], measure: str) -> float:
    return float(np.mean([one[measure] for one in prompts]))


def differences(found: dict[tuple[str, int], list[dict]]) -> str:
    """What each method has more than RLOO by the same seeds, as a markdown table; prompts are compared in pairs."""
    lines = [["method", "seeds", *COLUMNS.values()], ["---"] * (2 + len(COLUMNS))]
    for name in (BASE, *METHODS):
        seeds = [seed for method, seed in sorted(found) if method == name and (COMPARED_WITH, seed) in found]
        if name == COMPARED_WITH or not seeds:
            continue
        cells = []
        for measure in COLUMNS:
            own_p, other_p = (
                np.mean([[one[measure] for one in found[method, seed]] for seed in seeds], axis=0)
                for method in (name, COMPARED_WITH)
            )
            value, low, high, _ = bootstrap.difference(own_p, other_p)
            cells.append(f"{value:+.3f} [{low:+.3f}, {high:+.3f}]{'*' if low > 0 or high < 0 else ''}")
        lines.append([name, str(len(seeds)), *cells])
    return _markdown(lines)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    lines = [["method", "seeds", *COLUMNS.values()], ["---"] * (2 + len(COLUMNS))]
    for row in rows:
        cells = [f"{row[name]:.3f} ± {row[f'{name}/sem']:.3f}" for name in COLUMNS]
        lines.append([row["method"], str(row["seeds"]), *cells])
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Trains what is missing, measures what is not measured, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--variant", choices=list(REWARD_MODELS), default="smol")
    parser.add_argument("--runs", type=pathlib.Path, help="file of what is measured, by default FOLDER/runs.jsonl")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print what there is, and train nothing")
    parser.add_argument("--reward_model", default="", help="more flags of the reward_model command, between spaces")
    parser.add_argument("--evaluate", default="", help="more flags of evaluate run, between spaces")
    arguments, fields = parser.parse_known_args()
    unknown = [field for field in fields if not field.startswith("--config.")]
    if unknown:
        parser.error(f"unknown flag {unknown[0]}: fields of the runs begin with --config.")
    path = arguments.runs or arguments.folder / "runs.jsonl"
    if not arguments.table:
        make(arguments, path, fields)
    found = recorded(path, arguments.variant)
    rows = rows_of(found)
    for row in rows:
        print(json.dumps({name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()}), flush=True)
    print(table(rows))
    print(f"\nmore than {COMPARED_WITH}:\n{differences(found)}")


if __name__ == "__main__":
    main()
