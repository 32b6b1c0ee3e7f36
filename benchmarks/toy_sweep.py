"""CPU time of a sweep of the 100-outcome problem: one XLA program against a PyTorch loop over the same runs.

  python benchmarks/toy_sweep.py                 8 betas x 5 seeds, both sides, then the cost of 40 to 40,000 runs
  python benchmarks/toy_sweep.py --no-scaling    the comparison alone
  python benchmarks/toy_sweep.py --draws         what drawing costs, three ways

Prints one JSON object a line; the comparison's `ratio` is PyTorch's CPU seconds over ours. Both sides run on one
thread and train the same objective: logits from zero, Adam, 32 draws a step, no baseline. Each PyTorch run does all
32 samples as one array operation. Ours is compiled before it is timed; that time is reported apart. The sides take
turns and medians are compared. torch comes with the extra `test`.
"""

import argparse
import json
import os
import resource
import statistics
import time

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
os.environ["OMP_NUM_THREADS"] = "1"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mara_jax.policies import categorical
from mara_jax.toy import problems, training

BETAS = (1.0, 0.5, 0.25, 0.132, 0.1, 0.05, 0.025, 0.01)
SEEDS, STEPS, BATCH, LEARNING_RATE = 5, 1000, 32, 5e-3


def torch_run(problem: problems.Problem, beta: float, seed: int, method: str) -> np.ndarray:
    """One training run, reverse KL, in PyTorch; returns the final log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    ref_logp = torch.tensor(problem.ref_logp, dtype=torch.float32)
    reward = torch.tensor(problem.reward, dtype=torch.float32)
    logits = torch.zeros(len(reward), requires_grad=True)
    adam = torch.optim.Adam([logits], lr=LEARNING_RATE, foreach=False, fused=True)
    for _ in range(STEPS):
        logp = torch.log_softmax(logits, 0)
        with torch.no_grad():
            outcomes = torch.multinomial(logp.exp(), BATCH, replacement=True, generator=generator)
            signal, ref = reward[outcomes], ref_logp[outcomes]
            if method == "mara":
                good = signal >= problem.threshold
                anchor = torch.where(good, ref, -torch.inf).argmax()
                signal = torch.where(good, signal[anchor] + beta * (ref[anchor] - ref), signal)
            signal = signal - beta * (logp[outcomes] - ref)
        loss = -(signal * logp[outcomes]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return torch.log_softmax(logits, 0).detach().numpy()


def torch_sweep(problem: problems.Problem, method: str, first_seed: int) -> np.ndarray:
    return np.array([[torch_run(problem, b, first_seed + s, method) for s in range(SEEDS)] for b in BETAS])


def our_sweep(problem: problems.Problem, method: str, first_seed: int) -> np.ndarray:
    ended = training.grid(
        problem.ref_logp,
        problem.reward,
        betas=np.array(BETAS),
        seeds=first_seed + np.arange(SEEDS),
        threshold=problem.threshold,
        learning_rate=LEARNING_RATE,
        choices=training.Choices(method=method, steps=STEPS, batch=BATCH, every=10),
    )
    return np.asarray(ended.logp_a)


def timed(function, *args) -> tuple[np.ndarray, float]:
    start = time.process_time()
    value = function(*args)
    return value, time.process_time() - start


def compare(problem: problems.Problem, method: str, repeats: int) -> dict:
    """Both sides in turn; also how far apart their mean final distributions are, against the seeds' own scatter."""
    _, first = timed(our_sweep, problem, method, 0)
    ours, theirs, our_cpu, their_cpu = [], [], [], []
    for repeat in range(repeats):
        for function, ended, cpu in ((our_sweep, ours, our_cpu), (torch_sweep, theirs, their_cpu)):
            value, seconds = timed(function, problem, method, repeat * SEEDS)
            ended.append(np.exp(value))
            cpu.append(seconds)
    return {
        "benchmark": "toy_sweep",
        "method": method,
        "runs": len(BETAS) * SEEDS,
        "steps": STEPS,
        "ratio": statistics.median(their_cpu) / statistics.median(our_cpu),
        "torch_cpu_s": their_cpu,
        "ours_cpu_s": our_cpu,
        "compile_cpu_s": first - statistics.median(our_cpu),
        **agreement(np.concatenate(ours, axis=1), np.concatenate(theirs, axis=1)),
    }


