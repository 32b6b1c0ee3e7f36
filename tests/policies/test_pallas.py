"""The attention kernels, interpreted, against the plain definition."""

import functools
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.plan import chips
from mara_jax.policies.ops import pallas
from mara_jax.policies.ops.attention import Mask, attention, behind_prefix, causal_mask

P, G, K, M, T, S, H = 2, 2, 2, 2, 40, 19, 16  # prompts, rows of each, kv heads, queries of each, times, slots, channels
COUNTS, LENGTHS = np.array([40, 1, 17, 0]), np.array([19, 3])
MASK = behind_prefix(Mask(causal_mask(T, M), lengths_b=jnp.asarray(COUNTS)), S, jnp.asarray(LENGTHS))


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def by_xla(q, own, prefix):
    return attention(q, own, prefix, MASK)


def by_kernels(q, own, prefix):
    return pallas.attention(q, own, prefix, MASK)


@pytest.mark.parametrize("shared", [True, False])
def test_values_and_gradients_are_those_of_xla_at_counted_positions(shared, monkeypatch):
    monkeypatch.setattr(pallas, "_tiles", lambda *_: (16, 16))  # three tiles of queries, two of slots
    q = drawn(0, P * G, K, M * T, H)
    own = (drawn(1, P * G, K, T, H), drawn(2, P * G, K, T, H))
    prefix = (drawn(3, P, K, S, H), drawn(4, P, K, S, H)) if shared else None
    counted = jnp.tile(jnp.arange(T) < COUNTS[:, None], (1, M))[:, None, :, None]

    def loss(attend, *args):
        out = jnp.where(counted, attend(*args), 0)
        return jnp.sum(drawn(5, *q.shape) * jnp.sin(out)), out

    (kernels, xla) = (
        jax.jit(jax.grad(functools.partial(loss, attend), (0, 1, 2), has_aux=True))(q, own, prefix)
        for attend in (by_kernels, by_xla)
    )
    chex.assert_trees_all_close(kernels, xla, rtol=2e-5, atol=1e-5)
    assert all(float(jnp.abs(x).max()) > 0.1 for x in jax.tree.leaves(kernels))


@pytest.mark.slow
def test_rows_and_heads_cut_over_four_devices_change_nothing():
    program = pathlib.Path(__file__).with_name("kernels_program.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["equal on 2 1 2", "equal on 1 4 1", "equal on 1 2 2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "h100:2"])
def test_the_kernels_compile_for_chips_that_are_not_here(name):
    """Forward and backward, rows cut over the devices, in less memory than the scores alone would take."""
    if missing := chips.missing_compiler(chips.parse(name)):
        pytest.skip(missing)
    program = pathlib.Path(__file__).with_name("compile_program.py")
    done = subprocess.run([sys.executable, program, name], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        temporaries, scores = map(int, line.split())
        assert temporaries < scores
    assert len(done.stdout.splitlines()) == 3
