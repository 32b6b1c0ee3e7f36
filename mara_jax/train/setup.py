"""What the steps of a run share."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import optax

from mara_jax.config import LanguageRun
from mara_jax.policies.policy import Policy
from mara_jax.tasks.base import Task
from mara_jax.train.reference_samples import ReferenceSamples


class Setup(NamedTuple):
    """What does not change between the steps of a run.

    prompts: token ids of each prompt of the task, encoded when they are used; ref_samples: of each prompt, drawn when
    they are first asked for, None where the method reads none.
    """

    cfg: LanguageRun
    task: Task
    policy: Policy
    ref_params: Any
    prompts: Sequence[list[int]]
    tx: optax.GradientTransformation
    ref_samples: ReferenceSamples | None = None
