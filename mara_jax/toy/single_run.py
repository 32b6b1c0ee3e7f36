"""One run of the 100-outcome problem, with its metrics and figure, on the same core functions as a language model."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.config import ToyRun, estimator_of
from mara_jax.core import forecast, kl, method_rules
from mara_jax.toy import problems, run_figure, training
from mara_jax.train import reference, report
from mara_jax.train import workdir as workdirs
from mara_jax.train.metrics import Display

EVERY = 10  # steps between two rows of metrics.jsonl
# The config's name of an estimator -> the field of training.Choices and its value there.
ESTIMATORS = {
    "k1_in_reward": {"reverse_estimator": "k1_in_reward"},
    "k2_in_loss": {"reverse_estimator": "k2_in_loss"},
    "reference_samples": {"forward_estimator": "samples"},
    "ratio": {"forward_estimator": "ratio"},
    "k3_in_loss": {"forward_estimator": "k3_in_loss"},
}


def choices_of(cfg: ToyRun, every: int = 1) -> training.Choices:
    """The static choices of this config's run, recorded every `every` steps."""
    return training.Choices(
        method=cfg.algorithm.method,  # pyright: ignore[reportArgumentType]
        direction=cfg.algorithm.kl,  # pyright: ignore[reportArgumentType]
        gradients="exact" if cfg.toy.exact else "sampled",
        baseline=method_rules.resolved(cfg.algorithm).baseline,
        steps=cfg.steps,
        batch=cfg.toy.batch,
        every=every,
        **ESTIMATORS[estimator_of(cfg.algorithm)],  # pyright: ignore[reportArgumentType]
    )


def collapse_at_optimum(cfg: ToyRun, problem: problems.Problem) -> dict[str, Any] | None:
    """Describes the collapse of a run whose exact optimum gives one outcome COLLAPSED (95 %) of the mass, else None."""
    count = len(problem.reward)
    outcomes = forecast.Samples(problem.reward, np.arange(count), problem.ref_logp, exact=True)
    objective = reference.objective_of(dataclasses.replace(cfg.algorithm, anchor="string"))
    task = forecast.Task(tuple(str(outcome) for outcome in range(count)))
    return forecast.collapse_at_optimum(objective, [outcomes], task, key=jax.random.key(0), resamples=0)


def run(cfg: ToyRun, workdir: pathlib.Path) -> None:
    """Trains once and writes metrics.jsonl, result.json and figure.png (and .svg) under workdir."""
    problem = problems.PROBLEMS[f"figure{cfg.toy.figure}"]()
    settings, choices = cfg.algorithm, choices_of(cfg)
    workdirs.claim(workdir, cfg)
    display = Display(cfg.steps)
    display.note(
        f"{problem.name}: {settings.method}, {settings.kl} KL, beta {settings.beta:g}, "
        f"{'exact' if cfg.toy.exact else 'sampled'} gradients, {cfg.steps} steps"
    )
    collapse = collapse_at_optimum(cfg, problem)
    if collapse:
        display.note(report.collapse_warning(collapse))
    grid = training.grid(
        jnp.asarray(problem.ref_logp),
        jnp.asarray(problem.reward),
        betas=jnp.array([settings.beta]),
        seeds=jnp.array([cfg.seed]),
        threshold=settings.threshold,
        learning_rate=cfg.toy.learning_rate,
        choices=choices,
    )
    trained = training.Run(*(np.asarray(value)[0, 0] for value in grid))
    rows = [
        {
            "step": step,
            "reward/mean": float(trained.reward_s[step]),
            "distance/target": float(trained.distance_s[step]),
            "gap/kl_to_optimum": float(trained.kl_to_target_s[step]),
            "gap/kl_from_optimum": float(trained.kl_from_target_s[step]),
            "gap/tv_optimum": float(trained.distance_s[step]),
            "gap/tv_uniform": float(trained.uniform_distance_s[step]),
        }
        for step in range(0, cfg.steps, EVERY)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {
        "policy": np.exp(trained.logp_a).tolist(),
        "optimum": np.exp(trained.target_logp_a).tolist(),
        "reference": np.exp(problem.ref_logp).tolist(),
        "reward": problem.reward.tolist(),
        "distance_to_optimum": float(trained.distance_to_target),
        "distance_to_uniform": float(trained.distance_to_uniform),
        "kl_to_optimum": float(kl.reverse(trained.logp_a, trained.target_logp_a)),
        "kl_from_optimum": float(kl.forward(trained.logp_a, trained.target_logp_a)),
        "collapse": collapse,
    }
    workdirs.write_json(workdir / "result.json", result)
    figure = run_figure.save_figure(workdir)
    good = problem.reward >= settings.threshold
    mass, best = (float(np.exp(logp_a)[good].sum()) for logp_a in (trained.logp_a, trained.target_logp_a))
    display.note(
        f"total variation to the objective's optimum {result['distance_to_optimum']:.3f}, to uniform over the "
        f"{int(good.sum())} good outcomes {result['distance_to_uniform']:.3f}; mass on them "
        f"{mass:.3f} (at the optimum {best:.3f})"
    )
    display.note(f"figure: {figure}   numbers: {workdir / 'result.json'}")
