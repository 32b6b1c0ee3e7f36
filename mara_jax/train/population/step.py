"""A step of several members at once: drawn, scored and updated as `loop` does it for one run.

Arrays on the device have a leading axis of members k; what the host scores and writes is a list with an entry a member.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.config import estimator_of
from mara_jax.parallel import sharding
from mara_jax.policies.packing import Packing
from mara_jax.sampling import logprobs, rollout
from mara_jax.train import groups, loop, programs
from mara_jax.train.population import programs as of_members
from mara_jax.train.reference_samples import reads_masses
from mara_jax.train.scoring import AnswerIndices, GroupScores
from mara_jax.train.setup import Setup
from mara_jax.train.state import Batch, BySampler, State


class Drawing(NamedTuple):
    """Dispatched rollouts of k members: prompts and completions, with a leading axis k on every array."""

    prompts: rollout.Prompts
    drawn: rollout.Drawn

    @property
    def tokens(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Prompt tokens [k, p, s], their lengths [k, p], completions [k, p, g, t]."""
        return self.prompts.tokens, self.prompts.lengths, self.drawn.tokens


def start_rollouts(
    setups: Sequence[Setup], trained_k: Any, ids_k: Sequence[np.ndarray], stream: str, done: int
) -> Drawing:
    """Dispatches a rollout of every member, each with its own prompts and random key.

    Args:
      trained_k: what each member trains, stacked; None samples from the reference policy.
      stream: as of `groups.rollout_key`.
    """
    first, sizes, count = setups[0], setups[0].cfg.rollout, len(setups)
    tokens, numbers, first_samples = [], [], []
    for setup, ids in zip(setups, ids_k, strict=True):
        tokens += [setup.prompts[i] for i in ids]
        numbers += ids.tolist()
        first_samples += groups.earlier_groups(ids).tolist()
    sampling = rollout.sampling_params(len(tokens), temperature=1.0)
    starts = np.array(first_samples) * sizes.group_size
    placed = rollout.place_prompts(first.policy, tokens, sizes.group_size, sampling, numbers, starts)
    prompts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), placed)
    key_k = jnp.stack([groups.rollout_key(setup.cfg, stream, done) for setup in setups])
    policy = first.policy
    settings = rollout.Settings(sizes.group_size, sizes.max_new_tokens, policy.eos_ids, policy.pad_id)
    drawn = of_members.generate(policy.architecture, first.ref_params, trained_k, prompts, key_k, settings)
    return Drawing(prompts, drawn)


def collect(setups: Sequence[Setup], drawing: Drawing) -> list[rollout.Rollout]:
    """Waits for the rollouts, and decodes their text: the completions of each member, on the host."""
    policy, (prompts, drawn) = setups[0].policy, jax.device_get(drawing)
    completions = []
    for k in range(len(setups)):
        tokens, logp, lengths, finished = (x[k] for x in (drawn.tokens, drawn.logp, drawn.lengths, drawn.finished))
        text = rollout.decode_text(policy, tokens, lengths, finished)
        arrays = (tokens, logp, lengths, finished, text, prompts.tokens[k], prompts.lengths[k])
        completions.append(rollout.Rollout(*arrays))
    return completions


def scored_batches(
    setups: Sequence[Setup],
    drawing: Drawing,
    completions_k: Sequence[rollout.Rollout],
    ids_k: Sequence[np.ndarray],
    done: int,
) -> tuple[list[GroupScores], BySampler]:
    """The scores of every member's completions, and the batches of their update; as `loop.scored_batches`."""
    first, answers_k = setups[0], [AnswerIndices(len(ids)) for ids in ids_k]
    scores, batch = _scored_batch(setups, drawing, completions_k, ids_k, answers_k, done)
    if first.cfg.algorithm.truncate or first.cfg.guard == "skip":
        batch = batch.replace(sampler_logp=drawing.drawn.logp)  # pyright: ignore[reportAttributeAccessIssue]
    if first.task.leaves_out_truncated:
        batch = batch.replace(counted=drawing.drawn.finished)  # pyright: ignore[reportAttributeAccessIssue]
    if estimator_of(first.cfg.algorithm) != "reference_samples":
        return scores, BySampler(batch)
    drawing = start_rollouts(setups, None, ids_k, "reference", done)
    reference = _scored_batch(setups, drawing, collect(setups, drawing), ids_k, answers_k, done)[1]
    return scores, BySampler(batch, reference)


