"""Stored rollouts under other settings: what each batch's signal would have been, and where each setting ends."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mara_jax import config
from mara_jax.core import diversity, forecast, method_rules, reweighted
from mara_jax.predict import batches
from mara_jax.predict.prediction import LARGEST, Settings
from mara_jax.predict.stored_rollouts import Stored

# Effective sample size from which an estimate counts: a share of one half is known to 1.96 sqrt(.25 / 100), +- .1.
LEAST = 100
# Effective sample size of a prompt from which it may stand in a mean over prompts. The noise of many prompts averages
# out, but not the bias of weights that are divided by their sum, which is of the order of the spread over this number.
LEAST_IN_MEAN = 10
LEAST_OF_LOW = {"entropy_bits": 0.0, "number": 1.0}  # estimates that are too low from few samples: their least value
COVERED = 0.9  # mean weight below which the report says that the stored completions miss a part of the reference
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the run's beta, where none is given


def own_settings(run: config.LanguageRun) -> tuple[Settings, str]:
    """The settings of a run, and a sentence where vanilla RL or its advantages stand for its own method ("" else)."""
    algorithm = method_rules.resolved(run.algorithm)
    method, note = method_rules.forecast_method(algorithm), ""
    if method is None:
        note = f"the optimum of algorithm.method={run.algorithm.method} is not known: vanilla RL stands for it"
    elif algorithm.objective != "policy_gradient" or algorithm.level != "sequence":
        note = "the run's loss reads more than whole completions: its advantages are those of algorithm.method=vanilla"
    beta = max(algorithm.beta, forecast.LEAST_BETA)
    return Settings(method or "vanilla", algorithm.kl, beta, algorithm.threshold), note


def sweep(stored: Stored, chosen: dict[str, tuple]) -> list[Settings]:
    """The run's own settings, then all combinations of what is chosen.

    Args:
      stored: the batches.
      chosen: values of fields of Settings; a field that is not given keeps the run's own. Where no field is given:
        vanilla RL and MARA, at FACTORS of the run's beta.

    Raises:
      ValueError: a beta that float32 cannot hold beside these rewards.
    """
    own, _ = own_settings(stored.run)
    if not chosen:
        with_answers = any(name is not None for group in stored.answer for name in group)
        mara = own.objective if own.objective != "vanilla" else "answers" if with_answers else "strings"
        middle = own.beta if own.beta > forecast.LEAST_BETA else 0.1
        chosen = {"objective": ("vanilla", mara), "beta": tuple(float(f"{middle * x:.3g}") for x in FACTORS)}
    values = [chosen.get(name, (getattr(own, name),)) for name in Settings._fields]
    settings = list(dict.fromkeys([own, *(Settings(*one) for one in itertools.product(*values))]))
    least = (float(np.ptp(stored.reward)) or 1.0) / LARGEST
    for one in settings:
        if not least <= one.beta <= LARGEST:
            raise ValueError(f"beta={one.beta:g} must lie in [{least:.1g}, {LARGEST:g}] beside these rewards: try 0.1")
    return settings


def replay(
    stored: Stored, settings: Sequence[Settings], *, resamples: int = forecast.RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """What stored rollouts say about each of some settings.

    Args:
      stored: the batches.
      settings: the run's own first.
      resamples: of the bootstrap, for intervals.
      seed: of the resamples.

    Returns:
      A dict of plain numbers and lists for JSON. For each setting `batches`, see `batches.summary` (None where it
      cannot be computed), and `prompts` and their `mean`, the optimum: `reward`, `good` (probability of a good
      completion), `none` (of no answer), `entropy_bits` and `number` (effective number) of the answers, `share` of each
      answer, ends of 95 % intervals beside each (None where `too_small` keeps the numbers from being shown, and where
      no resample has an answer), `effective_samples`, and `too_small`, a sentence or None.

    Raises:
      ValueError: one line.
    """
    own_signal = batches.signal(stored, settings[0])
    weighted = {prompt: _weighted(stored, prompt) for prompt in sorted(stored.text)}
    by_prompt = {prompt: known for prompt, known in weighted.items() if len(known.counted.reward)}
    if not by_prompt:
        raise ValueError("no stored completion ends, and others are left out of the update (task.truncated=mask)")
    reference = [_reference(stored, prompt, known.every) for prompt, known in by_prompt.items()]
    entries = []
    for one in settings:
        signal = batches.signal(stored, one)
        optima = _optima(stored, one, by_prompt, resamples, seed)
        entries.append(
            one._asdict()
            | {
                "own": one == settings[0],
                "batches": batches.summary(signal, own_signal) if signal and own_signal else None,
                "prompts": [_of_prompt(prompt, *optimum, by_prompt[prompt]) for prompt, optimum in optima.items()],
                "mean": _mean(list(optima.values())),
            }
        )
    record = {
        "rollouts": {
            "steps": [int(stored.step.min()), int(stored.step.max())],
            "count": int(stored.reward.size),
            "group_size": int(stored.reward.shape[1]),
            "prompts": len(by_prompt),
            "prompts_left_out": len(weighted) - len(by_prompt),
            "reward": float(np.mean(stored.reward)),
        },
        "least": LEAST,
        "reference": reference,
        "settings": entries,
    }
    return record | {"notes": notes(record, own_settings(stored.run)[1])}


class _Known(NamedTuple):
    """A prompt's completions with their weights: `every` one, for how well they stand for the reference policy; those
    `counted` in the update, for the optimum; and the names of the answers of these."""

    every: reweighted.Weighted
    counted: reweighted.Weighted
    answers: tuple[str, ...]


def _weighted(stored: Stored, prompt: int) -> _Known:
    row_k = stored.prompt_id == prompt
    reward, logp, ref_logp = (array[row_k].ravel() for array in (stored.reward, stored.logp, stored.ref_logp))
    # Conditioning policy and reference on completions that end leaves the ratio of two such completions as it was, but
    # the mean of their weights is then the reference's probability of an end over the policy's: 1 is that of all.
    counted = stored.finished[row_k].ravel() if stored.leaves_out_truncated else np.ones(len(reward), bool)
    names_n = np.array([name for k in np.flatnonzero(row_k) for name in stored.answer[k]], object)
    answers = tuple(sorted({name for name in names_n[counted] if name is not None}))
    index = {name: number for number, name in enumerate(answers)}
    answer = np.array([index.get(name, -1) for name in names_n])
    every = reweighted.Weighted(reward, answer, ref_logp, reweighted.log_weights(logp, ref_logp))
    return _Known(every, reweighted.Weighted(*(array[counted] for array in every)), answers)


def _optima(
    stored: Stored, settings: Settings, by_prompt: dict[int, _Known], resamples: int, seed: int
) -> dict[int, tuple[dict, float]]:
    """The optimum under each prompt, resampled only where it is known well enough to be told: alone or in the mean."""
    optima = {prompt: _optimum(stored, settings, prompt, known, 0, seed) for prompt, known in by_prompt.items()}
    least = LEAST if _mean_too_small([effective for _, effective in optima.values()]) else LEAST_IN_MEAN
    for prompt, known in by_prompt.items():
        if resamples and optima[prompt][1] >= least:
            optima[prompt] = _optimum(stored, settings, prompt, known, resamples, seed)
    return optima


def _optimum(stored: Stored, settings: Settings, prompt: int, known: _Known, resamples: int, seed: int):
    """The optimum under one prompt, in numbers, rows as of `reweighted.Optimum`; and its effective sample size."""
    weighted, answers = known.counted, known.answers
    objective = forecast.Objective(*settings)  # pyright: ignore[reportArgumentType]
    log_mass_a = None
    if settings.objective == "answers" and prompt in stored.reference and answers:
        reference, index = stored.reference[prompt], {name: number for number, name in enumerate(answers)}
        # An answer that the rollouts lack has a mass of its own, which they cannot use.
        other = {
            name: len(index) + i for i, name in enumerate(sorted(set(filter(None, reference.answer)) - set(index)))
        }
        numbers: dict[str | None, int] = {**index, **other}
        answer_n = np.array([numbers.get(name, -1) for name in reference.answer])
        log_mass_a = reweighted.measured_log_mass(objective, reference.reward, answer_n, len(index) + len(other))
    count = len(answers) if log_mass_a is None else len(log_mass_a)
    optimum = reweighted.optimum(
        objective, weighted, max(count, 1), log_mass_a=log_mass_a, resamples=resamples, seed=seed + 7919 * prompt
    )
    mass_ra, none_r = optimum.mass[:, : len(answers)], optimum.mass[:, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        share_ra = mass_ra / mass_ra.sum(axis=1, keepdims=True)
    bits_r = np.array([diversity.entropy_bits(mass_a) for mass_a in mass_ra])
    of_resample = {"reward": optimum.reward, "good": optimum.good, "none": none_r, "entropy_bits": bits_r}
    number_r = np.where(mass_ra.sum(axis=1) > 0, 2.0**bits_r, 0.0)
    return of_resample | {"number": number_r, "share": share_ra}, optimum.effective_samples


def _of_prompt(prompt: int, numbers: dict, effective: float, known: _Known) -> dict[str, Any]:
    count = len(known.counted.reward)
    return {
        "prompt_id": prompt,
        "count": count,
        "answers": list(known.answers),
        **intervals(numbers),
        "effective_samples": effective,
        "too_small": _too_small(effective, count),
    }


def _too_small(effective: float, count: int) -> str | None:
    if effective >= LEAST:
        return None
    return f"too small: {count} completions count as {effective:.1f} at this optimum, and {LEAST} are needed"


def _mean(optima: list[tuple[dict, float]]) -> dict[str, Any]:
    """Means over prompts; the resamples of different prompts are independent. No interval where some have none."""
    rows = min(len(of_prompt["reward"]) for of_prompt, _ in optima)
    names = [name for name in optima[0][0] if name != "share"]
    numbers = {name: np.mean([of_prompt[name][:rows] for of_prompt, _ in optima], axis=0) for name in names}
    effective = [one for _, one in optima]
    return {
        **intervals(numbers), "effective_samples": sum(effective), "too_small": _mean_too_small(effective),
    }  # fmt: skip


def _mean_too_small(effective: list[float]) -> str | None:
    total, least = sum(effective), LEAST_IN_MEAN if len(effective) > 1 else LEAST
    few = sum(one < least for one in effective)
    if total >= LEAST and not few:
        return None
    return (
        f"too small: effective sample sizes of {len(effective)} prompts sum to {total:.1f} ({LEAST} are needed), "
        f"and {few} are below {least}"
    )


def intervals(numbers: dict[str, np.ndarray]) -> dict[str, Any]:
    """Row 0 of each array, and the ends of the 95 % interval of its resamples; None where these say nothing.

    Few samples show too few answers, so that estimates of entropy and number are low, and those of resamples are low by
    as much again. Their interval is therefore the resamples' one mirrored at the estimate (the basic bootstrap).
    """
    ends = {}
    for name, rows in numbers.items():
        ends[name] = rows[0].tolist()
        low, high = (_quantile(rows[1:], at) for at in (0.025, 0.975))
        if name in LEAST_OF_LOW and None not in (low, high):
            value = ends[name]
            low, high = max(2 * value - high, min(value, LEAST_OF_LOW[name])), 2 * value - low
            low, high = min(low, value), max(high, value)
        ends[f"{name}_low"], ends[f"{name}_high"] = low, high
    return ends


def _quantile(rows: np.ndarray, at: float) -> Any:
    """Over the rows that have a number: a resample without any answer has no shares. None where no row has one."""
    if len(rows) and not np.isnan(rows).any():
        return np.quantile(rows, at, axis=0).tolist()
    known = ~np.isnan(rows).all(axis=0)
    values = np.full(rows.shape[1:], None, object)
    if known.any():
        values[known] = np.nanquantile(rows[:, known], at, axis=0)
    return values.tolist()


def _reference(stored: Stored, prompt: int, weighted: reweighted.Weighted) -> dict[str, Any]:
    own = len(stored.reference[prompt].reward) if prompt in stored.reference else 0
    counts = {"prompt_id": prompt, "count": len(weighted.reward), "own_samples": own}
    return counts | reweighted.of_reference(weighted)._asdict()


def notes(record: dict[str, Any], about_own: str) -> list[str]:
    """Lines about what the stored completions cannot say.

    Args:
      record: as `replay` makes it.
      about_own: from `own_settings`.
    """
    mean = float(np.mean([one["mean_weight"] for one in record["reference"]]))
    errors = [one["standard_error"] for one in record["reference"]]
    error = float(np.sqrt(np.sum(np.square(errors))) / len(errors))
    lines = [about_own[:1].upper() + about_own[1:]] if about_own else []
    average = f"Weights average {mean:.2f} +- {error:.2f} where 1 is expected"
    if mean < COVERED:
        lines.append(
            f"{average}: the policies hardly reach {1 - mean:.0%} of the reference, which estimates therefore lack"
        )
    if mean > 1 + max(0.1, 4 * error):
        lines.append(
            f"{average}: the stored log-probabilities are not those with which completions were drawn, or "
            "sampler and trainer round differently: see sampler/logp_gap in metrics.jsonl"
        )
    if any(one["batches"] is None for one in record["settings"]):
        lines.append(
            "?: batches of MARA over answers need samples of the reference under every prompt, and the run kept none"
        )
    left_out = record["rollouts"]["prompts_left_out"]
    if left_out:
        total = left_out + record["rollouts"]["prompts"]
        lines.append(f"Optima lack {left_out} of {total} prompts: no completion under them ends")
    unmeasured = _without_masses(record)
    if unmeasured:
        lines.append(
            f"MARA over answers: the run kept no samples of the reference under {unmeasured} of "
            f"{len(record['reference'])} prompts, whose masses of answers are those of the stored completions"
        )
    return lines


def _without_masses(record: dict[str, Any]) -> int:
    """How many prompts have an optimum of MARA over answers without the masses that the run has measured."""
    kept = {one["prompt_id"]: one["own_samples"] for one in record["reference"]}
    answered = [
        one["prompt_id"]
        for setting in record["settings"] if setting["objective"] == "answers"
        for one in setting["prompts"] if one["answers"]
    ]  # fmt: skip
    return sum(not kept[prompt] for prompt in set(answered))
