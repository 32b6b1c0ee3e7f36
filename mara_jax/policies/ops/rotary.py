"""Rotary position embedding: frequencies as published models scale them, angles, rotation of queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.policies.parameters import Architecture, wide


def inverse_frequencies(arch: Architecture) -> np.ndarray:
    """Rotary frequencies, radians per position, [h / 2] in float32, after the architecture's scaling."""
    exponent = np.arange(0, arch.head_dim, 2, dtype=np.float32) / arch.head_dim
    frequency = (1.0 / np.float32(arch.rope_theta) ** exponent).astype(np.float32)
    scaling = arch.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / np.float32(scaling.factor)
    if scaling.kind != "llama3":
        raise ValueError(f"unknown rope scaling {scaling.kind!r}: this code knows 'linear' and 'llama3'")
    turns = scaling.original_max_positions * frequency / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - blend) * frequency / scaling.factor + blend * frequency).astype(np.float32)


def angles(arch: Architecture, positions_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles, float32 [b, t, 1, h / 2]."""
    angle = positions_bt[..., None, None].astype(jnp.float32) * inverse_frequencies(arch)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_btnh: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn each pair (channel i, channel i + h/2) of every head by its angle, in float32 (or wider)."""
    cos, sin = rope
    first, second = jnp.split(x_btnh.astype(wide(x_btnh.dtype)), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_btnh.dtype)
