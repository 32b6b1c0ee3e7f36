"""What a method reads: its choices, a batch of scored completions, and the numbers that one may sweep."""

from typing import Any, Literal, NamedTuple, Protocol

import jax

from mara_jax.core.importance import Form
from mara_jax.core.kl import Level
from mara_jax.core.targets import Direction


class Algorithm(Protocol):
    """The choices of a method, as `config.Algorithm` has them; `core.method_rules.resolved` replaces every "auto"."""

    @property
    def method(self) -> str: ...
    @property
    def transform(self) -> str: ...
    @property
    def objective(self) -> str: ...
    @property
    def baseline(self) -> str: ...
    @property
    def anchor(self) -> str: ...
    @property
    def kl(self) -> Direction: ...
    @property
    def estimator(self) -> str: ...
    @property
    def level(self) -> Level: ...
    @property
    def importance(self) -> Form: ...
    @property
    def clip(self) -> float: ...
    @property
    def truncate(self) -> float: ...
    @property
    def truncate_level(self) -> Literal["sequence", "token"]: ...
    @property
    def beta(self) -> float: ...
    @property
    def threshold(self) -> float: ...
    @property
    def threshold_percentile(self) -> float: ...
    @property
    def threshold_window(self) -> int: ...
    @property
    def eta(self) -> float: ...
    @property
    def likelihood_penalty(self) -> float: ...


class Numbers(NamedTuple):
    """Numbers that a compiled update takes as arguments, so that they can be swept without compiling again.

    `beta` weight of the KL (reward units per nat); `threshold` reward from which a completion is good; `eta` weight of
    the entropy bonus (reward units per nat).
    """

    beta: Any
    threshold: Any
    eta: Any = 0.0


class Scored(NamedTuple):
    """Completions of p prompts, g each, as an objective sees them: nothing of the model that sampled them.

    `logp` [p, g, t] (nats, differentiable), `mask` [p, g, t] (1 counts), `ref_logp` [p, g] of whole completions (nats),
    `reward` [p, g], `answer` [p, g] (class index within the prompt, -1 for none), `log_mass` [p, a] (log Z or log M of
    each answer, -inf for one that was not seen) or None. Rewards and `ref_logp` are those of the task and of the
    reference policy until a reward transform replaces them.

    Only some methods read the others. `ref_token_logp` [p, g, t]: the reference policy's log-probs of tokens;
    `anchor_reward` and `anchor_ref_logp` [p]: MARA's anchor over more than the group; `old_logp` [p, g, t] of the
    policy before the rollout's first update (None: it is this one); `sampler_logp` [p, g, t] that the sampler recorded;
    `unseen_log_mass` [p]: log-mass of an answer that was not seen; `prompt_log_z` [p]: log Z of the prompt, as
    trajectory balance has learned it; `ref_weight` [p, g]: transformed over own reference probability;
    `counted` [p, g]: 0 for a completion that is left out of the update (None: all count).
    """

    logp: jax.Array
    mask: jax.Array
    ref_logp: jax.Array
    reward: jax.Array
    answer: jax.Array
    log_mass: jax.Array | None = None
    ref_token_logp: jax.Array | None = None
    anchor_reward: jax.Array | None = None
    anchor_ref_logp: jax.Array | None = None
    old_logp: jax.Array | None = None
    sampler_logp: jax.Array | None = None
    unseen_log_mass: jax.Array | None = None
    prompt_log_z: jax.Array | None = None
    ref_weight: jax.Array | None = None
    counted: jax.Array | None = None
