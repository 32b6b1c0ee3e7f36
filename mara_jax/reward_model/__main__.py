"""``python -m mara_jax.reward_model``."""

import sys

from mara_jax.reward_model.command import main

sys.exit(main(sys.argv))
