"""KL-regularised reinforcement learning that keeps every good answer."""

from mara_jax import cpu

cpu.use_own_matmuls()
