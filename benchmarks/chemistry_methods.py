"""Searches among molecules, method beside method: runs them, and tabulates what each has found.

  python benchmarks/chemistry_methods.py --out=runs/chemistry --experiment=molexp
  python benchmarks/chemistry_methods.py --out=runs/chemistry --experiment=tables --seeds=5
  python benchmarks/chemistry_methods.py --out=runs/chemistry --experiment=pmo --weights=runs/zinc/model --seeds=2
  python benchmarks/chemistry_methods.py --out=runs/chemistry --experiment=molexp --only_table
  python benchmarks/chemistry_methods.py --out=runs/fast --experiment=molexp --flag=--config.task.randomised=4

Each run is a `python -m mara_jax.main --config=configs/chemistry.py:VARIANT` in a folder EXPERIMENT/ORACLE/METHOD/SEED;
started again, the script skips what is done and goes on with what is not. `--jobs=2` (one a core) at once.

  molexp   the product score and the targets reached (similarity of at least .5, or --threshold), yield, circles
  tables   the paper's columns for REINVENT and MARA on `synth` and `amide`: yield, calls to 100 hits, IntDiv, circles
  pmo      the area under the curve of the ten best, mol_opt's settings, beside molecules drawn from the prior alone

Prints one JSON object a method and oracle: means and standard deviations over seeds; `p_*`: one-sided Welch tests that
a method's number is higher than plain REINVENT's. Draws found.png: hits and circles against oracle calls, with the
range over seeds.
"""

import argparse
import concurrent.futures
import csv
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import matplotlib.figure
import numpy as np
from scipy import stats

from mara_jax import plot_style
from mara_jax.tasks.chemistry import metrics

CURVE_CALLS = 10  # points of a curve
EXPERIMENTS = {
    "molexp": ("molexp", [f"molexp:{name}" for name in ("AP", "A2A", "BACE1", "EGFR")]),
    "tables": ("", ["synth", "amide"]),
    "pmo": ("pmo", ["albuterol_similarity", "celecoxib_rediscovery", "isomers_c7h8n2o2"]),
}
NONE = ("--config.algorithm.transform=none",)
METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "molexp": {
        "reinvent": NONE,
        "filter": (*NONE, "--config.task.bucket_size=10", "--config.task.bucket_score=0.5"),
        "mara_strings": ("--config.algorithm.transform=mara_strings",),
        "mara_molecules": ("--config.algorithm.transform=mara_answers", "--config.task.answer=molecule"),
        "policy_gradient": (*NONE, "--config.algorithm.method=vanilla"),
    },
    "tables": {
        "reinvent": NONE,
        "mara_strings": (),
        "mara_strings_.8": ("--config.algorithm.threshold=0.8",),
    },
    "pmo": {"reinvent": (), "prior": ("--config.optimiser.learning_rate=1e-12", "--config.rollout.replay=0")},
}


def finished(workdir: pathlib.Path) -> bool:
    """Whether a run has written its report."""
    return (workdir / "molecules.csv").exists()


def train(workdir: pathlib.Path, variant: str, flags: tuple[str, ...], core: str) -> str:
    """Runs, or resumes, one search on one core; returns the last lines of one that failed."""
    if finished(workdir):
        return ""
    log = workdir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mara_jax.main", f"--config=configs/chemistry.py:{variant}", *flags]
    with log.open("a") as console:
        pinned = ["taskset", "-c", core, *command, f"--workdir={workdir}"]
        status = subprocess.run(pinned, stdout=console, stderr=subprocess.STDOUT, check=False).returncode
    return "" if status == 0 else "\n".join(log.read_text().splitlines()[-3:])


def series_of(workdir: pathlib.Path) -> dict[str, float]:
    """Scores by SMILES, in the order of the calls."""
    with (workdir / "molecules.csv").open(newline="", encoding="utf-8") as file:
        return {row["smiles"]: float(row["score"]) for row in csv.DictReader(file)}


def measured(experiment: str, oracle: str, workdir: pathlib.Path, threshold: float) -> dict[str, float]:
    """What one run has found."""
    series = series_of(workdir)
    hits = [smiles for smiles, score in series.items() if score >= threshold]
    calls = metrics.calls_to_hits(series, threshold)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    out = {
        "calls": len(series),
        "yield": len(hits),
        "calls_to_100": calls.get(100, np.nan),
        "intdiv": metrics.internal_diversity(hits),
        "circles": metrics.circles(sorted(hits, key=lambda smiles: -series[smiles])),
        "scaffolds": metrics.scaffolds(hits),
        "steps": len(rows),
        "valid": float(np.mean([row["valid/fraction"] for row in rows[-10:]])),
        "minutes": sum(row["time/step_s"] for row in rows) / 60,
    }
    if experiment == "molexp":
        task = oracle.removeprefix("molexp:")
        reached = metrics.molexp_similarities(task, list(series))
        targets = sum(similarity >= threshold for similarity in reached.values())
        out |= {"score": float(np.prod(list(reached.values()))), "targets": targets}
    if experiment == "pmo":
        out["auc_top10"] = metrics.top_auc(series)
    return out


