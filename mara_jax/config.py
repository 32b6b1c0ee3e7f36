"""The schema of a run: frozen dataclasses, their checks, and the way from a config file to them.

A config file's ``get_config(variant)`` returns ``LanguageRun(...)`` or ``ToyRun(...)`` turned into a
``ConfigDict`` by ``to_config_dict``, so that every field can be overridden from the command line;
``resolve`` turns it back and refuses what cannot work, with one line that names the cure.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import ml_collections

from mara_jax import limits
from mara_jax.core import kl as divergences
from mara_jax.core.targets import Direction

METHODS = ("vanilla", "mara")
ANCHORS = ("string", "answer")
BASELINES = ("none", "mean", "leave_one_out", "group_normalised")
# How the KL is estimated: name -> (estimator, placement) of core.kl.effective, or None for the two
# forms that are exact for the forward KL by construction.
ESTIMATORS: dict[str, tuple[divergences.Estimator, divergences.Placement] | None] = {
    "auto": None,
    "k1_in_reward": ("k1", "reward"),
    "k3_in_reward": ("k3", "reward"),
    "k1_in_loss": ("k1", "loss"),
    "k2_in_loss": ("k2", "loss"),
    "k3_in_loss": ("k3", "loss"),
    "reference_samples": None,
    "ratio": None,
}
# Here the KL is a term of its own, which no baseline touches.
KL_BESIDE_REWARD = ("reference_samples", "k2_in_loss", "k3_in_loss")
# What the training step implements; other rows of the table are for audits.
TRAINABLE = {
    "reverse": ("k1_in_reward", "k2_in_loss"),
    "forward": ("reference_samples", "ratio", "k3_in_loss"),
}


@dataclass(frozen=True)
class Algorithm:
    """Which objective is optimised: E[R] - beta KL, its reward augmentation and its estimator."""

    method: str = "mara"
    anchor: str = "answer"  # what MARA equalises: each good string (the papers' form) or each answer
    kl: Direction = "reverse"  # KL(pi || ref), or "forward": KL(ref || pi)
    beta: float = 0.1  # weight of the KL, in reward units per nat
    threshold: float = 0.8  # tau: a completion is good where its reward reaches this
    estimator: str = "auto"  # reverse: k1_in_reward; forward: reference_samples
    level: divergences.Level = "sequence"  # log-ratios of whole completions, or of single tokens
    baseline: str = "leave_one_out"


@dataclass(frozen=True)
class Policy:
    """Which weights are trained."""

    weights: str = "nano"  # a directory, a .gguf file, a hub id, "smollm2-135m-instruct" or "nano"
    chat: bool = True  # wrap prompts in the tokenizer's chat template
    compute_dtype: str = "float32"  # "bfloat16" on accelerators; "float64" to compare runs beyond rounding
    remat: str = "none"  # what the backward pass recomputes: "none", "elementwise" or "layer"
    scan_layers: bool = False  # train by one compiled layer (fast to compile) or all; decoding unrolls them anyway
    layers: int = 2  # nano only: its depth and width
    embed: int = 128


@dataclass(frozen=True)
class Task:
    """The 1-2 task (Figure 9) and the demonstrations of its warm-up."""

    lenient: bool = False  # accept a sentence before <think>
    share_of_ones: float = 0.8  # of the warm-up's demonstrations
    reasoning: str = "varied"
    malformed: float = 0.0  # share of demonstrations that break the format


@dataclass(frozen=True)
class Warmup:
    """Supervised steps that teach the format; their result is saved and frozen as the reference."""

    steps: int = 0  # 0: the weights are the reference as they are
    batch: int = 8
    learning_rate: float = 5e-5
    check_every: int = 1  # from `steps` on, samples are drawn this often until both ranges are met
    check_samples: int = 64
    max_steps: int = 0  # 0: never look, stop after `steps`
    valid_range: tuple[float, float] = (0.6, 1.0)
    ones_range: tuple[float, float] = (0.78, 0.89)
    measure_samples: int = 256  # samples of the finished reference: validity, answer masses


@dataclass(frozen=True)
class Rollout:
    """How completions are drawn."""

    prompts_per_step: int = 1
    group_size: int = 32
    max_new_tokens: int = 40
    temperature: float = 1.0
    top_p: float = 1.0
    # Updates run on completions laid end to end, their number of tokens rounded up to one of so many fractions of
    # the padded size, each compiled when it is first met. 0: padded.
    length_buckets: int = 8


@dataclass(frozen=True)
class Optimiser:
    """Adam."""

    learning_rate: float = 3e-5
    warmup_steps: int = 0  # linear increase of the learning rate
    decay_steps: int = 0  # then a linear decrease to a tenth over so many steps, where it stays; 0: constant
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    # 0: no clipping. A norm clipped at every step makes the last steps as large as the first: Adam no longer
    # remembers that gradients once were large, and the policy wanders about its optimum.
    max_grad_norm: float = 0.0
    # The model sees the batch in so many parts, each with some samples of every group: less memory, the same
    # gradient, one more forward pass.
    micro_batches: int = 1


@dataclass(frozen=True)
class Checkpoint:
    every: int = 20
    keep: int = 1


@dataclass(frozen=True)
class Mesh:
    """How devices are arranged, and what is cut over them; a run may be resumed on another mesh."""

    data: int = -1  # rows of the batch; -1, here or elsewhere: all devices that the other sizes leave
    fsdp: int = 1  # rows too, and parameters and their moments
    tensor: int = 1  # heads, feed-forward and vocabulary
    overrides: str = ""  # of the table in parallel/sharding.py: "kv_heads:none,embed:data+fsdp"


@dataclass(frozen=True)
class Profile:
    """A window of steps traced by jax's profiler into WORKDIR/profile."""

    first: int = 3  # numbered as in metrics.jsonl; the first steps compile
    steps: int = 0  # 0: nothing is traced


