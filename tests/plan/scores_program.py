"""Plan's memory of a reward model's scores beside real ones, on 8 simulated devices: python scores_program.py OUT.

Measured: the peak of the process during a call that compiles nothing, minus its level before, plus the bytes of the
arrays that were there before, which are the model's.
"""

import gc
import json
import os
import pathlib
import sys

# More devices than cores: one may wait for another longer than XLA's 40 seconds.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=900 "
    "--xla_cpu_collective_timeout_seconds=900"
)

import dataclasses

import jax
import measured_memory

from mara_jax import config, hf
from mara_jax.hf import tokenizer as tokenizers
from mara_jax.parallel import sharding
from mara_jax.plan import abstract, chips, phases
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.tasks import prompts
from mara_jax.tasks.base import LearnedReward
from mara_jax.train import preflight, reward_model, shape

PROMPT, NEW = 64, 64


def main() -> None:
    out = pathlib.Path(sys.argv[1])
    where = random_model(out.parent / "scoring")
    sizes = config.Rollout(prompts_per_step=8, group_size=16, max_new_tokens=NEW)
    task = prompts.Config(reward_model=str(where))
    run = config.LanguageRun(task=task, rollout=sizes, mesh=config.Mesh(data=2, fsdp=4))
    with sharding.use(preflight.layout_of(run, jax.devices())):
        measured = scored(str(where))
        reward_arch = shape.reward_architecture(run)
        assert reward_arch is not None
        program = abstract.scores_program(reward_arch, abstract.sizes_of(run, PROMPT))
        held = phases.capacity.held(run, shape.run_architecture(run), reward_arch)
        chip = chips.chip_of(chips.parse("cpu:8"))
        memory = phases._phase("scores", program, held, reward_arch, abstract.sizes_of(run, PROMPT), chip).memory
    planned = memory.reward_model + memory.batch + memory.temporaries
    out.write_text(json.dumps({"measured": measured, "planned": memory._asdict() | {"total": planned}}))


def random_model(out: pathlib.Path) -> pathlib.Path:
    """A reward model of random numbers, Qwen2-shaped: 4 layers of 256, heads of 64, two key heads."""
    tokenizer = tokenizers.nano(["a"], 512)
    arch = transformer.Architecture("qwen2", 4096, 256, 4, heads=4, kv_heads=2, head_dim=64, mlp=1024)
    arch = dataclasses.replace(arch, score_head=True)
    ends = tokenizers.end_tokens(tokenizer)
    policy = Policy(arch, tokenizer, ends, ends[0], {}, "random")
    return hf.export(policy, transformer.init(arch, jax.random.key(0)), out)


def scored(where: str) -> dict:
    """Bytes of the scores of 64 sequences at full length, the third time."""
    model = reward_model.loaded(LearnedReward(where))
    for turn in range(3):
        rows = [[turn, row] * ((PROMPT + NEW) // 2) for row in range(64)]
        if turn == 2:
            gc.collect()
            held = sum(s.data.nbytes for x in jax.live_arrays() for s in x.addressable_shards)
            own = sum(s.data.nbytes for x in jax.tree.leaves(model.params) for s in x.addressable_shards)
            before = measured_memory.status("VmRSS")
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        model.scores(rows)
    grown = measured_memory.status("VmHWM") - before
    return {"arrays_before": held, "model": own, "growth": grown, "total": held + grown}


main()
