"""Drawing completions from a policy, and the log-probs of given completions."""

from mara_jax.sampling.rollout import Rollout, sample

__all__ = ["Rollout", "sample"]
