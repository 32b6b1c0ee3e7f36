"""The three phases of a training step, one at a time: rollout, reference, update; to be timed and counted.

They are those of `train.loop`, on random rewards; each function waits for its result.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax import config
from mara_jax.hf.shapes import architecture_of
from mara_jax.plan import work
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.sampling import rollout
from mara_jax.tasks.base import Score, Task
from mara_jax.train import groups, loop, optim, placement, programs, reference_samples
from mara_jax.train.setup import Setup
from mara_jax.train.state import BySampler, State, remembered

NAMES = ("rollout", "reference", "update")
# Qwen2-shaped: heads of 64, two key heads, a feed-forward four times as wide, tied embeddings.
SIZES = {"tiny": (4, 256, 2048), "small": (12, 512, 8192)}


class RandomRewards(Task):
    """Rewards of 0 and 1 by chance, and one answer to what has the reward 1."""

    name, max_reward, invalid_reward = "random", 1.0, 0.0

    def __init__(self, prompts: int) -> None:
        self.prompts, self.random = prompts, np.random.default_rng(0)

    def __len__(self) -> int:
        return self.prompts

    def prompt(self, index: int) -> str:
        """Empty: a measurement has token ids of its own."""
        return ""

    def score(self, prompt_index: Sequence[int], texts: Sequence[str], finished: Sequence[bool]) -> Score:
        """Draws a reward for each completion."""
        reward = self.random.integers(0, 2, len(texts))
        return Score(reward, ["rewarded" if one else None for one in reward])


def random_policy(name: str, **choices: Any) -> Policy:
    """The policy of a size in SIZES (layers, width, words) or of a published shape, whose layers are scanned: no
    tokenizer, and random weights to be drawn. choices: compute_dtype, remat."""
    if name in SIZES:
        layers, embed, words = SIZES[name]
        choices |= {"heads": embed // 64, "kv_heads": 2, "head_dim": 64, "mlp": 4 * embed}
        arch = transformer.Architecture("qwen2", words, embed, layers, **choices)
    else:
        arch = architecture_of(name, scan_layers=True, **choices)
    return Policy(arch, None, (), 0, {}, name)


def random_prompts(vocab_size: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """`count` lists of `length` token ids, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, vocab_size, (count, length)).tolist()


def run_of(prompts: int, group_size: int, max_new_tokens: int, **sections: Any) -> config.LanguageRun:
    """A run whose step draws so many completions of each prompt; sections: others of the config, as it has them."""
    sizes = config.Rollout(prompts_per_step=prompts, group_size=group_size, max_new_tokens=max_new_tokens)
    algorithm = config.Algorithm(method="mara", anchor="string")
    return config.LanguageRun(**{"algorithm": algorithm, "rollout": sizes} | sections)


def setup_of(run: config.LanguageRun, policy: Policy, params: Any, prompts: list[list[int]]) -> Setup:
    """What the steps of a measurement share: all of them read these prompts.

    The policy's eos_ids end completions; without any, every completion has max_new_tokens.
    """
    task, count = RandomRewards(len(prompts)), reference_samples.count(run, len(prompts))
    store = reference_samples.ReferenceSamples(None, count, len(prompts))
    for number in range(len(prompts)):
        scores = task.score([number] * count, [""] * count, [True] * count)
        reward, answers = np.asarray(scores.reward, np.float32), list(scores.answer)
        store.add({number: reference_samples.PromptSamples(reward, answers, np.zeros(count), [""] * count)})
    return Setup(run, task, policy, params, prompts, optim.make(run.optimiser), store)


def fresh_state(setup: Setup) -> State:
    """A copy of the parameters with a fresh optimiser."""
    more = remembered(setup.cfg, len(setup.task))
    return placement.fresh(setup.policy.architecture, setup.ref_params, setup.tx, more=more)


def sample_completions(setup: Setup, params: Any, seed: int) -> rollout.Rollout:
    """One rollout of the policy with these params."""
    pending = groups.start_rollout(setup, params, _ids(setup), jax.random.key(seed))
    return jax.block_until_ready(rollout.collect(pending))


def score_completions(setup: Setup, completions: rollout.Rollout) -> BySampler:
    """The batch of a rollout: the reference policy's hidden states, and random rewards."""
    return jax.block_until_ready(loop.scored_batches(setup, completions, _ids(setup), done=0)[1])


def update(setup: Setup, state: State, batches: BySampler) -> State:
    """One update; the old state's buffers are donated."""
    return jax.block_until_ready(loop.update(setup, state, batches)[0])


def _ids(setup: Setup) -> np.ndarray:
    return np.arange(len(setup.prompts))


def counted(setup: Setup, completions: rollout.Rollout, batches: BySampler) -> work.Least:
    """FLOPs of the three programs as they were run for this rollout, counted from their jaxprs."""
    run, policy, params = setup.cfg, setup.policy, setup.ref_params
    numbers = jnp.zeros(len(setup.prompts), jnp.int32)
    sampling = rollout.sampling_params(len(setup.prompts), 1.0)
    prompts = rollout.Prompts(completions.prompt_tokens, completions.prompt_lengths, numbers, numbers, sampling)
    state: Any = jax.eval_shape(lambda: fresh_state(setup))
    steps = int(np.max(completions.lengths)) - 1
    arch, packing = policy.architecture, batches.policy.packing
    return work.Least(
        _flops(programs.rollout_program(run, policy, params, prompts, jax.random.key(0)), (steps,)),
        _flops(programs.reference_program(run, arch, params, completions, packing)),
        _flops(programs.update_program(run, arch, setup.tx, state, params, batches)),
    )


def _flops(program: programs.Program, trips: tuple[int, ...] = ()) -> int:
    return work.flops(program.function, *program.args, trips=trips)


def least(setup: Setup, completions: rollout.Rollout) -> work.Least:
    """The analytic least of the same three."""
    lengths_p, lengths_pg = np.asarray(completions.prompt_lengths), np.asarray(completions.lengths)
    return work.least(setup.policy.architecture, lengths_p, lengths_pg)