@dataclass(frozen=True)
class LanguageRun:
    """One training run of a language model."""

    steps: int = 40
    seed: int = 0
    algorithm: Algorithm = field(default_factory=Algorithm)
    policy: Policy = field(default_factory=Policy)
    task: Task = field(default_factory=Task)
    warmup: Warmup = field(default_factory=Warmup)
    rollout: Rollout = field(default_factory=Rollout)
    optimiser: Optimiser = field(default_factory=Optimiser)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    mesh: Mesh = field(default_factory=Mesh)
    profile: Profile = field(default_factory=Profile)
    show_samples: int = 2  # printed after each step


@dataclass(frozen=True)
class Toy:
    """The problem of 100 outcomes: which figure's rewards and reference."""

    figure: int = 6
    batch: int = 32
    learning_rate: float = 5e-3
    exact: bool = False  # exact gradients instead of sampled ones


@dataclass(frozen=True)
class Sweep:
    """A study of many toy runs: the product of its axes; without betas there is none, and one run is made."""

    betas: tuple[float, ...] = ()
    thresholds: tuple[float, ...] = ()  # none: algorithm.threshold
    gaps: tuple[float, ...] = ()  # best reward minus the left peak's, figures 2 and 4; none: the figure's own
    seeds: int = 1  # from `seed` on
    methods: tuple[str, ...] = ("vanilla", "mara")
    kls: tuple[str, ...] = ("reverse", "forward")
    estimators: tuple[str, ...] = ("auto",)  # of each KL, those that are its own
    chunk: int = 1024  # runs of each method and KL at once


@dataclass(frozen=True)
class ToyRun:
    """Training of a free categorical over 100 outcomes: one run, or a study of many."""

    steps: int = 1000
    seed: int = 0
    algorithm: Algorithm = field(default_factory=lambda: Algorithm(anchor="string", baseline="none"))
    toy: Toy = field(default_factory=Toy)
    sweep: Sweep = field(default_factory=Sweep)


Run = LanguageRun | ToyRun


def to_config_dict(run: Run) -> ml_collections.ConfigDict:
    """The run as a locked ConfigDict, for the command line's overrides."""
    return ml_collections.ConfigDict(dataclasses.asdict(run)).lock()


