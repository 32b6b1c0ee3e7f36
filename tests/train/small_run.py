"""A small run of the command, and how its rows and refusals are read."""

import json
import pathlib
import subprocess

SMALL = """--config=configs/onetwo.py:nano --config.policy.layers=1 --config.policy.embed=64 --config.warmup.batch=16
    --config.warmup.steps=120 --config.warmup.learning_rate=1e-2 --config.reference.samples=16
    --config.rollout.group_size=8 --config.rollout.max_new_tokens=48 --config.rollout.length_buckets=1
    --config.checkpoint.every=2 --config.checkpoint.best=valid --config.evaluation.every=2 --config.evaluation.samples=8
    --config.steps=6""".split()


def rows(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without clocks."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]


def evaluations(workdir: pathlib.Path) -> list[dict]:
    """evaluation.jsonl without clocks."""
    lines = [json.loads(line) for line in (workdir / "evaluation.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """One line on stderr with these words, a non-zero status, no traceback."""
    assert done.returncode not in (0, None)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in done.stderr + done.stdout
