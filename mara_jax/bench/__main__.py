"""``python -m mara_jax.bench``."""

import sys

from mara_jax.bench.command import main

sys.exit(main(sys.argv))
