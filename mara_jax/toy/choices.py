"""What is static in a toy training: the method and its estimators, which of them go together, and where it ends."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mara_jax import config
from mara_jax.core import advantages, augment, method_rules, methods, targets
from mara_jax.core.method_rows import Outcomes
from mara_jax.core.scored import Numbers
from mara_jax.core.targets import Scalar


@dataclass(frozen=True)
class Choices:
    """The static choices of a run.

    `method`: a name in `core.methods.METHODS`; `transform` and `objective` other than its own, or "auto".
    `gradients`: "sampled" estimates them from `batch` samples a step, "exact" sums over the outcomes
    (vanilla and MARA alone).
    `reverse_estimator` and `forward_estimator`: how the KL is estimated from samples. Reverse: k1 in the reward or k2
    as a loss term. Forward: "samples" of the reference, the "ratio" ref/pi on the policy's own, k3 as a loss term on
    them, or "exact" for the KL alone.
    `anchor`: MARA's anchor from the "batch" (Algorithm 1) or from the whole good set, "all" (as exact gradients do).
    `baseline`: a name in `core.advantages`; an objective with a baseline of its own does not read it.
    `eta`: weight of the entropy bonus (reward units per nat).
    `augmentation`: the KL that MARA's rewards are made for, by default that of `direction`. Rewards made for the other
    one (Algorithm 1's beside the forward KL) are the mistake that Figure 6 shows.
    `every`: metrics are recorded before every `every`-th step; it must divide `steps`.
    """

    method: str = "vanilla"
    direction: targets.Direction = "reverse"
    gradients: Literal["sampled", "exact"] = "sampled"
    reverse_estimator: Literal["k1_in_reward", "k2_in_loss"] = "k1_in_reward"
    forward_estimator: Literal["samples", "ratio", "k3_in_loss", "exact"] = "samples"
    anchor: Literal["batch", "all"] = "batch"
    baseline: str = "none"
    augmentation: targets.Direction | None = None
    steps: int = 1000
    batch: int = 32
    every: int = 1
    transform: str = "auto"
    objective: str = "auto"
    eta: float = 0.01

    @property
    def algorithm(self) -> config.Algorithm:
        """The same choices as a language-model run has them, with no "auto" left."""
        estimator = self.reverse_estimator if self.direction == "reverse" else self.forward_estimator
        if estimator in ("samples", "exact"):
            estimator = "reference_samples"
        algorithm = config.Algorithm(
            method=self.method, transform=self.transform, objective=self.objective, anchor="string",
            kl=self.direction, estimator=estimator, baseline=self.baseline, eta=self.eta,
        )  # fmt: skip
        return method_rules.resolved(algorithm)


def _known() -> dict[str, tuple[str | None, ...]]:
    """The values of each field; read when a run is checked, as a config file may add rows to the tables."""
    return {
        "method": tuple(methods.METHODS),
        "direction": ("reverse", "forward"),
        "gradients": ("sampled", "exact"),
        "reverse_estimator": ("k1_in_reward", "k2_in_loss"),
        "forward_estimator": ("samples", "ratio", "k3_in_loss", "exact"),
        "anchor": ("batch", "all"),
        "baseline": tuple(advantages.BY_NAME),
        "augmentation": (None, "reverse", "forward"),
        "transform": ("auto", *methods.TRANSFORMS),
        "objective": ("auto", *methods.OBJECTIVES),
    }


def check(choices: Choices) -> None:
    """Refuses an unknown choice, choices that do not go together, and a recording interval that does not divide steps.

    Args:
        choices: the run's choices.

    Raises:
        ValueError: naming the field, its value and the known ones.
    """
    for field, known in _known().items():
        value = getattr(choices, field)
        if value not in known:
            raise ValueError(f"{field} {value!r} is not known: use one of {', '.join(map(str, known))}")
    if choices.every < 1 or choices.steps % choices.every:
        raise ValueError(f"every {choices.every} does not divide the {choices.steps} steps: use a divisor of them")
    transform, objective = method_rules.rows(choices.algorithm)
    if transform.anchor == "answer":
        raise ValueError(
            "transform 'mara_answers' means nothing where each outcome is its own answer: use mara_strings"
        )
    if transform.anchor is not None and objective.refuses_mara:
        raise ValueError(f"MARA with objective {choices.algorithm.objective!r}: {objective.refuses_mara}")
    if choices.gradients == "exact" and not has_traced_optimum(choices):
        raise ValueError(
            f"gradients 'exact' are known for vanilla and MARA, not for method {choices.method!r}: use 'sampled'"
        )
    if choices.augmentation is not None and transform.anchor is None:
        raise ValueError(f"augmentation {choices.augmentation!r} with method {choices.method!r}: use method 'mara'")


def has_traced_optimum(choices: Choices) -> bool:
    """Whether `optimum` is a function that jax can trace: for vanilla and MARA over strings; others take arrays.

    Args:
        choices: transform and objective.
    """
    algorithm = choices.algorithm
    return algorithm.objective == "policy_gradient" and algorithm.transform in ("none", "mara_strings")


def optimum(
    ref_logp_a: Float[Array, " a"], reward_a: Float[Array, " a"], beta: Scalar, threshold: Scalar, choices: Choices
) -> Float[Array, " a"] | None:
    """The distribution at which training ends, as the method's row has it.

    Args:
        ref_logp_a: log-probabilities of the reference (nats).
        reward_a: reward of each outcome.
        beta: regularisation strength, above 0.
        threshold: reward from which an outcome is good.
        choices: method, direction, augmentation and batch.

    Returns:
        Log-probabilities (nats); None where no closed form is known, or no single distribution is optimal.
    """
    algorithm, direction = choices.algorithm, choices.direction
    if choices.augmentation not in (None, direction):
        whole_set = {"beta": beta, "threshold": threshold, "direction": choices.augmentation}
        (reward_a,), (ref_logp_a,) = augment.mara(reward_a[None], ref_logp_a[None], **whole_set)
        return (targets.reverse_kl if direction == "reverse" else targets.forward_kl)(ref_logp_a, reward_a, beta)
    outcomes = Outcomes(ref_logp_a, reward_a, jnp.arange(reward_a.shape[-1]))
    return method_rules.optimum(algorithm, outcomes, Numbers(beta, threshold, choices.eta), choices.batch)


def known_optimum(ref_logp_a, reward_a, beta: Scalar, threshold: Scalar, choices: Choices) -> np.ndarray:
    """`optimum` of arrays, in float64.

    Args:
        ref_logp_a: log-probabilities of the reference (nats).
        reward_a: reward of each outcome.
        beta: regularisation strength, above 0.
        threshold: reward from which an outcome is good.
        choices: method, direction, augmentation and batch.

    Returns:
        Log-probabilities (nats), [a]; nan where no closed form is known.
    """
    with jax.enable_x64(True):
        ref_logp_a, reward_a = (jnp.asarray(np.asarray(x, np.float64)) for x in (ref_logp_a, reward_a))
        logp_a = optimum(ref_logp_a, reward_a, float(beta), float(threshold), choices)
    return np.full(len(reward_a), np.nan) if logp_a is None else np.asarray(logp_a)
