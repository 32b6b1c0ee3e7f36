"""`core.method_rules.loss` with beta and threshold as arguments of their own, for audits."""

import jax

from mara_jax import config
from mara_jax.core import method_rules
from mara_jax.core.objectives import LossAndMetrics
from mara_jax.core.scored import Numbers, Scored

__all__ = ["Scored", "augmented", "objective"]


def augmented(algorithm: config.Algorithm, scored: Scored, beta, threshold) -> tuple[jax.Array, jax.Array]:
    """(reward, ref_logp), both [p, g], as the transform of the algorithm returns them."""
    numbers = Numbers(beta, threshold, algorithm.eta)
    after, _ = method_rules.transformed(method_rules.resolved(algorithm), scored, None, numbers)
    return after.reward, after.ref_logp


def objective(algorithm: config.Algorithm, scored: Scored, reference: Scored | None, beta, threshold) -> LossAndMetrics:
    """`core.method_rules.loss` at the algorithm's eta."""
    return method_rules.loss(algorithm, scored, reference, Numbers(beta, threshold, algorithm.eta))
