"""What a run may not ask for: values that cannot work, alone or together, and objectives that are not what they say."""

import dataclasses
import math

from mara_jax.config import algorithm_checks, limits, population
from mara_jax.config.schema import (
    COVERAGE,
    EQUIVALENCES,
    LORA_TARGETS,
    Evaluation,
    LanguageRun,
    Lora,
    Policy,
    Run,
    Task,
    ToyRun,
    lora_targets,
    settings,
    sweep_algorithms,
    template_options,
)


def check(run: Run) -> None:
    """Refuses values that cannot work, alone or together.

    Raises:
      ValueError: one line with the value, the limit and the cure.
    """
    check_values(run)
    if isinstance(run, LanguageRun) and population.is_population(run):
        _check_population(run)
        return
    algorithm_checks.check(run.algorithm)
    if isinstance(run, ToyRun):
        _check_toy(run)
        return
    _check_rollout(run)
    _check_lora(run.lora)
    _check_template(run.policy)
    _check_keep_every(run)
    _check_best(run)
    algorithm_checks.check_updates(run)
    algorithm_checks.check_moving_threshold(run)
    _check_equivalence(run.task)
    if not run.task.module:
        raise ValueError(
            "task.module is empty: give the run a task, as configs/digits.py does with task=digits.Config()"
        )
    if 0 < run.warmup.max_steps < run.warmup.steps:
        raise ValueError(
            f"warmup.max_steps={run.warmup.max_steps} is below warmup.steps={run.warmup.steps}, from which on samples "
            "are looked at: raise max_steps, or set it to 0 to stop after `steps` without looking"
        )
    if run.policy.weights == "nano" and run.warmup.steps < 1:
        raise ValueError(
            "policy.weights='nano' starts from random weights, so warmup.steps=0 leaves nothing to train on: "
            "set warmup.steps (some hundreds)"
        )


def _check_equivalence(task: Task) -> None:
    """Refuses settings of classes of answers that have no effect, and a rule without its threshold."""
    rule, usual = task.equivalence, type(task)()
    if rule == "embedding" and not task.similarity:
        raise ValueError(
            "task.equivalence='embedding' needs task.similarity, the cosine above which two answers count as one: "
            "choose it on pairs that you have judged (.8 is a beginning)"
        )
    unread = {"similarity": EQUIVALENCES[2:], "embedder": EQUIVALENCES[3:], "most_classes": EQUIVALENCES[1:]}
    for name, rules in unread.items():
        value = getattr(task, name)
        if value != getattr(usual, name) and rule not in rules:
            raise ValueError(
                f"task.{name}={value!r} has no effect with task.equivalence={rule!r}: use one of {', '.join(rules)}, "
                f"or leave it at {getattr(usual, name)!r}"
            )


def _check_population(run: LanguageRun) -> None:
    """Refuses a population with a member that could not be a run, or with what several members cannot share."""
    from mara_jax.core import method_rules  # brings jax, which importing a config does without

    population.refuse_repeated(run)
    off_in_populations = {
        "rollout.slots": 0, "rollout.replay": 0, "profile.steps": 0, "tracker": "", "task.equivalence": "",
    }  # fmt: skip
    for name, off in off_in_populations.items():
        section, _, field = name.rpartition(".")
        value = getattr(getattr(run, section) if section else run, field)
        if value != off:
            raise ValueError(f"{name}={value} is for single runs, not for a population: leave it at {off!r}")
    for member in population.members(run):
        try:
            check(member.run)
        except ValueError as error:
            raise ValueError(f"population member {member.name}: {error}") from error
        redraws = method_rules.rows(member.run.algorithm)[1].redraws_equal_groups
        if run.rollout.equal_groups in ("redraw", "replace") or (run.rollout.equal_groups == "auto" and redraws):
            raise ValueError(
                f"population member {member.name} draws groups of equal rewards again, which a population does not: "
                "set rollout.equal_groups=keep"
            )


def check_values(run: Run) -> None:
    """Refuses the first value that its field cannot have, whatever the others are.

    Raises:
      ValueError: one line with the value, what it may be, and a value that may be used.
    """
    defaults = ToyRun() if isinstance(run, ToyRun) else LanguageRun(task=type(run.task)())
    for (name, value, _, allowed), default in zip(settings(run), settings(defaults), strict=True):
        # A limit says so in its own words; a task's own field may have none.
        if not isinstance(allowed, limits.Limit) and isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite: try {default.value}")
        if isinstance(allowed, limits.Limit):
            if not allowed.holds(value):
                cure = f": try {default.value}" if default.value != () else ""
                raise ValueError(f"{name}={value} must be {allowed.words}{cure}")
        elif allowed is not None:
            for word in value if isinstance(value, tuple) else (value,):
                if word not in allowed:
                    raise ValueError(
                        f"{name}={word!r} is unknown: choose one of {', '.join(word or repr(word) for word in allowed)}"
                    )


def _check_template(policy: Policy) -> None:
    given = [name for name in ("system", "template_options") if getattr(policy, name)]
    if given and not policy.chat:
        raise ValueError(f"policy.{given[0]} has no effect with policy.chat=False: set policy.chat=True")
    template_options(policy)


