"""The schema of a run: frozen dataclasses whose fields carry their default, their meaning and what they may be.

The checks of single values, `--help` of the commands and the test of docs/configuration.md all read it from here.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import ml_collections

from mara_jax.config import limits
from mara_jax.config.limits import Limit
from mara_jax.config.words import Words, names

KLS = ("reverse", "forward")
ANCHORS = ("string", "answer")
LEVELS = ("sequence", "token")
# Ratio of the policy to the one that drew a rollout, at the rollout's later updates.
IMPORTANCES = ("none", "sequence", "length_normalised", "token")
FIRST_MOMENTS = ("float32", "bfloat16")
REFERENCE_DRAWN = ("auto", "before_training", "on_first_use")
FEW_PROMPTS = 16  # up to so many, the reference policy is measured under each of them before training
EQUAL_GROUPS = ("auto", "keep", "redraw", "replace")
LONG_PROMPTS = ("error", "replace")
COMPUTE_DTYPES = ("float32", "bfloat16", "float64")
REMATS = ("none", "elementwise", "layer")
GUARDS = ("stop", "skip")
COVERAGE = "coverage"  # as checkpoint.best: most good answers at equal reward
EQUIVALENCES = ("", "exact", "rouge1", "embedding")
TRACKERS = ("", "trackio", "wandb")
ATTENTIONS = ("auto", "xla", "kernels")
# Kernels of a layer that an adapter may update, in the order of the forward pass.
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


def setting(default: Any, meaning: str, allowed: Words | Callable[[], Words] | Limit | None = None) -> Any:
    """A field of a config.

    Args:
      default: its value where nothing sets it; its type is the field's.
      meaning: one or two phrases, for --help.
      allowed: words to choose from (of each entry, where the field is a tuple), or a function that returns them; a
        limit; or None for anything.
    """
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed})


@dataclass(frozen=True)
class Algorithm:
    """The objective, the transform of its rewards, and its estimator."""

    method: str = setting("mara", "a preset of transform, objective and baseline", names("methods.METHODS"))
    transform: str = setting(
        "auto", "what happens to rewards first; auto: the method's", names("methods.TRANSFORMS", "auto")
    )
    objective: str = setting("auto", "the loss that follows; auto: the method's", names("methods.OBJECTIVES", "auto"))
    anchor: str = setting(
        "answer", "what MARA makes equally likely: good strings (the papers' form) or answers", ANCHORS
    )
    kl: Literal["reverse", "forward"] = setting("reverse", "KL(policy || reference), or KL(reference || policy)", KLS)
    beta: float = setting(0.1, "weight of the KL, in reward units per nat; positive with MARA", limits.BETA)
    threshold: float = setting(
        0.8, "tau: a completion is good where its reward reaches this; the least tau that moves", limits.REWARD
    )
    threshold_percentile: float = setting(
        0.0,
        "tau moves: this percentile of the rewards of earlier steps, as in 90, never below `threshold`; 0: constant",
        limits.PERCENTILE,
    )
    threshold_window: int = setting(8, "of how many steps before, with threshold_percentile", limits.WINDOW)
    eta: float = setting(0.01, "weight of the entropy bonus, in reward units per nat", limits.BETA)
    likelihood_penalty: float = setting(
        0.0,
        "REINVENT: weight of the mean of -1 / log pi, mol_opt's term against collapse (there 5000); 0: none",
        limits.NOT_NEGATIVE,
    )
    estimator: str = setting(
        "auto",
        "how the KL is estimated (auto: k1_in_reward for the reverse, reference_samples for the forward KL); training "
        "refuses those that optimise another KL",
        names("kl.PLACED", "auto", "reference_samples", "ratio"),
    )
    level: Literal["sequence", "token"] = setting("sequence", "log-ratios of whole completions or of tokens", LEVELS)
    baseline: str = setting(
        "auto",
        "subtracted from the reward: mean of the group or of its others; auto: the method's, else leave_one_out",
        names("advantages.BY_NAME", "auto"),
    )
    importance: Literal["none", "sequence", "length_normalised", "token"] = setting(
        "none",
        "importance ratios of policy to sampler where optimiser.updates is above 1: of whole completions (exact at any "
        "distance), their geometric mean over tokens, or of each token (both surrogates)",
        IMPORTANCES,
    )
    clip: float = setting(
        0.0, "a ratio counts from 1 - clip to 1 + clip, as in PPO; 0: not clipped", limits.NOT_NEGATIVE
    )
    truncate: float = setting(
        0.0,
        "cap of the importance weights of trainer over sampler, whose log-probs may differ; 0: no weights",
        limits.CAP,
    )
    truncate_level: Literal["sequence", "token"] = setting(
        "sequence", "truncated weights of whole completions or of tokens", LEVELS
    )


@dataclass(frozen=True)
class Policy:
    """The weights that are trained, and how the model is computed."""

    weights: str = setting(
        "nano", "a directory, a .gguf file, a hub id, smollm2-135m-instruct, chemistry-prior, or nano (untrained)"
    )
    chat: bool = setting(True, "wrap prompts in the tokenizer's chat template")
    system: str = setting("", "a system message for prompts that have none; empty: the template's own, if it has one")
    template_options: str = setting("", "variables of the chat template, as in enable_thinking=False,reasoning=low")
    compute_dtype: str = setting(
        "float32", "of the matmuls: bfloat16 on accelerators, float64 to compare runs beyond rounding", COMPUTE_DTYPES
    )
    remat: str = setting("none", "activation checkpointing: what the backward pass recomputes", REMATS)
    attention: str = setting(
        "auto", "in training: XLA's, Pallas kernels (no scores in memory), or by device and dtype", ATTENTIONS
    )
    scan_layers: bool = setting(False, "train by one compiled layer (fast to compile); decoding unrolls the layers")
    layers: int = setting(2, "depth of nano", limits.COUNT)
    embed: int = setting(128, "width of nano", limits.COUNT)


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter trained in place of all weights: W + alpha / rank * a @ b, of which a and b are trained."""

    rank: int = setting(0, "0: all weights are trained", limits.FROM_ZERO)
    alpha: float = setting(16.0, "scale of the adapter, times rank", limits.POSITIVE)
    targets: str = setting(",".join(LORA_TARGETS), "the kernels that have an adapter, separated by commas")
    adapter: str = setting("", "a directory of peft's to start from; rank, alpha and targets must be its own")


