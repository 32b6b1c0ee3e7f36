"""Predicts the optimum of every objective from samples of the reference policy, as one dict for JSON."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from mara_jax.core import forecast, forecast_curves, pooled_samples
from mara_jax.core.targets import Direction

MOST_FLIPPING = 8  # answers, those of the largest shares, whose pairs are searched for flips
LARGEST = 1e30  # largest reward, and largest spread of rewards over beta, whose optimum float32 can compute
WIDE = 0.9  # length of a share's confidence interval from which no prediction is made
USEFUL = 30  # least effective sample size of an answer for a prediction of MARA over strings
OBJECTIVES = {"vanilla": "vanilla", "answers": "MARA over answers", "strings": "MARA over strings"}


class ReferenceSamples(NamedTuple):
    """n samples of the reference policy under one prompt, or (`exact`) every outcome of an enumerated problem.

    `reward` [n]; `answer` [n] index into `answers`, negative for none; `ref_logp` [n] (nats, whole completions) or
    None where it is not known; `answers` their names. `equal_strings`: every answer has as many good strings as any
    other.
    """

    reward: np.ndarray
    answer: np.ndarray
    ref_logp: np.ndarray | None
    answers: tuple[str, ...]
    equal_strings: bool = False
    exact: bool = False


class Settings(NamedTuple):
    """The objective whose optimum is predicted: a key of OBJECTIVES, direction, beta and threshold (reward units)."""

    objective: str
    kl: Direction
    beta: float
    threshold: float


def predict(
    samples: ReferenceSamples, settings: Settings, *, seed: int = 0, resamples: int = forecast.RESAMPLES
) -> dict[str, Any]:
    """Predicts every objective's optimum over a grid of betas, and at the configured one in particular.

    Args:
      samples: of the reference policy.
      settings: of the run.
      seed: of the resamples.
      resamples: number of bootstrap resamples; exact outcomes are not resampled.

    Returns:
      A dict of plain numbers and lists: the grid, for each direction and objective the curves with their intervals,
      the flips, the collapsed stretches of beta, and what holds at the configured beta. None stands for what does
      not exist or cannot be known.

    Raises:
      ValueError: no samples, or values that are not finite or beyond float32's range.
    """
    check(samples)
    _check_settings(samples, settings)
    resamples = 0 if samples.exact else resamples
    beta_b = forecast_curves.beta_grid(samples.reward, settings.beta)
    own = int(np.argmin(np.abs(beta_b - settings.beta)))
    record: dict[str, Any] = {
        "settings": settings._asdict(),
        "answers": list(samples.answers),
        "draws": reference_of(samples, settings.threshold),
        "resamples": resamples,
        "collapsed_at": forecast_curves.COLLAPSED,
        "betas": beta_b.tolist(),
        "own": own,
        "objectives": {},
    }
    for direction in ("reverse", "forward"):
        record["objectives"][direction] = {
            name: _objective(name, direction, samples, settings.threshold, beta_b, own, seed, resamples)
            for name in OBJECTIVES
            # Where each outcome is its own answer, MARA is the papers' form, over strings.
            if not (samples.exact and name == "answers")
        }
    record["verdict"] = verdict(record)
    return record


def check(samples: ReferenceSamples) -> None:
    """Refuses samples from which nothing can be predicted.

    Raises:
      ValueError: one line with the number at fault and the cure.
    """
    if len(samples.reward) == 0:
        raise ValueError("0 samples of the reference: nothing can be predicted; give at least one, better 256")
    for name in ("reward", "ref_logp"):
        value = getattr(samples, name)
        if value is not None and not np.all(np.isfinite(value) if name == "reward" else value < np.inf):
            row = int(np.argmin(np.isfinite(value)))
            raise ValueError(f"{name} of sample {row + 1} is {value[row]}: give a finite number")
    if np.max(np.abs(samples.reward)) > LARGEST:
        row = int(np.argmax(np.abs(samples.reward)))
        raise ValueError(
            f"reward of sample {row + 1} is {samples.reward[row]:g}: at most {LARGEST:g} either way; rescale"
        )
    if not len(samples.answers):
        raise ValueError(
            f"none of the {len(samples.reward)} samples has an answer: there are no shares of answers to predict"
        )


def _check_settings(samples: ReferenceSamples, settings: Settings) -> None:
    if not math.isfinite(settings.threshold):
        raise ValueError(f"threshold={settings.threshold} must be a finite reward: try 0.8")
    spread = float(np.ptp(samples.reward)) or 1.0
    if not spread / LARGEST <= settings.beta <= LARGEST:
        raise ValueError(
            f"beta={settings.beta:g} must lie in [{spread / LARGEST:.1g}, {LARGEST:g}] where rewards differ by "
            f"{np.ptp(samples.reward):g}: try {spread / 10:.1g}"
        )


def reference_of(samples: ReferenceSamples, threshold: float) -> dict[str, Any]:
    """The reference policy in numbers: samples of each answer; shares with an answer, good, and both; mean reward."""
    answers = len(samples.answers)
    counts = [int(np.sum(samples.answer == a)) for a in range(answers)]
    return {
        "count": len(samples.reward),
        "exact": samples.exact,
        "counts": counts,
        "valid": float(np.mean(samples.answer >= 0)),
        "good": float(np.mean(samples.reward >= threshold)),
        "good_answers": float(np.mean((samples.reward >= threshold) & (samples.answer >= 0))),
        "mean_reward": float(np.mean(samples.reward)),
    }


def _objective(
    name, direction, samples: ReferenceSamples, threshold, beta_b, own, seed, resamples
) -> dict[str, Any] | None:
    """The curves, flips and collapsed stretches of one objective; None without the log-probabilities that it needs."""
    if name == "strings" and samples.ref_logp is None:
        return None
    answers = len(samples.answers)
    bare_samples = forecast.Samples(samples.reward, samples.answer, samples.ref_logp, samples.exact)
    objective = forecast.Objective(name, direction, float(beta_b[own]), threshold)
    mass_brc = forecast.class_mass(
        objective, bare_samples, answers, beta_b, key=jax.random.key(seed), resamples=resamples
    )
    if not np.all(np.isfinite(mass_brc[:, 0])):
        raise ValueError(f"the {direction} optimum of {OBJECTIVES[name]} is beyond float32: rescale rewards and beta")
    entry = _summary(mass_brc, resamples, beta_b, own, samples.answers)
    if name == "strings":
        entry["trust"] = string_trust(samples, threshold)
        if entry["trust"]["known"]:
            entry |= _equal_shares(entry["curves"], answers, own)
    return entry


def _summary(mass_brc: np.ndarray, resamples: int, beta_b, own: int, answers) -> dict[str, Any]:
    curves = forecast_curves.summarise(mass_brc, resamples)
    sampled_bra = mass_brc[:, : resamples + 1, :-1]
    lists = {name: value.tolist() for name, value in curves._asdict().items()}
    return {
        "curves": lists,
        "at_own": {name: value[own] for name, value in lists.items()},
        "flips": _flips(sampled_bra, curves, beta_b, answers),
        "collapsed": _collapsed(sampled_bra, curves, beta_b, answers),
    }


def _leading(share_ba: np.ndarray) -> np.ndarray:
    """Up to MOST_FLIPPING answers: those that lead at some beta first, then by their largest share."""
    rank_a = share_ba.max(axis=0)
    rank_a[np.unique(share_ba.argmax(axis=1))] += 1.0
    return np.argsort(-rank_a, kind="stable")[:MOST_FLIPPING]


def _flips(mass_bra, curves: forecast_curves.Curves, beta_b, answers) -> list[dict[str, Any]]:
    """Betas at which two answers have equal shares, with intervals, and which of the two is larger below it."""
    with np.errstate(divide="ignore"):
        answer_k = _leading(curves.share)
        log_brk = np.log(mass_bra[:, :, answer_k])
    flips = []
    for i in range(len(answer_k)):
        for j in range(i):
            with np.errstate(invalid="ignore"):
                ratio_rb = (log_brk[:, :, i] - log_brk[:, :, j]).T
            for beta in forecast_curves.crossings(beta_b, ratio_rb[0]):
                share, leads = _at_crossing(beta, beta_b, mass_bra[:, 0], (answer_k[i], answer_k[j]))
                low, high, crossing = _interval(beta, beta_b, ratio_rb[1:])
                below, above = (i, j) if np.nan_to_num(ratio_rb[0])[beta_b < beta][-1] > 0 else (j, i)
                flips.append(
                    {
                        "beta": beta,
                        "low": low,
                        "high": high,
                        "resamples_with_one": crossing,
                        "below": answers[answer_k[below]],
                        "above": answers[answer_k[above]],
                        "share": share,
                        "leads": leads,
                    }
                )
    return sorted(flips, key=lambda flip: flip["beta"])


def _at_crossing(beta: float, beta_b, mass_ba: np.ndarray, pair: tuple[int, int]) -> tuple[float, bool]:
    """The share of two answers where their shares are equal, and whether no other answer is above them there.

    Log-masses are interpolated in 1 / beta, as crossings are: at the nearest beta of the grid the two shares differ.
    """
    log_ba = np.log(np.maximum(mass_ba.astype(np.float64), 1e-45))
    log_a = np.array([np.interp(-1.0 / beta, -1.0 / beta_b, log_b) for log_b in log_ba.T])
    log_pair = max(log_a[list(pair)])
    others_a = np.delete(log_a, pair)
    return float(np.exp(log_pair) / np.exp(log_a).sum()), bool(np.all(others_a <= log_pair + 0.01))


def _collapsed(mass_bra, curves: forecast_curves.Curves, beta_b, answers) -> list[dict[str, Any]]:
    """Stretches of beta in which one answer has COLLAPSED of the completions with an answer.

    An end outside of the grid is None.
    """
    above_b = forecast_curves.log_odds_above(curves.top)
    sampled_bra = mass_bra[:, 1:].astype(np.float64)
    above_rb = forecast_curves.log_odds_above(sampled_bra.max(axis=-1) / np.maximum(sampled_bra.sum(axis=-1), 1e-300)).T
    ends: list[float | None] = [*forecast_curves.crossings(beta_b, above_b)]
    inside = np.flatnonzero(above_b > 0)
    ends = ([None] if len(inside) and inside[0] == 0 else []) + ends
    ends += [None] if len(ends) % 2 else []
    stretches = []
    for start, end in zip(ends[::2], ends[1::2], strict=True):
        within_b = (beta_b >= (start or 0)) & (beta_b <= (end or np.inf)) & (above_b > 0)
        if not within_b.any():
            continue
        leader = int(np.argmax(curves.share[np.flatnonzero(within_b)[0]]))
        stretches.append(
            {
                "answer": answers[leader],
                "from": start,
                "to": end,
                "from_interval": _interval(start, beta_b, above_rb)[:2] if start else None,
                "to_interval": _interval(end, beta_b, above_rb)[:2] if end else None,
            }
        )
    return stretches


def _interval(beta, beta_b, value_rb):
    return forecast_curves.crossing_interval(beta, beta_b, value_rb) if len(value_rb) else (beta, beta, 1.0)


def string_trust(samples: ReferenceSamples, threshold: float) -> dict[str, Any]:
    """Whether samples can estimate how many good strings each answer has: the effective sample size of each estimate.

    Each sample is weighted by 1 / ref(y): one of probability e^-60 stands for e^60 / n strings. The estimate is
    unbiased, but the one or two least likely samples may dominate it, so every answer needs an effective sample size
    of USEFUL.
    """
    assert samples.ref_logp is not None
    counts = []
    for a in range(len(samples.answers)):
        good = (samples.answer == a) & (samples.reward >= threshold)
        counts.append(pooled_samples.effective_samples(np.where(good, -samples.ref_logp, -np.inf)))
    seen = [count for count in counts if count > 0]
    known = samples.equal_strings and bool(np.any(samples.reward >= threshold))
    useful = samples.exact or (len(seen) == len(counts) and min(seen) >= USEFUL)
    return {"effective_draws": counts, "needed": USEFUL, "useful": bool(useful), "known": known}


def _equal_shares(before: dict[str, list], answers: int, own: int) -> dict[str, Any]:
    """The curves where all answers have equally many good strings: equally likely strings, equally likely answers."""
    none = {end: np.array(before["mass" + end])[:, -1:] for end in ("", "_low", "_high")}
    equal = {}
    for end, other in (("", ""), ("_low", "_high"), ("_high", "_low")):
        mass_b1 = (1 - none[other]) / answers
        equal["mass" + end] = np.concatenate([np.repeat(mass_b1, answers, axis=1), none[end]], axis=1)
        equal["share" + end] = np.full((len(mass_b1), answers), 1 / answers)
        equal["top" + end] = np.full(len(mass_b1), 1 / answers)
        equal["number" + end] = np.full(len(mass_b1), float(answers))
    lists = {name: value.tolist() for name, value in equal.items()}
    return {"curves": lists, "at_own": {k: v[own] for k, v in lists.items()}, "flips": [], "collapsed": []}


def verdict(record: dict[str, Any]) -> str:
    """One sentence: the shares of the answers at the configured optimum, and which change would avoid a collapse.

    Args:
      record: as `predict` returns it.
    """
    settings, answers = record["settings"], record["answers"]
    name, kl, beta = settings["objective"], settings["kl"], settings["beta"]
    own = record["objectives"][kl][name]
    no_good_sample = name != "vanilla" and not record["draws"]["good_answers" if name == "answers" else "good"]
    if no_good_sample:  # MARA then leaves the optimum of vanilla RL unchanged
        own = record["objectives"][kl]["vanilla"]
    title = "vanilla RL" if name == "vanilla" else OBJECTIVES[name]
    where = f"At beta {beta:g} the optimum of {title}, {kl} KL,"
    if own is None:
        return f"{where} cannot be determined from these samples: MARA over strings needs ref_logp of each"
    if len(answers) < 2:
        return f'{where} has one answer, "{answers[0]}": no sample of the reference has another'
    trust = own.get("trust")
    if trust and not (trust["known"] or trust["useful"]):
        least = min(trust["effective_draws"])
        return (
            f"{where} cannot be determined from these samples: they count strings by weights 1 / ref(y), and some "
            f"answer's effective sample size is {least:.1f} ({trust['needed']} are needed)"
        )
    at = own["at_own"]
    top = int(np.argmax(at["share"]))
    low, high = at["share_low"][top], at["share_high"][top]
    if no_good_sample:
        which = (
            "outcome"
            if record["draws"]["exact"]
            else "good sample has an answer"
            if record["draws"]["good"]
            else "sample"
        )
        reaches = "" if which.startswith("good") else f" reaches the threshold {settings['threshold']:g}"
        where = f"no {which}{reaches}: MARA changes nothing. {where}"
    if high - low >= WIDE:
        return (
            f'{where} cannot be determined from these samples: the share of "{answers[top]}" may lie anywhere in '
            f"[{low:.0%}, {high:.0%}]; give more than {record['draws']['count']} samples"
        )
    puts = f'{where} puts {at["share"][top]:.1%}{_between(low, high)} of the answers on "{answers[top]}"'
    if at["share"][top] < record["collapsed_at"]:
        warn = "" if high < record["collapsed_at"] else ", though it lies within the interval"
        kept = f"{at['number']:.2g} of {len(answers)} answers are left in effect"
        return f"{puts}: no collapse is predicted{warn}; {kept}"
    return f"{puts}: expect collapse; {_cure(record)}"


def _cure(record: dict[str, Any]) -> str:
    settings, objectives = record["settings"], record["objectives"][record["settings"]["kl"]]
    cures = []
    stretch = next((c for c in objectives[settings["objective"]]["collapsed"] if _within(c, settings["beta"])), None)
    if stretch and stretch["to"]:
        cures.append(f"a beta above {stretch['to']:.3g} would keep more")
    other = "answers" if "answers" in objectives else "strings"
    if settings["objective"] != other:
        shares = objectives[other]["at_own"]["share"]
        top = np.argsort(-np.array(shares), kind="stable")[:3]
        mix = ", ".join(f'"{record["answers"][a]}" {shares[a]:.0%}' for a in top)
        more = ", ..." if len(shares) > len(top) else ""
        if max(shares) < record["collapsed_at"]:
            cures.append(f"{OBJECTIVES[other]} would give {mix}{more}")
    return ", and ".join(cures) or "no beta on the grid keeps more: the reference itself has to know other good answers"


def _within(stretch: dict[str, Any], beta: float) -> bool:
    return (stretch["from"] or 0.0) <= beta <= (stretch["to"] or math.inf)


def _between(low: float, high: float) -> str:
    return "" if low == high else f" [{low:.1%}, {high:.1%}]"