def resolve(config: Any) -> Run:
    """The frozen, checked run behind a ConfigDict (or a plain dict, as read from config.json).

    Raises:
      ValueError: an unknown field (the known ones are named), or values that cannot work together.
    """
    run = build(config)
    check(run)
    return run


def build(config: Any) -> Run:
    """The run behind a config as it stands: what training refuses (see `check`) can still be audited.

    Raises:
      ValueError: an unknown field, a value of the wrong type, or a word or beta of the algorithm that means nothing.
    """
    kind = kind_of(config)
    values = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    values = dataclasses.asdict(values) if isinstance(values, LanguageRun | ToyRun) else dict(values)
    run = _build(kind, kind(), values, "")
    _check_words(run.algorithm)
    limits.check(run, kind(), "algorithm.beta")
    return run


def kind_of(config: Any) -> type[LanguageRun] | type[ToyRun]:
    """Which schema a config has: a run, or a ConfigDict or dict of one.

    Raises:
      ValueError: it is none of these.
    """
    if isinstance(config, LanguageRun | ToyRun):
        return type(config)
    if not isinstance(config, ml_collections.ConfigDict | dict):
        raise ValueError(f"a config is to_config_dict(LanguageRun(...)) or of a ToyRun, not {config!r:.80}")
    return ToyRun if "toy" in config else LanguageRun


def _build(kind: type, defaults: Any, values: dict[str, Any], where: str) -> Any:
    """The dataclass of `defaults` with values in place of them; `kind` is the whole run's, for the error."""
    built = {}
    for name, value in values.items():
        if not hasattr(defaults, name):
            raise ValueError(unknown_field(kind, where + name))
        default = getattr(defaults, name)
        if dataclasses.is_dataclass(default):
            built[name] = _build(kind, default, dict(value), where + name + ".")
        else:
            built[name] = _typed(value, default, where + name)
    return dataclasses.replace(defaults, **built)


def _typed(value: Any, default: Any, where: str) -> Any:
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return _typed_tuple(tuple(value), default, where)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"{where}={value!r} must be a {type(default).__name__}, as in {default!r}")
    return value


# Tuples of any length, and what they hold; every other one is a pair of numbers.
_ELEMENT = {"betas": float, "thresholds": float, "gaps": float, "methods": str, "kls": str, "estimators": str}


def _typed_tuple(value: tuple, default: tuple, where: str) -> tuple:
    element = _ELEMENT.get(where.split(".")[-1])
    if element is None and len(value) != len(default):
        raise ValueError(f"{where}={value!r} must have {len(default)} entries, as {default!r} has")
    if element is str:
        wrong = [v for v in value if not isinstance(v, str)]
    else:
        wrong = [v for v in value if isinstance(v, bool) or not isinstance(v, int | float)]
    if wrong:
        raise ValueError(f"{where}={value!r} must hold {'words' if element is str else 'numbers'}, not {wrong[0]!r}")
    return value if element is str else tuple(float(v) for v in value)


def unknown_field(kind: type, path: str) -> str:
    """One line saying that a dotted field does not exist, and which ones do."""
    node: Any = kind()
    *sections, last = path.split(".")
    for at, section in enumerate(sections):
        if not dataclasses.is_dataclass(getattr(node, section, None)):
            last, sections = section, sections[:at]
            break
        node = getattr(node, section)
    known = ", ".join(f.name for f in dataclasses.fields(node))
    place = ".".join(sections) or "the config"
    return f"unknown config field {path!r}: {place} has no {last!r}; it has {known}"


def estimator_of(algorithm: Algorithm) -> str:
    """The estimator that "auto" stands for: the first trainable one of the chosen KL."""
    return TRAINABLE[algorithm.kl][0] if algorithm.estimator == "auto" else algorithm.estimator


def sweep_algorithms(run: ToyRun) -> list[Algorithm]:
    """The variants of a study: each method with each KL, and each of the named estimators that is that KL's own."""
    rows = []
    for method in run.sweep.methods:
        for kl in TRAINABLE:
            named = [TRAINABLE[kl][0] if name == "auto" else name for name in run.sweep.estimators]
            for name in dict.fromkeys(named):
                if kl in run.sweep.kls and name in TRAINABLE[kl]:
                    rows.append(dataclasses.replace(run.algorithm, method=method, kl=kl, estimator=name))
    return rows


