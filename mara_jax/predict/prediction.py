"""What a configuration's optimum will be, from draws of its reference: every objective, as one JSON-able dict."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from mara_jax.core import forecast, forecast_curves, pooled_samples
from mara_jax.core.targets import Direction

KEPT = 8  # answers, the largest ones, among which flips are looked for
LARGEST = 1e30  # of rewards, and of their spread over beta: beyond it float32 runs out of range on the way
WIDE = 0.9  # length of a share's interval from which it says nothing
USEFUL = 30  # effective draws of a class below which MARA over strings is not predicted in earnest
OBJECTIVES = {"vanilla": "vanilla", "answers": "MARA over answers", "strings": "MARA over strings"}


class Draws(NamedTuple):
    """n draws of the reference under one prompt, or (`exact`) every outcome there is.

    `reward` [n]; `answer` [n] index into `answers`, negative for none; `ref_logp` [n] (nats, whole strings) or None
    where it is not known; `answers` their names. `equal_strings`: every answer has as many good strings as any other.
    """

    reward: np.ndarray
    answer: np.ndarray
    ref_logp: np.ndarray | None
    answers: tuple[str, ...]
    equal_strings: bool = False
    exact: bool = False


class Settings(NamedTuple):
    """The objective that is asked about: a key of OBJECTIVES, direction, beta and threshold (reward units)."""

    objective: str
    kl: Direction
    beta: float
    threshold: float


def predict(draws: Draws, settings: Settings, *, seed: int = 0, resamples: int = forecast.RESAMPLES) -> dict[str, Any]:
    """Predicts every objective's optimum over a grid of betas, and at the configured one in particular.

    Args:
      draws: of the reference.
      settings: of the run.
      seed: of the resamples.
      resamples: how many; none for exact draws.

    Returns:
      A dict of plain numbers and lists: the grid, for each direction and objective the curves with their intervals,
      the flips, the collapsed stretches of beta, and what holds at the configured beta. None stands for what does
      not exist or cannot be known.

    Raises:
      ValueError: no draws, or values that are not finite or beyond float32's range.
    """
    check(draws)
    _check_settings(draws, settings)
    resamples = 0 if draws.exact else resamples
    beta_b = forecast_curves.beta_grid(draws.reward, settings.beta)
    own = int(np.argmin(np.abs(beta_b - settings.beta)))
    found: dict[str, Any] = {
        "settings": settings._asdict(),
        "answers": list(draws.answers),
        "draws": reference_of(draws, settings.threshold),
        "resamples": resamples,
        "collapsed_at": forecast_curves.COLLAPSED,
        "betas": beta_b.tolist(),
        "own": own,
        "objectives": {},
    }
    for direction in ("reverse", "forward"):
        found["objectives"][direction] = {
            name: _objective(name, direction, draws, settings.threshold, beta_b, own, seed, resamples)
            for name in OBJECTIVES
            # Where each outcome is its own answer, MARA is the papers' form, over strings.
            if not (draws.exact and name == "answers")
        }
    found["verdict"] = verdict(found)
    return found


def check(draws: Draws) -> None:
    """Refuses draws that nothing can be predicted from.

    Raises:
      ValueError: one line with the number at fault and the cure.
    """
    if len(draws.reward) == 0:
        raise ValueError("0 draws of the reference: nothing can be predicted; give at least one, better 256")
    for name in ("reward", "ref_logp"):
        value = getattr(draws, name)
        if value is not None and not np.all(np.isfinite(value) if name == "reward" else value < np.inf):
            row = int(np.argmin(np.isfinite(value)))
            raise ValueError(f"{name} of draw {row + 1} is {value[row]}: give a finite number")
    if np.max(np.abs(draws.reward)) > LARGEST:
        row = int(np.argmax(np.abs(draws.reward)))
        raise ValueError(f"reward of draw {row + 1} is {draws.reward[row]:g}: at most {LARGEST:g} either way; rescale")
    if not len(draws.answers):
        raise ValueError(f"none of the {len(draws.reward)} draws has an answer: nothing can collapse or be kept")


def _check_settings(draws: Draws, settings: Settings) -> None:
    if not math.isfinite(settings.threshold):
        raise ValueError(f"threshold={settings.threshold} must be a finite reward: try 0.8")
    spread = float(np.ptp(draws.reward)) or 1.0
    if not spread / LARGEST <= settings.beta <= LARGEST:
        raise ValueError(
            f"beta={settings.beta:g} must lie in [{spread / LARGEST:.1g}, {LARGEST:g}] where rewards differ by "
            f"{np.ptp(draws.reward):g}: try {spread / 10:.1g}"
        )


def reference_of(draws: Draws, threshold: float) -> dict[str, Any]:
    """What the draws say of the reference itself: counts of each answer, share with one, good, and both."""
    answers = len(draws.answers)
    counts = [int(np.sum(draws.answer == a)) for a in range(answers)]
    return {
        "count": len(draws.reward),
        "exact": draws.exact,
        "counts": counts,
        "valid": float(np.mean(draws.answer >= 0)),
        "good": float(np.mean(draws.reward >= threshold)),
        "good_answers": float(np.mean((draws.reward >= threshold) & (draws.answer >= 0))),
        "mean_reward": float(np.mean(draws.reward)),
    }


def _objective(name, direction, draws: Draws, threshold, beta_b, own, seed, resamples) -> dict[str, Any] | None:
    """The curves of one objective, and what is read off them; None where the draws cannot tell."""
    if name == "strings" and draws.ref_logp is None:
        return None
    answers = len(draws.answers)
    samples = forecast.Samples(draws.reward, draws.answer, draws.ref_logp, draws.exact)
    objective = forecast.Objective(name, direction, float(beta_b[own]), threshold)
    mass_brc = forecast.class_mass(objective, samples, answers, beta_b, key=jax.random.key(seed), resamples=resamples)
    if not np.all(np.isfinite(mass_brc[:, 0])):
        raise ValueError(f"the {direction} optimum of {OBJECTIVES[name]} is beyond float32: rescale rewards and beta")
    read = _read_off(mass_brc, resamples, beta_b, own, draws.answers)
    if name == "strings":
        read["trust"] = string_trust(draws, threshold)
        if read["trust"]["known"]:
            read |= _level(read["curves"], answers, own)
    return read


def _read_off(mass_brc: np.ndarray, resamples: int, beta_b, own: int, answers) -> dict[str, Any]:
    found = forecast_curves.read(mass_brc, resamples)
    sampled_bra = mass_brc[:, : resamples + 1, :-1]
    lists = {name: value.tolist() for name, value in found._asdict().items()}
    return {
        "curves": lists,
        "at_own": {name: value[own] for name, value in lists.items()},
        "flips": _flips(sampled_bra, found, beta_b, answers),
        "collapsed": _collapsed(sampled_bra, found, beta_b, answers),
    }


def _leading(share_ba: np.ndarray) -> np.ndarray:
    """Up to KEPT answers: those that lead at some beta first, then by their largest share."""
    rank_a = share_ba.max(axis=0)
    rank_a[np.unique(share_ba.argmax(axis=1))] += 1.0
    return np.argsort(-rank_a, kind="stable")[:KEPT]


def _flips(mass_bra, found: forecast_curves.Curves, beta_b, answers) -> list[dict[str, Any]]:
    """Where two answers change places: the beta with its interval, and which of the two leads below it."""
    with np.errstate(divide="ignore"):
        kept_k = _leading(found.share)
        log_brk = np.log(mass_bra[:, :, kept_k])
    flips = []
    for i in range(len(kept_k)):
        for j in range(i):
            with np.errstate(invalid="ignore"):
                ratio_rb = (log_brk[:, :, i] - log_brk[:, :, j]).T
            for beta in forecast_curves.crossings(beta_b, ratio_rb[0]):
                share, leads = _at_crossing(beta, beta_b, mass_bra[:, 0], (kept_k[i], kept_k[j]))
                low, high, held = _interval(beta, beta_b, ratio_rb[1:])
                below, above = (i, j) if np.nan_to_num(ratio_rb[0])[beta_b < beta][-1] > 0 else (j, i)
                flips.append(
                    {
                        "beta": beta,
                        "low": low,
                        "high": high,
                        "resamples_with_one": held,
                        "below": answers[kept_k[below]],
                        "above": answers[kept_k[above]],
                        "share": share,
                        "leads": leads,
                    }
                )
    return sorted(flips, key=lambda flip: flip["beta"])


def _at_crossing(beta: float, beta_b, mass_ba: np.ndarray, pair: tuple[int, int]) -> tuple[float, bool]:
    """The share at which two answers meet, and whether none of the others lies above them there.

    Log-masses are interpolated in 1 / beta, as crossings are: at the nearest beta of the grid one of the two is ahead.
    """
    log_ba = np.log(np.maximum(mass_ba.astype(np.float64), 1e-45))
    log_a = np.array([np.interp(-1.0 / beta, -1.0 / beta_b, log_b) for log_b in log_ba.T])
    met = max(log_a[list(pair)])
    others_a = np.delete(log_a, pair)
    return float(np.exp(met) / np.exp(log_a).sum()), bool(np.all(others_a <= met + 0.01))


def _collapsed(mass_bra, found: forecast_curves.Curves, beta_b, answers) -> list[dict[str, Any]]:
    """Stretches of beta in which one answer has COLLAPSED of the completions with an answer; None: no end seen."""
    above_b = forecast_curves.log_odds_above(found.top)
    sampled_bra = mass_bra[:, 1:].astype(np.float64)
    above_rb = forecast_curves.log_odds_above(sampled_bra.max(axis=-1) / np.maximum(sampled_bra.sum(axis=-1), 1e-300)).T
    ends: list[float | None] = [*forecast_curves.crossings(beta_b, above_b)]
    inside = np.flatnonzero(above_b > 0)
    ends = ([None] if len(inside) and inside[0] == 0 else []) + ends
    ends += [None] if len(ends) % 2 else []
    stretches = []
    for start, end in zip(ends[::2], ends[1::2], strict=True):
        held = (beta_b >= (start or 0)) & (beta_b <= (end or np.inf)) & (above_b > 0)
        if not held.any():
            continue
        leader = int(np.argmax(found.share[np.flatnonzero(held)[0]]))
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


def string_trust(draws: Draws, threshold: float) -> dict[str, Any]:
    """Whether draws can tell how many good strings each answer has: the effective number of draws behind the count.

    A string seen once where the reference gives it e^-60 stands for e^60 / n strings: a count by weights 1 / ref is
    unbiased, but rests on the one or two least likely draws. No answer may have fewer than USEFUL effective draws.
    """
    assert draws.ref_logp is not None
    counts = []
    for a in range(len(draws.answers)):
        good = (draws.answer == a) & (draws.reward >= threshold)
        counts.append(pooled_samples.effective_samples(np.where(good, -draws.ref_logp, -np.inf)))
    seen = [count for count in counts if count > 0]
    known = draws.equal_strings and bool(np.any(draws.reward >= threshold))
    useful = draws.exact or (len(seen) == len(counts) and min(seen) >= USEFUL)
    return {"effective_draws": counts, "needed": USEFUL, "useful": bool(useful), "known": known}


def _level(before: dict[str, list], answers: int, own: int) -> dict[str, Any]:
    """Where every answer has as many good strings, equally likely strings are equally likely answers."""
    none = {end: np.array(before["mass" + end])[:, -1:] for end in ("", "_low", "_high")}
    level = {}
    for end, other in (("", ""), ("_low", "_high"), ("_high", "_low")):
        mass_b1 = (1 - none[other]) / answers
        level["mass" + end] = np.concatenate([np.repeat(mass_b1, answers, axis=1), none[end]], axis=1)
        level["share" + end] = np.full((len(mass_b1), answers), 1 / answers)
        level["top" + end] = np.full(len(mass_b1), 1 / answers)
        level["number" + end] = np.full(len(mass_b1), float(answers))
    lists = {name: value.tolist() for name, value in level.items()}
    return {"curves": lists, "at_own": {k: v[own] for k, v in lists.items()}, "flips": [], "collapsed": []}


def verdict(found: dict[str, Any]) -> str:
    """One sentence: what the configured optimum does to the answers, and what would change it.

    Args:
      found: as `predict` builds it.
    """
    settings, answers = found["settings"], found["answers"]
    name, kl, beta = settings["objective"], settings["kl"], settings["beta"]
    own = found["objectives"][kl][name]
    idle = name != "vanilla" and not found["draws"]["good_answers" if name == "answers" else "good"]
    if idle:  # its optimum is vanilla's, whatever is known of strings
        own = found["objectives"][kl]["vanilla"]
    title = "vanilla RL" if name == "vanilla" else OBJECTIVES[name]
    where = f"At beta {beta:g} the optimum of {title}, {kl} KL,"
    if own is None:
        return f"{where} cannot be told from these draws: MARA over strings needs ref_logp of each"
    if len(answers) < 2:
        return f'{where} holds the one answer that the draws have, "{answers[0]}": it was the only one to begin with'
    trust = own.get("trust")
    if trust and not (trust["known"] or trust["useful"]):
        least = min(trust["effective_draws"])
        return (
            f"{where} cannot be told from these draws: they count strings by weights 1 / ref(y), and some "
            f"answer's count rests on {least:.1f} effective draws ({trust['needed']} are needed)"
        )
    at = own["at_own"]
    top = int(np.argmax(at["share"]))
    low, high = at["share_low"][top], at["share_high"][top]
    if idle:
        which = (
            "outcome" if found["draws"]["exact"] else "good draw has an answer" if found["draws"]["good"] else "draw"
        )
        reaches = "" if which.startswith("good") else f" reaches the threshold {settings['threshold']:g}"
        where = f"no {which}{reaches}: MARA changes nothing. {where}"
    if high - low >= WIDE:
        return (
            f'{where} cannot be told from these draws: the share of "{answers[top]}" may lie anywhere in '
            f"[{low:.0%}, {high:.0%}]; give more than {found['draws']['count']} draws"
        )
    puts = f'{where} puts {at["share"][top]:.1%}{_between(low, high)} of the answers on "{answers[top]}"'
    if at["share"][top] < found["collapsed_at"]:
        warn = "" if high < found["collapsed_at"] else ", though it lies within the interval"
        kept = f"{at['number']:.2g} of {len(answers)} answers are left in effect"
        return f"{puts}: no collapse is predicted{warn}; {kept}"
    return f"{puts}: expect collapse; {_cure(found)}"


def _cure(found: dict[str, Any]) -> str:
    settings, objectives = found["settings"], found["objectives"][found["settings"]["kl"]]
    cures = []
    stretch = next((c for c in objectives[settings["objective"]]["collapsed"] if _within(c, settings["beta"])), None)
    if stretch and stretch["to"]:
        cures.append(f"a beta above {stretch['to']:.3g} would keep more")
    other = "answers" if "answers" in objectives else "strings"
    if settings["objective"] != other:
        shares = objectives[other]["at_own"]["share"]
        top = np.argsort(-np.array(shares), kind="stable")[:3]
        mix = ", ".join(f'"{found["answers"][a]}" {shares[a]:.0%}' for a in top)
        more = ", ..." if len(shares) > len(top) else ""
        if max(shares) < found["collapsed_at"]:
            cures.append(f"{OBJECTIVES[other]} would give {mix}{more}")
    return ", and ".join(cures) or "no beta on the grid keeps more: the reference itself has to know other good answers"


def _within(stretch: dict[str, Any], beta: float) -> bool:
    return (stretch["from"] or 0.0) <= beta <= (stretch["to"] or math.inf)


def _between(low: float, high: float) -> str:
    return "" if low == high else f" [{low:.1%}, {high:.1%}]"
