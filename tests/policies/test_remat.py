"""Activation checkpointing, by the matmuls that the backward pass repeats."""

import dataclasses

import pytest

from mara_jax.bench import phases
from mara_jax.plan import abstract, work


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("elementwise", 0), ("layer", 1)])
def test_remat_saves_or_repeats_the_kernels_matmuls(remat, again):
    """By count: a name that saves matmuls repeats none of the kernels', the other all of them but the last, `down`."""
    arch = dataclasses.replace(phases.random_policy("tiny").architecture, remat=remat)
    programs = abstract.phase_programs(phases.run_of(4, 8, 64), arch, abstract.Sizes(4, 64, 8, 64))
    extra = programs["update"].flops() - work.least(arch, [64] * 4, [[64] * 8] * 4).update
    rows = 4 * (64 + 8 * 63)
    repeated = 2 * rows * (work.layer_parameters(arch) - arch.layers * arch.mlp * arch.embed)
    # Attention's own matmuls, here a tenth of the kernels', are repeated by both names, and its scores by its gradient.
    assert extra / repeated == pytest.approx(again, abs=0.25)
