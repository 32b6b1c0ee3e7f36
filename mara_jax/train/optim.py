"""The optimiser of a run, from optax."""

import jax.numpy as jnp
import optax

from mara_jax.config import Optimiser

# config.FIRST_MOMENTS -> dtype; None: that of the trained weights, never less than float32.
FIRST_MOMENTS = {"float32": None, "bfloat16": jnp.bfloat16}


def make(cfg: Optimiser) -> optax.GradientTransformation:
    """Adam; a learning rate that may rise and then fall linearly; clipping by global norm where asked for.

    The schedule depends on the number of updates alone, not on the run's length, so that a longer run repeats a
    shorter one.
    """
    rate: float | optax.Schedule = cfg.learning_rate
    if cfg.warmup_steps or cfg.decay_steps:
        rise = optax.linear_schedule(cfg.learning_rate / (cfg.warmup_steps + 1), cfg.learning_rate, cfg.warmup_steps)
        last = cfg.learning_rate / 10 if cfg.decay_steps else cfg.learning_rate
        fall = optax.linear_schedule(cfg.learning_rate, last, max(cfg.decay_steps, 1))
        rate = optax.join_schedules([rise, fall], [cfg.warmup_steps])
    clip = optax.clip_by_global_norm(cfg.max_grad_norm) if cfg.max_grad_norm > 0 else optax.identity()
    first_moment = FIRST_MOMENTS[cfg.first_moment]
    return optax.chain(clip, optax.adam(rate, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, mu_dtype=first_moment))
