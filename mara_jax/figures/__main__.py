import sys

from mara_jax.figures.command import main

sys.exit(main(sys.argv[1:]))
