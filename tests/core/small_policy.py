"""Expected gradients over all groups of strings, of losses that take one group's tokens; see `audit.enumeration`."""

import jax.numpy as jnp
import numpy as np

from mara_jax.audit import enumeration


def expected_gradient(loss, params, all_strings, size, drawn_by=None):
    """Gradient of `loss`, averaged over all groups by their probability.

    loss: of one group, from (logp [1, g, t], mask [1, g, t], indices [g]).
    """
    mask_nt = jnp.asarray(all_strings.mask)

    def of_group(logp_nt, index):
        return loss(logp_nt[index][None], mask_nt[index][None], index)

    groups = enumeration.groups(len(all_strings.tokens), size)
    return enumeration.expected_gradient(of_group, params, all_strings, groups, drawn_by)


def relative_error(got, want) -> float:
    """Norm of the difference over the norm of what was wanted."""
    return float(np.linalg.norm(np.asarray(got) - np.asarray(want)) / np.linalg.norm(np.asarray(want)))
