import sys

from mara_jax.bench.command import main

sys.exit(main(sys.argv))
