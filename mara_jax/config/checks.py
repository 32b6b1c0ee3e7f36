"""What a run may not ask for: values that cannot work, alone or together, and objectives that are not what they say."""

from mara_jax.config import limits
from mara_jax.config.schema import (
    ESTIMATORS,
    KL_BESIDE_REWARD,
    LORA_TARGETS,
    TRAINABLE,
    Algorithm,
    LanguageRun,
    Lora,
    Run,
    ToyRun,
    estimator_of,
    lora_targets,
    settings,
    sweep_algorithms,
)


def check(run: Run) -> None:
    """Refuses values that cannot work, alone or together.

    Raises:
      ValueError: one line with the value, the limit and the cure.
    """
    check_values(run)
    _check_algorithm(run.algorithm)
    if isinstance(run, ToyRun):
        _check_toy(run)
        return
    _check_rollout(run)
    _check_lora(run.lora)
    _check_updates(run)
    if not run.task.module:
        raise ValueError(
            "task.module is empty: give the run a task, as configs/onetwo.py does with task=onetwo.Config()"
        )
    if 0 < run.warmup.max_steps < run.warmup.steps:
        raise ValueError(
            f"warmup.max_steps={run.warmup.max_steps} is below warmup.steps={run.warmup.steps}, from which on samples "
            "are looked at: raise max_steps, or set it to 0 to stop after `steps` without looking"
        )
    if run.policy.weights == "nano" and run.warmup.steps < 1:
        raise ValueError(
            "policy.weights='nano' starts from random weights, so warmup.steps=0 leaves nothing to train on: "
            "set warmup.steps (the nano variant uses 250)"
        )


def check_values(run: Run) -> None:
    """Refuses the first value that its field cannot have, whatever the others are.

    Raises:
      ValueError: one line with the value, what it may be, and a value that may be used.
    """
    defaults = ToyRun() if isinstance(run, ToyRun) else LanguageRun(task=type(run.task)())
    for (name, value, _, allowed), default in zip(settings(run), settings(defaults), strict=True):
        if isinstance(allowed, limits.Limit):
            if not allowed.holds(value):
                cure = f": try {default.value}" if default.value != () else ""
                raise ValueError(f"{name}={value} must be {allowed.words}{cure}")
        elif allowed is not None:
            for word in value if isinstance(value, tuple) else (value,):
                if word not in allowed:
                    raise ValueError(f"{name}={word!r} is unknown: choose one of {', '.join(allowed)}")


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


def _check_toy(run: ToyRun) -> None:
    if run.algorithm.method == "mara" and run.algorithm.anchor == "answer":
        raise ValueError(
            "algorithm.anchor='answer' means nothing where each outcome is its own answer: use algorithm.anchor=string"
        )
    if run.algorithm.beta <= 0:
        raise ValueError(f"algorithm.beta={run.algorithm.beta} must be positive: the toy's optimum needs it")
    if run.algorithm.level != "sequence":
        raise ValueError("algorithm.level='token' means nothing for single outcomes: use sequence")
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
        _check_algorithm(algorithm)
    for kl in sweep.kls:
        if not any(name == "auto" or name in TRAINABLE[kl] for name in sweep.estimators):
            raise ValueError(
                f"sweep.estimators={sweep.estimators} has none for the {kl} KL: add auto or "
                f"{' or '.join(TRAINABLE[kl])}, or take {kl} out of sweep.kls"
            )
    if sweep.gaps and run.toy.figure not in (2, 4):
        raise ValueError(f"sweep.gaps means nothing for toy.figure={run.toy.figure}: figures 2 and 4 have two peaks")


def _check_algorithm(algorithm: Algorithm) -> None:
    if algorithm.method == "mara" and algorithm.beta == 0:
        raise ValueError(
            "algorithm.beta=0.0 with algorithm.method='mara': the augmentation is beta times a log-ratio and "
            "does nothing at 0; use a positive beta (0.1), or algorithm.method=vanilla"
        )
    if algorithm.baseline == "group_normalised" and algorithm.beta > 0:
        raise ValueError(
            "algorithm.baseline='group_normalised' divides each group by its own standard deviation, so the "
            "expected gradient is that of no E[R] - beta KL: use leave_one_out"
        )
    if algorithm.baseline == "mean" and algorithm.beta > 0 and estimator_of(algorithm) in KL_BESIDE_REWARD:
        raise ValueError(
            "algorithm.baseline='mean' shrinks the reward's gradient by (g - 1) / g but not that of "
            f"algorithm.estimator={estimator_of(algorithm)}, so beta would not be the stated one: use leave_one_out"
        )
    _check_placement(algorithm)
    _check_weights(algorithm)


def _check_weights(algorithm: Algorithm) -> None:
    """Refuses ratios that do nothing, or that would leave reward and KL unequally weighted."""
    name, ratio = estimator_of(algorithm), algorithm.importance
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
    from mara_jax.core import kl as divergences  # brings jax, which --help and most refusals do without

    name = estimator_of(algorithm)
    cure = f"use algorithm.estimator={TRAINABLE[algorithm.kl][0]} with algorithm.level=sequence"
    pair = ESTIMATORS[name]
    if pair is not None:
        effective = divergences.effective(*pair, algorithm.level)
        if effective.name != algorithm.kl:
            raise ValueError(
                f"algorithm.estimator={name} at level={algorithm.level} does not optimise the "
                f"{algorithm.kl} KL: {effective.sentence}. {cure[0].upper() + cure[1:]}"
            )
    elif algorithm.level == "token":
        raise ValueError(f"algorithm.level='token' has no meaning for algorithm.estimator={name}: {cure}")
    if name not in TRAINABLE[algorithm.kl]:
        exact = "forward" if algorithm.kl == "reverse" else "reverse"
        raise ValueError(f"algorithm.estimator={name} optimises the {exact} KL, not the {algorithm.kl} one: {cure}")


def _check_updates(run: LanguageRun) -> None:
    updates, ratio = run.optimiser.updates, run.algorithm.importance
    if updates > 1 and ratio == "none":
        raise ValueError(
            f"optimiser.updates={updates} with algorithm.importance='none': from the second update on, samples come "
            "from an older policy than the one that is differentiated, so the gradient would not be that of the stated "
            "objective; use algorithm.importance=sequence, or optimiser.updates=1"
        )
    if updates == 1 and ratio != "none":
        raise ValueError(
            f"algorithm.importance={ratio!r} does nothing at optimiser.updates=1, where every ratio is 1: raise "
            "updates (2), or use algorithm.importance=none"
        )


def _check_rollout(run: LanguageRun) -> None:
    rollout = run.rollout
    parts = run.optimiser.micro_batches
    if rollout.group_size % parts:
        raise ValueError(
            f"optimiser.micro_batches={parts} must divide rollout.group_size={rollout.group_size}: each part has some "
            "samples of every group"
        )
    if run.algorithm.baseline != "none" and rollout.group_size < 2:
        raise ValueError(
            f"rollout.group_size={rollout.group_size} leaves algorithm.baseline={run.algorithm.baseline!r} nothing "
            "to compare with: use at least 2, or algorithm.baseline=none"
        )