@dataclass(frozen=True)
class Task:
    """What is trained for. Each task's module defines its own section, a subclass called `Config`."""

    module: str = setting("", "the Python module that makes the task, as in mara_jax.tasks.digits")
    equivalence: str = setting(
        "",
        "open answers that count as one: equal but for white space (exact), alike in words (rouge1), alike in meaning "
        "(embedding); empty: equal texts",
        EQUIVALENCES,
    )
    similarity: float = setting(
        0.0, "equivalent above this ROUGE-1 (0: .458) or cosine of embeddings (which has no default)", limits.SHARE
    )
    embedder: str = setting("", "a directory with an embedder; empty: all-MiniLM-L6-v2, as installed")
    most_classes: int = setting(512, "classes of a prompt's answers; further good ones have none", limits.COUNT)


def task_module(name: str) -> Any:
    """The field `module` of a task's own section: `module: str = task_module(__name__)`."""
    return setting(name, "the Python module that makes the task")


@dataclass(frozen=True)
class Warmup:
    """Supervised steps that teach the format; their result is saved and frozen as the reference policy."""

    steps: int = setting(0, "0: the weights are the reference policy as they are", limits.FROM_ZERO)
    batch: int = setting(8, "demonstrations per step", limits.COUNT)
    learning_rate: float = setting(5e-5, "of Adam", limits.POSITIVE)
    max_steps: int = setting(
        0,
        "from `steps` to here samples are drawn after each step, until the task accepts them; 0: stop after `steps`",
        limits.FROM_ZERO,
    )


@dataclass(frozen=True)
class Reference:
    """Samples of the reference policy: they measure it, and MARA over answers has the masses of answers from them."""

    drawn: str = setting(
        "auto",
        "before_training: of every prompt; on_first_use: of a prompt when a step first uses it; auto: before training "
        f"where there are at most {FEW_PROMPTS} prompts and rollout.long_prompts=error. They are kept in the run "
        "directory",
        REFERENCE_DRAWN,
    )
    samples: int = setting(
        0, "of each prompt; 0: 256 drawn before training, or 16 drawn on first use", limits.FROM_ZERO
    )
    seed: int = setting(-1, "of these samples; -1: the run's", limits.SEED_OR_OWN)


