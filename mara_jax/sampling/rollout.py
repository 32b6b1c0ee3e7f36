"""Completions drawn from a policy: one prefill per prompt, then decoding that stops early."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.parallel import hosts, sharding
from mara_jax.policies import decoding, encoding, transformer
from mara_jax.policies.policy import Policy
from mara_jax.sampling import continuous_batching, decode, draw
from mara_jax.sampling.draw import SamplingParams


class Rollout(NamedTuple):
    """Completions of p prompts, g samples each, right-padded to t tokens.

    Fields: tokens [p, g, t] (the end token included, padding after it), logp [p, g, t] (nats, under the
    policy as it is, 0 at padding), lengths [p, g] (end token included), finished [p, g] (an end token
    came), text (nested list, without the end token; empty for rows that other processes hold),
    prompt_tokens [p, s] and prompt_lengths [p].
    """

    tokens: jax.Array
    logp: jax.Array
    lengths: jax.Array
    finished: jax.Array
    text: list[list[str]]
    prompt_tokens: jax.Array
    prompt_lengths: jax.Array


class Drawn(NamedTuple):
    """What `generate` makes: tokens, logp [p, g, t]; lengths, finished [p, g]; steps of decoding, []."""

    tokens: jax.Array
    logp: jax.Array
    lengths: jax.Array
    finished: jax.Array
    steps: jax.Array


class Prompts(NamedTuple):
    """p prompts as `generate` takes them, each for a group of completions.

    tokens [p, s], right-padded; lengths [p]; ids [p]: numbers of the prompts in the data; first_sample [p]: number of
    each group's first sample; sampling: temperature and truncation, one entry a prompt.
    """

    tokens: jax.Array
    lengths: jax.Array
    ids: jax.Array
    first_sample: jax.Array
    sampling: SamplingParams


class Settings(NamedTuple):
    """What is static in `generate`: another value is another compiled program.

    slots: completions decoded at once, 0 for all; axis_name: of the vmap over policies that share their kernels, which
    then decode until the last completion of them all has ended.
    """

    group_size: int
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    slots: int = 0
    axis_name: str | None = None


class Pending(NamedTuple):
    """A dispatched rollout: the policy, its prompts, and arrays that the device may still be computing."""

    policy: Policy
    prompts: Prompts
    drawn: Drawn


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int, multiple: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads token lists to one length, a multiple of `multiple` so that few shapes are compiled.

    Raises:
      ValueError: a prompt has no token.
    """
    lengths_p = np.array([len(tokens) for tokens in prompts], np.int32)
    if lengths_p.min(initial=1) < 1:
        raise ValueError(f"prompt {int(lengths_p.argmin())} has no token: a policy needs at least one to start from")
    width = -(-int(lengths_p.max()) // multiple) * multiple
    tokens_ps = np.full((len(prompts), width), pad_id, np.int32)
    for row, tokens in zip(tokens_ps, prompts, strict=True):
        row[: len(tokens)] = tokens
    return tokens_ps, lengths_p


def sample(
    policy: Policy,
    params: dict,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    key: jax.Array,
    group_size: int = 8,
    max_new_tokens: int = 32,
    temperature: float | Sequence[float] | np.ndarray = 1.0,
    top_p: float | Sequence[float] | np.ndarray = 1.0,
    top_k: int | Sequence[int] | np.ndarray = 0,
    slots: int = 0,
    prompt_ids: Sequence[int] | np.ndarray | None = None,
    first_sample: int | Sequence[int] | np.ndarray = 0,
) -> Rollout:
    """Draws group_size completions of each prompt.

    Args:
      policy, params: as from hf.load.
      prompts: token lists, or texts, which `encoding.encode_prompts` encodes, behind the tokenizer's BOS; a chat
        template is the caller's.
      key: counter-based: a completion depends on (key, prompt id, sample number) alone, so any split of
        prompts or groups into calls gives the same text.
      temperature: divides the logits; 0 takes the likeliest token. One for all prompts, or one for each, as are
      top_k: draws from so many of the likeliest tokens; 0: from all.
      top_p: draws from the fewest likeliest tokens (of those that top_k leaves) holding this share of the mass.
      slots: completions decoded at once; as one ends, the next takes its row. The same completions as of 0: all at
        once, which takes fewer steps of more rows.
      prompt_ids: numbers of the prompts in the data; 0, 1, ... unless told.
      first_sample: number of each group's first sample; one a prompt where the same prompt comes more than once.

    Returns:
      A Rollout; its log-probs are the policy's own (temperature 1, untruncated).

    Raises:
      ValueError: no prompts, a count below 1, an empty prompt, a policy without a tokenizer for texts, more tokens than
        the policy has positions, logits that are not finite.
    """
    for name, value, least in (
        ("group_size", group_size, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("slots", slots, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    sampling = sampling_params(len(prompts), temperature, top_k, top_p)
    tokens = _encoded(policy, prompts)
    check_context(policy, tokens, max_new_tokens)
    placed = place_prompts(policy, tokens, group_size, sampling, prompt_ids, first_sample)
    settings = Settings(group_size, max_new_tokens, policy.eos_ids, policy.pad_id, slots)
    drawn = generate(policy.architecture, params, placed, key, settings)
    check_logp(policy, drawn.logp)
    return collect(Pending(policy, placed, drawn))


def check_context(policy: Policy, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Refuses prompts whose completions would go past the policy's last position, which it was never trained on.

    Raises:
      ValueError: one line.
    """
    most = policy.architecture.max_positions
    for number, tokens in enumerate(prompts):
        if len(tokens) + max_new_tokens > most:
            cure = f"use at most {most - len(tokens)}" if len(tokens) < most else "shorten the prompt"
            raise ValueError(
                f"max_new_tokens={max_new_tokens} after prompt {number} of {len(tokens)} tokens makes "
                f"{len(tokens) + max_new_tokens}, but {policy.source} has {most} positions: {cure}"
            )


def check_logp(policy: Policy, logp_pgt: jax.Array) -> None:
    """Refuses completions that were drawn from logits that are not finite, as their log-probs tell.

    Raises:
      ValueError: one line that names the first of them (on several processes `hosts.SharedError`).
    """
    bad = np.argwhere(~np.isfinite(hosts.gather(logp_pgt)))
    if len(bad):
        prompt, sample, token = bad[0].tolist()
        hosts.raise_as_one(
            ValueError(
                f"{policy.source}: logits are not finite at token {token} of completion {sample} of prompt {prompt}: "
                "weights hold NaN or infinity, or overflow in compute_dtype (use float32), or temperature is too low"
            )
        )


def place_prompts(
    policy: Policy,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    group_size: int,
    sampling: SamplingParams,
    ids: Sequence[int] | np.ndarray | None = None,
    first_sample: int | Sequence[int] | np.ndarray = 0,
) -> Prompts:
    """Prompts, padded, on the devices that will hold their groups' rows; arguments and errors as of `sample`."""
    if not len(prompts):
        raise ValueError("no prompts were given: at least one is needed")
    tokens_ps, lengths_p = pad_prompts(_encoded(policy, prompts), policy.pad_id)
    ids_p = np.arange(len(prompts)) if ids is None else np.asarray(ids)
    first_p = np.broadcast_to(np.asarray(first_sample, np.int32), len(prompts))
    arrays = Prompts(tokens_ps, lengths_p, ids_p, first_p, sampling)  # pyright: ignore[reportArgumentType]
    return jax.tree.map(lambda array_p: hosts.shard_prompts(array_p, group_size), arrays)


def collect(pending: Pending) -> Rollout:
    """Waits for a dispatched rollout and decodes its text."""
    tokens_pgt, logp_pgt, lengths_pg, finished_pg, _ = pending.drawn
    text = decode_text(pending.policy, tokens_pgt, lengths_pg, finished_pg)
    prompts = pending.prompts
    return Rollout(tokens_pgt, logp_pgt, lengths_pg, finished_pg, text, prompts.tokens, prompts.lengths)


def replaced(completions: Rollout, others: Rollout, of_prompt: np.ndarray) -> Rollout:
    """Completions with the groups of the prompts where `of_prompt` [p] holds from `others`, maybe of other prompts."""
    chosen_p = hosts.shard_prompts(of_prompt, completions.lengths.shape[1])
    width = max(completions.prompt_tokens.shape[1], others.prompt_tokens.shape[1])
    completions, others = (
        one._replace(prompt_tokens=_widened(one.prompt_tokens, width)) for one in (completions, others)
    )

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(chosen_p.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    names = ("tokens", "logp", "lengths", "finished", "prompt_tokens", "prompt_lengths")
    arrays = {name: choose(getattr(others, name), getattr(completions, name)) for name in names}
    text = [new if chosen else old for new, old, chosen in zip(others.text, completions.text, of_prompt, strict=True)]
    return completions._replace(text=text, **arrays)


def _widened(tokens_ps: jax.Array, width: int) -> jax.Array:
    """Padded prompts with more padding, which nothing reads."""
    return jnp.pad(tokens_ps, ((0, 0), (0, width - tokens_ps.shape[1])))


def sampling_params(prompts: int, temperature: Any, top_k: Any = 0, top_p: Any = 1.0) -> SamplingParams:
    """One entry a prompt of each (see `sample`); None where nothing is truncated, which then costs nothing."""
    limits = {
        "temperature": (temperature, np.float32, lambda v: (v >= 0) & (v < np.inf), "at least 0 and finite"),
        "top_k": (top_k, np.int32, lambda v: v >= 0, "at least 0 (0: all tokens)"),
        "top_p": (top_p, np.float32, lambda v: (v > 0) & (v <= 1), "in (0, 1]"),
    }
    checked = []
    for name, (value, dtype, holds, words) in limits.items():
        values = np.asarray(value)
        if values.shape not in ((), (prompts,)):
            raise ValueError(
                f"{name} has the shape {values.shape}: give one number, or one for each of {prompts} prompts"
            )
        for value in values.ravel()[~holds(values).ravel()]:
            raise ValueError(f"{name}={value} must be {words}")
        checked.append(np.broadcast_to(values.astype(dtype), prompts))
    temperature_p, top_k_p, top_p_p = checked
    return SamplingParams(temperature_p, top_k_p if top_k_p.any() else None, top_p_p if (top_p_p < 1).any() else None)


def _encoded(policy: Policy, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[Sequence[int]]:
    if policy.tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("the policy has no tokenizer, so prompts must be lists of token ids, not text")

    def encode(prompt: str | Sequence[int]) -> Sequence[int]:
        return encoding.encode_prompts(policy.tokenizer, [prompt], chat=False)[0] if isinstance(prompt, str) else prompt

    return [encode(prompt) for prompt in prompts]


def decode_text(policy: Policy, tokens_pgt, lengths_pg, finished_pg) -> list[list[str]]:
    """Completions as text, without the end token; other special tokens are kept visible.

    Rows that other processes hold are empty.
    """
    if policy.tokenizer is None:
        return [["" for _ in range(lengths_pg.shape[1])] for _ in range(lengths_pg.shape[0])]
    tokens, ends = hosts.local_values(tokens_pgt), hosts.local_values(lengths_pg) - hosts.local_values(finished_pg)
    rows = [
        ids[:end].tolist()
        for group, stops in zip(tokens, ends, strict=True)
        for ids, end in zip(group, stops, strict=True)
    ]
    texts = encoding.decode_completions(policy.tokenizer, rows)
    per = tokens.shape[1]
    return [texts[at : at + per] for at in range(0, len(texts), per)]


def whole_text(policy: Policy, drawn: Rollout) -> list[list[str]]:
    """The text of all rows, on every process."""
    if not hosts.several_processes():
        return drawn.text
    return decode_text(policy, *(hosts.gather(x) for x in (drawn.tokens, drawn.lengths, drawn.finished)))


@functools.partial(jax.jit, static_argnames=("arch", "settings"))
def generate(
    arch: transformer.Architecture, params: dict, prompts: Prompts, key: jax.Array, settings: Settings
) -> Drawn:
    """Computes each prompt once, then decodes its group of samples, statically or with continuous batching.

    params: as from `lora.attached`; settings.slots: sequences decoded at once, 0 for all of them. Log-probs are the
    policy's own, at temperature 1 and without truncation.
    """
    num_prompts, group_size = len(prompts.lengths), settings.group_size
    b, slots, max_new_tokens = num_prompts * group_size, settings.slots, settings.max_new_tokens
    last_pd, prefix = prefill(arch, params, prompts.tokens, prompts.lengths)
    arch, params, prefix = decoding.lay_out(arch, params, prefix, merge=settings.axis_name is None)
    spread = functools.partial(jnp.repeat, repeats=group_size, axis=0)
    sample_b = spread(prompts.first_sample) + jnp.tile(jnp.arange(group_size), num_prompts)
    keys_b = draw.token_keys(key, spread(prompts.ids), sample_b)
    eos_ids = jnp.array(settings.eos_ids, jnp.int32)
    start = decode.Prefilled(
        arch,
        params,
        prefix,
        prompts.lengths,
        last_pd,
        keys_b,
        prompts.sampling,
        eos_ids,
        max_new_tokens,
        settings.pad_id,
        settings.axis_name,
    )
    if 0 < slots < b:
        tokens_bt, logp_bt, steps = continuous_batching.decode_continuously(start, slots)
    else:
        tokens_bt, logp_bt, steps = decode.decode_statically(start)
    # A padding id may be an end token too, so the length is where the first end token stands.
    is_end_bt = jnp.isin(tokens_bt, eos_ids)
    finished_b = jnp.any(is_end_bt, axis=1)
    lengths_b = jnp.where(finished_b, jnp.argmax(is_end_bt, axis=1) + 1, max_new_tokens).astype(jnp.int32)

    def grouped(x: jax.Array) -> jax.Array:
        return sharding.constrain_groups(x.reshape(num_prompts, group_size, *x.shape[1:]))

    return Drawn(grouped(tokens_bt), grouped(logp_bt), grouped(lengths_b), grouped(finished_b), steps)


def prefill(arch, params, prompt_tokens_ps, prompt_lengths_p):
    """Each prompt once: the hidden state of its last token [p, d] and its keys and values."""
    positions_ps = jnp.broadcast_to(jnp.arange(prompt_tokens_ps.shape[1]), prompt_tokens_ps.shape)
    hidden_psd, prefix = transformer.forward(arch, params, prompt_tokens_ps, positions_ps)
    return last(hidden_psd, prompt_lengths_p), prefix


def last(hidden_psd: jax.Array, prompt_lengths_p: jax.Array) -> jax.Array:
    """The hidden state of each prompt's last token, [p, d]."""
    return jnp.take_along_axis(hidden_psd, (prompt_lengths_p - 1)[:, None, None], axis=1)[:, 0]
