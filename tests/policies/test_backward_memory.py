"""What a layer saves for the backward pass, read off the compiled gradient and counted by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mara_jax.policies import transformer
from mara_jax.policies.packing import pack_lengths

P, G, S, T = 2, 4, 24, 24
ARCH = transformer.Architecture("qwen2", 32, 32, 4, heads=4, kv_heads=2, head_dim=16, mlp=48)
# Of a token: the residual stream before attention and before the feed-forward, and both normed; queries and attention's
# output, keys and values, gate and up. Of a query, beside: the log-sum-exp of its scores. Each norm: one number.
NUMBERS = 4 * 32 + 2 * 64 + 2 * 32 + 2 * 48 + 4 + 2
LAYERS = 2, 6


def temporary(layers: int) -> int:
    """Bytes of temporary arrays in the gradient of a group's hidden states."""
    packing, arch = pack_lengths([T] * (P * G), T), dataclasses.replace(ARCH, layers=layers)

    def loss(params, prompts, prompt_lengths, tokens, positions):
        of = (arch, params, prompts, prompt_lengths, tokens, positions, packing)
        return sum(jnp.sum(jnp.sin(hidden)) for hidden in transformer.forward_group(*of))

    ints = [(P, S), (P,), *[(1, P * G * T)] * 2]
    params = jax.eval_shape(lambda: transformer.init(arch, jax.random.key(0)))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ints]
    memory: Any = jax.jit(jax.grad(loss)).lower(params, *shapes).compile().memory_analysis()
    return memory.temp_size_in_bytes


def test_neither_swiglu_nor_attention_weights_are_saved():
    few, many = map(temporary, LAYERS)
    numbers = (many - few) / (LAYERS[1] - LAYERS[0]) / 4 / (P * S + P * G * T)
    assert 0.85 * NUMBERS < numbers < NUMBERS
