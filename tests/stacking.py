"""Trees of parameters with their layers stacked, made from unrolled ones: what `parameters.to_unrolled` undoes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def to_scanned(params: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Stack the unrolled layers 'layers_0', 'layers_1', ... of a tree into one 'layers' on a leading axis."""
    unlayered = {name: tree for name, tree in params.items() if not name.startswith("layers_")}
    trees = [params[f"layers_{index}"] for index in range(layers)]
    return {**unlayered, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)}