@dataclass(frozen=True)
class Rollout:
    """How completions are drawn."""

    prompts_per_step: int = setting(1, "prompts per step", limits.COUNT)
    group_size: int = setting(32, "completions per prompt", limits.COUNT)
    max_new_tokens: int = setting(40, "length limit of a completion, in tokens", limits.COUNT)
    length_buckets: int = setting(
        8,
        "reference and update run on packed sequences, padded to one of so many fractions of the padded batch, each "
        "compiled when it is first met; 0: padded rows",
        limits.FROM_ZERO,
    )
    equal_groups: str = setting(
        "auto",
        "groups whose rewards are all equal: keep them, or draw up to three times again, of the same prompts (redraw) "
        "or of others (replace); auto: redraw for DAPO, else keep",
        EQUAL_GROUPS,
    )
    long_prompts: str = setting(
        "error",
        "prompts too long for the model's context end the run, or are replaced by others, which is counted",
        LONG_PROMPTS,
    )
    replay: int = setting(
        0,
        "REINVENT and VarGrad: completions of earlier steps that are added to each update, for each prompt; drawn from "
        "the best, in proportion to their reward. 0: none",
        limits.FROM_ZERO,
    )
    replay_best: int = setting(100, "completions of each prompt that are remembered for replay", limits.COUNT)
    save: bool = setting(True, "keep every step's completions in WORKDIR/rollouts")
    slots: int = setting(
        0,
        "continuous batching: completions decoded at once; as one ends, the next takes its row. 0: a static batch",
        limits.FROM_ZERO,
    )


@dataclass(frozen=True)
class Optimiser:
    """Adam."""

    learning_rate: float = setting(3e-5, "its peak", limits.POSITIVE)
    warmup_steps: int = setting(0, "updates of linear increase of the learning rate", limits.FROM_ZERO)
    decay_steps: int = setting(
        0, "then updates of linear decrease to a tenth, where it stays; 0: constant", limits.FROM_ZERO
    )
    b1: float = setting(0.9, "decay of the first moment", limits.DECAY)
    b2: float = setting(0.999, "decay of the second moment", limits.DECAY)
    eps: float = setting(1e-8, "added to the root of the second moment", limits.POSITIVE)
    # A norm clipped at every step makes the last steps as large as the first: Adam no longer remembers that
    # gradients once were large, and the policy wanders about its optimum.
    max_grad_norm: float = setting(0.0, "the gradient is scaled down to this norm; 0: never", limits.NOT_NEGATIVE)
    micro_batches: int = setting(
        1,
        "gradient accumulation: the batch in so many parts, each with samples of every group (it must divide "
        "rollout.group_size); less memory, the same gradient, one more forward pass",
        limits.COUNT,
    )
    updates: int = setting(
        1, "updates on one rollout, each on all of it; above 1 with algorithm.importance", limits.COUNT
    )
    first_moment: str = setting(
        "float32", "dtype of Adam's first moment; bfloat16 takes half the memory", FIRST_MOMENTS
    )


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoints of what is trained and of the optimiser."""

    every: int = setting(20, "steps between them", limits.COUNT)
    keep: int = setting(
        2, "how many stay, the newest; a run goes on from the one before where the newest is damaged", limits.COUNT
    )
    keep_every: int = setting(
        0, "beside these, each whose step is a multiple of this stays; a multiple of `every`. 0: none", limits.FROM_ZERO
    )
    best: str = setting(
        "",
        "a measure of the evaluations, as in pass@1: beside the newest, the checkpoint where it is highest stays; "
        "coverage: the one with most good answers among those whose reward equals the best, within its interval",
    )


@dataclass(frozen=True)
class Evaluation:
    """The policy measured on held-out prompts before the first step, every so many steps, and after the last."""

    prompts: str = setting("", "a file as task.prompts is, with the same columns; empty: the task's own prompts")
    every: int = setting(0, "steps between evaluations; 0: none are made", limits.FROM_ZERO)
    samples: int = setting(16, "completions of each prompt", limits.COUNT)


@dataclass(frozen=True)
class Mesh:
    """How devices are arranged, and what is sharded over them; a run may be resumed on another mesh."""

    data: int = setting(-1, "data parallel: shards rows of the batch", limits.MESH_SIZE)
    fsdp: int = setting(1, "shards rows of the batch, and parameters and their moments", limits.MESH_SIZE)
    tensor: int = setting(1, "tensor parallel: shards heads, feed-forward and vocabulary", limits.MESH_SIZE)
    overrides: str = setting("", "of the table in parallel/sharding.py, as in kv_heads:none,embed:data+fsdp")


@dataclass(frozen=True)
class Profile:
    """A window of steps traced by jax's profiler into WORKDIR/profile."""

    first: int = setting(3, "its first step, numbered as in metrics.jsonl; the first steps compile", limits.COUNT)
    steps: int = setting(0, "how many; 0: nothing is traced", limits.FROM_ZERO)


