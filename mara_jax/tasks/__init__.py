"""Tasks: prompts, rewards and answer classes."""

from mara_jax.tasks.base import Score, Task
from mara_jax.tasks.onetwo import OneTwo

__all__ = ["OneTwo", "Score", "Task"]
