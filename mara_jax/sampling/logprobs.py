"""Log-probs of given completions, prompts computed once per group."""

import functools

import jax
import jax.numpy as jnp

from mara_jax.policies import transformer
from mara_jax.sampling import rollout

# Above this many float32 logits at once, the head runs in chunks of positions and is recomputed in the
# backward pass, so that no array of the size of positions times vocabulary is ever held.
MAX_LOGITS = 24_000_000


def completion_hidden(
    arch: transformer.Architecture,
    params: dict,
    prompt_tokens_ps: jax.Array,
    prompt_lengths_p: jax.Array,
    tokens_pgt: jax.Array,
) -> jax.Array:
    """The hidden state from which each completion token is predicted, [p, g, t, d].

    Each prompt is computed once; differentiable in params, also through its keys and values.
    """
    p, g, t = tokens_pgt.shape
    last_pd, prefix = rollout.prefill(arch, params, prompt_tokens_ps, prompt_lengths_p)
    hidden_btd = jnp.repeat(last_pd, g, axis=0)[:, None]
    if t > 1:
        start_b1 = jnp.repeat(prompt_lengths_p, g)[:, None]
        rest_btd, _ = transformer.forward(
            arch,
            params,
            tokens_pgt.reshape(p * g, t)[:, :-1],
            start_b1 + jnp.arange(t - 1),
            prefix=prefix,
            prefix_lengths_p=prompt_lengths_p,
        )
        hidden_btd = jnp.concatenate([hidden_btd, rest_btd], axis=1)
    return hidden_btd.reshape(p, g, t, -1)


def completion_logps(
    arch: transformer.Architecture,
    params: dict,
    prompt_tokens_ps: jax.Array,
    prompt_lengths_p: jax.Array,
    tokens_pgt: jax.Array,
) -> jax.Array:
    """log pi(token | prompt, earlier tokens) of every completion token, [p, g, t] float32 (nats).

    Values at padding are finite and mean nothing: mask them by the lengths.
    """
    hidden_pgtd = completion_hidden(arch, params, prompt_tokens_ps, prompt_lengths_p, tokens_pgt)
    return token_logps(arch, params, hidden_pgtd, tokens_pgt)


def token_logps(arch: transformer.Architecture, params: dict, hidden_d: jax.Array, tokens: jax.Array) -> jax.Array:
    """log softmax of the head at the given tokens, float32 [...], for hidden states [..., d]."""

    def of_chunk(hidden_cd, tokens_c):
        logits_cv = transformer.logits(arch, params, hidden_cd)
        return _chosen(logits_cv, tokens_c) - jax.nn.logsumexp(logits_cv, axis=-1)

    return _by_chunks(of_chunk, arch.vocab_size, hidden_d, tokens)


def token_logps_and_kl(
    arch: transformer.Architecture,
    params: dict,
    ref_params: dict,
    hidden_d: jax.Array,
    ref_hidden_d: jax.Array,
    tokens: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As token_logps, and each position's exact KL(pi || ref) over the vocabulary (nats), without gradient.

    Summed over a completion's positions, the KL is an unbiased estimate of the sequence's with far less
    variance than the log-ratio of the tokens that happened to be drawn.
    """

    def of_chunk(hidden_cd, ref_hidden_cd, tokens_c):
        logits_cv = transformer.logits(arch, params, hidden_cd)
        logp_c = _chosen(logits_cv, tokens_c) - jax.nn.logsumexp(logits_cv, axis=-1)
        frozen_cv = jax.nn.log_softmax(jax.lax.stop_gradient(logits_cv))
        ref_cv = jax.nn.log_softmax(transformer.logits(arch, jax.lax.stop_gradient(ref_params), ref_hidden_cd))
        return logp_c, jnp.sum(jnp.exp(frozen_cv) * (frozen_cv - ref_cv), axis=-1)

    return _by_chunks(of_chunk, arch.vocab_size, hidden_d, ref_hidden_d, tokens)


def _chosen(logits_cv: jax.Array, tokens_c: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_cv, tokens_c[:, None], axis=-1)[:, 0]


def _by_chunks(of_chunk, vocab_size: int, *arrays: jax.Array):
    """of_chunk over flattened positions: at once where the logits are few, else chunk by chunk with remat."""
    shape = arrays[-1].shape
    flat = [array.reshape(-1, *array.shape[len(shape) :]) for array in arrays]
    n = flat[-1].shape[0]
    chunks = -(-n * vocab_size // MAX_LOGITS)
    if chunks == 1:
        out = of_chunk(*flat)
    else:
        size = -(-n // chunks)
        cut = [
            jnp.pad(array, ((0, chunks * size - n), *((0, 0),) * (array.ndim - 1))).reshape(
                chunks, size, *array.shape[1:]
            )
            for array in flat
        ]
        out = jax.lax.map(lambda xs: jax.checkpoint(of_chunk)(*xs), tuple(cut))
        out = jax.tree.map(lambda array: array.reshape(-1)[:n], out)
    return jax.tree.map(lambda array: array.reshape(shape), out)


def mask(lengths_pg: jax.Array, width: int) -> jax.Array:
    """1 at the first `lengths` positions, else 0: [p, g, width] float32."""
    return (jnp.arange(width) < lengths_pg[..., None]).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("arch",))
def reference_logps(
    arch, params, prompt_tokens_ps, prompt_lengths_p, tokens_pgt, lengths_pg
) -> tuple[jax.Array, jax.Array]:
    """Under the reference: sequence log-probs [p, g] (sums over each completion's own tokens) and the hidden
    states [p, g, t, d] they come from, which an exact KL needs again."""
    hidden_pgtd = completion_hidden(arch, params, prompt_tokens_ps, prompt_lengths_p, tokens_pgt)
    logp_pgt = token_logps(arch, params, hidden_pgtd, tokens_pgt)
    return jnp.sum(logp_pgt * mask(lengths_pg, tokens_pgt.shape[-1]), axis=-1), hidden_pgtd
