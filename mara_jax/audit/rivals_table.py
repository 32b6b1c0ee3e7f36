"""Where every objective and every rival of MARA ends on one small problem: the table of benchmarks/RESULTS.md.

Five outcomes, reference .60 .30 .05 .04 .01, rewards 1 1 1 0 0, beta .1. With MARA, rewards (and, for losses of
the forward KL, references) are those of `augment.mara` anchored over the whole good set.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax import config
from mara_jax.audit import enumeration, fixed_point, rival_losses
from mara_jax.core import augment, kl, method_rules, methods, rival_optima, rivals, targets
from mara_jax.core.method_rows import Outcomes
from mara_jax.core.scored import Numbers

REF_LOGP = np.log([0.60, 0.30, 0.05, 0.04, 0.01])
REWARD = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
BETA, THRESHOLD, ETA = 0.1, 0.8, 0.1
OUTCOMES = len(REWARD)
UNIFORM_LOGP = np.full(OUTCOMES, -np.log(OUTCOMES))
SETTLE_STEPS = 1500  # of the objectives that look at ranks, whose gradient jumps

# (reference, reward) -> log-probabilities, or None where the closed form does not cover those rewards
Optimum = Callable[[np.ndarray, np.ndarray], np.ndarray | None]


class Row(NamedTuple):
    """One objective: its loss, the samples in a group, and what is known of its end.

    `optimum` is the closed form, if there is one; `direction` the augmentation that belongs to it, None where
    MARA has no place (no reference, or no penalty to balance it); `sampler_logp` what draws the samples, the
    policy itself if None; `algorithm` its choices where the loss is of `core.methods`.
    """

    name: str
    loss: rival_losses.Loss
    group: int
    optimum: Optimum | None = None
    direction: targets.Direction | None = "reverse"
    sampler_logp: np.ndarray | None = None
    algorithm: config.Algorithm | None = None


class Ending(NamedTuple):
    """Where one objective ended: the point, and total variations from it.

    `to_closed_form` is None where no closed form is known; the others are to the optimum of the vanilla
    reverse-KL objective, to that of MARA, and to equal shares of the good outcomes.
    """

    name: str
    method: str
    point: fixed_point.Point
    to_closed_form: float | None
    to_vanilla: float
    to_mara: float
    to_uniform: float


def rows() -> list[Row]:
    """Every method of `core.methods`, every objective of `core.objectives` and every other rival, in order.

    Returns:
        The rows; on one token the levels "sequence" and "token" of `objectives.placed` are the same.
    """
    named = _our_rows() + _placed_rows() + _group_rows() + _reward_rows() + _likelihood_rows() + _squared_rows()
    return named + _added_rows(named)


def _added_rows(named: list[Row]) -> list[Row]:
    """A row, with MARA where it is balanced beside it, for each method of `core.methods` that no row names."""
    there = [method_rules.resolved(row.algorithm) for row in named if row.algorithm is not None]
    pairs, added = {(algorithm.transform, algorithm.objective) for algorithm in there}, []
    for name in methods.METHODS:
        algorithm = method_rules.resolved(config.Algorithm(method=name, anchor="string"))
        transform, objective = method_rules.rows(algorithm)
        if transform.anchor is None and (algorithm.transform, algorithm.objective) not in pairs:
            refused: dict[str, Any] = {"direction": None} if objective.refuses_mara else {}
            log_z = 0.0 if objective.learns_log_z else None
            added.append(_method_row(f"{name}, N=4", 4, method=name, log_z=log_z, **refused))
    return added


def _method_row(name: str, group: int, *, beta: float = BETA, log_z: Any = None, **more: Any) -> Row:
    """A row of what `core.methods` has; its closed form is that of the tables, unless one is given.

    `more`: fields of the algorithm, or of the row.
    """
    own = {field: more.pop(field) for field in ("optimum", "direction", "sampler_logp") if field in more}
    fields: dict[str, Any] = {"method": "reinforce", "anchor": "string"} | more
    algorithm = config.Algorithm(**fields)
    numbers = Numbers(beta, THRESHOLD, ETA)

    def optimum(ref_logp, reward):
        outcomes = Outcomes(ref_logp, reward, jnp.arange(OUTCOMES))
        logp = method_rules.optimum(algorithm, outcomes, numbers, group)
        return None if logp is None else np.asarray(logp)

    loss = rival_losses.method_loss(algorithm, numbers, log_z)
    return Row(name, loss, group, **{"optimum": optimum, "algorithm": algorithm} | own)


def _reverse(ref_logp, reward):
    return np.asarray(targets.reverse_kl(ref_logp, reward, BETA))


def _best(ref_logp, reward):
    return rival_optima.restricted(REF_LOGP, reward == reward.max())


# Every policy on the best outcomes is stationary; natural gradients from the reference keep its ratios.
WITHOUT_KL: dict[str, Any] = {"optimum": _best, "direction": None}


def _our_rows():
    row = _method_row
    forward: dict[str, Any] = {"kl": "forward", "direction": "forward"}

    def forward_of_group_mean(ref_logp, reward):
        return np.asarray(targets.forward_kl(ref_logp, reward, BETA * 4 / 3))

    return [
        row("reverse_kl, no baseline, N=1", 1),
        row("reverse_kl, group mean, N=3", 3, baseline="mean"),
        row("reverse_kl, leave-one-out (RLOO), N=2", 2, baseline="leave_one_out"),
        row("reverse_kl, group std, N=4", 4, baseline="group_normalised"),
        row("RLOO without a penalty (beta 0), N=2", 2, beta=0.0, baseline="leave_one_out", **WITHOUT_KL),
        row("forward_kl_samples, no baseline, N=1", 1, **forward),
        row("forward_kl_samples, group mean, N=4", 4, baseline="mean", optimum=forward_of_group_mean, **forward),
        row("forward_kl_ratio, leave-one-out, N=2", 2, baseline="leave_one_out", estimator="ratio", **forward),
    ]


def _placed_rows():
    known = {
        "reverse": _reverse,
        "forward": lambda ref_logp, reward: np.asarray(targets.forward_kl(ref_logp, reward, BETA)),
        "none": _best,
    }
    uses: tuple[tuple[kl.Estimator, kl.Placement], ...] = (
        ("k1", "reward"), ("k2", "reward"), ("k3", "reward"),
        ("k1", "loss"), ("k2", "loss"), ("k3", "loss"), ("k1_ratio", "loss"),
    )  # fmt: skip
    placed = []
    for estimator, place in uses:
        loss = rival_losses.placed_loss(estimator, place, "sequence", BETA)
        optimum = known.get(kl.effective(estimator, place, "sequence").name)
        placed.append(Row(f"{estimator} in the {place}, N=1", loss, 1, optimum))
    return placed


def _group_rows():
    row, free = _method_row, WITHOUT_KL
    return [
        row("GRPO, N=2", 2, method="grpo"),
        row("GRPO, N=4", 4, method="grpo"),
        row("Dr. GRPO with k3, N=2", 2, method="dr_grpo"),
        row("Dr. GRPO with k3, N=4", 4, method="dr_grpo"),
        row("Dr. GRPO as published (beta 0), N=4", 4, method="dr_grpo", beta=0.0, **free),
        row("DAPO, N=4", 4, method="dapo", **free),
        row("MaxRL, N=4", 4, method="maxrl", **free),
        row("pass@k, k=N=2", 2, method="pass_at_k", **free),
    ]


def _reward_rows():
    row = _method_row
    loo: dict[str, Any] = {"baseline": "leave_one_out"}
    grpo: dict[str, Any] = {"objective": "grpo"}
    return [
        row("unlikeliness in RLOO, N=4", 4, transform="unlikeliness", **loo),
        row("unlikeliness in GRPO, N=4", 4, transform="unlikeliness", **grpo),
        row("DARLING, no baseline, N=4", 4, transform="darling"),
        row("DARLING in RLOO, N=4", 4, transform="darling", **loo),
        row("DARLING in GRPO, N=4", 4, transform="darling", **grpo),
        row("IPS, no baseline, beta 0, N=4", 4, transform="ips", beta=0.0, direction=None),
        row("IPS in RLOO, beta 0, N=4", 4, transform="ips", beta=0.0, direction=None, **loo),
        row("IPS in RLOO, N=4", 4, transform="ips", **loo),
        row("IPS in GRPO, N=4", 4, transform="ips", **grpo),
        row("entropy bonus .1 in RLOO, N=2", 2, transform="entropy_bonus", **loo),
        row("entropy bonus .1, beta 0, N=2", 2, transform="entropy_bonus", beta=0.0, direction=None, **loo),
    ]


def _likelihood_rows():
    raft: dict[str, Any] = {"method": "raft", **WITHOUT_KL}
    best = rival_losses.likelihood_loss(rivals.best_of_n)
    toward = rival_losses.policy_loss(rivals.forward_kl_to_target, beta=BETA)

    def best_of_four(ref_logp, reward):
        return rival_optima.best_of_n(ref_logp, reward == 1, 4)

    return [
        _method_row("RAFT, one round from the reference, N=2", 2, sampler_logp=REF_LOGP, **raft),
        Row("best of N, one round from the reference, N=4", best, 4, best_of_four, None, REF_LOGP),
        _method_row("RAFT on its own samples, N=2", 2, **raft),
        Row("forward KL toward G (Eq. 7), N=2", toward, 2, _reverse),
        Row("forward KL toward G (Eq. 7), N=4", toward, 4, _reverse),
    ]


def _squared_rows():
    def true_log_z(ref_logp_a, reward_a):
        return jax.nn.logsumexp(ref_logp_a + reward_a / BETA)

    def reinvent_end(ref_logp, reward):
        return rival_optima.reinvent_elsewhere(ref_logp, reward, BETA, UNIFORM_LOGP)

    row = _method_row
    elsewhere: dict[str, Any] = {"sampler_logp": UNIFORM_LOGP}
    balance: dict[str, Any] = {"method": "trajectory_balance"}
    return [
        row("trajectory balance, log Z = 3, N=1", 1, log_z=3.0, **balance),
        row("VarGrad, N=2", 2, method="vargrad"),
        row("REINVENT, N=1", 1, method="reinvent"),
        row("trajectory balance, true log Z, uniform samples", 1, log_z=true_log_z, **balance, **elsewhere),
        row("VarGrad, uniform samples, N=2", 2, method="vargrad", **elsewhere),
        row("REINVENT, uniform samples", 1, method="reinvent", optimum=reinvent_end, **elsewhere),
    ]


def augmented(direction: targets.Direction) -> tuple[np.ndarray, np.ndarray]:
    """The problem's reference and rewards as MARA gives them, anchored over the whole good set.

    Args:
        direction: the KL that the augmentation is for.

    Returns:
        Reference log-probabilities (nats) and rewards.
    """
    group = jnp.asarray(REWARD)[None], jnp.asarray(REF_LOGP)[None]
    reward, ref = augment.mara(*group, beta=BETA, threshold=THRESHOLD, direction=direction)
    return np.asarray(ref[0]), np.asarray(reward[0])


def gradient_of(row: Row) -> Callable[..., jax.Array]:
    """The expected gradient of what an objective maximises: (logits [1, a], reference, rewards) -> [1, a].

    Args:
        row: the objective.
    """
    all_strings, groups = enumeration.outcomes(OUTCOMES), enumeration.groups(OUTCOMES, row.group)
    drawn_by = None if row.sampler_logp is None else row.sampler_logp[None]  # float64 while it is traced

    def gradient(params_1a, ref_logp_a, reward_a):
        def loss(logp_a1, index_g):
            return row.loss(logp_a1[:, 0], index_g, ref_logp_a, reward_a)

        return -enumeration.expected_gradient(loss, params_1a, all_strings, groups, drawn_by)

    return gradient


def flow_of(row: Row) -> fixed_point.Flow:
    """The flow of an objective, from (reference, rewards); one serves both methods, so that it is compiled once.

    Args:
        row: the objective.
    """
    drawn_by = None if row.sampler_logp is None else row.sampler_logp[None]
    return fixed_point.flow(gradient_of(row), enumeration.outcomes(OUTCOMES), drawn_by)


def ending(row: Row, method: str, flow: fixed_point.Flow | None = None) -> Ending:
    """Run one objective to where it rests, from the reference.

    Args:
        row: the objective.
        method: "vanilla", or "mara" for the augmented problem.
        flow: of the row, where it is there already.

    Returns:
        The point and its distances (total variation).

    Raises:
        ValueError: for "mara" where it has no place, or another word.
    """
    if method not in ("vanilla", "mara") or (method == "mara" and row.direction is None):
        raise ValueError(f"{row.name} with {method!r}: use 'vanilla'" + " or 'mara'" * (row.direction is not None))
    with jax.enable_x64(True):
        ref, reward = REF_LOGP, REWARD
        if method == "mara" and row.direction is not None:
            ref, reward = augmented(row.direction)
        point = fixed_point.find(flow or flow_of(row), REF_LOGP[None], ref, reward, settle_steps=SETTLE_STEPS)
        closed = row.optimum(ref, reward) if row.optimum is not None else None
        vanilla, mara = _reverse(REF_LOGP, REWARD), targets.mara(REF_LOGP, REWARD, BETA, THRESHOLD)
    good = REWARD >= THRESHOLD
    uniform = rival_optima.restricted(UNIFORM_LOGP, good)
    distances = [_distance(point.logp, other) for other in (vanilla, mara, uniform)]
    return Ending(row.name, method, point, None if closed is None else _distance(point.logp, closed), *distances)


def endings() -> list[Ending]:
    """Every row, without and (where it has a place) with MARA; about a minute of CPU.

    Returns:
        The endings in the order of the table.
    """
    table = []
    for row in rows():
        flow = flow_of(row)
        methods = ("vanilla",) if row.direction is None else ("vanilla", "mara")
        table += [ending(row, method, flow) for method in methods]
    return table


def _distance(logp, other):
    return float(np.abs(np.exp(logp) - np.exp(np.asarray(other))).sum() / 2)


def rests(point: fixed_point.Point) -> str:
    """In a word, what kind of rest a point is.

    Args:
        point: as `fixed_point.find` returns it.

    Returns:
        "yes" for an attractor; "anywhere" for one of a continuum; "at a jump" where the field changes sign
        without a root; "runs away" where an outcome's log-probability falls without end and pulls.
    """
    if point.is_attractor:
        return "anywhere" if point.growth > -1e-7 else "yes"
    return "runs away" if point.kind == "runs_away" else "at a jump"


def markdown(table: list[Ending]) -> str:
    """The endings as a table.

    Args:
        table: as `endings` returns them.

    Returns:
        Markdown, one line an ending.
    """
    head = "objective", "with", "ends at", "off its closed form", "TV vanilla", "TV MARA", "TV uniform", "rests"
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for e in table:
        shares = " ".join(f"{x:.3f}" for x in e.point.probability)
        off = "-" if e.to_closed_form is None else f"{e.to_closed_form:.0e}"
        distances = (f"{x:.3f}" for x in (e.to_vanilla, e.to_mara, e.to_uniform))
        lines.append("| " + " | ".join((e.name, e.method, shares, off, *distances, rests(e.point))) + " |")
    return "\n".join(lines)
