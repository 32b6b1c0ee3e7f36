"""Load a checkpoint in bfloat16, run one forward, export it, as its own process: python qwen_scale_program.py DIR OUT.

Writes OUT/model, OUT/logits.npy and, to stdout as JSON, this process's peak memory in bytes after each stage.
"""

import json
import pathlib
import resource
import sys
import time

import numpy as np

from mara_jax import hf

TOKENS = np.arange(2 * 12, dtype=np.int32).reshape(2, 12) * 6143 % 151_643
LENGTHS = np.array([12, 9], np.int32)


def main() -> None:
    where, out = (pathlib.Path(argument) for argument in sys.argv[1:])
    stages, began = {}, time.perf_counter()

    def note(stage: str) -> None:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stages[stage] = {"peak_bytes": peak, "seconds": round(time.perf_counter() - began, 1)}

    note("start")
    # Scanned: XLA for CPUs multiplies float32 copies of the weights, here of one layer at a time.
    policy, params = hf.load(where, param_dtype="bfloat16", tokenizer=False, scan_layers=True)
    note("load")
    np.save(out / "logits.npy", np.asarray(policy.logits(params, TOKENS, LENGTHS)))
    note("forward")
    hf.export(policy, params, out / "model", max_shard_bytes=2 * 10**9)
    note("export")
    stages["cpu_s"] = round(time.process_time(), 1)
    print(json.dumps(stages))


if __name__ == "__main__":
    main()