@dataclass(frozen=True)
class Population:
    """Many runs as one program: the product of these axes, each trained as by itself; empty axes and no seeds: one run.

    They share the policy's weights, the warm-up and the samples of the reference policy.
    """

    methods: tuple[str, ...] = setting((), "as algorithm.method; none: the config's", names("methods.METHODS"))
    anchors: tuple[str, ...] = setting((), "as algorithm.anchor", ANCHORS)
    kls: tuple[str, ...] = setting((), "as algorithm.kl", KLS)
    betas: tuple[float, ...] = setting((), "as algorithm.beta", limits.BETAS)
    thresholds: tuple[float, ...] = setting((), "as algorithm.threshold", limits.REWARDS)
    learning_rates: tuple[float, ...] = setting((), "as optimiser.learning_rate", limits.RATES)
    seeds: int = setting(0, "how many, from `seed` on; 0: the run's own", limits.FROM_ZERO)
    at_once: int = setting(
        0, "members trained side by side, at most; 0: as many as an estimate of their memory allows", limits.FROM_ZERO
    )


@dataclass(frozen=True)
class LanguageRun:
    """One training run of a language model, or a population of them."""

    steps: int = setting(40, "rollouts of the run, each with its update", limits.COUNT)
    seed: int = setting(0, "of all randomness of the run", limits.FROM_ZERO)
    show_samples: int = setting(
        2, "completions printed after each step: + where the reward reaches algorithm.threshold", limits.FROM_ZERO
    )
    guard: str = setting(
        "stop",
        "at the first value that is not finite: stop the run, whose last checkpoint stays, or skip the step's update",
        GUARDS,
    )
    guard_limit: int = setting(5, "with guard=skip, updates skipped in a row at which the run stops", limits.COUNT)
    watchdog: float = setting(
        600.0,
        "seconds without progress after which a line on stderr names the phase and the process; longer than a "
        "compilation. 0: none",
        limits.NOT_NEGATIVE,
    )
    watchdog_ends: bool = setting(False, "then the run ends, too, with status 70")
    tracker: str = setting("", "where metrics go beside WORKDIR; its package is an extra, mara_jax[NAME]", TRACKERS)
    algorithm: Algorithm = field(default_factory=Algorithm)
    policy: Policy = field(default_factory=Policy)
    lora: Lora = field(default_factory=Lora)
    task: Task = field(default_factory=Task)
    warmup: Warmup = field(default_factory=Warmup)
    reference: Reference = field(default_factory=Reference)
    rollout: Rollout = field(default_factory=Rollout)
    optimiser: Optimiser = field(default_factory=Optimiser)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluation: Evaluation = field(default_factory=Evaluation)
    mesh: Mesh = field(default_factory=Mesh)
    profile: Profile = field(default_factory=Profile)
    population: Population = field(default_factory=Population)


@dataclass(frozen=True)
class Toy:
    """The problem of 100 outcomes."""

    figure: int = setting(6, "whose rewards and reference", limits.FIGURE)
    batch: int = setting(32, "samples per step", limits.COUNT)
    learning_rate: float = setting(5e-3, "of Adam", limits.POSITIVE)
    exact: bool = setting(False, "exact gradients instead of sampled ones")


