"""What a checkpoint costs: writing it at once or beside training, its digests, and reading it back to compare.

python benchmarks/checkpoint_cost.py [--megabytes=256] [--repeats=5]

The state is random float32 numbers, which nothing compresses, in arrays of 4 MB. Prints one JSON object: medians in
seconds of wall time (of CPU time beside, as others may use the machine), and `ratio`, digests over the write.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from absl import logging

from mara_jax.config import Checkpoint
from mara_jax.train import checkpoint, integrity
from mara_jax.train.state import State

ARRAY = 1 << 20  # numbers in an array


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    logging.set_verbosity(logging.FATAL)
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
