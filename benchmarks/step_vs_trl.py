"""CPU time and memory of a whole training step, ours against TRL's GRPOTrainer: the same model, prompts and lengths.

  python benchmarks/step_vs_trl.py                               all cases, five turns
  python benchmarks/step_vs_trl.py --case=tiny_balanced --turns=3
  python benchmarks/step_vs_trl.py --case=smol_one_prompt        SmolLM2-135M at the 1-2 task's sizes (7 min)
  python benchmarks/step_vs_trl.py --peer-python=PYTHON          one that has peers-requirements.txt

Prints one JSON object a line. `ratio` is the peer's median CPU seconds over ours, `memory_ratio` our peak memory over
the peer's (of the whole processes, compilation included; later_peak_mib: after the first turn). Each side is a process
of one thread on the same core; they take turns. Random weights never end a completion, so both sides make the same
number of tokens; in the ragged case each token ends one with probability 1/24, and lengths agree in distribution.
Both generate, run the reference (beta 0.1) and update all weights with Adam and the norm clipped at 1; generate_s,
reference_s and update_s are CPU seconds of the phases. TRL's gradient checkpointing, on by default, is turned off: it
trades time for memory.
"""

import side_by_side as sides

if __name__ == "__main__":
    sides.main(__file__, __doc__ or "", "step", "peer_trl.py")
