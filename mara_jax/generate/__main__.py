"""``python -m mara_jax.generate``."""

import sys

from mara_jax.generate.command import main

sys.exit(main(sys.argv))
