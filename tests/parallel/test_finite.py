"""Values that are not finite are found where they lie, without a program of several devices."""

import json
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def test_a_bad_value_on_one_of_eight_devices_is_named():
    """Programs of several devices exchange their answers: many at once, on several processes, may wait for ever."""
    environment = {"PYTHONPATH": str(HERE.parents[1]), "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, HERE / "finite_program.py"], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {
        "found": [None, "opt_state['mu']", "opt_state['mu']"], "all_finite": [True, False], "devices": [1]
    }  # fmt: skip
