"""What the compiled training step holds: read off its text."""

import dataclasses
import math
import re

import jax
import pytest

from mara_jax import config
from mara_jax.bench import phases
from mara_jax.plan import abstract
from mara_jax.sampling import head
from mara_jax.train import programs, step

WORDS, GROUP, NEW = 2048, 8, 16
CHUNK = 2 * NEW * WORDS  # logits of an eighth of the tokens, all prompts' together


def update_of(micro_batches: int) -> programs.Program:
    """A small policy's update on shapes alone."""
    arch = phases.random_policy("tiny").architecture
    arch = dataclasses.replace(arch, layers=1, embed=64, heads=1, kv_heads=1, mlp=64)
    run = phases.run_of(2, GROUP, NEW, optimiser=config.Optimiser(micro_batches=micro_batches))
    return abstract.phase_programs(run, arch, abstract.Sizes(2, 32, GROUP, NEW))["update"].program


def undonated(program: programs.Program):
    """The update compiled anew, without donated buffers."""
    *arrays, choices = program.args
    return jax.jit(lambda *arrays: step.update.__wrapped__(*arrays, choices)).lower(*arrays).compile()


def largest(micro_batches: int) -> tuple[int, tuple[int, ...]]:
    """The most elements of any array in the compiled update, and its shape."""
    # Not the jitted update itself: what it traced under another limit would be used again.
    text = undonated(update_of(micro_batches)).as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[([\d,]+)\]", text)}
    shape = max(shapes, key=math.prod)
    return math.prod(shape), shape


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_no_array_of_completions_times_vocabulary(monkeypatch, micro_batches):
    """Neither in the forward nor in the backward pass: nothing larger than a chunk's logits or the head itself."""
    monkeypatch.setitem(head.MAX_LOGITS, jax.default_backend(), CHUNK)
    size, shape = largest(micro_batches)
    assert size <= max(CHUNK, WORDS * 64) < 2 * GROUP * NEW * WORDS // 2, shape


def test_one_chunk_is_found(monkeypatch):
    """The reading of the text sees such an array where there is one."""
    monkeypatch.setitem(head.MAX_LOGITS, jax.default_backend(), 2 * GROUP * NEW * WORDS)
    assert largest(1)[0] >= 2 * GROUP * (NEW - 1) * WORDS


def test_the_new_state_is_written_over_the_old_one():
    """All of it but the step's counter and the optimiser's, which XLA may place anew; no second copy of weights."""
    program = update_of(1)
    stats = program.compile().memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.args[0]))
    assert held - 16 <= stats.alias_size_in_bytes <= held
    assert undonated(program).memory_analysis().alias_size_in_bytes == 0  # the figure tells the two apart
