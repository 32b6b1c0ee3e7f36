"""``python -m mara_jax.audit``."""

import sys

import jax

from mara_jax.audit.command import main

# Tiny sums in float64: an accelerator would be slower, not every one has float64, and compiling takes longest.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_disable_most_optimizations", True)
sys.exit(main(sys.argv))
