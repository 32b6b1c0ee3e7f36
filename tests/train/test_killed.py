"""Runs that end before their first complete checkpoint, killed or without room, at every place where they write."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import pytest
from small_run import evaluations, rows

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = pathlib.Path(__file__).with_name("killed_program.py")
RUN = """--config=configs/onetwo.py:nano --config.policy.layers=1 --config.policy.embed=64 --config.warmup.batch=4
    --config.warmup.steps=2 --config.reference.samples=8 --config.rollout.group_size=8 --config.lora.rank=2
    --config.rollout.max_new_tokens=48 --config.rollout.length_buckets=0 --config.checkpoint.every=1
    --config.evaluation.every=1 --config.evaluation.samples=8 --config.steps=2""".split()
EACH = 6  # every so many writes a run ends; of about 90
WITHOUT_ROOM = "mara_jax: no space left to write"


class Runs:
    """Runs of the command in forks of one process."""

    def __init__(self, kind: str, environment: dict[str, str], flags: Sequence[str] = RUN) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), kind, *flags],
            cwd=ROOT, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, workdir: pathlib.Path, ends_at: int = 0) -> tuple[int, str, str]:
        """Exit status, the write before which the run ended, and what it wrote to stderr."""
        assert self.process.stdin and self.process.stdout
        print(json.dumps([ends_at, str(workdir)]), file=self.process.stdin, flush=True)
        status, where, said = json.loads(self.process.stdout.readline())
        return status, where, said


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "first"), [("kill", 1), ("full", 2)])
def test_the_same_command_goes_on_wherever_it_ended(kind, first, quick_environment, tmp_path):
    """The second time it ends as a run that nothing has happened to."""
    runs = Runs(kind, quick_environment)
    try:
        assert runs.run(tmp_path / "whole") == (0, "", "")
        places = []
        for number in range(first, 1000, EACH):
            workdir = tmp_path / str(number)
            status, where, said = runs.run(workdir, number)
            if not where:
                break
            places.append(where)
            if kind == "kill":
                assert (status, said) == (-9, ""), where
            else:
                # What is only removed, or looked up, needs no room.
                assert status in (0, 2) and said.count("\n") == (status == 2), (where, said)
                assert said.startswith(WITHOUT_ROOM) or not said, (where, said)
            status, _, said = runs.run(workdir)
            assert (status, said) == (0, ""), where
            assert rows(workdir) == rows(tmp_path / "whole"), where
            assert evaluations(workdir) == evaluations(tmp_path / "whole"), where
            names = {path.name for path in workdir.rglob("*")}
            assert not any(
                "orbax-checkpoint-tmp" in name or name.startswith(".") or "part" in name for name in names
            ), where
        assert len(places) > 12 and any("checkpoints/1." in place for place in places)
    finally:
        runs.process.kill()
