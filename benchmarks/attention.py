"""Attention of a training step on this machine's accelerator: the kernels, XLA's and, where there is one, cuDNN's.

python benchmarks/attention.py [--shape=qwen2.5-3b] [--prompts=4] [--group=16] [--prompt=64] [--new=512] [--tiles]

Time and memory of one layer's attention, forward and backward, and how far its bfloat16 results lie from float64's on
the host (relative to their norm). cuDNN's has no shared prefix: it is given each row's prompt and completion end to end
and reads the prompt once a row. --tiles tries the kernels' tiles.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from mara_jax.hf import shapes
from mara_jax.policies.ops import pallas
from mara_jax.policies.ops.attention import Mask, attention, behind_prefix, causal_mask


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--shape", default="qwen2.5-3b")
    for name, size in (("prompts", 4), ("group", 16), ("prompt", 64), ("new", 512)):
        flags.add_argument(f"--{name}", type=int, default=size)
    flags.add_argument("--tiles", action="store_true")
    options = flags.parse_args()
    arch = shapes.architecture_of(options.shape)
    arrays = inputs(options, arch)
    print(f"{options}; {jax.devices()[0].device_kind}; median of 20, ms; MiB; error of output and of gradients")
    print(f"{'':18}{'forward':>9}{'both':>9}{'MiB':>8}   error")
    exact = truth(arrays) if options.new <= 512 else None
    if not options.tiles:
        report("XLA", by_xla, arrays, exact)
        report("kernels", by_kernels, arrays, exact)
        if jax.default_backend() == "gpu":
            report("cuDNN, repeated", by_cudnn, arrays, exact)
        return
    usual = pallas._tiles
    for queries in (64, 128):
        for keys in (32, 64, 128):
            pallas._tiles = lambda *_, found=(queries, keys): found
            try:
                report(f"{queries} x {keys}", lambda *args: by_kernels(*args), arrays, exact)  # anew: another program
            except Exception as error:  # tiles that do not fit
                print(f"{queries} x {keys}: {str(error).splitlines()[0][:90]}")
    pallas._tiles = usual


def inputs(options, arch):
    """Scaled queries, own keys and values, the prefix, counted positions of each row, prompt lengths."""
    p, b, m = options.prompts, options.prompts * options.group, arch.heads // arch.kv_heads
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.bfloat16)

    own = tuple(normal(b, arch.kv_heads, options.new, arch.head_dim) for _ in range(2))
    prefix = tuple(normal(p, arch.kv_heads, options.prompt, arch.head_dim) for _ in range(2))
    q = normal(b, arch.kv_heads, m * options.new, arch.head_dim) * arch.head_dim**-0.5
    counts = jnp.full(b, options.new, jnp.int32)
    return q, own, prefix, counts, jnp.full(p, options.prompt, jnp.int32), normal(*q.shape)


def by_xla(q, own, prefix, counts, lengths):
    return attention(q, own, prefix, masked(q, own, prefix, counts, lengths))


def by_kernels(q, own, prefix, counts, lengths):
    return pallas.attention(q, own, prefix, masked(q, own, prefix, counts, lengths))


def masked(q, own, prefix, counts, lengths):
    t, s = own[0].shape[2], prefix[0].shape[2]
    return behind_prefix(Mask(causal_mask(t, q.shape[2] // t), lengths_b=counts), s, lengths)


def by_cudnn(q, own, prefix, counts, lengths):
    (b, k, x, h), t, s = q.shape, own[0].shape[2], prefix[0].shape[2]
    share = functools.partial(jnp.repeat, repeats=b // prefix[0].shape[0], axis=0)
    keys, values = (
        jnp.concatenate([share(mine), rows], axis=2).transpose(0, 2, 1, 3)
        for mine, rows in zip(prefix, own, strict=True)
    )
    queries = q.reshape(b, k * (x // t), t, h).transpose(0, 2, 1, 3)
    queries = jnp.pad(queries, ((0, 0), (s, 0), (0, 0), (0, 0)))
    out = jax.nn.dot_product_attention(queries, keys, values, scale=1.0, is_causal=True, implementation="cudnn")
    return out[:, s:].transpose(0, 2, 1, 3).reshape(q.shape)


def truth(arrays):
    """Output and gradients of the first prompt's first row in float64, on the host."""
    q, own, prefix, _, _, g = jax.tree.map(lambda x: np.asarray(x, np.float64)[:1], arrays)
    t, s = own[0].shape[2], prefix[0].shape[2]
    keys, values = (np.concatenate(pair, axis=2) for pair in zip(prefix, own, strict=True))
    score = np.einsum("bkxh,bksh->bkxs", q, keys)
    slot = np.arange(s + t)
    score[..., ~np.tile(slot <= s + np.arange(t)[:, None], (q.shape[2] // t, 1))] = -np.inf
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    d_weight = np.einsum("bkxh,bksh->bkxs", g, values)
    d_score = weight * (d_weight - (d_weight * weight).sum(-1, keepdims=True))
    d_keys, d_values = np.einsum("bkxs,bkxh->bksh", d_score, q), np.einsum("bkxs,bkxh->bksh", weight, g)
    found = (np.einsum("bkxs,bksh->bkxh", weight, values), np.einsum("bkxs,bksh->bkxh", d_score, keys))
    return (*found, d_keys[:, :, s:], d_values[:, :, s:])


def report(name, attend, arrays, exact):
    *args, g = arrays
    forward = jax.jit(attend).lower(*args).compile()
    both = jax.jit(lambda q, own, prefix, *rest: _both(attend, q, own, prefix, rest, g)).lower(*args).compile()
    out, (d_q, d_own, _) = both(*args)
    errors = [] if exact is None else [_error(x[:1], y) for x, y in zip((out, d_q, *d_own), exact, strict=True)]
    memory = both.memory_analysis()
    times = [1e3 * timed(functools.partial(program, *args)) for program in (forward, both)]
    shown = "  ".join(f"{error:.1e}" for error in errors)
    print(f"{name:18}{times[0]:9.3f}{times[1]:9.3f}{memory.temp_size_in_bytes / 2**20:8.0f}   {shown}", flush=True)


def _both(attend, q, own, prefix, rest, g):
    out, back = jax.vjp(lambda q, own, prefix: attend(q, own, prefix, *rest), q, own, prefix)
    return out, back(g)


def _error(x, y):
    return float(np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y))


def timed(run) -> float:
    for _ in range(3):
        jax.block_until_ready(run())
    spent = []
    for _ in range(20):
        start = time.perf_counter()
        jax.block_until_ready(run())
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


if __name__ == "__main__":
    main()
