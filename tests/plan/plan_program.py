"""Plan's memory beside a real step's, on 8 simulated devices: python plan_program.py ARGUMENTS OUT, as its own process.

ARGUMENTS (JSON): shape ("nano" or [layers, embed, words]), and fields of the config, mesh and sizes among them.

Measured: the peak of the process during a step that compiles nothing, minus its level before, plus the bytes of the
arrays that were there before.
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

import jax
import single_step
from measured_memory import status

from mara_jax import config, hf
from mara_jax.hf import tokenizer as tokenizers
from mara_jax.parallel import sharding
from mara_jax.plan import abstract, chips, phases
from mara_jax.policies import parameters, transformer
from mara_jax.policies.policy import Policy
from mara_jax.tasks import onetwo
from mara_jax.train import optim, placement, preflight, reference, shape, startup
from mara_jax.train.prompts import EncodedPrompts


def main() -> None:
    asked = json.loads(sys.argv[1])
    out = pathlib.Path(sys.argv[2])
    weights = "nano" if asked["shape"] == "nano" else str(random_weights(out.parent / "weights", *asked["shape"]))
    values = config.to_config_dict(
        config.LanguageRun(policy=config.Policy(weights=weights), steps=2, task=onetwo.Config())
    )
    values.update_from_flattened_dict({"warmup.steps": int(weights == "nano")} | asked["fields"])
    run = config.resolve(values)
    assert isinstance(run, config.LanguageRun)
    layout = preflight.layout_of(run, jax.devices())
    with sharding.use(layout):
        measured, prompt_tokens = train(run)
        sizes = abstract.sizes_of(run, prompt_tokens)
        chip = chips.chip_of(chips.parse("cpu:8"))
        found = phases.phases(run, shape.policy_architecture(run.policy), sizes, chip)
    planned = {name: phase.memory._asdict() | {"total": phase.memory.total} for name, phase in found.items()}
    out.write_text(json.dumps({"measured": measured, "planned": planned}))


def random_weights(out: pathlib.Path, layers: int, embed: int, words: int) -> pathlib.Path:
    """A checkpoint of random numbers, Qwen2-shaped: heads of 64, two key heads."""
    tokenizer = tokenizers.nano([onetwo.PROMPT], 512)
    arch = transformer.Architecture(
        family="qwen2", vocab_size=words, embed=embed, layers=layers, heads=embed // 64, kv_heads=2, head_dim=64,
        mlp=4 * embed,
    )  # fmt: skip
    tree = transformer.init(arch, jax.random.key(0))
    ends = tokenizers.end_tokens(tokenizer)
    return hf.export(Policy(arch, tokenizer, ends, ends[0], {}, "small"), tree, out)


def train(run: config.LanguageRun) -> tuple[dict, int]:
    """Bytes of a step, its first and its second one compiling all there is; tokens of the longest prompt."""
    task = onetwo.OneTwo()
    policy, ref_params = reference.load_base(run, task)
    tx = optim.make(run.optimiser)
    state = placement.fresh(policy.architecture, ref_params, tx)
    prompts = EncodedPrompts(run, policy, task)
    # No end token: every completion has its full length, as plan assumes.
    policy = Policy(policy.architecture, policy.tokenizer, (), policy.pad_id, {}, policy.source)
    setup = startup.Setup(
        run, task, policy, ref_params, prompts, tx, single_step.samples_with({"1": 154, "2": 51, None: 51})
    )
    for done in range(2):
        state, _ = single_step.train_step(setup, state, done)
    gc.collect()
    # Heap that compiling freed is left as it is: given back it would be counted as the step's, which takes it again for
    # small things that no plan speaks of (10 MB).
    held = sum(s.data.nbytes for x in jax.live_arrays() for s in x.addressable_shards)
    own = sum(s.data.nbytes for x in jax.tree.leaves((state, ref_params)) for s in x.addressable_shards)
    before = status("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    single_step.train_step(setup, state, 2)
    grown = status("VmHWM") - before
    measured = {"arrays_before": held, "state_and_reference": own, "growth": grown, "total": held + grown}
    return measured | {"parameters": parameters.count(policy.architecture)}, max(map(len, prompts))


main()
