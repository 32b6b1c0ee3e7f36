"""The choice of XLA's matmuls on a CPU, seen in what a fresh process compiles."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
import mara_jax
x = jnp.ones((64, 64))
print("ynn" in jax.jit(lambda x: x @ x + 1).lower(x).compile().as_text())
"""


@pytest.mark.parametrize(
    ("flags", "ynn"),
    [
        ("", "False"),
        ("--xla_cpu_multi_thread_eigen=false a_word_that_is_no_flag", "False"),
        ("--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT", "True"),
    ],
)
def test_ynn_is_off_unless_asked_for(flags, ynn):
    made = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout.split() == [ynn]
