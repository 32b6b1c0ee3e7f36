"""KL-regularised reinforcement learning that keeps every good answer."""

from mara_jax import cpu, precision

cpu.use_own_matmuls()
precision.keep_float32()
