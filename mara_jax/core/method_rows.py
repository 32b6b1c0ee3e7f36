"""What a row of each table in `core.methods` says."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from mara_jax.core.objectives import LossAndMetrics
from mara_jax.core.scored import Algorithm, Numbers, Scored

Need = Literal["answers", "masses", "non_negative_rewards", "groups", "positive_beta", "positive_eta"]


class Outcomes(NamedTuple):
    """Every outcome there is, or samples that stand for them: `ref_logp` [a] (nats), `reward` [a], `answer` [a]."""

    ref_logp: Float[Array, " a"] | Float[np.ndarray, " a"]
    reward: Float[Array, " a"] | Float[np.ndarray, " a"]
    answer: Int[Array, " a"] | Int[np.ndarray, " a"]


# (algorithm without "auto", outcomes, numbers, group size) -> log-probs [a] (nats), or None where no closed form is
# known for these choices or rewards. Called on arrays, not under jit.
Optimum = Callable[[Algorithm, Outcomes, Numbers, int], Any]


class Transform(NamedTuple):
    """A row of TRANSFORMS.

    `apply`: (algorithm, scored, numbers) -> (reward [p, g], ref_logp [p, g]) for the objective.
    `rewards`: what it does, to complete "with rewards ...".
    `needs`: what a run must have.
    `exactly`: what follows where the objective ends at the optimum of its KL whatever the rewards.
    `anchor`: what a MARA makes equally likely; None for other transforms.
    `optimum`: beside an objective that ends at the optimum of its KL whatever the rewards.
    `forecast`: the name that `core.forecast` has for that optimum.
    `paper`: its source.
    """

    apply: Callable[[Algorithm, Scored, Numbers], tuple[jax.Array, jax.Array]]
    rewards: str
    needs: tuple[Need, ...] = ()
    anchor: Literal["string", "answer"] | None = None
    optimum: Optimum | None = None
    forecast: Literal["vanilla", "answers", "strings"] | None = None
    exactly: str = ""
    paper: str = ""


class Objective(NamedTuple):
    """A row of OBJECTIVES.

    `loss`: (algorithm, scored, reference, numbers) -> (loss, metrics), of transformed rewards.
    `optimises`: a sentence that begins with its verb, or a function of the algorithm that returns one.
    `kl`: where its penalty stands, in words.
    `placements`: by direction, the values of `algorithm.estimator` that it reads; none where its penalty is its own.
    `baseline`: its own; None where it reads `algorithm.baseline`.
    `ratios`: importance ratios at a rollout's later updates: "configured" by the algorithm, its "own", or "none".
    `refuses_mara`: why MARA is not balanced beside it; "" where it ends at the optimum of its KL whatever the rewards.
    `needs`: what a run must have.
    `optimum`: with rewards as they are.
    `redraws_equal_groups`: groups of equal rewards are sampled again.
    `replays`: it may take completions of earlier policies, without ratios.
    `learns_log_z`: it reads `Scored.prompt_log_z`, which the update learns.
    `reads_threshold`: it reads `Numbers.threshold`, as MARA's transforms do.
    `paper`: its source.
    """

    loss: Callable[[Algorithm, Scored, Scored | None, Numbers], LossAndMetrics]
    optimises: str | Callable[[Algorithm], str]
    kl: str
    placements: Mapping[str, tuple[str, ...]] = {}
    baseline: str | None = None
    ratios: Literal["configured", "own", "none"] = "none"
    refuses_mara: str = ""
    needs: tuple[Need, ...] = ()
    optimum: Optimum | None = None
    redraws_equal_groups: bool = False
    replays: bool = False
    learns_log_z: bool = False
    reads_threshold: bool = False
    paper: str = ""


class Method(NamedTuple):
    """A row of METHODS: a preset.

    `transform`: a name in TRANSFORMS, by `algorithm.anchor` where it has two forms.
    `objective`: a name in OBJECTIVES.
    `ends`: where training ends, in words.
    `baseline`: where the objective reads one.
    `paper`: its source.
    """

    transform: str | Mapping[str, str]
    objective: str
    ends: str
    baseline: str = "leave_one_out"
    paper: str = ""
