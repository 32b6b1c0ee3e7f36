"""What a checkpoint costs: writing it at once or beside training, its digests, and reading it back to compare.

python benchmarks/checkpoint_cost.py [--megabytes=256] [--repeats=5]
python benchmarks/checkpoint_cost.py --steps=12 [flags of the training command, as --config.policy.embed=384]

The first: a state of random float32 numbers, which nothing compresses, in arrays of 4 MB. Prints one JSON object:
medians in seconds of wall time (of CPU time beside, as others may use the machine), and `ratio`, digests over writing.

The second: whole runs of configs/onetwo.py:nano, with no checkpoint between their steps, one at each step written at
once, and one at each step written beside training. Prints one JSON object: megabytes of a checkpoint; of each kind of
run the median seconds from the beginning of a step to that of the next, and of these in which `save` holds the run up;
`cost_cpu_s`, what a checkpoint and what belongs to it cost, and `share`, that over the steps between two checkpoints,
of which the config has `every`.
"""

import argparse
import contextlib
import io
import itertools
import json
import pathlib
import statistics
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from mara_jax import main as command
from mara_jax import tasks
from mara_jax.config import Checkpoint, LanguageRun
from mara_jax.train import checkpoint, integrity, loop
from mara_jax.train.state import State

ARRAY = 1 << 20  # numbers in an array
COLD = 3  # steps of a run that compile, and do not count


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def measured(state: State, repeats: int, asynchronous: bool) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each part: until `save` returns, until all is written, and of the digests and the comparison alone."""
    seconds: dict[str, list[tuple[float, float]]] = {"blocks": [], "written": [], "digests": [], "compared": []}
    seal = integrity.seal
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.jax.default_backend = lambda: "gpu" if asynchronous else "cpu"
        integrity.seal = lambda *_: None
        checkpoints = checkpoint.Checkpoints(pathlib.Path(folder), Checkpoint(every=1, keep=1))
        for step in range(1, repeats + 1):
            wall, cpu = time.perf_counter(), time.process_time()
            seconds["blocks"].append(timed(lambda step=step: checkpoints.save(step, state)))
            checkpoints.manager.wait_until_finished()
            checkpoints._finish_sealing()
            seconds["written"].append((time.perf_counter() - wall, time.process_time() - cpu))
            place = pathlib.Path(folder) / "checkpoints" / str(step)
            seconds["digests"].append(timed(lambda place=place: seal(place)))
            seconds["compared"].append(timed(lambda place=place: integrity.damage(place)))
        integrity.seal = seal
        checkpoints.close()
    return seconds


FLAGS = ["--config=configs/onetwo.py:nano", "--config.warmup.steps=20", "--config.reference.samples=32"]
KINDS = {"none": (10**6, False), "at_once": (1, False), "beside": (1, True)}  # steps between checkpoints; asynchronous


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Inside, names of a module or class have other values."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def step_seconds(flags: list[str], workdir: pathlib.Path, every: int, asynchronous: bool) -> dict[str, float]:
    """Medians over the warm steps of a run: wall and CPU seconds of a step, and seconds in which `save` holds it up."""
    begun: list[tuple[float, float]] = []
    held: list[float] = []
    start, save = loop.start_rollout, checkpoint.Checkpoints.save

    def started(*args: Any) -> Any:
        begun.append((time.perf_counter(), time.process_time()))
        return start(*args)

    def saved(*args: Any, **named: Any) -> bool:
        now = time.perf_counter()
        written = save(*args, **named)
        held.append((time.perf_counter() - now) * written)
        return written

    told = types.SimpleNamespace(default_backend=lambda: "gpu" if asynchronous else "cpu")
    flags = [*FLAGS, *flags, f"--config.checkpoint.every={every}", f"--workdir={workdir}"]
    run = command.run_of(command.parse(["main", *flags]))
    assert isinstance(run, LanguageRun)
    with (
        replaced(loop, start_rollout=started),
        replaced(checkpoint.Checkpoints, save=saved),
        replaced(checkpoint, jax=told),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        loop.run(run, tasks.make(run), workdir)
    pairs = list(itertools.pairwise(begun))[COLD:]
    wall, cpu = (statistics.median(later[i] - sooner[i] for sooner, later in pairs) for i in range(2))
    return {"step_s": wall, "step_cpu_s": cpu, "held_s": statistics.median(held[COLD:-1])}


def measured_runs(steps: int, flags: list[str]) -> dict[str, Any]:
    """The three kinds of run."""
    told: dict[str, Any] = {"steps": steps, "flags": " ".join(flags)}
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kind in KINDS.items():
            workdir = pathlib.Path(folder) / name
            seconds[name] = step_seconds([*flags, f"--config.steps={steps}"], workdir, *kind)
            told |= {f"{name}/{part}": round(value, 4) for part, value in seconds[name].items()}
        last = pathlib.Path(folder) / "none" / "checkpoints" / str(steps)
        told["megabytes"] = round(sum(path.stat().st_size for path in last.rglob("*") if path.is_file()) / 1e6, 1)
    run = command.run_of(command.parse(["main", *FLAGS, *flags, "--workdir=none"]))
    assert isinstance(run, LanguageRun)
    told["every"], without = run.checkpoint.every, seconds["none"]["step_cpu_s"]
    for name in ("at_once", "beside"):
        cost = seconds[name]["step_cpu_s"] - without
        told |= {f"{name}/cost_cpu_s": round(cost, 4), f"{name}/share": round(cost / (told["every"] * without), 4)}
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    asked, flags = parser.parse_known_args()
    logging.set_verbosity(logging.FATAL)
    if asked.steps:
        print(json.dumps(measured_runs(asked.steps, flags)))
        return
    random, count = np.random.default_rng(0), max(1, asked.megabytes * 10**6 // (4 * ARRAY))
    arrays = {str(number): jnp.asarray(random.standard_normal(ARRAY, np.float32)) for number in range(count)}
    state = State(jnp.int32(1), arrays, ())
    told: dict[str, object] = {"megabytes": round(count * ARRAY * 4 / 1e6), "repeats": asked.repeats}
    for name, asynchronous in (("at_once", False), ("beside", True)):
        for part, pairs in measured(state, asked.repeats, asynchronous).items():
            told[f"{name}/{part}_s"] = round(statistics.median(wall for wall, _ in pairs), 3)
            told[f"{name}/{part}_cpu_s"] = round(statistics.median(cpu for _, cpu in pairs), 3)
    written = told["at_once/written_cpu_s"]
    assert isinstance(written, float)
    told["ratio"] = round(float(told["at_once/digests_cpu_s"]) / written, 3)  # pyright: ignore[reportArgumentType]
    print(json.dumps(told))


if __name__ == "__main__":
    main()
