"""CPU time and memory of a rollout, ours against transformers' generate: the same model, prompts and lengths.

  python benchmarks/rollout_vs_transformers.py                               all cases, five turns
  python benchmarks/rollout_vs_transformers.py --case=tiny_balanced --turns=3
  python benchmarks/rollout_vs_transformers.py --peer-python=PYTHON          one that has peers-requirements.txt

Prints one JSON object a line. `ratio` is the peer's median CPU seconds over ours, `memory_ratio` our peak memory over
the peer's (of the whole processes, compilation included; later_peak_mib: after the first turn). Each side is a process
of one thread on the same core; they take turns. Random weights never end a completion, so both sides make the same
number of tokens; in the ragged case each token ends one with probability 1/24, and lengths agree in distribution.
Both draw from the whole vocabulary at temperature 1.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import side_by_side as sides


def run(case: str, peer_python: str, core: int, turns: int) -> dict:
    ours = [sys.executable, str(sides.HERE / "our_side.py")]
    with tempfile.TemporaryDirectory() as folder:
        write = [*ours, "export", case, folder]
        told = subprocess.run(write, check=True, stdout=subprocess.PIPE, text=True, env=sides.environment()).stdout
        theirs = [peer_python, str(sides.HERE / "peer_transformers.py"), told.strip().splitlines()[-1]]
        record = sides.compare([*ours, "rollout", case], theirs, core, turns)
    return {"benchmark": pathlib.Path(__file__).stem, "case": case, **sides.shape(case), **record}


def main() -> None:
    asked = sides.arguments(__doc__ or "")
    peer = sides.peer_python(asked.peer_python)
    for case in asked.case or sides.CASES:
        print(json.dumps(run(case, peer, asked.core, asked.turns)), flush=True)


if __name__ == "__main__":
    main()
