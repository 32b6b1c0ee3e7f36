"""What a step costs against the group size and against the completion length: a table, and a plot.

  python benchmarks/scaling.py --plot=docs/step-scaling.png
  python benchmarks/scaling.py --turns=3 --model=tiny

Prints one JSON object a line: CPU seconds of rollout, reference and update (medians of --turns after one that
compiles), tokens that the model reads (`rows`: prompts once, and completions), the prompts' share of them, and FLOPs.
Groups of 1 to 32 of four prompts of 64 tokens with 64 new tokens each; then lengths of 32 to 512 with groups of 8. The
last line fits seconds = fixed + per_token * rows to each of the two. One thread.
"""

import argparse
import json
import os

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import numpy as np

from mara_jax import config
from mara_jax.bench import phases, speed
from mara_jax.policies import transformer

PROMPTS, PROMPT, NEW, GROUP = 4, 64, 64, 8
GROUPS, LENGTHS = (1, 2, 4, 8, 16, 32), (32, 64, 128, 256, 512)


def cost(model: str, group: int, new: int, turns: int) -> dict:
    """The row of one size."""
    policy = phases.random_policy(model)
    prompts = phases.random_prompts(policy.architecture.vocab_size, PROMPTS, PROMPT)
    # A group of one has nothing to compare with, so that no baseline is used at any size.
    algorithm = config.Algorithm(method="vanilla", baseline="none")
    params = transformer.init(policy.architecture, jax.random.key(0))
    setup = phases.setup_of(phases.run_of(PROMPTS, group, new, algorithm=algorithm), policy, params, prompts)
    measured = speed.steps(setup, turns)
    rows = PROMPTS * (PROMPT + group * (new - 1))
    seconds = {f"{name}_s": float(np.median(measured.spent[name])) for name in phases.NAMES}
    return {
        "benchmark": "scaling",
        "group": group,
        "new": new,
        "rows": rows,
        "prompt_share": PROMPTS * PROMPT / rows,
        **seconds,
        "step_s": sum(seconds.values()),
        "gflop": sum(phases.counted(setup, measured.completions, measured.batches)) / 1e9,
    }


def fit(rows: list[dict]) -> dict:
    """Least squares of step_s over rows: the fixed part, the cost of a token and the largest relative deviation."""
    x, y = np.array([row["rows"] for row in rows]), np.array([row["step_s"] for row in rows])
    per_token, fixed = np.polyfit(x, y, 1, w=1 / y)
    off = np.abs(fixed + per_token * x - y) / y
    return {"fixed_s": fixed, "us_per_token": 1e6 * per_token, "largest_deviation": off.max()}


def plot(groups: list[dict], lengths: list[dict], path: str) -> None:
    """Stacked phases over the completion tokens of a step, beside the line that the fit gives."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for ax, rows, key, label in (
        (axes[0], groups, "group", f"completions a prompt ({NEW} tokens each)"),
        (axes[1], lengths, "new", f"tokens a completion ({GROUP} a prompt)"),
    ):
        x = [row[key] for row in rows]
        below = np.zeros(len(rows))
        for name, colour in zip(phases.NAMES, ("#4C72B0", "#A0A0A0", "#DD8452"), strict=True):
            above = below + [row[f"{name}_s"] for row in rows]
            ax.fill_between(x, below, above, color=colour, alpha=0.75, linewidth=0, label=name)
            below = above
        line_fit = fit(rows)
        line = [line_fit["fixed_s"] + line_fit["us_per_token"] * 1e-6 * row["rows"] for row in rows]
        ax.plot(
            x, line, "k--", linewidth=1, label=f"{line_fit['us_per_token']:.0f} µs a token {line_fit['fixed_s']:+.2f} s"
        )
        ax.plot(x, below, "ko", markersize=3)
        ax.set(xlabel=label, ylabel="CPU seconds a step", xlim=(0, None), ylim=(0, None), xticks=x[2:])
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--model", choices=tuple(phases.SIZES), default="tiny")
    parser.add_argument("--plot", help="write the plot here")
    options = parser.parse_args()
    groups, lengths = [], []
    for group in GROUPS:
        groups.append(cost(options.model, group, NEW, options.turns))
        print(json.dumps(groups[-1]), flush=True)
    for new in LENGTHS:
        same = [row for row in groups if (row["group"], row["new"]) == (GROUP, new)]
        lengths.append(same[0] if same else cost(options.model, GROUP, new, options.turns))
        if not same:
            print(json.dumps(lengths[-1]), flush=True)
    fits = {"by_group": fit(groups), "by_length": fit(lengths), "load": round(os.getloadavg()[0], 1)}
    print(json.dumps({"benchmark": "scaling_fit", **fits}), flush=True)
    if options.plot:
        plot(groups, lengths, options.plot)


if __name__ == "__main__":
    main()
