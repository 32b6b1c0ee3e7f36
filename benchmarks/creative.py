"""Creative question answering by seven methods: the papers' table, from a reward model to the last row.

  python benchmarks/creative.py --folder=runs/creative-table                    SmolLM2: hours on two cores
  python benchmarks/creative.py --folder=runs/creative-nano --variant=nano      a model from scratch, to see it work
  python benchmarks/creative.py --folder=runs/creative-table --table            what there is so far

Trains the reward model, makes one reference policy, trains every method from it (RLOO and MARA over answers by --seeds
seeds, the others by one), and measures each policy on the held-out prompts. The same command goes on where it was
stopped. What follows `--config.` goes to every run. Prints one JSON object a method, then the table: means over the
prompts, of a prompt's mean over the seeds, and the standard error of a bootstrap over the prompts.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

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


def trained(folder: pathlib.Path, variant: str, model: pathlib.Path, seeds: int, fields: Sequence[str]) -> None:
    """The reference policy, then every run from it: folder/base, folder/NAME-SEED."""
    config = [f"--config={CONFIG}:{variant}", f"--config.task.reward_model={model}", *fields]
    base = folder / "base"
    if not (base / "model").exists():
        run("main", *config, f"--workdir={base}", *METHODS["RLOO"], "--config.steps=1", "--config.evaluation.every=0")
    start = [f"--config.policy.weights={base / 'reference'}", "--config.warmup.steps=0"]
    for name, seed in runs(seeds):
        workdir = folder / folder_of(name, seed)
        if not (workdir / "model").exists():
            run("main", *config, *start, f"--workdir={workdir}", *METHODS[name], f"--config.seed={seed}")


def runs(seeds: int) -> list[tuple[str, int]]:
    """Method and seed of each run: first one of each method, then the other seeds."""
    others = [(name, seed) for seed in range(1, seeds) for name in REPEATED]
    return [(name, 0) for name in METHODS] + others


def folder_of(name: str, seed: int) -> str:
    """Of a run, below --folder."""
    return f"{name.replace(',', '').replace(' ', '_')}-{seed}"


def measured(folder: pathlib.Path, model: pathlib.Path, seeds: int, flags: Sequence[str]) -> None:
    """evaluation.json of the reference policy and of every run, in folder/evaluations."""
    sources = {"base": folder / "base" / "reference"}
    sources |= {folder_of(*one): folder / folder_of(*one) / "model" for one in runs(seeds)}
    for name, weights in sources.items():
        out = folder / "evaluations" / name
        if not (out / "evaluation.json").exists():
            run(
                "evaluate", "run", f"--weights={weights}", f"--prompts={PROMPTS / 'creative_heldout.jsonl'}",
                f"--reward_model={model}", "--reward=mara_jax.tasks.rewards.grammar:grammar", "--threshold=0",
                "--embedder=installed", "--samples=10", "--max_new_tokens=48", f"--out={out}", *flags,
            )  # fmt: skip


def rows_of(folder: pathlib.Path, seeds: int) -> list[dict[str, Any]]:
    """A row for the reference policy and for each method that has been measured so far."""
    rows = []
    for name, numbers in [("base", [None]), *((name, range(seeds if name in REPEATED else 1)) for name in METHODS)]:
        paths = [folder / "evaluations" / (name if n is None else folder_of(name, n)) for n in numbers]
        evaluations = [json.loads((path / "evaluation.json").read_text()) for path in paths if path.exists()]
        if evaluations:
            rows.append(row_of(name, [one["prompts"] for one in evaluations]))
    return rows


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
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a markdown table."""
    lines = [["method", "seeds", *COLUMNS.values()], ["---"] * (2 + len(COLUMNS))]
    for row in rows:
        cells = [f"{row[name]:.3f} ± {row[f'{name}/sem']:.3f}" for name in COLUMNS]
        lines.append([row["method"], str(row["seeds"]), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Trains what is missing, measures what is not measured, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--variant", choices=list(REWARD_MODELS), default="smol")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="print what there is, and train nothing")
    parser.add_argument("--reward_model", default="", help="more flags of the reward_model command, between spaces")
    parser.add_argument("--evaluate", default="", help="more flags of evaluate run, between spaces")
    arguments, fields = parser.parse_known_args()
    unknown = [field for field in fields if not field.startswith("--config.")]
    if unknown:
        parser.error(f"unknown flag {unknown[0]}: fields of the runs begin with --config.")
    if not arguments.table:
        model = reward_model(arguments.folder, arguments.variant, arguments.reward_model.split())
        trained(arguments.folder, arguments.variant, model, arguments.seeds, fields)
        measured(arguments.folder, model, arguments.seeds, arguments.evaluate.split())
    rows = rows_of(arguments.folder, arguments.seeds)
    for row in rows:
        print(json.dumps({name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()}), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
