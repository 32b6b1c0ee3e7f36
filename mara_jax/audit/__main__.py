import sys

from mara_jax.audit.command import main

sys.exit(main(sys.argv))