def check(run: Run) -> None:
    """Refuses values that cannot work, alone or together.

    Raises:
      ValueError: one line with the value, the limit and the cure.
    """
    limits.check(run, type(run)())
    _check_algorithm(run.algorithm)
    if isinstance(run, ToyRun):
        _check_toy(run)
        return
    _check_rollout(run)
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
    if run.task.reasoning not in ("varied", "fixed"):
        raise ValueError(f"task.reasoning={run.task.reasoning!r} is unknown: choose varied or fixed")


def _check_toy(run: ToyRun) -> None:
    if run.toy.figure not in (2, 4, 5, 6):
        raise ValueError(f"toy.figure={run.toy.figure} has no 100-outcome problem: choose 2, 4, 5 or 6")
    if run.algorithm.method == "mara" and run.algorithm.anchor == "answer":
        raise ValueError(
            "algorithm.anchor='answer' means nothing where each outcome is its own answer: use algorithm.anchor=string"
        )
    if run.algorithm.beta <= 0:
        raise ValueError(f"algorithm.beta={run.algorithm.beta} must be positive: the toy's optimum needs it")
    if run.algorithm.level != "sequence":
        raise ValueError("algorithm.level='token' means nothing for single outcomes: use sequence")
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
    for name, known in (("methods", METHODS), ("kls", tuple(TRAINABLE)), ("estimators", tuple(ESTIMATORS))):
        if not getattr(sweep, name):
            raise ValueError(f"sweep.{name} is empty: choose from {', '.join(known)}")
        for value in getattr(sweep, name):
            if value not in known:
                raise ValueError(f"sweep.{name} has {value!r}, which is unknown: choose from {', '.join(known)}")
    for algorithm in sweep_algorithms(run):
        _check_algorithm(algorithm)
    for kl in sweep.kls:
        if not any(name == "auto" or name in TRAINABLE[kl] for name in sweep.estimators):
            raise ValueError(
                f"sweep.estimators={sweep.estimators} has none for the {kl} KL: add auto or "
                f"{' or '.join(TRAINABLE[kl])}, or take {kl} out of sweep.kls"
            )
    for name, holds, limit in (
        ("betas", lambda v: 0 < v <= 1e6, "above 0 and at most 1e6"),
        ("thresholds", lambda v: -1e6 <= v <= 1, "finite and at most 1"),
        ("gaps", lambda v: -1e6 <= v <= 1, "finite and at most 1"),
    ):
        for value in getattr(sweep, name):
            if not holds(value):
                raise ValueError(f"sweep.{name} has {value}: each must be {limit}")
    if sweep.gaps and run.toy.figure not in (2, 4):
        raise ValueError(f"sweep.gaps means nothing for toy.figure={run.toy.figure}: figures 2 and 4 have two peaks")


def _check_words(algorithm: Algorithm) -> None:
    choices = {
        "method": METHODS,
        "anchor": ANCHORS,
        "kl": tuple(TRAINABLE),
        "estimator": tuple(ESTIMATORS),
        "level": ("sequence", "token"),
        "baseline": BASELINES,
    }
    for name, known in choices.items():
        value = getattr(algorithm, name)
        if value not in known:
            raise ValueError(f"algorithm.{name}={value!r} is unknown: choose one of {', '.join(known)}")


def _check_algorithm(algorithm: Algorithm) -> None:
    _check_words(algorithm)
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


def _check_placement(algorithm: Algorithm) -> None:
    """Refuses an estimator whose expected gradient is not that of the KL asked for."""
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


def _check_rollout(run: LanguageRun) -> None:
    rollout = run.rollout
    for name in ("top_p", "temperature"):
        value = getattr(rollout, name)
        if value != 1:
            raise ValueError(
                f"rollout.{name}={value}: samples would not come from the policy whose log-probs are differentiated "
                "and whose KL is measured, so the gradient would not be that of the stated objective; use "
                f"rollout.{name}=1.0"
            )
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
