"""A language model as a whole: what a checkpoint holds beside its parameters."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mara_jax.policies import transformer
from mara_jax.policies.parameters import Architecture


@partial(jax.jit, static_argnums=0)
def _logits_of(arch: Architecture, params: Any, tokens_bt: jax.Array) -> jax.Array:
    positions_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), tokens_bt.shape)
    hidden_btd, _ = transformer.forward(arch, params, tokens_bt, positions_bt)
    return transformer.logits(arch, params, hidden_btd)


@dataclass(frozen=True, eq=False)
class Policy:
    """A language model apart from its parameters: its architecture, tokenizer, end tokens and where it came
    from.

    tokenizer: a transformers fast tokenizer, or None; eos_ids: sorted ids any of which ends a completion;
    config, generation: Hugging Face's config.json and generation_config.json as read, kept for export.
    """

    architecture: Architecture
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    config: dict[str, Any]
    source: str
    generation: dict[str, Any] = field(default_factory=dict)

    def logits(self, params: Any, tokens_bt: Any, lengths_b: Any) -> jax.Array:
        """Next-token logits of right-padded sequences.

        args: params: nested dict; tokens_bt: ids; lengths_b: tokens of each row that count.
        returns: float32 [b, t, v]; finite but unspecified at padded positions.
        errors: AssertionError for ids that are not [b, t], or lengths that are not [b].
        """
        tokens_bt, lengths_b, arch = jnp.asarray(tokens_bt), jnp.asarray(lengths_b), self.architecture
        chex.assert_rank(tokens_bt, 2)
        chex.assert_shape(lengths_b, tokens_bt.shape[:1])
        # Causality already hides padding on the right; clearing it keeps an out-of-range pad id out of the embedding.
        counted_bt = jnp.arange(tokens_bt.shape[1]) < lengths_b[:, None]
        return _logits_of(arch, params, jnp.where(counted_bt, tokens_bt, 0))
