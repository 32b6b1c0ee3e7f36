"""What an algorithm may not ask for: choices that have no effect, or whose objective is not what it says."""

import dataclasses
import math

from mara_jax.config.schema import Algorithm, LanguageRun

# Here the KL is a term of its own, which no baseline touches.
KL_BESIDE_REWARD = ("reference_samples", "k2_in_loss", "k3_in_loss")


def check(algorithm: Algorithm) -> None:
    """Refuses a transform and an objective that do not go together, and fields that the objective does not read.

    Raises:
      ValueError: one line with the value, the reason and the cure.
    """
    from mara_jax.core import method_rules  # brings jax, which importing a config does without

    given, algorithm = algorithm, method_rules.resolved(algorithm)
    transform, objective = method_rules.rows(algorithm)
    _check_numbers(given, algorithm)
    if transform.anchor is not None and objective.refuses_mara:
        raise ValueError(
            f"algorithm.transform={algorithm.transform} is not balanced beside algorithm.objective="
            f"{algorithm.objective}: {objective.refuses_mara} (docs/methods.md): use algorithm.method=mara, or "
            f"algorithm.transform=none"
        )
    _check_unread(algorithm)
    if algorithm.likelihood_penalty and algorithm.objective != "reinvent":
        raise ValueError(
            f"algorithm.likelihood_penalty={algorithm.likelihood_penalty:g} is a term of algorithm.objective=reinvent "
            f"alone, not of {algorithm.objective}: set it to 0, or use algorithm.method=reinvent"
        )
    if objective.placements:
        _check_baseline(algorithm)
        _check_placement(algorithm)
        _check_weights(algorithm)


def _check_numbers(given: Algorithm, algorithm: Algorithm) -> None:
    from mara_jax.core import method_rules

    needs = method_rules.needs(algorithm)
    mara = method_rules.rows(algorithm)[0].anchor is not None
    if mara and algorithm.beta == 0:
        raise ValueError(
            f"algorithm.beta=0.0 with algorithm.method={given.method!r}: the augmentation is beta times a log-ratio "
            "and does nothing at 0; use a positive beta (0.1), or algorithm.method=vanilla"
        )
    if "positive_beta" in needs and algorithm.beta == 0:
        raise ValueError(
            f"algorithm.beta=0.0 with algorithm.objective={algorithm.objective}, which divides rewards by beta: use a "
            "positive beta (0.1)"
        )
    if "positive_eta" in needs and algorithm.eta == 0:
        raise ValueError(
            f"algorithm.eta=0.0 with algorithm.transform={algorithm.transform}: a bonus of weight 0 does nothing; use "
            "a positive eta (0.01), or algorithm.transform=none"
        )


def _check_unread(algorithm: Algorithm) -> None:
    """Refuses fields that an objective with a form of its own does not read."""
    from mara_jax.core import method_rules

    objective = method_rules.rows(algorithm)[1]
    usual = {field.name: field.default for field in dataclasses.fields(algorithm)}
    unread = {} if objective.placements else {name: usual[name] for name in ("kl", "estimator", "level")}
    if objective.baseline is not None:
        unread["baseline"] = objective.baseline
    if objective.ratios != "configured":
        unread |= {name: usual[name] for name in ("importance", "clip", "truncate", "truncate_level")}
    for name, value in unread.items():
        if getattr(algorithm, name) != value:
            cure = "auto" if name == "baseline" else value
            raise ValueError(
                f"algorithm.{name}={getattr(algorithm, name)} is not read by "
                f"algorithm.objective={algorithm.objective}, which has a form of its own (its KL: {objective.kl}): "
                f"leave it at {cure}, or use algorithm.objective=policy_gradient"
            )


