"""Activation checkpointing, by the matmuls that the backward pass repeats."""

import dataclasses

import jax
import pytest

from mara_jax.bench import phases
from mara_jax.plan import work
from mara_jax.policies import transformer


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("elementwise", 0), ("layer", 1)])
def test_remat_keeps_or_repeats_the_kernels_matmuls(remat, again):
    """By count: a name that keeps matmuls repeats none of the kernels', the other all of them but the last, `down`."""
    policy = phases.random_policy("tiny")
    policy = dataclasses.replace(policy, architecture=dataclasses.replace(policy.architecture, remat=remat))
    arch = policy.architecture
    case = phases.Case("case", policy, phases.random_prompts(arch.vocab_size, 4, 64), 8, 64)
    params = jax.eval_shape(lambda: transformer.init(arch, jax.random.key(0)))
    drawn, batch = phases.shapes(case, params)
    extra = phases.counted(case, params, drawn, batch).update - phases.least(case, drawn).update
    rows = 4 * (64 + 8 * 63)
    repeated = 2 * rows * (work.layer_parameters(arch) - arch.layers * arch.mlp * arch.embed)
    # Attention's own matmuls, here a tenth of the kernels', are repeated by both names, and its scores by its gradient.
    assert extra / repeated == pytest.approx(again, abs=0.25)
