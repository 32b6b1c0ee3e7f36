"""One whole MARA step of a checkpoint's policy: python qwen_step_program.py CHECKPOINT DATA FSDP TENSOR.

The product of the three is the number of devices. Prints JSON: tokens, loss, a kernel's place and change, and the peak
memory after each phase.
"""

import dataclasses
import json
import pathlib
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mara_jax import config, hf
from mara_jax.parallel import mesh, sharding
from mara_jax.sampling import logprobs, rollout
from mara_jax.train import optim, placement, programs
from mara_jax.train.state import Batch, BySampler

DATA, FSDP, TENSOR = map(int, sys.argv[2:])
PROMPTS = np.random.default_rng(1).integers(0, 151936, (2, 12)).tolist()
GROUP, NEW = 4, 8


def main() -> None:
    layout = sharding.layout(Mesh(np.array(jax.devices()).reshape(DATA, FSDP, TENSOR), mesh.AXES))
    told, started = {}, time.perf_counter()

    def tell(phase: str) -> None:
        told[phase] = {"peak_bytes": peak(), "seconds": time.perf_counter() - started}
        print(phase, told[phase], file=sys.stderr, flush=True)

    with sharding.use(layout):
        policy, ref_params = hf.load(sys.argv[1], tokenizer=False, scan_layers=True, remat="layer", layout=layout)
        optimiser = config.Optimiser(learning_rate=1e-5)
        arch, tx = policy.architecture, optim.make(optimiser)
        tell("loaded")
        drawn = rollout.sample(
            dataclasses.replace(policy, eos_ids=()), ref_params, PROMPTS, key=jax.random.key(0), group_size=GROUP,
            max_new_tokens=NEW,
        )  # fmt: skip
        tell("rollout")
        batch = judged(arch, ref_params, drawn)
        tell("reference")
        state = placement.fresh(arch, ref_params, tx)
        before = np.asarray(state.params["layers"]["down"]["kernel"][0, :4])
        algorithm = config.Algorithm(method="mara", anchor="string", beta=0.1, threshold=0.5)
        run = config.LanguageRun(algorithm=algorithm, optimiser=optimiser)
        state, metrics = programs.update_program(run, arch, tx, state, ref_params, BySampler(batch))()
        kernel = state.params["layers"]["down"]["kernel"]
        moved = float(np.abs(np.asarray(kernel[0, :4]) - before).max())
    tell("update")
    found = {name: float(metrics[name]) for name in ("loss", "grad/norm", "kl/reverse", "mara/augmented_fraction")}
    shard = kernel.addressable_shards[0].data.shape
    tokens = np.asarray(drawn.tokens).tolist()
    gap = float(np.abs(np.asarray(drawn.logp)).sum())
    print(json.dumps(found | {"tokens": tokens, "logp": gap, "moved": moved, "shard": shard, "phases": told}))


def judged(arch, ref_params, drawn: rollout.Rollout) -> Batch:
    """The reference's hidden states, and a reward for every other completion."""
    reward_pg = np.tile(np.float32([0, 1]), (len(PROMPTS), GROUP // 2))
    ref_hidden = logprobs.reference_hidden(arch, ref_params, drawn.prompt_tokens, drawn.prompt_lengths, drawn.tokens)
    return Batch(
        prompt_tokens=drawn.prompt_tokens,
        prompt_lengths=drawn.prompt_lengths,
        tokens=drawn.tokens,
        lengths=drawn.lengths,
        reward=jnp.asarray(reward_pg),
        answer=jnp.asarray(reward_pg, jnp.int32) - 1,
        prompt_ids=jnp.arange(len(PROMPTS)),
        ref_hidden=jax.block_until_ready(ref_hidden),
    )


def peak() -> int:
    """Bytes: the most that this process has held."""
    found = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


main()
