"""KL-regularised reinforcement learning that keeps every good answer."""

from mara_jax import cpu, precision

__version__ = "0.1.0"

cpu.use_own_matmuls()
precision.keep_float32()
