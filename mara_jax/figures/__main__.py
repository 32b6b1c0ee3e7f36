"""``python -m mara_jax.figures``."""

import sys

import jax

from mara_jax.figures.command import main

# Many small programs, each run once: optimising them takes longer than it saves.
jax.config.update("jax_disable_most_optimizations", True)
sys.exit(main(sys.argv))
