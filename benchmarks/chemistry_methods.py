"""Searches among molecules, method beside method: runs them, and tabulates what each has found.

  python benchmarks/chemistry_methods.py --out=runs/chemistry --experiment=molexp
  python benchmarks/chemistry_methods.py --out=runs/chemistry --experiment=tables --seeds=5
  python benchmarks/chemistry_methods.py --out=runs/chemistry --experiment=pmo --seeds=2 --weights=runs/zinc/model \
      --screened=zinc250k.smi.gz
  python benchmarks/chemistry_methods.py --out=runs/chemistry --experiment=molexp --only_table
  python benchmarks/chemistry_methods.py --out=runs/fast --experiment=molexp --flag=--config.task.randomised=4

Each run is a `python -m mara_jax.main --config=configs/chemistry.py:VARIANT` in a folder EXPERIMENT/ORACLE/METHOD/SEED;
started again, the script goes on with runs that are not done. What a finished one has found is a line of OUT/runs.jsonl
(`--runs=FILE`; benchmarks/measured/chemistry_runs.jsonl holds those of this project): a run that has a line is not made
again, on no machine. `--jobs=2` (one a core) at once.

  molexp   the product score and the targets reached (similarity of at least .5, or --threshold), yield, circles
  tables   the paper's columns for REINVENT and MARA on `synth` and `amide`: yield, calls to 100 hits, IntDiv, circles
  pmo      the area under the curve of the ten best, mol_opt's settings, beside random ones of --screened

Prints one JSON object a method and oracle: means and standard deviations over the seeds that have such a number; `p_*`:
one-sided Welch tests that a method's number is higher than plain REINVENT's; where MolExp is complete, the same of all
its tasks together. Draws found.png: hits and circles against oracle calls, with the range over seeds; circles there in
the order of the calls, in the table the best hits first (both are lower bounds).
"""

import argparse
import concurrent.futures
import csv
import functools
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
from mara_jax.tasks.chemistry import metrics, oracles, smiles_file

CURVE_CALLS = 10  # points of a curve
EXPERIMENTS = {
    "molexp": ("molexp", [f"molexp:{name}" for name in ("AP", "A2A", "BACE1", "EGFR")]),
    "tables": ("", ["synth", "amide"]),
    "pmo": ("pmo", ["albuterol_similarity", "celecoxib_rediscovery", "isomers_c7h8n2o2"]),
}
SCREENING = "screening"  # the method that learns nothing
REPLAY = "--config.rollout.replay=10"  # as the paper's authors have it
NONE = ("--config.algorithm.transform=none",)
METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "molexp": {
        "reinvent": NONE,
        "filter": (*NONE, "--config.task.bucket_size=10", "--config.task.bucket_score=0.4"),
        "mara_strings": ("--config.algorithm.transform=mara_strings",),
        "mara_molecules": ("--config.algorithm.transform=mara_answers", "--config.task.answer=molecule"),
        "policy_gradient": (*NONE, "--config.algorithm.method=vanilla", "--config.rollout.replay=0"),
    },
    "tables": {
        "reinvent": (*NONE, REPLAY),
        "mara_strings": (REPLAY,),
        "mara_strings_.8": (REPLAY, "--config.algorithm.threshold=0.8"),
    },
    "pmo": {"reinvent": (), SCREENING: ()},
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


@functools.cache
def molecules_of(source: str) -> list[str]:
    """A file's SMILES."""
    return smiles_file.read(source, bad_lines="skip").smiles


def screened(oracle: str, source: str, seed: int, budget: int) -> dict[str, float]:
    """Scores of as many molecules of a file as the budget has calls, in random order, by SMILES."""
    known = molecules_of(source)
    chosen = np.random.default_rng(seed).choice(len(known), budget, replace=False)
    smiles = [known[index] for index in chosen.tolist()]
    return dict(zip(smiles, oracles.score(oracle, smiles), strict=True))


