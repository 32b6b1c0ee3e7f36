"""A family whose norms run over heads that devices share is the same model on 8 of them as on one."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.slow
def test_a_norm_over_all_heads_is_right_where_they_are_on_several_devices(quick_environment):
    """OLMo 2: values, gradients and sampled tokens, by rounding of float64 apart."""
    environment = os.environ | quick_environment | {"PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "sharded_families_program.py"), "olmo2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["olmo2"]
    assert found.keys() == {"2x2x2", "1x2x4"}
    for sizes, apart in found.items():
        assert apart["tokens"] == 0 and max(apart.values()) < 1e-11, (sizes, apart)
