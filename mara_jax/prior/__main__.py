"""``python -m mara_jax.prior``."""

import sys

from mara_jax.prior.command import main

sys.exit(main(sys.argv))
