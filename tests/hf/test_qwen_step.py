"""A policy of Qwen2.5-0.5B's shape takes one whole MARA step on eight simulated devices, as on one (slow)."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import random_checkpoint

pytestmark = pytest.mark.slow

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "checkpoint"
    random_checkpoint.write(folder, "qwen2.5-0.5b")
    yield folder
    shutil.rmtree(folder)


def step(checkpoint: pathlib.Path, data: int, fsdp: int, tensor: int) -> dict:
    # More devices than cores: one may wait for another longer than XLA's 40 seconds.
    flags = (
        f"--xla_force_host_platform_device_count={data * fsdp * tensor} "
        "--xla_cpu_collective_call_terminate_timeout_seconds=900 --xla_cpu_collective_timeout_seconds=900"
    )
    done = subprocess.run(
        [sys.executable, HERE / "qwen_step_program.py", checkpoint, str(data), str(fsdp), str(tensor)],
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1]), "XLA_FLAGS": flags}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_a_step_on_eight_devices_is_the_step_on_one(checkpoint):
    one, eight = step(checkpoint, 1, 1, 1), step(checkpoint, 1, 4, 2)
    print(json.dumps({"one": one, "eight": eight}))
    assert eight["tokens"] == one["tokens"]
    assert (one["shard"], eight["shard"]) == ([24, 4864, 896], [24, 4864 // 8, 896])
    for name in ("loss", "grad/norm", "logp"):
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-4)
    assert eight["mara/augmented_fraction"] == one["mara/augmented_fraction"] > 0
    assert eight["moved"] == pytest.approx(one["moved"], rel=0.05) and one["moved"] > 5e-6
