"""Checkpoints restored on other meshes and by other numbers of processes: every bit is what it was (slow)."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from mara_jax.train import integrity

PROGRAM = pathlib.Path(__file__).with_name("restored_program.py")
ROOT = pathlib.Path(__file__).parents[2]
# Processes, devices of each, and the mesh: data, fsdp, tensor.
CHAIN = [
    (2, 4, (1, 8, 1)),  # FSDP over eight devices of two processes
    (1, 4, (1, 1, 4)),  # tensor parallel over four
    (1, 1, (1, 1, 1)),
    (4, 2, (2, 2, 2)),
    (1, 8, (8, 1, 1)),
]


def arranged(workdir: pathlib.Path, step: int, processes: int, devices: int, sizes: tuple) -> dict[str, list]:
    """The digest of each array, and of how many different parts it is on the first process."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_collective_timeout_seconds=900"
    paths = os.pathsep.join([str(ROOT), str(PROGRAM.parent)])
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(PROGRAM), str(workdir), *map(str, sizes), str(step)]
    started = [
        subprocess.Popen(
            [*command, *([f"localhost:{port}", str(processes), str(number)] if processes > 1 else [])],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(processes)
    ]  # fmt: skip
    ended = [process.communicate(timeout=1800) for process in started]
    assert all(process.returncode == 0 for process in started), ended
    digests = [json.loads(out.splitlines()[-1]) for out, _ in ended]
    assert all(
        {name: one[0] for name, one in other.items()} == {n: o[0] for n, o in digests[0].items()} for other in digests
    )
    return digests[0]


@pytest.mark.slow
def test_every_bit_survives_other_meshes_and_numbers_of_processes(tmp_path):
    """8 devices of 2 processes, then 4 of one, then 1, then 8 of 4, then 8 of one; each saves what it has restored."""
    seen = [arranged(tmp_path, step, *one) for step, one in enumerate(CHAIN, 1)]
    for digests in seen[1:]:
        assert {name: one[0] for name, one in digests.items()} == {name: one[0] for name, one in seen[0].items()}
    assert len(seen[0]) > 20 and len({one[0] for one in seen[0].values()}) > 20  # no two arrays are alike
    # They lay on devices otherwise: in parts, in other parts, and whole.
    parts = [max(one[1] for one in digests.values()) for digests in seen]
    assert parts[0] == 4 and parts[1] == 4 and parts[2] == 1 and parts[4] == 1
    for step in range(1, len(CHAIN) + 1):
        assert integrity.is_sealed(tmp_path / "checkpoints" / str(step))
        assert integrity.damage(tmp_path / "checkpoints" / str(step)) is None
