"""Completions drawn from a policy: one prefill per prompt, then a decode loop that stops early."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.parallel import hosts, sharding
from mara_jax.policies import transformer
from mara_jax.sampling import draw as drawing


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
    policy: transformer.Policy,
    params: dict,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    key: jax.Array,
    group_size: int = 8,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_p: float = 1.0,
    prompt_ids: Sequence[int] | np.ndarray | None = None,
    first_sample: int | Sequence[int] | np.ndarray = 0,
) -> Rollout:
    """Draws group_size completions of each prompt.

    Args:
      policy, params: as from hf.load.
      prompts: texts (encoded as they are; a chat template is the caller's) or token lists.
      key: counter-based: a completion depends on (key, prompt id, sample number) alone, so any split of
        prompts or groups into calls gives the same text.
      temperature: divides the logits; 0 takes the likeliest token.
      top_p: draws from the smallest set of likeliest tokens holding this mass.
      prompt_ids: numbers of the prompts in the data; 0, 1, ... unless told.
      first_sample: number of each group's first sample; one a prompt where the same prompt comes more than once.

    Returns:
      A Rollout; its log-probs are the policy's own (temperature 1, untruncated).

    Raises:
      ValueError: no prompts, a count below 1, an empty prompt, a policy without a tokenizer for texts.
    """
    for name, value in (("group_size", group_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature={temperature} must be at least 0 and top_p={top_p} in (0, 1]")
    if not len(prompts):
        raise ValueError("no prompts were given: at least one is needed")
    tokens = [_encode(policy, prompt) for prompt in prompts]
    tokens_ps, lengths_p = pad_prompts(tokens, policy.pad_id)
    ids_p = np.arange(len(prompts)) if prompt_ids is None else np.asarray(prompt_ids)
    first_p = np.broadcast_to(np.asarray(first_sample, np.int32), len(prompts))
    prompts_ps, prompt_lengths_p, ids_p, first_p, temperature_p = (
        hosts.prompts(array_p, group_size)
        for array_p in (tokens_ps, lengths_p, ids_p, first_p, np.full(len(prompts), temperature, np.float32))
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
        top_p=top_p,
    )
    tokens_pgt, logp_pgt, lengths_pg, finished_pg = drawn
    text = decode_text(policy, tokens_pgt, lengths_pg, finished_pg)
    return Rollout(tokens_pgt, logp_pgt, lengths_pg, finished_pg, text, prompts_ps, prompt_lengths_p)


def _encode(policy: transformer.Policy, prompt: str | Sequence[int]) -> Sequence[int]:
    if not isinstance(prompt, str):
        return prompt
    if policy.tokenizer is None:
        raise ValueError("the policy has no tokenizer, so prompts must be lists of token ids, not text")
    return policy.tokenizer.encode(prompt, add_special_tokens=False)


def decode_text(policy: transformer.Policy, tokens_pgt, lengths_pg, finished_pg) -> list[list[str]]:
    """Completions as text, without the end token; other special tokens are kept visible.

    Rows that other processes hold are empty.
    """
    if policy.tokenizer is None:
        return [["" for _ in range(lengths_pg.shape[1])] for _ in range(lengths_pg.shape[0])]
    tokens, ends = hosts.own(tokens_pgt), hosts.own(lengths_pg) - hosts.own(finished_pg)
    rows = [
        ids[:end].tolist()
        for group, stops in zip(tokens, ends, strict=True)
        for ids, end in zip(group, stops, strict=True)
    ]
    texts = policy.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    per = tokens.shape[1]
    return [texts[at : at + per] for at in range(0, len(texts), per)]


def whole_text(policy: transformer.Policy, drawn: Rollout) -> list[list[str]]:
    """The text of all rows, on every process."""
    if not hosts.several():
        return drawn.text
    return decode_text(policy, *(hosts.gather(x) for x in (drawn.tokens, drawn.lengths, drawn.finished)))


@functools.partial(jax.jit, static_argnames=("arch", "group_size", "max_new_tokens", "eos_ids", "pad_id", "top_p"))
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
    top_p: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The compiled draw behind `sample`: tokens, logp [p, g, t], lengths and finished [p, g]."""
    num_prompts = prompt_tokens_ps.shape[0]
    rows = num_prompts * group_size
    last_pd, prefix = prefill(arch, params, prompt_tokens_ps, prompt_lengths_p)
    arch, params, prefix = transformer.for_decoding(arch, params, prefix)
    spread = functools.partial(jnp.repeat, repeats=group_size, axis=0)
    sample_b = spread(first_sample_p) + jnp.tile(jnp.arange(group_size), num_prompts)
    keys_b = drawing.token_keys(key, spread(prompt_ids_p), sample_b)
    temperature_b, start_b = spread(temperature_p), spread(prompt_lengths_p)
    ends = jnp.array(eos_ids, jnp.int32)

    def choose(hidden_bd, at):
        logits_bv = transformer.decoding_logits(arch, params, hidden_bd)
        token_b, logp_b = _choose(jax.vmap(jax.random.fold_in, (0, None))(keys_b, at), logits_bv, temperature_b, top_p)
        return token_b, logp_b

    def body(carry):
        at, token_b, done_b, cache, tokens_bt, logp_bt = carry
        hidden_b1d, cache = transformer.forward(
            arch, params, token_b[:, None], (start_b + at - 1)[:, None],
            prefix=prefix, prefix_lengths_p=prompt_lengths_p, cache=cache, index=at - 1,
        )  # fmt: skip
        token_b, logp_b = choose(hidden_b1d[:, 0], at)
        token_b = jnp.where(done_b, pad_id, token_b)
        tokens_bt = tokens_bt.at[:, at].set(token_b)
        logp_bt = logp_bt.at[:, at].set(jnp.where(done_b, 0.0, logp_b))
        return at + 1, token_b, done_b | jnp.isin(token_b, ends), cache, tokens_bt, logp_bt

    def unfinished(carry):
        return (carry[0] < max_new_tokens) & ~jnp.all(carry[2])

    token_b, logp_b = choose(sharding.constrain(spread(last_pd), "rows"), 0)
    tokens_bt = sharding.constrain(jnp.full((rows, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(token_b), "rows")
    logp_bt = sharding.constrain(jnp.zeros((rows, max_new_tokens), logp_b.dtype).at[:, 0].set(logp_b), "rows")
    cache = transformer.init_cache(arch, rows, max_new_tokens)
    carry = (jnp.int32(1), token_b, jnp.isin(token_b, ends), cache, tokens_bt, logp_bt)
    _, _, finished_b, _, tokens_bt, logp_bt = jax.lax.while_loop(unfinished, body, carry)
    # A padding id may be an end token too, so the length is where the first end token stands.
    is_end_bt = jnp.isin(tokens_bt, ends)
    lengths_b = jnp.where(finished_b, jnp.argmax(is_end_bt, axis=1) + 1, max_new_tokens)
    found = (tokens_bt, logp_bt, lengths_b.astype(jnp.int32), finished_b)
    shape = (num_prompts, group_size)
    tokens_pgt, logp_pgt, lengths_pg, finished_pg = (
        sharding.constrain_groups(x.reshape(*shape, *x.shape[1:])) for x in found
    )
    return tokens_pgt, logp_pgt, lengths_pg, finished_pg


def prefill(arch, params, prompt_tokens_ps, prompt_lengths_p):
    """Each prompt once: the hidden state of its last token [p, d] and its keys and values."""
    positions_ps = jnp.broadcast_to(jnp.arange(prompt_tokens_ps.shape[1]), prompt_tokens_ps.shape)
    hidden_psd, prefix = transformer.forward(arch, params, prompt_tokens_ps, positions_ps)
    last_pd = jnp.take_along_axis(hidden_psd, (prompt_lengths_p - 1)[:, None, None], axis=1)[:, 0]
    return last_pd, prefix


def _choose(keys_b, logits_bv, temperature_b, top_p):
    """Draws at a temperature (0: the likeliest); the log-prob is the policy's own, at temperature 1."""
    greedy_b = temperature_b == 0
    shaped_bv = logits_bv / jnp.where(greedy_b, 1.0, temperature_b)[:, None]
    if top_p < 1:
        shaped_bv = drawing.keep_nucleus(shaped_bv, top_p)
    drawn_b, _ = drawing.draw(keys_b, shaped_bv)
    token_b = jnp.where(greedy_b, jnp.argmax(logits_bv, axis=-1).astype(jnp.int32), drawn_b)
    chosen_b = jnp.take_along_axis(logits_bv, token_b[:, None], axis=1)[:, 0]
    return token_b, chosen_b - jax.nn.logsumexp(logits_bv, axis=-1)
