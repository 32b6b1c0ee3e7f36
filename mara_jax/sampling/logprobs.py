"""Log-probs of given completions, prompts computed once per group."""

import functools

import jax
import jax.numpy as jnp

from mara_jax.policies import transformer
from mara_jax.sampling import rollout

# Above this many float32 logits at once, the head runs in chunks of positions and is recomputed in the
# backward pass, so that no array of the size of positions times vocabulary is ever held.
MAX_LOGITS = 80_000_000


def completion_logps(
    arch: transformer.Architecture,
    params: dict,
    prompt_tokens_ps: jax.Array,
    prompt_lengths_p: jax.Array,
    tokens_pgt: jax.Array,
) -> jax.Array:
    """log pi(token | prompt, earlier tokens) of every completion token, [p, g, t] float32 (nats).

    Values at padding are finite and mean nothing: mask them by the lengths. Differentiable in params,
    also through the prompts' keys and values.
    """
    p, g, t = tokens_pgt.shape
    last_pd, prefix = rollout.prefill(arch, params, prompt_tokens_ps, prompt_lengths_p)
    first_b1d = jnp.repeat(last_pd, g, axis=0)[:, None]
    hidden_btd = first_b1d
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
        hidden_btd = jnp.concatenate([first_b1d, rest_btd], axis=1)
    logp_n = token_logps(arch, params, hidden_btd.reshape(p * g * t, -1), tokens_pgt.reshape(-1))
    return logp_n.reshape(p, g, t)


def token_logps(arch: transformer.Architecture, params: dict, hidden_nd: jax.Array, tokens_n: jax.Array) -> jax.Array:
    """log softmax of the head at the given tokens, [n] float32, for hidden states [n, d]."""

    def of_chunk(hidden_cd, tokens_c):
        logits_cv = transformer.logits(arch, params, hidden_cd)
        chosen_c = jnp.take_along_axis(logits_cv, tokens_c[:, None], axis=-1)[:, 0]
        return chosen_c - jax.nn.logsumexp(logits_cv, axis=-1)

    n = tokens_n.shape[0]
    chunks = -(-n * arch.vocab_size // MAX_LOGITS)
    if chunks == 1:
        return of_chunk(hidden_nd, tokens_n)
    size = -(-n // chunks)
    pad = chunks * size - n
    hidden_kcd = jnp.pad(hidden_nd, ((0, pad), (0, 0))).reshape(chunks, size, -1)
    tokens_kc = jnp.pad(tokens_n, (0, pad)).reshape(chunks, size)
    logp_kc = jax.lax.map(lambda xs: jax.checkpoint(of_chunk)(*xs), (hidden_kcd, tokens_kc))
    return logp_kc.reshape(-1)[:n]


def mask(lengths_pg: jax.Array, width: int) -> jax.Array:
    """1 at the first `lengths` positions, else 0: [p, g, width] float32."""
    return (jnp.arange(width) < lengths_pg[..., None]).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("arch",))
def reference_logps(arch, params, prompt_tokens_ps, prompt_lengths_p, tokens_pgt, lengths_pg):
    """Sequence log-probs [p, g] under the reference: sums over each completion's own tokens."""
    logp_pgt = completion_logps(arch, params, prompt_tokens_ps, prompt_lengths_p, tokens_pgt)
    return jnp.sum(logp_pgt * mask(lengths_pg, tokens_pgt.shape[-1]), axis=-1)
