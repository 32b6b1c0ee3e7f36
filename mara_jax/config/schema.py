"""The schema of a run: frozen dataclasses with their defaults."""

import dataclasses
from dataclasses import dataclass, field

import ml_collections

from mara_jax.core import kl as divergences
from mara_jax.core.importance import Form
from mara_jax.core.targets import Direction

METHODS = ("vanilla", "mara")
ANCHORS = ("string", "answer")
# Ratio of the policy to the one that drew a rollout, at the rollout's later updates.
IMPORTANCES = ("none", "sequence", "length_normalised", "token")
FIRST_MOMENTS = ("float32", "bfloat16")
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
# Kernels of a layer that an adapter may update, in the order of the forward pass.
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
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
    # Where optimiser.updates is above 1: ratios of policy to sampler, of whole completions ("sequence": exact at any
    # distance), their geometric mean over tokens ("length_normalised") or of each token (both surrogates).
    importance: Form = "none"
    clip: float = 0.0  # a ratio counts from 1 - clip to 1 + clip, as in PPO; 0: not clipped
    # Importance weights of trainer over sampler, whose log-probs may differ, at most so large; 0: none.
    truncate: float = 0.0
    truncate_level: divergences.Level = "sequence"


@dataclass(frozen=True)
class Policy:
    """Which weights are trained."""

    weights: str = "nano"  # a directory, a .gguf file, a hub id, "smollm2-135m-instruct" or "nano"
    chat: bool = True  # wrap prompts in the tokenizer's chat template
    compute_dtype: str = "float32"  # "bfloat16" on accelerators; "float64" to compare runs beyond rounding
    remat: str = "none"  # what the backward pass recomputes: "none", "elementwise" or "layer"
    attention: str = "auto"  # in training: "xla", "kernels" (no scores in memory), or what the device and dtype ask for
    scan_layers: bool = False  # train by one compiled layer (fast to compile) or all; decoding unrolls them anyway
    layers: int = 2  # nano only: its depth and width
    embed: int = 128


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter trained in place of all weights: W + alpha / rank * a @ b, of which a and b are trained."""

    rank: int = 0  # 0: all weights are trained
    alpha: float = 16.0
    targets: str = "q,k,v,o,gate,up,down"  # the kernels that have one
    adapter: str = ""  # a directory of peft's to start from; rank, alpha and targets must be its own. Empty: a new one


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
    # Completions decoded at once; as one ends, the next takes its row: more steps, of fewer rows. 0: all at once.
    slots: int = 0
    # All sizes are compiled in the first step, so that no later one waits for a compilation.
    compile_ahead: bool = False


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
    # Updates on one rollout, each on all of it; a step of the run is one rollout with all of them.
    updates: int = 1
    # What Adam's first moment is kept in: "float32", as the weights, or "bfloat16", half of that.
    first_moment: str = "float32"


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
    lora: Lora = field(default_factory=Lora)
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


def estimator_of(algorithm: Algorithm) -> str:
    """The estimator that "auto" stands for: the first trainable one of the chosen KL."""
    return TRAINABLE[algorithm.kl][0] if algorithm.estimator == "auto" else algorithm.estimator


def lora_targets(lora: Lora) -> tuple[str, ...]:
    """The kernels that `targets` names, in the order of the forward pass, then what it names besides."""
    named = [name.strip() for name in lora.targets.split(",")]
    return (*(name for name in LORA_TARGETS if name in named), *(name for name in named if name not in LORA_TARGETS))


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
