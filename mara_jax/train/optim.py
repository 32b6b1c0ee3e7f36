"""The optimiser of a run, from optax."""

import optax

from mara_jax.config import Optimiser


def make(cfg: Optimiser) -> optax.GradientTransformation:
    """Adam, with a linear warm-up of the learning rate and clipping by global norm where asked for."""
    rate = cfg.learning_rate
    schedule = (
        optax.linear_schedule(rate / (cfg.warmup_steps + 1), rate, cfg.warmup_steps) if cfg.warmup_steps else rate
    )
    clip = optax.clip_by_global_norm(cfg.max_grad_norm) if cfg.max_grad_norm > 0 else optax.identity()
    return optax.chain(clip, optax.adam(schedule, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps))