@dataclass(frozen=True)
class Sweep:
    """A study of many toy runs: the product of its axes; without betas there is none, and one run is made."""

    betas: tuple[float, ...] = setting((), "weights of the KL; none: one run", limits.BETAS)
    thresholds: tuple[float, ...] = setting((), "none: algorithm.threshold", limits.TOY_REWARDS)
    gaps: tuple[float, ...] = setting(
        (), "best reward minus the left peak's, figures 2 and 4; none: the figure's own", limits.TOY_REWARDS
    )
    seeds: int = setting(1, "how many, from `seed` on", limits.COUNT)
    methods: tuple[str, ...] = setting(("vanilla", "mara"), "as algorithm.method", names("methods.METHODS"))
    kls: tuple[str, ...] = setting(("reverse", "forward"), "as algorithm.kl", KLS)
    estimators: tuple[str, ...] = setting(
        ("auto",),
        "as algorithm.estimator, each with the KL that it is exact for",
        names("kl.PLACED", "auto", "reference_samples", "ratio"),
    )
    chunk: int = setting(1024, "runs of each method and KL that are trained at once", limits.COUNT)


@dataclass(frozen=True)
class ToyRun:
    """Training of a free categorical over 100 outcomes: one run, or a study of many."""

    steps: int = setting(1000, "updates of the run", limits.COUNT)
    seed: int = setting(0, "of all randomness of the run", limits.FROM_ZERO)
    algorithm: Algorithm = field(default_factory=lambda: Algorithm(anchor="string", baseline="none"))
    toy: Toy = field(default_factory=Toy)
    sweep: Sweep = field(default_factory=Sweep)


Run = LanguageRun | ToyRun


class Setting(NamedTuple):
    """A field of a run: its dotted name, its value, and as `setting` has them its meaning and what it may be."""

    name: str
    value: Any
    meaning: str
    allowed: Words | Limit | None


def settings(run: Any, prefix: str = "") -> Iterator[Setting]:
    """All fields of a run in the order of the schema, those of its sections among them."""
    for one in dataclasses.fields(run):
        value = getattr(run, one.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{prefix}{one.name}.")
        else:
            if "meaning" not in one.metadata:
                raise ValueError(
                    f"{prefix}{one.name} says neither its meaning nor what it may be: write the field as {one.name} = "
                    "config.setting(default, meaning, allowed)"
                )
            allowed = one.metadata["allowed"]
            words: Any = allowed() if callable(allowed) else allowed
            yield Setting(prefix + one.name, value, one.metadata["meaning"], words)


def to_config_dict(run: Run) -> ml_collections.ConfigDict:
    """The run as a locked ConfigDict, for the command line's overrides."""
    return ml_collections.ConfigDict(dataclasses.asdict(run)).lock()


def estimator_of(algorithm: Algorithm) -> str:
    """The estimator that "auto" stands for: the first trainable one of the chosen KL; "auto" for an objective whose KL
    is fixed."""
    from mara_jax.core import method_rules

    return method_rules.resolved(algorithm).estimator


def template_options(policy: Policy) -> dict[str, bool | int | str]:
    """The variables that `template_options` gives the chat template: true, false, whole numbers, else texts.

    Raises:
      ValueError: a part that is no NAME=VALUE.
    """
    words = {"true": True, "false": False}
    options: dict[str, bool | int | str] = {}
    for part in filter(None, (part.strip() for part in policy.template_options.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"policy.template_options: {part!r} is not of the form NAME=VALUE: enable_thinking=False")
        options[name] = words.get(value.lower(), int(value) if value.isdecimal() else value)
    return options


def lora_targets(lora: Lora) -> tuple[str, ...]:
    """The kernels that `targets` names, in the order of the forward pass, then what it names besides."""
    named = [name.strip() for name in lora.targets.split(",")]
    return (*(name for name in LORA_TARGETS if name in named), *(name for name in named if name not in LORA_TARGETS))


def sweep_algorithms(run: ToyRun) -> list[Algorithm]:
    """The variants of a study: each method with each KL, and each of the named estimators that is that KL's own.

    A method whose objective has a KL of its own is there once, whatever the KLs and estimators.
    """
    from mara_jax.core import method_rules

    variants = []
    for method in run.sweep.methods:
        one = dataclasses.replace(run.algorithm, method=method)
        placements = method_rules.rows(one)[1].placements
        if not placements:
            variants.append(dataclasses.replace(one, kl="reverse", estimator="auto", baseline="auto"))
        for kl in (kl for kl in placements if kl in run.sweep.kls):
            named = [placements[kl][0] if name == "auto" else name for name in run.sweep.estimators]
            for name in dict.fromkeys(named):
                if name in placements[kl]:
                    variants.append(dataclasses.replace(one, kl=kl, estimator=name))  # pyright: ignore
    return variants
