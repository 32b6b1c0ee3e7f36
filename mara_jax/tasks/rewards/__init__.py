"""Reward and answer functions that prompt files can use by name, as in `mara_jax.tasks.rewards.matching:one_of`."""