def agreement(ours_bna: np.ndarray, theirs_bna: np.ndarray) -> dict:
    """Total variation between the two sides' mean policies, and between two halves of one side's seeds."""

    def apart(x_ba, y_ba):
        return float(np.abs(x_ba - y_ba).sum(-1).mean() / 2)

    half = theirs_bna.shape[1] // 2
    return {
        "tv_ours_torch": apart(ours_bna.mean(1), theirs_bna.mean(1)),
        "tv_torch_halves": apart(theirs_bna[:, :half].mean(1), theirs_bna[:, half : 2 * half].mean(1)),
    }


def scaling(problem: problems.Problem) -> None:
    """CPU time, wall time and peak memory against the number of runs, in chunks of the same compiled program."""
    from mara_jax.toy import study

    for runs in (40, 400, 4_000, 40_000):
        plan = study.Plan(
            problems=(problem,),
            betas=BETAS,
            thresholds=(problem.threshold,),
            seeds=tuple(range(runs // len(BETAS))),
            learning_rate=LEARNING_RATE,
            variants=(training.Choices(method="mara", steps=STEPS, batch=BATCH, every=STEPS),),
        )
        study.run(plan)  # compiles what this size needs
        wall, cpu = time.perf_counter(), time.process_time()
        study.run(plan)
        row = {
            "benchmark": "toy_sweep_scaling",
            "runs": runs,
            "cpu_s": time.process_time() - cpu,
            "wall_s": time.perf_counter() - wall,
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        row["cpu_ms_per_run"] = 1000 * row["cpu_s"] / runs
        print(json.dumps(row), flush=True)


def draws(problem: problems.Problem, runs: int = 400, steps: int = 200) -> dict:
    """CPU microseconds a run and step for BATCH draws, ours beside two usual ways; log-softmax and keys included."""

    def searched(key, logp_a, count):
        below_a = jnp.cumsum(jnp.exp(logp_a))
        uniform_n = jax.random.uniform(key, (count,)) * below_a[-1]
        return jnp.searchsorted(below_a, uniform_n, side="right", method="compare_all")

    def gumbel(key, logp_a, count):
        return jax.random.categorical(key, logp_a, shape=(count,))

    def cost(draw) -> float:
        def step(logits_ra, index):
            keys = jax.vmap(lambda run: jax.random.fold_in(jax.random.key(run), index))(jnp.arange(runs))
            drawn_rn = jax.vmap(lambda key, logp_a: draw(key, logp_a, BATCH))(keys, jax.nn.log_softmax(logits_ra))
            return logits_ra + 1e-9 * jnp.sum(drawn_rn, axis=-1, keepdims=True), None

        go = jax.jit(lambda logits_ra: jax.lax.scan(step, logits_ra, jnp.arange(steps))[0])
        start_ra = jnp.tile(jnp.asarray(problem.ref_logp, jnp.float32), (runs, 1))
        jax.block_until_ready(go(start_ra))
        seconds = [timed(lambda: jax.block_until_ready(go(start_ra)))[1] for _ in range(5)]
        return statistics.median(seconds) * 1e6 / (runs * steps)

    ways = {"ours_us": categorical.sample, "cumsum_search_us": searched, "gumbel_us": gumbel}
    return {"benchmark": "toy_sweep_draws", **{name: cost(draw) for name, draw in ways.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--method", choices=("vanilla", "mara", "both"), default="both")
    parser.add_argument("--scaling", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--draws", action="store_true", help="measure the draws alone, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    assert len(jax.devices()) == 1
    problem = problems.figure6()
    if options.draws:
        print(json.dumps(draws(problem)), flush=True)
        return
    for method in ("vanilla", "mara") if options.method == "both" else (options.method,):
        print(json.dumps(compare(problem, method, options.repeats)), flush=True)
    if options.scaling:
        scaling(problem)


if __name__ == "__main__":
    main()
