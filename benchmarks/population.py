"""A population of K members beside K runs alone: time and memory of a warm step.

  python benchmarks/population.py                                  nano, all weights: K = 1, 2, 4, 8, 16, 32
  python benchmarks/population.py --variant=smol --rank=16 --members=1,2,4 --steps=6
  python benchmarks/population.py --figure=cost.png                also a picture of both costs over K, as PNG and SVG

A reference policy is warmed up once; then each side trains a few steps in a process of its own, which compiles nothing
after its first steps: the median of the others is a warm step. Prints one JSON object a K: `step_s` of the population,
`alone_s` of one run, `ratio`, K runs alone over the population (larger is better), peak memory of both (MiB), and
`cpu_ratio`, the same quotient of the CPU seconds of whole commands, compiling included. Rollouts are not saved.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import matplotlib.figure
import numpy as np

from mara_jax import plot_style

COMPILING = 3  # first steps that are left out


def run(workdir: pathlib.Path, *flags: str) -> tuple[float, float]:
    """Trains; returns the CPU seconds and the peak memory (MiB) of the command."""
    command = [sys.executable, "-m", "mara_jax.main", f"--workdir={workdir}", *flags, "--config.rollout.save=False"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def warm_step(folder: pathlib.Path) -> float:
    """Median seconds of the steps that compile nothing."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return float(np.median([row["time/step_s"] for row in rows[COMPILING:]]))


def draw(rows: list[dict[str, float]], title: str, path: pathlib.Path) -> None:
    """Time of a step and peak memory over the number of members, beside as many runs alone."""
    members = [row["members"] for row in rows]
    with plot_style.style():
        figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
        for ax, name, alone, unit, label in zip(
            figure.subplots(1, 2), ("step_s", "memory_mib"), ("alone_s", "alone_mib"), (1, 1024),
            ("seconds a step of all members", "peak memory, GiB"), strict=True,
        ):  # fmt: skip
            separate = [row["members"] * row[alone] / unit for row in rows]
            ax.plot(members, separate, "o--", color=plot_style.REFERENCE, label="as many runs alone")
            ax.plot(members, [row[name] / unit for row in rows], "o-", color=plot_style.OWN, label="one population")
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_xticks(members, [f"{count}" for count in members])
            ax.set_xlabel("members")
            ax.set_ylabel(label)
            ax.yaxis.set_major_formatter("{x:g}")
            plot_style.horizontal_grid(ax)
            ax.legend(frameon=False)
        figure.suptitle(title)
        plot_style.save(figure, path)


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="nano")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--members", default="1,2,4,8,16,32")
    parser.add_argument("--figure", type=pathlib.Path, default=None)
    arguments, rows = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder)
        config = f"--config=configs/onetwo.py:{arguments.variant}"
        run(base / "reference", config, "--config.steps=1")
        settings = {
            "policy.weights": base / "reference" / "reference", "warmup.steps": 0, "warmup.max_steps": 0,
            "steps": arguments.steps, "checkpoint.every": arguments.steps, "lora.rank": arguments.rank,
            "reference.samples": 64, "rollout.length_buckets": 1,
        }  # fmt: skip
        flags = [config, *(f"--config.{name}={value}" for name, value in settings.items())]
        cpu_alone, memory_alone = run(base / "alone", *flags)
        alone = warm_step(base / "alone")
        for count in map(int, arguments.members.split(",")):
            workdir = base / f"of-{count}"
            cpu, memory = run(workdir, *flags, f"--config.population.seeds={count}")
            step = warm_step(next((workdir / "members").iterdir()))
            row = {"members": count, "step_s": step, "alone_s": alone, "ratio": count * alone / step}
            row |= {"memory_mib": memory, "alone_mib": memory_alone, "cpu_ratio": count * cpu_alone / cpu}
            rows.append(row)
            print(json.dumps({name: round(value, 3) for name, value in row.items()}), flush=True)
    if arguments.figure:
        adapters = f"adapters of rank {arguments.rank}" if arguments.rank else "all weights"
        draw(rows, f"{arguments.variant}, {adapters}", arguments.figure)


if __name__ == "__main__":
    main()
