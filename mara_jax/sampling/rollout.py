"""Completions drawn from a policy: one prefill per prompt, then decoding that stops early."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.parallel import hosts, sharding
from mara_jax.policies import decoding, transformer
from mara_jax.policies.policy import Policy
from mara_jax.sampling import decode
from mara_jax.sampling import draw as drawing
from mara_jax.sampling import slots as refill

REFILL_EVERY = 1  # steps between refills of free rows


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


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_id: int, multiple: int = 32, least: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads token lists to one length, at least `least`, a multiple of `multiple` so that few shapes are compiled.

    Raises:
      ValueError: a prompt has no token.
    """
    lengths_p = np.array([len(tokens) for tokens in prompts], np.int32)
    if lengths_p.min(initial=1) < 1:
        raise ValueError(f"prompt {int(lengths_p.argmin())} has no token: a policy needs at least one to start from")
    width = -(-max(least, int(lengths_p.max())) // multiple) * multiple
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
    least_width: int = 0,
    meanwhile: Callable[[], object] | None = None,
) -> Rollout:
    """Draws group_size completions of each prompt.

    Args:
      policy, params: as from hf.load.
      prompts: texts (encoded as they are; a chat template is the caller's) or token lists.
      key: counter-based: a completion depends on (key, prompt id, sample number) alone, so any split of
        prompts or groups into calls gives the same text.
      temperature: divides the logits; 0 takes the likeliest token. One for all prompts, or one for each, as are
      top_k: draws from so many of the likeliest tokens; 0: from all.
      top_p: draws from the fewest likeliest tokens (of those that top_k leaves) holding this share of the mass.
      slots: completions decoded at once; as one ends, the next takes its row. The same completions as of 0: all at
        once, which takes fewer steps of more rows.
      prompt_ids: numbers of the prompts in the data; 0, 1, ... unless told.
      first_sample: number of each group's first sample; one a prompt where the same prompt comes more than once.
      least_width: prompts are padded as if one had so many tokens: calls with other prompts then share a program.
      meanwhile: called once while the device draws.

    Returns:
      A Rollout; its log-probs are the policy's own (temperature 1, untruncated).

    Raises:
      ValueError: no prompts, a count below 1, an empty prompt, a policy without a tokenizer for texts.
    """
    for name, value, least in (
        ("group_size", group_size, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("slots", slots, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if not len(prompts):
        raise ValueError("no prompts were given: at least one is needed")
    tokens = [_encode(policy, prompt) for prompt in prompts]
    tokens_ps, lengths_p = pad_prompts(tokens, policy.pad_id, least=least_width)
    ids_p = np.arange(len(prompts)) if prompt_ids is None else np.asarray(prompt_ids)
    first_p = np.broadcast_to(np.asarray(first_sample, np.int32), len(prompts))
    shaping = _shaping(len(prompts), temperature, top_k, top_p)
    prompts_ps, prompt_lengths_p, ids_p, first_p = (
        hosts.shard_prompts(array_p, group_size) for array_p in (tokens_ps, lengths_p, ids_p, first_p)
    )
    temperature_p = hosts.shard_prompts(shaping.temperature, group_size)
    top_k_p, top_p_p = (
        None if x is None else hosts.shard_prompts(x, group_size) for x in (shaping.top_k, shaping.top_p)
    )
    drawn = generate(
        policy.architecture,
        params,
        prompts_ps,
        prompt_lengths_p,
        ids_p,
        key,
        temperature_p,
        first_sample_p=first_p,
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        eos_ids=policy.eos_ids,
        pad_id=policy.pad_id,
        top_k_p=top_k_p,
        top_p_p=top_p_p,
        slots=slots,
    )
    tokens_pgt, logp_pgt, lengths_pg, finished_pg, _ = drawn
    if meanwhile is not None:
        meanwhile()
    text = decode_text(policy, tokens_pgt, lengths_pg, finished_pg)
    return Rollout(tokens_pgt, logp_pgt, lengths_pg, finished_pg, text, prompts_ps, prompt_lengths_p)


def _shaping(prompts: int, temperature: Any, top_k: Any, top_p: Any) -> drawing.Shaping:
    """One entry a prompt of each; None of what cuts nothing, which then costs nothing."""
    limits = {
        "temperature": (temperature, np.float32, lambda v: (v >= 0) & (v < np.inf), "at least 0 and finite"),
        "top_k": (top_k, np.int32, lambda v: v >= 0, "at least 0 (0: all tokens)"),
        "top_p": (top_p, np.float32, lambda v: (v > 0) & (v <= 1), "in (0, 1]"),
    }
    found = []
    for name, (given, dtype, holds, words) in limits.items():
        values = np.asarray(given)
        if values.shape not in ((), (prompts,)):
            raise ValueError(
                f"{name} has the shape {values.shape}: give one number, or one for each of {prompts} prompts"
            )
        for value in values.ravel()[~holds(values).ravel()]:
            raise ValueError(f"{name}={value} must be {words}")
        found.append(np.broadcast_to(values.astype(dtype), prompts))
    temperature_p, top_k_p, top_p_p = found
    return drawing.Shaping(temperature_p, top_k_p if top_k_p.any() else None, top_p_p if (top_p_p < 1).any() else None)


def _encode(policy: Policy, prompt: str | Sequence[int]) -> Sequence[int]:
    if not isinstance(prompt, str):
        return prompt
    if policy.tokenizer is None:
        raise ValueError("the policy has no tokenizer, so prompts must be lists of token ids, not text")
    return policy.tokenizer.encode(prompt, add_special_tokens=False)


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
    texts = policy.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    per = tokens.shape[1]
    return [texts[at : at + per] for at in range(0, len(texts), per)]


def whole_text(policy: Policy, drawn: Rollout) -> list[list[str]]:
    """The text of all rows, on every process."""
    if not hosts.several_processes():
        return drawn.text
    return decode_text(policy, *(hosts.gather(x) for x in (drawn.tokens, drawn.lengths, drawn.finished)))


@functools.partial(
    jax.jit,
    static_argnames=("arch", "group_size", "max_new_tokens", "eos_ids", "pad_id", "slots", "refill_every"),
)
def generate(
    arch: transformer.Architecture,
    params: dict,
    prompt_tokens_ps: jax.Array,
    prompt_lengths_p: jax.Array,
    prompt_ids_p: jax.Array,
    key: jax.Array,
    temperature_p: jax.Array,
    *,
    first_sample_p: jax.Array,
    group_size: int,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    top_k_p: jax.Array | None = None,
    top_p_p: jax.Array | None = None,
    slots: int = 0,
    refill_every: int = REFILL_EVERY,
) -> Drawn:
    """The compiled draw behind `sample`."""
    num_prompts = prompt_tokens_ps.shape[0]
    b = num_prompts * group_size
    last_pd, prefix = prefill(arch, params, prompt_tokens_ps, prompt_lengths_p)
    arch, params, prefix = decoding.lay_out(arch, params, prefix)
    spread = functools.partial(jnp.repeat, repeats=group_size, axis=0)
    sample_b = spread(first_sample_p) + jnp.tile(jnp.arange(group_size), num_prompts)
    keys_b = drawing.token_keys(key, spread(prompt_ids_p), sample_b)
    shaping = drawing.Shaping(temperature_p, top_k_p, top_p_p)
    ends = jnp.array(eos_ids, jnp.int32)
    start = decode.Start(arch, params, prefix, prompt_lengths_p, last_pd, keys_b, shaping, ends, max_new_tokens, pad_id)
    if 0 < slots < b:
        tokens_bt, logp_bt, steps = refill.refilled(start, slots, refill_every)
    else:
        tokens_bt, logp_bt, steps = decode.together(start)
    # A padding id may be an end token too, so the length is where the first end token stands.
    is_end_bt = jnp.isin(tokens_bt, ends)
    finished_b = jnp.any(is_end_bt, axis=1)
    lengths_b = jnp.where(finished_b, jnp.argmax(is_end_bt, axis=1) + 1, max_new_tokens).astype(jnp.int32)
    found = (x.reshape(num_prompts, group_size, *x.shape[1:]) for x in (tokens_bt, logp_bt, lengths_b, finished_b))
    tokens_pgt, logp_pgt, lengths_pg, finished_pg = (sharding.constrain_groups(x) for x in found)
    return Drawn(tokens_pgt, logp_pgt, lengths_pg, finished_pg, steps)


def prefill(arch, params, prompt_tokens_ps, prompt_lengths_p):
    """Each prompt once: the hidden state of its last token [p, d] and its keys and values."""
    positions_ps = jnp.broadcast_to(jnp.arange(prompt_tokens_ps.shape[1]), prompt_tokens_ps.shape)
    hidden_psd, prefix = transformer.forward(arch, params, prompt_tokens_ps, positions_ps)
    return last(hidden_psd, prompt_lengths_p), prefix


def last(hidden_psd: jax.Array, prompt_lengths_p: jax.Array) -> jax.Array:
    """The hidden state of each prompt's last token, [p, d]."""
    return jnp.take_along_axis(hidden_psd, (prompt_lengths_p - 1)[:, None, None], axis=1)[:, 0]
