"""``python -m mara_jax.evaluate``."""

import sys

from mara_jax.evaluate.command import main

sys.exit(main(sys.argv))