def of_run(workdir: pathlib.Path) -> dict[str, Any]:
    """What the steps of a run say of it."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "steps": len(rows),
        "valid": float(np.mean([row["valid/fraction"] for row in rows[-10:]])),
        "minutes": sum(row["time/step_s"] for row in rows) / 60,
    }


def measured(experiment: str, oracle: str, series: dict[str, float], threshold: float, budget: int) -> dict[str, Any]:
    """What these calls have found; `curve`: calls, and the hits and circles until then."""
    hits = [smiles for smiles, score in series.items() if score >= threshold]
    calls = metrics.calls_to_hits(series, threshold)
    out = {
        "calls": len(series),
        "yield": len(hits),
        "calls_to_100": calls.get(100),
        "intdiv": metrics.internal_diversity(hits),
        "circles": metrics.circles(sorted(hits, key=lambda smiles: -series[smiles])),
        "scaffolds": metrics.scaffolds(hits),
        "curve": found_by(series, threshold, np.linspace(budget / CURVE_CALLS, budget, CURVE_CALLS)),
    }
    if experiment == "molexp":
        task = oracle.removeprefix("molexp:")
        reached = metrics.molexp_similarities(task, list(series))
        targets = sum(similarity >= threshold for similarity in reached.values())
        out |= {"score": float(np.prod(list(reached.values()))), "targets": targets}
    if experiment == "pmo":
        out["auc_top10"] = metrics.top_auc(series)
    return out


def recorded(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a file of runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summary(runs: dict[str, list[dict[str, Any]]], baseline: str = "reinvent") -> dict[str, dict[str, Any]]:
    """By method, means and standard deviations over seeds, and tests against the baseline."""
    rows: dict[str, dict[str, Any]] = {}
    for method, found in runs.items():
        row: dict[str, Any] = {"seeds": len(found)}
        for name in [key for key in found[0] if key != "curve"]:
            values = [one[name] for one in found if one[name] is not None]
            mean = round(float(np.mean(values)), 3) if values else None
            row[name] = [mean, round(float(np.std(values, ddof=1)), 3) if len(values) > 1 else None]
        for name in ("score", "yield", "circles", "auc_top10"):
            others = [one[name] for one in runs.get(baseline, []) if name in one]
            own = [one[name] for one in found if name in one]
            if method == baseline or min(len(own), len(others)) < 2 or not (np.ptp(own) or np.ptp(others)):
                continue  # no test of samples that do not vary
            test = stats.ttest_ind(own, others, equal_var=False, alternative="greater")
            row[f"p_{name}"] = round(float(test.pvalue), 4)
        rows[method] = row
    return rows


def over_oracles(found: dict[str, dict[str, list[dict[str, Any]]]], baseline: str = "reinvent") -> list[dict[str, Any]]:
    """MolExp's tasks together: targets reached by each seed, and a test of a seed's mean log score, by method."""

    def by_seed(method: str) -> tuple[list[float], list[int]]:
        seeds = list(zip(*(methods[method] for methods in found.values()), strict=True))
        scores = [float(np.mean([np.log(one["score"]) for one in tasks])) for tasks in seeds]
        return scores, [sum(one["targets"] for one in tasks) for tasks in seeds]

    rows, (scores, _) = [], by_seed(baseline)
    for method in set.intersection(*(set(methods) for methods in found.values())):
        own, targets = by_seed(method)
        test = stats.ttest_ind(own, scores, equal_var=False, alternative="greater")
        p = {} if method == baseline else {"p_score": round(float(test.pvalue), 4)}
        rows.append({"oracle": "all", "method": method, "targets_by_seed": targets} | p)
    return sorted(rows, key=lambda row: row["method"])


def draw(found: dict[str, dict[str, list[dict[str, Any]]]], path: pathlib.Path) -> None:
    """Hits and circles against oracle calls, a row an oracle, the mean and the range over seeds."""
    names = list(dict.fromkeys(method for methods in found.values() for method in methods))
    with plot_style.style():
        figure = matplotlib.figure.Figure(figsize=(9, 3.2 * len(found)), layout="constrained")
        panels = figure.subplots(len(found), 2, squeeze=False)
        for (oracle, methods), axes in zip(found.items(), panels, strict=True):
            for method, runs in methods.items():
                calls, *curves = np.moveaxis(np.array([one["curve"] for one in runs], float), 2, 0)
                for ax, values in zip(axes, curves, strict=True):
                    colour, label = f"C{names.index(method)}", method.replace("mara_", "MARA over ").replace("_", " ")
                    ax.plot(calls[0], values.mean(0), color=colour, label=label)
                    ax.fill_between(calls[0], values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
            for ax, name in zip(axes, ("hits", "circles of hits"), strict=True):
                ax.set_xlabel("oracle calls")
                ax.set_ylabel(name)
                ax.set_title(oracle)
                ax.set_ylim(bottom=0)
        figure.axes[0].legend(frameon=False)
        plot_style.save(figure, path)


def found_by(series: dict[str, float], threshold: float, calls: np.ndarray) -> list[tuple[int, int, int]]:
    """Calls, and the hits and circles among the first so many."""
    smiles, out = list(series), []
    for count in calls.astype(int).tolist():
        hits = [one for one in smiles[:count] if series[one] >= threshold]
        out.append((count, len(hits), metrics.circles(hits)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--experiment", choices=EXPERIMENTS, required=True)
    parser.add_argument(
        "--runs", type=pathlib.Path, help="file of what finished runs have found, by default OUT/runs.jsonl"
    )
    parser.add_argument("--oracles", help="some of the experiment's, by commas")
    parser.add_argument("--methods", help="some of the experiment's, by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=10_000)
    parser.add_argument("--threshold", type=float, help="of a hit; by default that of the config")
    parser.add_argument("--weights", help="of the prior, by default the package's")
    parser.add_argument(
        "--flag", action="append", default=[], help="of every run, as --config.task.randomised=4; may be repeated"
    )
    parser.add_argument("--screened", help="file of SMILES for pmo's random screening")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, each on a core of its own")
    parser.add_argument("--only_table", action="store_true", help="of the runs that are done")
    args = parser.parse_args()
    variant, names = EXPERIMENTS[args.experiment]
    names = args.oracles.split(",") if args.oracles else names
    methods = args.methods.split(",") if args.methods else list(METHODS[args.experiment])
    if SCREENING in methods and not (args.screened or args.only_table):
        parser.error(f"--screened is missing: the file of molecules of which --methods={SCREENING} takes some")
    threshold = args.threshold or {"molexp": 0.5, "tables": 0.85, "pmo": 0.8}[args.experiment]
    path = args.runs or args.out / "runs.jsonl"
    settings = {"experiment": args.experiment, "budget": args.budget, "threshold": threshold, "flags": args.flag}

    def run_of(oracle: str, method: str, seed: int) -> dict[str, Any]:
        return settings | {"oracle": oracle, "method": method, "seed": seed}

    def found(oracle: str, method: str, seed: int) -> dict[str, Any] | None:
        wanted = run_of(oracle, method, seed)
        return next((one["found"] for one in recorded(path) if one["run"] == wanted), None)

    every = [(oracle, method, seed) for seed in range(args.seeds) for oracle in names for method in methods]
    if not args.only_table:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = [str(core) for core in sorted(os.sched_getaffinity(0))][: args.jobs]

        def keep(oracle: str, method: str, seed: int, series: dict[str, float], of_run: dict[str, Any]) -> None:
            found = measured(args.experiment, oracle, series, threshold, args.budget) | of_run
            with path.open("a") as file:
                file.write(json.dumps({"run": run_of(oracle, method, seed), "found": found}) + "\n")

        def make(oracle: str, method: str, seed: int) -> None:
            if method == SCREENING:
                keep(oracle, method, seed, screened(oracle, args.screened, seed, args.budget), {})
                return
            workdir = args.out / args.experiment / oracle.replace(":", "_") / method / str(seed)
            flags = (f"--config.task.oracle={oracle}", f"--config.seed={seed}", f"--config.task.budget={args.budget}")
            weights = (f"--config.policy.weights={args.weights}",) if args.weights else ()
            core = free.pop()
            said = train(workdir, variant, (*flags, *weights, *METHODS[args.experiment][method], *args.flag), core)
            free.append(core)
            if not said:
                keep(oracle, method, seed, series_of(workdir), of_run(workdir))
            print(f"{oracle} {method} {seed}: {said or 'done'}", file=sys.stderr, flush=True)

        with concurrent.futures.ThreadPoolExecutor(len(free)) as pool:
            list(pool.map(lambda job: make(*job), [job for job in every if found(*job) is None]))
    drawn: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for oracle in names:
        by_method = {m: list(filter(None, (found(oracle, m, seed) for seed in range(args.seeds)))) for m in methods}
        drawn[oracle] = {method: runs for method, runs in by_method.items() if runs}
        for method, row in summary(drawn[oracle]).items():
            print(json.dumps({"oracle": oracle, "method": method} | row))
    complete = all(len(runs) == args.seeds > 1 for methods in drawn.values() for runs in methods.values())
    if args.experiment == "molexp" and complete and all("reinvent" in methods for methods in drawn.values()):
        for row in over_oracles(drawn):
            print(json.dumps(row))
    if any(drawn.values()):
        (args.out / args.experiment).mkdir(parents=True, exist_ok=True)
        draw({oracle: runs for oracle, runs in drawn.items() if runs}, args.out / args.experiment / "found.png")


if __name__ == "__main__":
    main()
