"""What precision a fresh process asks of float32 matmuls."""

import os
import subprocess
import sys

import pytest

PROGRAM = "import jax, mara_jax; print(jax.config.jax_default_matmul_precision)"


@pytest.mark.parametrize(
    ("asked", "found"), [({}, "highest"), ({"JAX_DEFAULT_MATMUL_PRECISION": "tensorfloat32"}, "tensorfloat32")]
)
def test_float32_is_float32_unless_told_otherwise(asked, found):
    env = {k: v for k, v in os.environ.items() if k != "JAX_DEFAULT_MATMUL_PRECISION"} | asked
    made = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    assert made.stdout.split() == [found]
