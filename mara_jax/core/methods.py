"""The methods, one row each: what happens to rewards, which loss follows, what it optimises and where it ends.

A method is a reward transform and an objective. `TRANSFORMS` and `OBJECTIVES` are the two axes, `METHODS` the presets
that `algorithm.method` names; docs/extending.md adds one of each. Training, toy, audits, predictions and documentation
read these tables; `core.method_rules` says which rows go together and what a combination optimises.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.core import augment, objectives, policy_gradient, rival_optima, rival_rewards, rivals, targets
from mara_jax.core.method_rows import Method, Objective, Optimum, Outcomes, Transform
from mara_jax.core.scored import Algorithm, Numbers, Scored

LEAST_BETA = 1e-6  # stands for beta = 0 in closed forms, whose limit it is


# ---- reward transforms ----------------------------------------------------------------------------------------


def _unchanged(algorithm: Algorithm, scored: Scored, numbers: Numbers):
    return scored.reward, scored.ref_logp


def _mara_strings(algorithm: Algorithm, scored: Scored, numbers: Numbers):
    return augment.mara(
        scored.reward, scored.ref_logp, beta=numbers.beta, threshold=numbers.threshold, direction=algorithm.kl,
        anchor_reward=scored.anchor_reward, anchor_ref_logp=scored.anchor_ref_logp,
    )  # fmt: skip


def _mara_answers(algorithm: Algorithm, scored: Scored, numbers: Numbers):
    assert scored.log_mass is not None, "MARA over answers needs the log-mass of every answer"
    return augment.mara_answers(
        scored.reward, scored.ref_logp, scored.answer, scored.log_mass, beta=numbers.beta,
        threshold=numbers.threshold, direction=algorithm.kl, unseen_log_mass=scored.unseen_log_mass,
        anchor_reward=scored.anchor_reward,
    )  # fmt: skip


def _entropy_bonus(algorithm: Algorithm, scored: Scored, numbers: Numbers):
    logp_pg = objectives.sequence_logp(scored.logp, scored.mask)
    return rival_rewards.entropy_bonus(scored.reward, logp_pg, eta=numbers.eta), scored.ref_logp


def _unlikeliness(algorithm: Algorithm, scored: Scored, numbers: Numbers):
    logp_pgt = jax.lax.stop_gradient(scored.logp if scored.old_logp is None else scored.old_logp)
    length_pg = jnp.maximum(jnp.sum(scored.mask, axis=-1), 1)
    mean_logp_pg = objectives.sequence_logp(logp_pgt, scored.mask) / length_pg
    return rival_rewards.unlikeliness(scored.reward, mean_logp_pg), scored.ref_logp


def _darling(algorithm: Algorithm, scored: Scored, numbers: Numbers):
    return rival_rewards.darling(scored.reward, scored.answer), scored.ref_logp


def _ips(algorithm: Algorithm, scored: Scored, numbers: Numbers):
    return rival_rewards.inverse_probability(scored.reward, scored.answer), scored.ref_logp


# ---- objectives -----------------------------------------------------------------------------------------------


def _tokens(scored: Scored):
    """What token-level losses read: log-probs, mask, log-probs of the sampler, of the reference, and rewards."""
    assert scored.ref_token_logp is not None, "published forms at token level need the reference's log-probs of tokens"
    old_pgt = jax.lax.stop_gradient(scored.logp if scored.old_logp is None else scored.old_logp)
    return scored.logp, scored.mask, old_pgt, scored.ref_token_logp, scored.reward


def _whole(scored: Scored):
    """What losses of whole completions read: log-probs, mask, reference and rewards."""
    return scored.logp, scored.mask, scored.ref_logp, scored.reward


def _grpo(algorithm: Algorithm, scored: Scored, reference: Scored | None, numbers: Numbers):
    return rivals.grpo(*_tokens(scored), beta=numbers.beta)


def _dr_grpo(algorithm: Algorithm, scored: Scored, reference: Scored | None, numbers: Numbers):
    return rivals.dr_grpo(*_tokens(scored), beta=numbers.beta)


def _dapo(algorithm: Algorithm, scored: Scored, reference: Scored | None, numbers: Numbers):
    logp_pgt, mask_pgt, old_pgt, _, reward_pg = _tokens(scored)
    return rivals.dapo(logp_pgt, mask_pgt, old_pgt, reward_pg)


def _raft(algorithm: Algorithm, scored: Scored, reference: Scored | None, numbers: Numbers):
    return rivals.raft(scored.logp, scored.mask, scored.reward, threshold=numbers.threshold)


def _maxrl(algorithm: Algorithm, scored: Scored, reference: Scored | None, numbers: Numbers):
    return rivals.maxrl(scored.logp, scored.mask, scored.reward)


def _pass_at_k(algorithm: Algorithm, scored: Scored, reference: Scored | None, numbers: Numbers):
    return rivals.pass_at_k(scored.logp, scored.mask, scored.reward)


def _trajectory_balance(algorithm: Algorithm, scored: Scored, reference: Scored | None, numbers: Numbers):
    assert scored.prompt_log_z is not None, "trajectory balance needs the log Z that it has learned of every prompt"
    return rivals.trajectory_balance(*_whole(scored), beta=numbers.beta, log_z=scored.prompt_log_z)


def _vargrad(algorithm: Algorithm, scored: Scored, reference: Scored | None, numbers: Numbers):
    return rivals.vargrad(*_whole(scored), beta=numbers.beta)


def _reinvent(algorithm: Algorithm, scored: Scored, reference: Scored | None, numbers: Numbers):
    penalty = algorithm.likelihood_penalty
    return rivals.reinvent(*_whole(scored), sigma=1 / numbers.beta, likelihood_penalty=penalty)


# ---- where they end -------------------------------------------------------------------------------------------


def _kl_optimum(algorithm: Algorithm, outcomes: Outcomes, numbers: Numbers, group: int):
    optimum = targets.reverse_kl if algorithm.kl == "reverse" else targets.forward_kl
    return optimum(outcomes.ref_logp, outcomes.reward, jnp.maximum(numbers.beta, LEAST_BETA))


def _mara_optimum(algorithm: Algorithm, outcomes: Outcomes, numbers: Numbers, group: int):
    settings = numbers.beta, numbers.threshold, algorithm.kl
    if algorithm.anchor == "string":
        return targets.mara(outcomes.ref_logp, outcomes.reward, *settings)
    return targets.mara_answers(outcomes.ref_logp, outcomes.reward, outcomes.answer, *settings)


def _entropy_optimum(algorithm: Algorithm, outcomes: Outcomes, numbers: Numbers, group: int):
    if algorithm.kl != "reverse":
        return None
    ref_logp, reward = jnp.asarray(outcomes.ref_logp), jnp.asarray(outcomes.reward)
    return rival_rewards.entropy_bonus_optimum(ref_logp, reward, numbers.beta, numbers.eta)


def _copies_optimum(worth: Callable[[int, int], float]) -> Optimum:
    """Where rewards are multiplied by worth(number of other copies in the group, group size)."""

    def optimum(algorithm: Algorithm, outcomes: Outcomes, numbers: Numbers, group: int):
        ref_logp, reward, answer = (np.asarray(x) for x in outcomes)
        rewarded = answer[reward != 0]
        paired = algorithm.baseline == "leave_one_out"
        if algorithm.kl != "reverse" or algorithm.baseline not in ("none", "leave_one_out") or (paired and group < 3):
            return None
        if len(set(rewarded.tolist())) < len(rewarded) or set(rewarded) & set(answer[reward == 0]):
            return None  # a closed form is known where every rewarded outcome is an answer of its own
        beta = float(numbers.beta)
        return rival_optima.copies_optimum(ref_logp, reward, beta, group, lambda copies: worth(copies, group), paired)

    return optimum


def _diversity(copies: int, group: int) -> float:
    return max((group - 1 - copies) / (group - 1), rival_rewards.LEAST_DIVERSITY)


def _grpo_optimum(algorithm: Algorithm, outcomes: Outcomes, numbers: Numbers, group: int):
    reward = np.asarray(outcomes.reward)
    if not set(reward.tolist()) <= {0.0, 1.0} or float(numbers.beta) <= 0:
        return None
    return rival_optima.grpo_optimum(np.asarray(outcomes.ref_logp), reward == 1, float(numbers.beta), group)


def _dr_grpo_optimum(algorithm: Algorithm, outcomes: Outcomes, numbers: Numbers, group: int):
    if float(numbers.beta) <= 0:
        return None
    return targets.forward_kl(outcomes.ref_logp, outcomes.reward, numbers.beta * group / (group - 1))


# ---- the tables -----------------------------------------------------------------------------------------------

_COPIES = "which depends on the rest of the group, so that no fixed reward is maximised"

TRANSFORMS: dict[str, Transform] = {
    "none": Transform(_unchanged, "as they are", optimum=_kl_optimum, forecast="vanilla"),
    "mara_strings": Transform(
        _mara_strings, "that MARA augments, so that the optimum gives every good completion the same mass",
        ("positive_beta",), anchor="string", optimum=_mara_optimum, forecast="strings", paper="arXiv 2510.20817",
    ),
    "mara_answers": Transform(
        _mara_answers, "that MARA augments, so that the optimum gives every good answer the same mass",
        ("positive_beta", "answers", "masses"), anchor="answer", optimum=_mara_optimum, forecast="answers",
        paper="docs/objectives.md",
    ),
    "entropy_bonus": Transform(
        _entropy_bonus, "plus eta times each completion's own -log pi", ("positive_eta",),
        exactly=", which adds eta H(pi)", optimum=_entropy_optimum,
    ),
    "unlikeliness": Transform(
        _unlikeliness, f"times 1 - .25 rank / N, the likeliest of the group ranking highest, {_COPIES}",
        ("non_negative_rewards", "groups"), paper="arXiv 2506.02355",
    ),
    "darling": Transform(
        _darling, f"times the share of the group's others that have another answer, {_COPIES}",
        ("answers", "non_negative_rewards", "groups"), optimum=_copies_optimum(_diversity), paper="arXiv 2509.02534",
    ),
    "ips": Transform(
        _ips, f"over the frequency of their answer in the group, {_COPIES}",
        ("answers", "non_negative_rewards", "groups"),
        optimum=_copies_optimum(lambda copies, group: group / (copies + 1)), paper="arXiv 2601.21669",
    ),
}  # fmt: skip


def _anywhere(algorithm: Algorithm, outcomes: str = "the best outcomes") -> str:
    """What rewards that no transform flattens leave free, where there is no KL."""
    return f": every policy on {outcomes} is stationary" if algorithm.transform == "none" else ""


def _without_kl(maximised: str, outcomes: str = "the best outcomes") -> Callable[[Algorithm], str]:
    return lambda algorithm: f"maximises {maximised}, without a KL (beta is not read){_anywhere(algorithm, outcomes)}"


def _our_objective(algorithm: Algorithm) -> str:
    if algorithm.beta == 0:
        return f"maximises E[R], without a KL{_anywhere(algorithm)}"
    pair = "KL(pi || ref)" if algorithm.kl == "reverse" else "KL(ref || pi)"
    return f"maximises E[R] - beta {pair} of whole completions, exactly ({algorithm.estimator.replace('_', ' ')})"


def _grpo_sentence(algorithm: Algorithm) -> str:
    sentence = "maximises E[R] with rewards over their group's deviation, each completion over its length"
    if algorithm.beta == 0:
        return f"{sentence}, without a KL{_anywhere(algorithm)}"
    return (
        f"{sentence}, - beta times token-level k3 in the loss: the deviation gives beta another weight at every "
        "success rate, and the KL is on one categorical KL(ref || pi), on sequences neither"
    )


def _dr_grpo_sentence(algorithm: Algorithm) -> str:
    if algorithm.beta == 0:
        return f"maximises E[R], without a KL (as published){_anywhere(algorithm)}"
    return (
        "maximises E[R] - beta times token-level k3 in the loss: on one categorical forward KL(ref || pi) at "
        "beta N / (N - 1), on sequences neither KL"
    )


_TO_G = "minimises KL(pi || G) toward the optimum G of E[R] - beta KL(pi || ref)"
_K3 = "token by token it is neither KL, on one token the forward one, and MARA's bonus cancels a reverse KL only"
_NO_KL = "it has no KL, and MARA's bonus is made to cancel one"


def _reinvent_sentence(algorithm: Algorithm) -> str:
    sentence = f"{_TO_G}, a squared gap with log Z = 0 and sigma = 1 / beta"
    c = algorithm.likelihood_penalty
    return (
        f"{sentence}, each reward lower by {c:g} beta / (2 log pi^2), so that it does not end at G" if c else sentence
    )


OBJECTIVES: dict[str, Objective] = {
    "policy_gradient": Objective(
        policy_gradient.loss, _our_objective, "as algorithm.kl and algorithm.estimator say",
        {"reverse": ("k1_in_reward", "k2_in_loss"), "forward": ("reference_samples", "ratio", "k3_in_loss")},
        ratios="configured", optimum=_kl_optimum, paper="arXiv 2402.14740",
    ),
    "grpo": Objective(
        _grpo, _grpo_sentence,
        "k3 in the loss, token by token", baseline="group_normalised", ratios="own", needs=("groups",),
        refuses_mara=f"its KL is k3 in the loss: {_K3}", optimum=_grpo_optimum, paper="arXiv 2402.03300",
    ),
    "dr_grpo": Objective(
        _dr_grpo, _dr_grpo_sentence, "k3 in the loss, token by token; none as published (beta 0)",
        baseline="mean", ratios="own", needs=("groups",), refuses_mara=f"its KL is k3 in the loss: {_K3}",
        optimum=_dr_grpo_optimum, paper="arXiv 2503.20783",
    ),
    "dapo": Objective(
        _dapo,
        _without_kl("E[R] with rewards over their group's deviation, in one mean over all tokens"),
        "none", baseline="group_normalised", ratios="own", needs=("groups",), refuses_mara=_NO_KL,
        redraws_equal_groups=True, paper="arXiv 2503.14476",
    ),
    "raft": Objective(
        _raft,
        _without_kl("the likelihood of its own samples whose reward reaches tau", "these"),
        "none", baseline="none", refuses_mara="it keeps or drops samples by their reward and has no KL",
        reads_threshold=True, paper="arXiv 2304.06767",
    ),
    "maxrl": Objective(
        _maxrl,
        _without_kl("the log of the success probability, to order N - 1 in that of failure", "the good outcomes"),
        "none", baseline="none", needs=("non_negative_rewards", "groups"), refuses_mara=_NO_KL,
        paper="arXiv 2602.02710",
    ),
    "pass_at_k": Objective(
        _pass_at_k,
        _without_kl("E[largest reward of a group]"),
        "none", baseline="none", needs=("groups",), refuses_mara=_NO_KL, paper="arXiv 2503.19595",
    ),
    "trajectory_balance": Objective(
        _trajectory_balance, f"{_TO_G}, a squared gap whose log Z is learned for each prompt",
        "inside the squared gap", baseline="none", needs=("positive_beta",), optimum=_kl_optimum, learns_log_z=True,
        paper="arXiv 2201.13259",
    ),
    "vargrad": Objective(
        _vargrad, f"{_TO_G}, as a variance in each group; sample by sample 2 / beta times RLOO's gradient",
        "inside the squared gap", baseline="leave_one_out", needs=("positive_beta", "groups"), optimum=_kl_optimum,
        replays=True, paper="arXiv 2010.10436",
    ),
    "reinvent": Objective(
        _reinvent, _reinvent_sentence,
        "inside the squared gap", baseline="none", needs=("positive_beta",), optimum=_kl_optimum, replays=True,
        paper="arXiv 1704.07555",
    ),
}  # fmt: skip

_RATIO = "the optimum of E[R] - beta KL, where equal rewards keep the reference policy's ratio"
_FLATTER = "flatter than the optimum of E[R] - beta KL, not flat; published within GRPO (algorithm.objective=grpo)"
_ANYWHERE = "anywhere on the best outcomes: nothing holds the policy"

METHODS: dict[str, Method] = {
    "vanilla": Method("none", "policy_gradient", _RATIO, paper="RLOO: arXiv 2402.14740"),
    "reinforce": Method("none", "policy_gradient", _RATIO, "none", "Algorithm 1, line 13 without MARA"),
    "mara": Method(
        {"string": "mara_strings", "answer": "mara_answers"}, "policy_gradient",
        "all good strings, or all good answers, equally likely", paper="arXiv 2510.20817",
    ),
    "entropy_bonus": Method(
        "entropy_bonus", "policy_gradient", "ref^(beta/(beta+eta)) exp(R/(beta+eta)): bad outcomes gain, too"
    ),
    "unlikeliness": Method(
        "unlikeliness", "policy_gradient", f"{_FLATTER}; no stationary point", paper="arXiv 2506.02355"
    ),
    "darling": Method("darling", "policy_gradient", _FLATTER, paper="arXiv 2509.02534"),
    "ips": Method("ips", "policy_gradient", _FLATTER, paper="arXiv 2601.21669"),
    "grpo": Method(
        "none", "grpo", "on one categorical, the forward-KL optimum at a beta of its own", paper="arXiv 2402.03300"
    ),
    "dr_grpo": Method(
        "none", "dr_grpo", "on one categorical, the forward-KL optimum at beta N/(N-1)", paper="arXiv 2503.20783"
    ),
    "dapo": Method("none", "dapo", _ANYWHERE, paper="arXiv 2503.14476"),
    "raft": Method("none", "raft", _ANYWHERE, paper="arXiv 2304.06767"),
    "maxrl": Method("none", "maxrl", _ANYWHERE, paper="arXiv 2602.02710"),
    "pass_at_k": Method(
        "none", "pass_at_k", f"{_ANYWHERE}; a group without a unique best moves nothing", paper="arXiv 2503.19595"
    ),
    "trajectory_balance": Method("none", "trajectory_balance", _RATIO, paper="arXiv 2201.13259"),
    "vargrad": Method("none", "vargrad", _RATIO, paper="arXiv 2010.10436"),
    "reinvent": Method("none", "reinvent", _RATIO, paper="arXiv 1704.07555"),
}  # fmt: skip
