"""Folders of runs whose every number was chosen by hand."""

import io
import json
from pathlib import Path

from rich.console import Console

OBJECTIVE = "maximise E[R] - 0.1 KL(pi || ref) over whole completions"


def write_run(
    workdir: Path,
    rows: list[dict],
    *,
    method: str = "mara",
    anchor: str = "answer",
    kl: str = "reverse",
    beta: float = 0.1,
    seed: int = 0,
    counts=(60, 20),
    samples: int = 100,
    optimum: dict | None = None,
) -> Path:
    """Writes config.json, reference.json and metrics.jsonl; returns the folder."""
    workdir.mkdir(parents=True)
    algorithm = {"method": method, "anchor": anchor, "kl": kl, "beta": beta}
    config = {"seed": seed, "algorithm": algorithm}
    if optimum is None:
        optimum = {"vanilla": [0.75, 0.25, 0.0], "mara": [0.5, 0.5, 0.0]}
    reference = {
        "samples": samples,
        "valid": sum(counts) / samples,
        "answers": ["1", "2"],
        "counts": list(counts),
        "optimum": optimum,
        "objective": OBJECTIVE,
        "collapse": None,
    }
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "reference.json").write_text(json.dumps(reference))
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return workdir


def row(step: int, ones: int, twos: int, samples: int = 10, kl: float = 1.0, length: float = 20.0) -> dict:
    """One line of metrics.jsonl."""
    return {
        "step": step,
        "answers/counts": [ones, twos],
        "answers/by_prompt": [[0, {"1": ones, "2": twos, "": samples - ones - twos}]],
        "answers/entropy_bits": 0.0,
        "samples": samples,
        "valid/fraction": (ones + twos) / samples,
        "kl/reverse": kl,
        "length/mean": length,
    }


# Twelve steps; the last 8 hold 36 "1", 36 "2" and 8 invalid of 80. The KL ends on a line of slope .05.
ROWS = [row(t, 9, 0, samples=30, kl=9.0) for t in range(1, 3)]
ROWS += [row(t, 9, 0, kl=1 + 0.05 * t) for t in range(3, 5)]
ROWS += [row(t, *((5, 4) if t % 2 else (4, 5)), kl=1 + 0.05 * t, length=18 + 2 * (t % 2)) for t in range(5, 13)]


def printed(renderable, width: int = 80) -> str:
    """The text of a rich renderable."""
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
