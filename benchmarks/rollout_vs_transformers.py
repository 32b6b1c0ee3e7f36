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

import side_by_side as sides

if __name__ == "__main__":
    sides.main(__file__, __doc__ or "", "rollout", "peer_transformers.py")
