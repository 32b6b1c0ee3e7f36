"""The batch script on a real SLURM of two nodes, which lie on this machine."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
HERE = pathlib.Path(__file__).parent
STEPS = 40  # enough for the job to be requeued before it has done them
RUN = f"""--config=configs/onetwo.py:nano --config.warmup.steps=0 --config.reference.samples=8
    --config.rollout.group_size=8 --config.rollout.max_new_tokens=10 --config.optimiser.learning_rate=1e-3
    --config.rollout.length_buckets=1 --config.checkpoint.every=100 --config.steps={STEPS}""".split()
WRITE = "import pathlib, sys, hand_made_policy; hand_made_policy.write(pathlib.Path(sys.argv[1]))"
# Machines with more to do than cores let one process wait for another longer than XLA's 40 seconds.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=900 --xla_cpu_collective_timeout_seconds=900"


def missing() -> str:
    """What this machine lacks for a SLURM of its own; empty where it lacks nothing."""
    path = os.environ["PATH"] + ":/usr/sbin"
    lacking = [
        name for name in ("slurmctld", "slurmd", "srun", "munged", "unshare") if not shutil.which(name, path=path)
    ]
    if lacking:
        return f"{', '.join(lacking)} not installed: apt-get install slurm-wlm"
    return "" if os.geteuid() == 0 else "SLURM's daemons need root here"


def rows(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without clocks."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]


@pytest.mark.slow
@pytest.mark.skipif(missing() != "", reason=missing())
def test_a_job_that_is_requeued_ends_as_one_that_is_left_alone(quick_environment, tmp_path):
    """The same two processes: asked to end, the first start saves; the second goes on from there, bit for bit."""
    quick = quick_environment | {"XLA_FLAGS": f"{quick_environment['XLA_FLAGS']} {PATIENCE}"}
    environment = os.environ | quick | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    weights = tmp_path / "weights"
    subprocess.run([sys.executable, "-c", WRITE, weights], cwd=HERE.parent / "parallel", env=environment, check=True)
    done = subprocess.run(
        [HERE / "slurm_here.sh", sys.executable, HERE / "slurm_program.py", tmp_path,
         f"--config.policy.weights={weights}", *RUN],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    log = (tmp_path / "cut.log").read_text()
    (step,) = re.findall(r"mara_jax: stopped by SIGTERM after step (\d+), which is saved", log)
    assert f"resuming after step {step}" in log and 0 < int(step) < STEPS
    assert len(rows(whole)) == STEPS and rows(cut) == rows(whole)
    assert (cut / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    # Only one process speaks, and SLURM began the job twice.
    assert log.count(f"step {STEPS}/{STEPS}") == 1 and "Restarts=1" in done.stdout
