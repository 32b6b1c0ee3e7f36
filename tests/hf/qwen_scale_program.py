"""Load a checkpoint in bfloat16 and export it, as its own process: python qwen_scale_program.py DIR OUT.

Writes OUT/model and, to stdout as JSON, this process's peak memory in bytes after each stage.
"""

import json
import pathlib
import resource
import sys
import time

from mara_jax import hf


def main() -> None:
    where, out = (pathlib.Path(argument) for argument in sys.argv[1:])
    stages, began = {}, time.perf_counter()

    def note(stage: str) -> None:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stages[stage] = {"peak_bytes": peak, "seconds": round(time.perf_counter() - began, 1)}

    note("start")
    policy, params = hf.load(where, param_dtype="bfloat16", tokenizer=False)
    note("load")
    hf.export(policy, params, out / "model", max_shard_bytes=2 * 10**9)
    note("export")
    stages["cpu_s"] = round(time.process_time(), 1)
    print(json.dumps(stages))


if __name__ == "__main__":
    main()