def _check_lora(lora: Lora) -> None:
    for name in lora_targets(lora):
        if name not in LORA_TARGETS:
            raise ValueError(
                f"lora.targets={lora.targets!r} names {name!r}, which is no kernel of a layer: name some of "
                f"{','.join(LORA_TARGETS)}, as in lora.targets=q,v"
            )
    if lora.adapter and not lora.rank:
        raise ValueError(
            f"lora.adapter={lora.adapter!r} has no effect with lora.rank=0, where all weights are trained: set "
            "lora.rank, lora.alpha and lora.targets to the adapter's own"
        )


def measures(evaluation: Evaluation) -> tuple[str, ...]:
    """The measures of an evaluation of which more is better: pass@k for powers of two up to the number of samples."""
    counts = (2**power for power in range(evaluation.samples.bit_length()))
    passes = (f"pass@{count}" for count in counts)
    return ("reward", *passes, "valid", "answers/distinct", "answers/good", "answers/effective")


def _check_keep_every(run: LanguageRun) -> None:
    """Refuses to keep checkpoints of steps at which none is written."""
    kept, every = run.checkpoint.keep_every, run.checkpoint.every
    if kept % every:
        near = max(every, kept // every * every)
        raise ValueError(
            f"checkpoint.keep_every={kept} is no multiple of checkpoint.every={every}, so that step {kept} has no "
            f"checkpoint: set checkpoint.keep_every={near}"
        )


def _check_best(run: LanguageRun) -> None:
    """Refuses checkpoints that are to be kept by a measure which not all of them have."""
    best, every, evaluation = run.checkpoint.best, run.checkpoint.every, run.evaluation
    if not best:
        return
    if best not in (*measures(evaluation), COVERAGE):
        raise ValueError(
            f"checkpoint.best={best!r} is no measure of evaluations with evaluation.samples={evaluation.samples}: "
            f"choose one of {', '.join(measures(evaluation))}, or {COVERAGE}"
        )
    if not evaluation.every or every % evaluation.every:
        raise ValueError(
            f"checkpoint.best={best!r} needs an evaluation at each checkpoint, but checkpoint.every={every} is no "
            f"multiple of evaluation.every={evaluation.every}: set evaluation.every={every}"
        )


def _check_toy(run: ToyRun) -> None:
    from mara_jax.core import method_rules  # brings jax, which importing a config does without

    if method_rules.rows(run.algorithm)[0].anchor == "answer":
        raise ValueError(
            "algorithm.anchor='answer' means nothing where each outcome is its own answer: use algorithm.anchor=string"
        )
    if run.algorithm.beta <= 0:
        raise ValueError(f"algorithm.beta={run.algorithm.beta} must be positive: the toy's optimum needs it")
    if run.algorithm.level != "sequence":
        raise ValueError("algorithm.level='token' means nothing for single outcomes: use sequence")
    if run.algorithm.threshold_percentile:
        raise ValueError(
            f"algorithm.threshold_percentile={run.algorithm.threshold_percentile:g} is for runs of language models: a "
            "toy's rewards are known beforehand, so set algorithm.threshold, and leave the percentile at 0"
        )
    for name, off in (("importance", "none"), ("truncate", 0.0)):
        if getattr(run.algorithm, name) != off:
            raise ValueError(
                f"algorithm.{name}={getattr(run.algorithm, name)} does nothing in a toy run, whose every update draws "
                f"from the policy as it is: use {off}"
            )
    if run.algorithm.threshold > 1.0:
        raise ValueError(
            f"algorithm.threshold={run.algorithm.threshold} is above every reachable reward (1.0): lower it"
        )
    if run.sweep.betas:
        _check_sweep(run)


def _check_sweep(run: ToyRun) -> None:
    sweep = run.sweep
    if run.seed + sweep.seeds - 1 > limits.LARGEST:
        raise ValueError(f"seed={run.seed} with sweep.seeds={sweep.seeds} goes past {limits.LARGEST}: lower the seed")
    for name in ("methods", "kls", "estimators"):
        if not getattr(sweep, name):
            raise ValueError(f"sweep.{name} is empty: try {','.join(getattr(type(sweep)(), name))}")
    for algorithm in sweep_algorithms(run):
        algorithm_checks.check(algorithm)
    for kl, known in _sweep_placements(run).items():
        if kl in sweep.kls and not any(name == "auto" or name in known for name in sweep.estimators):
            raise ValueError(
                f"sweep.estimators={sweep.estimators} has none for the {kl} KL: add auto or "
                f"{' or '.join(known)}, or take {kl} out of sweep.kls"
            )
    if sweep.gaps and run.toy.figure not in (2, 4):
        raise ValueError(f"sweep.gaps means nothing for toy.figure={run.toy.figure}: figures 2 and 4 have two peaks")


def _sweep_placements(run: ToyRun) -> dict[str, tuple[str, ...]]:
    """The estimators of each KL that a study's methods read."""
    from mara_jax.core import method_rules

    known: dict[str, tuple[str, ...]] = {}
    for method in run.sweep.methods:
        known |= method_rules.rows(dataclasses.replace(run.algorithm, method=method))[1].placements
    return known


def _check_rollout(run: LanguageRun) -> None:
    rollout = run.rollout
    parts = run.optimiser.micro_batches
    if rollout.group_size % parts:
        raise ValueError(
            f"optimiser.micro_batches={parts} must divide rollout.group_size={rollout.group_size}: each part has some "
            "samples of every group"
        )
    algorithm_checks.check_group(run)
    algorithm_checks.check_replay(run)
