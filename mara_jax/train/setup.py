"""What the steps of a run share."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import optax

from mara_jax.config import LanguageRun
from mara_jax.policies.policy import Policy
from mara_jax.tasks.base import Task
from mara_jax.train.answer_classes import AnswerClasses
from mara_jax.train.reference_samples import ReferenceSamples

if TYPE_CHECKING:  # it reads a setup itself
    from mara_jax.train.known_strings import KnownStrings
    from mara_jax.train.replay import Replay


class HeldOut(NamedTuple):
    """What evaluations are made on: a task, whose prompts training may not use, and token ids of each of them."""

    task: Task
    prompts: Sequence[list[int]]


class Setup(NamedTuple):
    """What does not change between the steps of a run.

    prompts: token ids of each prompt of the task, encoded when they are used; ref_samples: of each prompt, drawn when
    they are first asked for, None where the method reads none; held_out: None where no evaluation is made; classes: of
    open answers, None where the task names no equivalence; known_strings: what masses of answers are summed over where
    the task lists strings, else None; replay: the best completions so far, None where none are replayed.
    """

    cfg: LanguageRun
    task: Task
    policy: Policy
    ref_params: Any
    prompts: Sequence[list[int]]
    tx: optax.GradientTransformation
    ref_samples: ReferenceSamples | None = None
    held_out: HeldOut | None = None
    classes: AnswerClasses | None = None
    known_strings: "KnownStrings | None" = None
    replay: "Replay | None" = None
