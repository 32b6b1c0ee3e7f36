"""Our side of the comparisons: the model exported for the peer, then rollouts or whole steps. Run by the scripts."""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import side_by_side as sides

from mara_jax import config, hf
from mara_jax.bench import phases
from mara_jax.policies import transformer
from mara_jax.train import memory

SMOL = "smollm2-135m-instruct"


def case_of(name: str) -> phases.Case:
    """The case both sides run; Adam clips the gradient's norm as TRL does by default."""
    sizes = sides.shape(name)
    policy = hf.load(SMOL)[0] if sizes["model"] == "smol" else phases.random_policy(sizes["model"])
    words = policy.architecture.vocab_size
    ends = tuple(range(words - round(words / sides.RAGGED_MEAN), words)) if sizes["ragged"] else ()
    policy = dataclasses.replace(policy, eos_ids=ends)
    prompts = phases.random_prompts(words, sizes["samples"] // sizes["group"], sizes["prompt"])
    return phases.Case(
        name, policy, prompts, sizes["group"], sizes["new"],
        optimiser=config.Optimiser(learning_rate=1e-5, max_grad_norm=1.0),
    )  # fmt: skip


def export(name: str, folder: pathlib.Path) -> dict:
    """Writes the case's model for the peer; returns what the peer is told."""
    case, sizes = case_of(name), sides.shape(name)
    smol = sizes["model"] == "smol"
    params = hf.load(SMOL)[1] if smol else transformer.init(case.policy.architecture, jax.random.key(0))
    hf.export(case.policy, params, folder / "model")
    words = case.policy.architecture.vocab_size
    told = {"weights": str(folder / "model"), "prompts": case.prompts, "ends": list(case.policy.eos_ids)}
    return {**sizes, **told, "words": words}


def main(what: str, name: str, weights: str) -> None:
    case = case_of(name)
    _, params = hf.load(weights, tokenizer=False)  # the peer's own files
    state = phases.fresh_state(case, params)

    def rolled(turn: int) -> dict:
        start = sides.clock()
        drawn = phases.roll(case, params, turn)
        return {"cpu_s": sides.clock() - start, "tokens": int(np.sum(drawn.lengths))}

    def stepped(turn: int) -> dict:
        nonlocal state
        times = [sides.clock()]
        drawn = phases.roll(case, state.params, turn)
        times.append(sides.clock())
        batch = phases.refer(case, params, drawn, turn)
        times.append(sides.clock())
        if turn == 0:
            # Lengths that differ from turn to turn come in several sizes.
            phases.compile_update(case, state, params, batch, all_sizes=sides.shape(name)["ragged"])
        state = phases.update(case, state, params, batch)
        times.append(sides.clock())
        if turn == 0:
            memory.give_back()  # as the training loop does
        spent: Any = dict(zip(("generate_s", "reference_s", "update_s"), np.diff(times).tolist(), strict=True))
        return {"cpu_s": times[-1] - times[0], **spent, "tokens": int(np.sum(drawn.lengths))}

    sides.serve({"jax": jax.__version__}, {"rollout": rolled, "step": stepped}[what])


if __name__ == "__main__":
    if sys.argv[1] == "export":
        print(json.dumps(export(sys.argv[2], pathlib.Path(sys.argv[3]))))
    else:
        main(*sys.argv[1:])