def _check_baseline(algorithm: Algorithm) -> None:
    if algorithm.baseline == "group_normalised" and algorithm.beta > 0:
        raise ValueError(
            "algorithm.baseline='group_normalised' divides each group by its own standard deviation, so the "
            "expected gradient is that of no E[R] - beta KL: use leave_one_out, or algorithm.method=grpo"
        )
    if algorithm.baseline == "mean" and algorithm.beta > 0 and algorithm.estimator in KL_BESIDE_REWARD:
        raise ValueError(
            "algorithm.baseline='mean' shrinks the reward's gradient by (g - 1) / g but not that of "
            f"algorithm.estimator={algorithm.estimator}, so beta would not be the stated one: use leave_one_out"
        )


def _check_weights(algorithm: Algorithm) -> None:
    """Refuses ratios that do nothing, or that would leave reward and KL unequally weighted."""
    name, ratio = algorithm.estimator, algorithm.importance
    if algorithm.clip and ratio == "none":
        raise ValueError(
            f"algorithm.clip={algorithm.clip} clips the ratios of algorithm.importance, which is none: choose "
            "sequence, length_normalised or token, or set algorithm.clip=0"
        )
    if algorithm.truncate_level != "sequence" and not algorithm.truncate:
        raise ValueError(
            f"algorithm.truncate_level={algorithm.truncate_level!r} does nothing at algorithm.truncate=0: set truncate "
            "(2.0), or truncate_level=sequence"
        )
    token_weights = algorithm.truncate > 0 and algorithm.truncate_level == "token"
    if name in KL_BESIDE_REWARD and (ratio in ("length_normalised", "token") or algorithm.clip or token_weights):
        asked = f"importance={ratio}, clip={algorithm.clip:g}" + (", truncate_level=token" if token_weights else "")
        raise ValueError(
            f"algorithm.estimator={name} has its KL beside the reward, out of the reach of {asked}, so beta would not "
            "be the stated one where they act: use algorithm.importance=sequence with clip=0 (and "
            "truncate_level=sequence), or the estimator "
            f"{'k1_in_reward' if algorithm.kl == 'reverse' else 'ratio'}"
        )


def _check_placement(algorithm: Algorithm) -> None:
    """Refuses an estimator whose expected gradient is not that of the KL asked for."""
    from mara_jax.core import kl as divergences
    from mara_jax.core import method_rules

    name = algorithm.estimator
    known = method_rules.rows(algorithm)[1].placements[algorithm.kl]
    cure = f"use algorithm.estimator={known[0]} with algorithm.level=sequence"
    if name in divergences.PLACED:
        effective = divergences.effective(*divergences.PLACED[name], algorithm.level)
        if effective.name != algorithm.kl:
            raise ValueError(
                f"algorithm.estimator={name} at level={algorithm.level} does not optimise the "
                f"{algorithm.kl} KL: {effective.sentence}. {cure[0].upper() + cure[1:]}"
            )
    elif algorithm.level == "token":
        raise ValueError(f"algorithm.level='token' has no meaning for algorithm.estimator={name}: {cure}")
    if name not in known:
        exact = "forward" if algorithm.kl == "reverse" else "reverse"
        raise ValueError(f"algorithm.estimator={name} optimises the {exact} KL, not the {algorithm.kl} one: {cure}")


def check_updates(run: LanguageRun) -> None:
    """Refuses several updates on a rollout without importance ratios, and ratios that are all 1.

    Raises:
      ValueError: one line.
    """
    from mara_jax.core import method_rules

    updates, algorithm = run.optimiser.updates, method_rules.resolved(run.algorithm)
    ratios = method_rules.rows(algorithm)[1].ratios
    if updates > 1 and ratios == "none":
        raise ValueError(
            f"optimiser.updates={updates} with algorithm.objective={algorithm.objective}, which has no importance "
            "ratios: use optimiser.updates=1"
        )
    if updates > 1 and ratios == "configured" and algorithm.importance == "none":
        raise ValueError(
            f"optimiser.updates={updates} with algorithm.importance='none': from the second update on, samples come "
            "from an older policy than the one that is differentiated, so the gradient would not be that of the stated "
            "objective; use algorithm.importance=sequence, or optimiser.updates=1"
        )
    if updates == 1 and algorithm.importance != "none":
        raise ValueError(
            f"algorithm.importance={algorithm.importance!r} does nothing at optimiser.updates=1, where every ratio is "
            "1: raise updates (2), or use algorithm.importance=none"
        )


