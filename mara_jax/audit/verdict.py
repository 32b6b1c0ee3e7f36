"""What an audited setting optimises, in one sentence, from the numbers of `audit.computation`."""

from typing import Any

from mara_jax.audit import gradients
from mara_jax.core import methods

REACHED = 1e-3  # total variation below which a stationary point is a closed form
BALANCED = 1e-2  # and below which good strings or answers count as equal

_KL_WORDS = {
    ("reverse", "sequence"): "reverse KL at sequence level",
    ("forward", "sequence"): "forward KL at sequence level",
    ("reverse", "token"): "reverse KL at token level, which is each token's own share of it only",
    ("forward", "token"): "forward KL at token level, which on strings is neither the reverse nor the forward KL",
    ("reverse_minus_forward", "sequence"): "reverse minus forward KL at sequence level",
    ("reverse_minus_forward", "token"): "reverse minus forward KL at token level",
    ("reverse_minus_forward", "mixed"): "reverse KL at sequence level minus forward KL at token level",
}

OPTIMUM_WORDS = {
    "reverse": "ref(y) exp(R(y)/beta), normalised",
    "forward": "beta ref(y) / (Lambda - R(y))",
    "reverse_mara_string": "every good string equally likely",
    "forward_mara_string": "every good string equally likely",
    "reverse_mara_answer": "every answer equally likely, the strings of one in proportion to ref(y) exp(R(y)/beta)",
    "forward_mara_answer": "every answer equally likely, the strings of one in the reference's proportions",
    "own": "that of the method itself, in closed form",
    "crossed": "good strings unequal, as their rewards are augmented for the other KL",
}


def percent(comparison: dict[str, Any]) -> str:
    """How far a gradient is off, over the policies: "exact", "25 %" or "20-40 %"."""
    worst, least = comparison["relative_error"], comparison["smallest_error"]
    if worst is None:
        return "-"
    if worst < gradients.EXACT:
        return "exact"
    low, high = (f"{100 * x:.1f}" if x < 0.0995 else f"{100 * x:.0f}" for x in (least, worst))
    return f"{high} %" if low == high else f"{low}-{high} %"


def sentence(record: dict[str, Any]) -> str:
    """What the setting optimises, in one sentence without its full stop.

    Args:
        record: of `computation.audit`, all but "verdict" filled in.

    Returns:
        A line.
    """
    parts = (_regulariser(record), _reward(record), _ending(record), _mara(record), _stale(record))
    return "; ".join(part for part in parts if part)


def _stale(record: dict[str, Any]) -> str:
    """What becomes of the gradient on strings of an older policy, or of a sampler that is not the trainer."""
    words = {"updates": "at later updates of a rollout", "sampler": "with a sampler that is not the trainer"}
    clauses = []
    for between, where in words.items():
        rows = [row for row in record["stale"] if row["between"] == between]
        if not rows:
            continue
        if max(row["relative_error"] for row in rows) < gradients.EXACT:
            clauses.append(f"{where} the gradient is the present policy's, exactly")
            continue
        last = rows[-1]
        clauses.append(f"{where} the gradient is biased, by {percent(last)} once {last['nats']:.2g} nats lie between")
    return "; ".join(clauses)


def _regulariser(record: dict[str, Any]) -> str:
    effective, beta = record["kl"], record["algorithm"]["beta"]
    if effective["name"] == "none":
        why = "beta is 0" if beta == 0 else "the KL has no gradient in expectation"
        if methods.OBJECTIVES[record["algorithm"]["objective"]].kl == "none":
            why = "it has no KL"
        return f"nothing is regularised: {why}"
    if effective["name"] == "neither":
        # Where groups are rescaled, the KL without any reward is rescaled as it never is beside one.
        whole = record["reward_factor"] is None
        comparisons = record["gradients"]["objective" if whole else "kl"]
        nearest = max(comparisons, key=lambda name: comparisons[name]["cosine"] or -1.0)
        direction, level = nearest.split("_")
        cosine = comparisons[nearest]["cosine"]
        return f"neither KL, at neither level (nearest: {direction} KL at {level} level, cosine {cosine:.2f})"
    words = _KL_WORDS[effective["name"], effective["level"]]
    strength = _strength(record)
    if strength is None:
        return words
    if abs(strength - 1) < gradients.EXACT:
        factor = record["objective"]["factor"] if record["objective"] else 1.0
        longer = "" if abs(factor - 1) < gradients.EXACT else f", in a gradient {factor:.3g} times as long"
        return f"{words}, exactly{longer}"
    group = record["enumerated"]["group"]
    return f"{words}, with {strength:.3g} times the configured beta at groups of {group}"


def _strength(record: dict[str, Any]) -> float | None:
    """Weight of the KL against the reward, in units of the configured beta; None where the reward's is unknown."""
    if record["objective"]:
        return 1.0
    factor = record["reward_factor"]
    return None if factor is None else record["kl"]["beta"] / (record["algorithm"]["beta"] * factor)


