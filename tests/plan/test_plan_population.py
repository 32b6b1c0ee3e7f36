"""What plan counts of a population: against hand arithmetic and the counts of a single run."""

import dataclasses
from typing import Any

import pytest
from test_plan import BIASES, KERNELS, NORMS, layout

from mara_jax import config
from mara_jax.parallel import sharding
from mara_jax.plan import abstract, command, phases, population
from mara_jax.policies import lora, parameters
from mara_jax.train import capacity, shape

RUN = config.LanguageRun(
    rollout=config.Rollout(prompts_per_step=2, group_size=8, max_new_tokens=10),
    population=config.Population(methods=("vanilla", "mara"), betas=(0.1, 0.2), seeds=3),
)
FIRST = config.members(RUN)[0].run
SIZES = abstract.Sizes(2, 32, 8, 10, members=6)


def arch_of(run: config.LanguageRun, rank: int) -> parameters.Architecture:
    arch = shape.nano(run.policy)
    return dataclasses.replace(arch, lora=parameters.Lora(rank, 2.0 * rank, parameters.LORA_TARGETS)) if rank else arch


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_the_matmuls_are_those_of_as_many_runs(rank):
    arch = arch_of(RUN, rank)
    alone = abstract.phase_programs(FIRST, arch, SIZES._replace(members=0))
    for name, program in population.phase_programs(FIRST, arch, SIZES).items():
        ratio = program.flops() / (6 * alone[name].flops())
        if rank and name == "rollout":
            assert (
                1 < ratio < 1.1
            )  # decoding merges a single run's adapter into its kernels, which a population does not
        else:
            assert ratio == pytest.approx(1, rel=1e-3), name  # what depends on no member is computed once


def test_what_a_device_holds_and_reads_by_hand():
    """Six members over two devices, three each: one reference, three adapters."""
    arch, reference = arch_of(RUN, 4), 4 * (KERNELS + NORMS + BIASES)
    with sharding.use(layout(2, 1, 1)):
        held = population.held(FIRST, arch, 6)
        adapter = 4 * lora.count(arch)
        cache = 3 * capacity.cache_bytes(FIRST, arch) * 2
        assert held == (3 * adapter, reference, 3 * 2 * adapter + 3 * 4, cache, 0)
        assert population.on_a_device(6) == 3 and population.on_a_device(5) == 5
        scoring = dataclasses.replace(shape.nano(RUN.policy), score_head=True)
        score = 4 * 128
        assert population.held(FIRST, arch, 6, scoring) == held._replace(reward_model=reference + score)
        assert phases.least_bytes("reference", arch, SIZES) == reference
        assert phases.least_bytes("update", arch, SIZES) == 2 * reference + 3 * 6 * adapter
        slot = 2 * 2 * 2 * 32 * 4  # keys and values, layers, heads, their width
        seen = 2 * 32 + 16 * 10 / 2  # prompts once, completions half full on average
        assert phases.least_bytes("rollout", arch, SIZES) == 10 * reference + 3 * 9 * slot * seen
        whole = dataclasses.replace(arch, lora=None)
        assert phases.least_bytes("rollout", whole, SIZES) == 3 * (10 * reference + 9 * slot * seen)


def test_members_at_once():
    """Six of the twelve share the first program; at_once and memory allow fewer."""
    arch = arch_of(RUN, 4)
    assert population.at_once(RUN, arch, 2.0**40) == 6
    few = dataclasses.replace(RUN, population=dataclasses.replace(RUN.population, at_once=4))
    assert population.at_once(few, arch, 2.0**40) == 4
    assert population.at_once(RUN, arch, 1.0) == 1
    with sharding.use(layout(2, 1, 1)):
        assert population.at_once(RUN, arch, 1.0) == 2


def test_the_choice_of_a_mesh_is_for_single_runs(capsys):
    flags: Any = ["--config=configs/onetwo.py:nano", "--topology=cpu:8", "--config.population.seeds=2", "--suggested"]
    assert command.main(["plan", *flags]) == 2
    assert "--suggested and --largest are for single runs" in capsys.readouterr().err
