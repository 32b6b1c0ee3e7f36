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
from mara_jax.policies.policy import Policy
from mara_jax.train import loop, memory
from mara_jax.train.startup import Setup

SMOL = "smollm2-135m-instruct"


def case_of(name: str) -> tuple[config.LanguageRun, Policy, list[list[int]]]:
    """Sizes, policy and prompts that both sides run; Adam clips the gradient's norm as TRL does by default."""
    sizes = sides.shape(name)
    policy = hf.load(SMOL)[0] if sizes["model"] == "smol" else phases.random_policy(sizes["model"])
    words = policy.architecture.vocab_size
    ends = tuple(range(words - round(words / sides.RAGGED_MEAN), words)) if sizes["ragged"] else ()
    policy = dataclasses.replace(policy, eos_ids=ends)
    prompts = phases.random_prompts(words, sizes["samples"] // sizes["group"], sizes["prompt"])
    optimiser = config.Optimiser(learning_rate=1e-5, max_grad_norm=1.0)
    return phases.run_of(len(prompts), sizes["group"], sizes["new"], optimiser=optimiser), policy, prompts


def export(name: str, folder: pathlib.Path) -> dict:
    """Writes the case's model for the peer; returns what the peer needs to know."""
    (_, policy, prompts), sizes = case_of(name), sides.shape(name)
    smol = sizes["model"] == "smol"
    params = hf.load(SMOL)[1] if smol else transformer.init(policy.architecture, jax.random.key(0))
    hf.export(policy, params, folder / "model")
    words = policy.architecture.vocab_size
    model = {"weights": str(folder / "model"), "prompts": prompts, "ends": list(policy.eos_ids)}
    return {**sizes, **model, "words": words}


def compile_buckets(setup: Setup) -> None:
    """Runs the reference and the update at every length bucket, so that no timed turn compiles one."""
    size, buckets = setup.cfg.rollout, setup.cfg.rollout.length_buckets
    completions = phases.sample_completions(setup, setup.ref_params, 0)
    for bucket in range(buckets):
        lengths = np.full(completions.lengths.shape, 1 + (size.max_new_tokens - 1) * (bucket + 1) // buckets, np.int32)
        batches = phases.score_completions(setup, completions._replace(lengths=jax.numpy.asarray(lengths)))
        phases.update(setup, phases.fresh_state(setup), batches)


def main(what: str, name: str, weights: str) -> None:
    run, policy, prompts = case_of(name)
    _, params = hf.load(weights, tokenizer=False)  # the peer's own files
    setup = phases.setup_of(run, policy, params, prompts)
    state = phases.fresh_state(setup)

    def rolled(turn: int) -> dict:
        start = sides.clock()
        completions = phases.sample_completions(setup, params, turn)
        return {"cpu_s": sides.clock() - start, "tokens": int(np.sum(completions.lengths))}

    def stepped(turn: int) -> dict:
        nonlocal state
        times = [sides.clock()]
        completions = phases.sample_completions(setup, state.params, turn)
        times.append(sides.clock())
        batches = phases.score_completions(setup, completions)
        times.append(sides.clock())
        if turn == 0:
            loop.compile_update(setup, state, batches)  # as the training loop does
        state = phases.update(setup, state, batches)
        times.append(sides.clock())
        if turn == 0:
            if policy.eos_ids:  # completions of other lengths follow
                compile_buckets(setup)
            memory.give_back()  # as the training loop does
        spent: Any = dict(zip(("generate_s", "reference_s", "update_s"), np.diff(times).tolist(), strict=True))
        return {"cpu_s": times[-1] - times[0], **spent, "tokens": int(np.sum(completions.lengths))}

    sides.serve({"jax": jax.__version__}, {"rollout": rolled, "step": stepped}[what])


if __name__ == "__main__":
    if sys.argv[1] == "export":
        print(json.dumps(export(sys.argv[2], pathlib.Path(sys.argv[3]))))
    else:
        main(*sys.argv[1:])