def summary(runs: dict[str, list[dict[str, float]]], baseline: str = "reinvent") -> dict[str, dict[str, Any]]:
    """By method, means and standard deviations over seeds, and tests against the baseline."""
    rows: dict[str, dict[str, Any]] = {}
    for method, found in runs.items():
        row: dict[str, Any] = {"seeds": len(found)}
        for name in found[0]:
            values = np.array([one[name] for one in found], float)
            spread = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
            row[name] = [round(float(values.mean()), 3), round(spread, 3)]
        for name in ("score", "yield", "circles", "auc_top10"):
            others = [one[name] for one in runs.get(baseline, []) if name in one]
            if method != baseline and name in found[0] and min(len(found), len(others)) > 1:
                test = stats.ttest_ind([one[name] for one in found], others, equal_var=False, alternative="greater")
                row[f"p_{name}"] = round(float(test.pvalue), 4)
        rows[method] = row
    return rows


def draw(folders: dict[str, dict[str, list[pathlib.Path]]], threshold: float, budget: int, path: pathlib.Path) -> None:
    """Hits and circles against oracle calls, a row an oracle, the mean and the range over seeds."""
    with plot_style.style():
        figure = matplotlib.figure.Figure(figsize=(9, 3.2 * len(folders)), layout="constrained")
        panels = figure.subplots(len(folders), 2, squeeze=False)
        for (oracle, methods), axes in zip(folders.items(), panels, strict=True):
            at = np.linspace(budget / CURVE_CALLS, budget, CURVE_CALLS)
            for number, (method, workdirs) in enumerate(methods.items()):
                curves = np.array([found_by(series_of(workdir), threshold, at) for workdir in workdirs])
                for ax, values in zip(axes, np.moveaxis(curves, 2, 0), strict=True):
                    colour = f"C{number}"
                    ax.plot(at, values.mean(0), color=colour, label=method)
                    ax.fill_between(at, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
            for ax, name in zip(axes, ("hits", "circles of hits"), strict=True):
                ax.set_xlabel("oracle calls")
                ax.set_ylabel(name)
                ax.set_title(oracle)
                ax.set_ylim(bottom=0)
        figure.axes[0].legend(frameon=False)
        plot_style.save(figure, path)


def found_by(series: dict[str, float], threshold: float, calls: np.ndarray) -> list[tuple[int, int]]:
    """Hits and circles among the first so many calls."""
    smiles, out = list(series), []
    for count in calls.astype(int):
        hits = [one for one in smiles[:count] if series[one] >= threshold]
        out.append((len(hits), metrics.circles(hits)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--experiment", choices=EXPERIMENTS, required=True)
    parser.add_argument("--oracles", help="some of the experiment's, by commas")
    parser.add_argument("--methods", help="some of the experiment's, by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=10_000)
    parser.add_argument("--threshold", type=float, help="of a hit; by default that of the config")
    parser.add_argument("--weights", help="of the prior, by default the package's")
    parser.add_argument(
        "--flag", action="append", default=[], help="of every run, as --config.task.randomised=4; may be repeated"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on a core of its own")
    parser.add_argument("--only_table", action="store_true", help="of the runs that are done")
    args = parser.parse_args()
    variant, oracles = EXPERIMENTS[args.experiment]
    oracles = args.oracles.split(",") if args.oracles else oracles
    methods = args.methods.split(",") if args.methods else list(METHODS[args.experiment])
    threshold = args.threshold or {"molexp": 0.5, "tables": 0.85, "pmo": 0.8}[args.experiment]

    def folder(oracle: str, method: str, seed: int) -> pathlib.Path:
        return args.out / args.experiment / oracle.replace(":", "_") / method / str(seed)

    every = [(oracle, method, seed) for seed in range(args.seeds) for oracle in oracles for method in methods]
    if not args.only_table:
        cores = [str(core) for core in sorted(os.sched_getaffinity(0))][: args.jobs]
        free = list(cores)

        def one(oracle: str, method: str, seed: int) -> str:
            core = free.pop()
            flags = (f"--config.task.oracle={oracle}", f"--config.seed={seed}", f"--config.task.budget={args.budget}")
            weights = (f"--config.policy.weights={args.weights}",) if args.weights else ()
            said = train(
                folder(oracle, method, seed),
                variant,
                (*flags, *weights, *METHODS[args.experiment][method], *args.flag),
                core,
            )
            free.append(core)
            print(f"{oracle} {method} {seed}: {said or 'done'}", file=sys.stderr, flush=True)
            return said

        with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:
            list(pool.map(lambda job: one(*job), every))
    drawn: dict[str, dict[str, list[pathlib.Path]]] = {}
    for oracle in oracles:
        by_method = {
            method: [w for w in (folder(oracle, method, seed) for seed in range(args.seeds)) if finished(w)]
            for method in methods
        }
        drawn[oracle] = {method: workdirs for method, workdirs in by_method.items() if workdirs}
        runs = {m: [measured(args.experiment, oracle, w, threshold) for w in ws] for m, ws in drawn[oracle].items()}
        for method, row in summary(runs).items():
            print(json.dumps({"oracle": oracle, "method": method} | row))
    if any(drawn.values()):
        kept = {oracle: methods for oracle, methods in drawn.items() if methods}
        draw(kept, threshold, args.budget, args.out / args.experiment / "found.png")


if __name__ == "__main__":
    main()
