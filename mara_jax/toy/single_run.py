"""One run of the 100-outcome problem, with its metrics and figure, on the same core functions as a language model."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.config import ToyRun, estimator_of
from mara_jax.core import forecast, kl, method_rules
from mara_jax.toy import problems, run_figure, training
from mara_jax.train import reference, report, strict_json
from mara_jax.train import workdir as workdirs
from mara_jax.train.metrics import Display

EVERY = 10  # steps between two rows of metrics.jsonl
# The config's name of an estimator -> the field of training.Choices and its value there; "auto" is left where an
# objective has a KL of its own.
ESTIMATORS = {
    "auto": {},
    "k1_in_reward": {"reverse_estimator": "k1_in_reward"},
    "k2_in_loss": {"reverse_estimator": "k2_in_loss"},
    "reference_samples": {"forward_estimator": "samples"},
    "ratio": {"forward_estimator": "ratio"},
    "k3_in_loss": {"forward_estimator": "k3_in_loss"},
}


def choices_of(cfg: ToyRun, every: int = 1) -> training.Choices:
    """The static choices of this config's run, recorded every `every` steps."""
    return training.Choices(
        method=cfg.algorithm.method,
        transform=cfg.algorithm.transform,
        objective=cfg.algorithm.objective,
        direction=cfg.algorithm.kl,  # pyright: ignore[reportArgumentType]
        gradients="exact" if cfg.toy.exact else "sampled",
        baseline=method_rules.resolved(cfg.algorithm).baseline,
        eta=cfg.algorithm.eta,
        steps=cfg.steps,
        batch=cfg.toy.batch,
        every=every,
        **ESTIMATORS[estimator_of(cfg.algorithm)],  # pyright: ignore[reportArgumentType]
    )


def collapse_at_optimum(cfg: ToyRun, problem: problems.Problem) -> dict[str, Any] | None:
    """Describes the collapse of a run whose exact optimum gives one outcome COLLAPSED (95 %) of the mass, else None."""
    if method_rules.forecast_method(dataclasses.replace(cfg.algorithm, anchor="string")) is None:
        return None
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
    kl_word = f", {settings.kl} KL" if method_rules.rows(settings)[1].placements else ""
    display.note(
        f"{problem.name}: {settings.method}{kl_word}, beta {settings.beta:g}, "
        f"{'exact' if cfg.toy.exact else 'sampled'} gradients, {cfg.steps} steps"
    )
    display.note(f"it {method_rules.describe(settings)}")
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
    _check_finite(trained, cfg)
    (workdir / "metrics.jsonl").write_text(
        "".join(strict_json.text(row) + "\n" for row in _metrics(trained, cfg.steps))
    )
    result = _result(trained, problem) | {"collapse": collapse}
    workdirs.write_json(workdir / "result.json", result)
    figure = run_figure.save_figure(workdir)
    good = problem.reward >= settings.threshold
    mass, best = (float(np.exp(logp_a)[good].sum()) for logp_a in (trained.logp_a, trained.target_logp_a))
    known = result["optimum"] is not None
    to_optimum = f" to the objective's optimum {result['distance_to_optimum']:.3f}," if known else ""
    display.note(
        f"total variation{to_optimum} to uniform over the {int(good.sum())} good outcomes "
        f"{result['distance_to_uniform']:.3f}; mass on them {mass:.3f}" + f" (at the optimum {best:.3f})" * known
    )
    display.note(f"figure: {figure}   numbers: {workdir / 'result.json'}")


def _check_finite(trained: training.Run, cfg: ToyRun) -> None:
    """Refuses a run whose policy became NaN, before anything of it is written.

    Raises:
      ValueError: one line with the step and the cure.
    """
    bad = np.flatnonzero(~np.isfinite(trained.reward_s))
    if len(bad) or np.isnan(trained.logp_a).any():
        step = int(bad[0]) if len(bad) else cfg.steps
        raise ValueError(
            f"step {step}: the policy's probabilities are not finite: lower toy.learning_rate="
            f"{cfg.toy.learning_rate:g}, or raise algorithm.beta={cfg.algorithm.beta:g}"
        )


def _metrics(trained: training.Run, steps: int) -> list[dict[str, float]]:
    """Rows of metrics.jsonl; without distances to an optimum that is not known."""
    known = bool(np.all(np.isfinite(trained.distance_s)))
    rows = []
    for step in range(0, steps, EVERY):
        to_optimum = {
            "distance/target": float(trained.distance_s[step]),
            "gap/kl_to_optimum": float(trained.kl_to_target_s[step]),
            "gap/kl_from_optimum": float(trained.kl_from_target_s[step]),
            "gap/tv_optimum": float(trained.distance_s[step]),
        }
        rows.append(
            {"step": step, "reward/mean": float(trained.reward_s[step])}
            | (to_optimum if known else {})
            | {"gap/tv_uniform": float(trained.uniform_distance_s[step])}
        )
    return rows


def _result(trained: training.Run, problem: problems.Problem) -> dict[str, Any]:
    """What result.json holds; None for what needs an optimum that is not known."""
    known = not np.any(np.isnan(trained.target_logp_a))
    return {
        "policy": np.exp(trained.logp_a).tolist(),
        "optimum": np.exp(trained.target_logp_a).tolist() if known else None,
        "reference": np.exp(problem.ref_logp).tolist(),
        "reward": problem.reward.tolist(),
        "distance_to_optimum": float(trained.distance_to_target) if known else None,
        "distance_to_uniform": float(trained.distance_to_uniform),
        "kl_to_optimum": float(kl.reverse(trained.logp_a, trained.target_logp_a)) if known else None,
        "kl_from_optimum": float(kl.forward(trained.logp_a, trained.target_logp_a)) if known else None,
    }
