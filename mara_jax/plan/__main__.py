"""``python -m mara_jax.plan``."""

import sys

from mara_jax.plan.command import main

sys.exit(main(sys.argv))