def check_replay(run: LanguageRun) -> None:
    """Refuses replay beside a loss that takes its samples for the policy's own, and a memory that is too small.

    Raises:
      ValueError: one line.
    """
    from mara_jax.core import method_rules

    rollout, algorithm = run.rollout, method_rules.resolved(run.algorithm)
    if not rollout.replay:
        return
    if not method_rules.rows(algorithm)[1].replays:
        raise ValueError(
            f"rollout.replay={rollout.replay} with algorithm.objective={algorithm.objective}, which takes completions "
            "for the policy's own: use algorithm.method=vargrad or reinvent, or rollout.replay=0"
        )
    if rollout.replay >= rollout.replay_best:
        raise ValueError(
            f"rollout.replay={rollout.replay} is not below rollout.replay_best={rollout.replay_best}, from which "
            "completions are drawn: raise replay_best (100)"
        )
    parts = run.optimiser.micro_batches
    if rollout.replay % parts:
        raise ValueError(
            f"optimiser.micro_batches={parts} must divide rollout.replay={rollout.replay}: each part has some samples "
            "of every group"
        )


def check_group(run: LanguageRun) -> None:
    """Refuses groups of one sample where a method compares samples.

    Raises:
      ValueError: one line.
    """
    from mara_jax.core import method_rules

    algorithm, size = method_rules.resolved(run.algorithm), run.rollout.group_size
    if size < 2 and "groups" in method_rules.needs(algorithm):
        rows = zip(("transform", "objective"), method_rules.rows(algorithm), strict=True)
        which = [f"algorithm.{name}={getattr(algorithm, name)}" for name, row in rows if "groups" in row.needs]
        what = which[0] if which else f"algorithm.baseline={algorithm.baseline!r}"
        raise ValueError(
            f"rollout.group_size={size} leaves {what} nothing to compare with: use at least 2, or "
            "algorithm.method=reinforce"
        )


def check_moving_threshold(run: LanguageRun) -> None:
    """Refuses a percentile at which a group has one good completion, or none, more often than it should have two.

    With two good completions of a group on average, and the same share of them under every prompt, at least
    1 - 3 exp(-2) = 59 % of the groups have two or more (a binomial's share is smallest in Poisson's limit). Below that
    mean most steps would be those of no augmentation.

    Raises:
      ValueError: one line.
    """
    from mara_jax.core import method_rules, moving_threshold

    algorithm, size = run.algorithm, run.rollout.group_size
    percentile, window = algorithm.threshold_percentile, algorithm.threshold_window
    if not percentile:
        usual = type(algorithm)().threshold_window
        if window != usual:
            raise ValueError(
                f"algorithm.threshold_window={window} has no effect with algorithm.threshold_percentile=0, a constant "
                f"threshold: set the percentile (90), or leave the window at {usual}"
            )
        return
    least, share = moving_threshold.LEAST_GOOD, moving_threshold.good_share(percentile)
    if method_rules.rows(algorithm)[0].anchor is None or size * share >= least:
        return
    lower = f", or algorithm.threshold_percentile={100 - 100 * least / size:.6g} or less" if size > least else ""
    raise ValueError(
        f"algorithm.threshold_percentile={percentile:g} with rollout.group_size={size} makes {float(size * share):.3g} "
        "completions of a group good on average, and MARA tells good completions of one prompt apart, where a lone one "
        f"has none beside it: {least} on average are needed, with which at least 59 % of the groups have two; use "
        f"rollout.group_size={math.ceil(least / share)} or more{lower}"
    )
