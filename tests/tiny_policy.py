"""A policy small enough to enumerate what it can say."""

import functools
import itertools

import jax

from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy

END = 3


@functools.cache
def tiny(vocab=16, eos=(END,), scan=False, **changes):
    """A two-layer policy with weights large enough that its distribution is far from uniform."""
    arch = transformer.Architecture(
        family="qwen2", vocab_size=vocab, embed=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=32,
        rope_theta=1e4, rope_scaling=None, norm_eps=1e-6, tie_embeddings=True,
        max_positions=64, scan_layers=scan, **changes,
    )  # fmt: skip
    init = jax.jit(transformer.init, static_argnums=0)
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, init(arch, jax.random.key(5)))
    return Policy(arch, None, eos, 0, {}, "tiny"), params


def all_strings(width: int) -> list[tuple[int, ...]]:
    """Every completion of four words: ended by END, or cut at the width."""
    return [
        s
        for length in range(1, width + 1)
        for s in itertools.product(range(4), repeat=length)
        if END not in s[:-1] and (s[-1] == END or length == width)
    ]