def _reward(record: dict[str, Any]) -> str:
    if record["objective"] or record["reward_factor"] is not None:
        return ""
    transform = record["algorithm"]["transform"]
    own = transform != "none" and methods.TRANSFORMS[transform].anchor is None
    what = "rewards are not the task's own" if own else "groups or strings are rescaled one by one"
    return f"{what}, so the gradient is that of no E[R] - beta KL"


def optimum(record: dict[str, Any]) -> str | None:
    """The closed form that is the optimum for certain, as the gradient is that of its E[R] - beta KL; else None.

    Args:
        record: "algorithm", "enumerated", "kl" and "objective" of `computation.audit`.

    Returns:
        A name of `problems.closed_forms`.
    """
    effective, whole, algorithm = record["kl"], record["objective"], record["algorithm"]
    if effective["name"] not in ("reverse", "forward") or effective["level"] != "sequence":
        return None
    if not whole or whole["factor"] <= 0:
        return None
    # Where beta is tiny every KL may seem to fit the whole; the KL alone tells which it is, and how strong.
    if abs(effective["beta"] / (algorithm["beta"] * whole["factor"]) - 1) > gradients.EXACT:
        return None
    if not _is_lifted(record):
        return effective["name"]
    # Rewards augmented for the other KL have an optimum of another form.
    return f"{algorithm['kl']}_mara_{algorithm['anchor']}" if effective["name"] == algorithm["kl"] else None


def _ending(record: dict[str, Any]) -> str:
    end, known = record["stationary"], record["optimum"]
    if known:
        return f"optimum: {OPTIMUM_WORDS[known]}{_search(end, known)}"
    distance = end["total_variation"][end["nearest"]]
    if end["kind"] == "runs_away":
        return "it has no optimum: some strings are driven out ever faster"
    if record["kl"]["name"] == "none":
        return _without_kl(record)
    if distance < REACHED:
        words = "optimum" if record["objective"] else "yet it ends at"
        return f"{words}: {OPTIMUM_WORDS[_own_first(record)]}"
    name = end["nearest"].replace("_", " ")
    settled = "ends" if end["kind"] == "settled" else "did not settle within the search, and stands"
    return f"it {settled} a total variation of {distance:.2g} from the nearest closed form ({name})"


def _without_kl(record: dict[str, Any]) -> str:
    """On what a policy ends that nothing regularises."""
    if _is_lifted(record):
        return "the policy collapses onto the best reward as augmented"
    reward, probability = record["problem"]["reward"], record["stationary"]["probability"]
    best = sum(p for p, r in zip(probability, reward, strict=True) if r == max(reward))
    on = "the best reward" if best > 1 - BALANCED else "strings that it keeps, in the proportions that it finds"
    return f"the policy collapses onto {on}"


def _search(end: dict[str, Any], known: str) -> str:
    """Where the search stands that should have come to an optimum known without it; nothing if it is there."""
    distance = end["total_variation"][known]
    if distance < REACHED:
        return ""
    stopped = {
        "settled": "stopped short of it, where the gradient has all but vanished,",
        "unsettled": "did not settle and stands",
        "runs_away": "was broken off, too fast to follow,",
    }[end["kind"]]
    return (
        f" (known from the gradient; the search from the reference {stopped} a total variation of {distance:.2g} away)"
    )


def _own_first(record: dict[str, Any]) -> str:
    """The closed form that is reached; where several coincide, the one that the configuration asks for."""
    distances, algorithm = record["stationary"]["total_variation"], record["algorithm"]
    own = f"{algorithm['kl']}_mara_{algorithm['anchor']}" if _is_lifted(record) else algorithm["kl"]
    named = ("own", own) if "own" in distances else (own,)
    return next((name for name in named if distances[name] < REACHED), record["stationary"]["nearest"])


def _is_mara(record: dict[str, Any]) -> bool:
    return methods.TRANSFORMS[record["algorithm"]["transform"]].anchor is not None


def _is_lifted(record: dict[str, Any]) -> bool:
    """MARA finds a good string, without which it changes no reward."""
    return _is_mara(record) and record["enumerated"]["good"] > 0


def _mara(record: dict[str, Any]) -> str:
    if not _is_mara(record):
        return ""
    if not _is_lifted(record):
        threshold, most = record["algorithm"]["threshold"], max(record["problem"]["reward"])
        reached = f"no string reaches the threshold of {threshold:g} (rewards here are at most {most:g})"
        return f"{reached}: MARA changes nothing"
    balanced = [distance for name, distance in record["stationary"]["total_variation"].items() if "mara" in name]
    if "_mara_" in (record["optimum"] or "") or min(balanced) < BALANCED:
        return ""
    return "MARA's balance is lost"
