import sys

from mara_jax.evaluate.command import main

sys.exit(main(sys.argv[1:]))
