"""``python -m mara_jax.predict``."""

import sys

from mara_jax.predict.command import main

sys.exit(main(sys.argv))