def _scored_batch(
    setups: Sequence[Setup],
    drawing: Drawing,
    completions_k: Sequence[rollout.Rollout],
    ids_k: Sequence[np.ndarray],
    answers_k: Sequence[AnswerIndices],
    done: int,
) -> tuple[list[GroupScores], Batch]:
    first, packing = setups[0], packings(setups, completions_k)
    # Dispatched first, so that the device works while the host scores texts.
    ref_hidden = of_members.reference_hidden(
        first.policy.architecture,
        first.ref_params,
        drawing.tokens,
        packing,
        first.cfg.optimiser.micro_batches,
        len(first.task) == 1,
    )
    samples: dict[str, jax.Array] = {}
    if reads_masses(first.cfg.algorithm):
        group_size = first.cfg.rollout.group_size
        rows = [loop.reference_scores(*one, group_size) for one in zip(setups, ids_k, answers_k, strict=True)]
        samples = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
    together = zip(setups, completions_k, ids_k, strict=True)
    scores = [groups.score(setup, completions, ids, done) for setup, completions, ids in together]
    prompts, drawn = drawing
    return scores, Batch(
        prompt_tokens=prompts.tokens,
        prompt_lengths=prompts.lengths,
        tokens=drawn.tokens,
        lengths=drawn.lengths,
        reward=jnp.asarray(np.stack([one.reward for one in scores])),
        answer=jnp.asarray(np.stack([index.of(one.answer) for index, one in zip(answers_k, scores, strict=True)])),
        prompt_ids=jnp.asarray(np.stack(ids_k).astype(np.int32)),
        ref_hidden=ref_hidden,
        packing=packing,
        **samples,  # pyright: ignore[reportArgumentType]
    )


def packings(setups: Sequence[Setup], completions_k: Sequence[rollout.Rollout]) -> Packing | None:
    """How each member's tokens are packed, [k, ...]; all in sequences of the size that the fullest needs."""
    cfg, count = setups[0].cfg, len(setups)
    parts = cfg.optimiser.micro_batches
    lengths_kpg = np.stack([one.lengths for one in completions_k])
    # Members and micro-batches alike are parts of one group, for `packed`.
    parts_pg = logprobs.joined(np.concatenate([logprobs.split(lengths_pg, parts) for lengths_pg in lengths_kpg]))
    packing = logprobs.packed(
        parts_pg, completions_k[0].tokens.shape[-1], cfg.rollout.length_buckets, parts=count * parts
    )
    if packing is None:
        return None
    shape = (count, parts) if parts > 1 else (count,)
    arrays = packing if count * parts > 1 else Packing(*(np.asarray(array)[None] for array in packing))
    return Packing(*(jnp.asarray(array.reshape(*shape, *array.shape[1:])) for array in arrays))


def policy_hidden(
    setups: Sequence[Setup], trained_k: Any, drawing: Drawing, completions_k: Sequence[rollout.Rollout]
) -> logprobs.Hidden:
    """The members' hidden states at their completions, [k, ...], see `loop.hidden_states`."""
    first = setups[0]
    return of_members.policy_hidden(
        first.policy.architecture,
        first.ref_params,
        trained_k,
        drawing.tokens,
        packings(setups, completions_k),
        first.cfg.optimiser.micro_batches,
    )


def update(setups: Sequence[Setup], states: State, batches: BySampler) -> tuple[State, dict[str, jax.Array]]:
    """Dispatches every member's update; the old states' buffers are donated."""
    first = setups[0]
    hyper = jax.tree.map(lambda *values: np.stack(values), *(programs.hyperparameters(setup.cfg) for setup in setups))
    rates = np.array([setup.cfg.optimiser.learning_rate for setup in setups])
    choices = programs.static_choices(first.cfg, first.policy.architecture, first.tx)
    return of_members.update(states, first.ref_params, batches, hyper, rates / rates[0], choices)


def stacked(trees: Iterable[Any]) -> Any:
    """Trees of arrays as one, with a leading axis of members, on the devices that have them.

    With several devices each tree goes through the host, so that no device ever holds more than its own members.
    """
    if sharding.current() is None:
        return jax.jit(lambda *trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees))(*trees)
    on_host = [jax.device_get(tree) for tree in trees]
    where = of_members.member_sharding(len(on_host))
    return jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves), where), *on_host)


def member(tree: Any, place: int) -> Any:
    """One member's part of a tree of arrays with a leading axis, on every device of the layout in use."""
    layout = sharding.current()
    if layout is None:
        return _part(tree, place)
    return jax.device_put(jax.tree.map(lambda x: _part_of_shard(x, place), tree), sharding.replicated(layout))


def _part_of_shard(x: jax.Array, place: int) -> jax.Array:
    """The part of a member, on a device that has it: the others' need not meet there."""
    for shard in x.addressable_shards:
        here = range(len(x))[shard.index[0]]
        if place in here:
            return _part(shard.data, place - here.start)
    raise IndexError(f"member {place} of {len(x)}")


@jax.jit
def _part(tree: Any, place: int) -> Any:
    return jax.tree.map(lambda x: x[place], tree)
