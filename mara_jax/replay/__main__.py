"""``python -m mara_jax.replay``."""

import sys

from mara_jax.replay.command import main

sys.exit(main(sys.argv))
