"""``python -m mara_jax.export``."""

import sys

from mara_jax.export.command import main

sys.exit(main(sys.argv))
