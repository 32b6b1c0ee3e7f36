"""What the compiled training step holds: read off its text."""

import dataclasses
import math
import re

import jax
import pytest

from mara_jax.bench import phases
from mara_jax.policies import transformer
from mara_jax.sampling import head
from mara_jax.train import step

WORDS, GROUP, NEW = 2048, 8, 16
CHUNK = 2 * NEW * WORDS  # logits of an eighth of the tokens, all prompts' together


def update_of(parts: int) -> tuple[tuple, dict]:
    """Arguments, shapes alone, and settings of a small policy's update."""
    policy = phases.random_policy("tiny")
    arch = dataclasses.replace(policy.architecture, layers=1, embed=64, heads=1, kv_heads=1, mlp=64)
    policy = dataclasses.replace(policy, architecture=arch)
    optimiser = dataclasses.replace(phases.config.Optimiser(), micro_batches=parts)
    case = phases.Case("case", policy, phases.random_prompts(WORDS, 2, 8), GROUP, NEW, optimiser=optimiser)
    params = jax.eval_shape(lambda: transformer.init(arch, jax.random.key(0)))
    _, batch = phases.shapes(case, params)
    state = jax.eval_shape(lambda p: phases.fresh_state(case, p), params)
    return phases._update_call(case, state, params, batch)


def largest(parts: int) -> tuple[int, tuple[int, ...]]:
    """The most elements of any array in the compiled update, and its shape."""
    args, settings = update_of(parts)
    # Not the jitted update itself: what it traced under another limit would be used again.
    text = jax.jit(lambda *args: step.update.__wrapped__(*args, **settings)).lower(*args).compile().as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[([\d,]+)\]", text)}
    shape = max(shapes, key=math.prod)
    return math.prod(shape), shape


@pytest.mark.parametrize("parts", [1, 2])
def test_no_array_of_completions_times_vocabulary(monkeypatch, parts):
    """Neither in the forward nor in the backward pass: nothing larger than a chunk's logits or the head itself."""
    monkeypatch.setitem(head.MAX_LOGITS, jax.default_backend(), CHUNK)
    size, shape = largest(parts)
    assert size <= max(CHUNK, WORDS * 64) < 2 * GROUP * NEW * WORDS // 2, shape


def test_one_chunk_is_found(monkeypatch):
    """The reading of the text sees such an array where there is one."""
    monkeypatch.setitem(head.MAX_LOGITS, jax.default_backend(), 2 * GROUP * NEW * WORDS)
    assert largest(1)[0] >= 2 * GROUP * (NEW - 1) * WORDS


def test_the_new_state_is_written_over_the_old_one():
    """All of it but the step's counter and the optimiser's, which XLA may place anew; no second copy of weights."""
    args, settings = update_of(1)
    stats = step.update.lower(*args, **settings).compile().memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args[0]))
    assert held - 16 <= stats.alias_size_in_bytes <= held
    kept = jax.jit(lambda *args: step.update.__wrapped__(*args, **settings)).lower(*args).compile()
    assert kept.memory_analysis().alias_size_in_bytes == 0  # the figure tells the two apart
