"""Decoding in fewer rows than samples: the same completions as all at once, in the steps that the lengths ask for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policy import END, tiny

from mara_jax.sampling import rollout, sample
from mara_jax.sampling.draw import SamplingParams

PROMPTS = [[1, 2, 4], [5], [7, 7, 9, 1, 2]]
GROUP, WIDTH = 16, 12


@pytest.fixture(scope="module")
def draw():
    """slots -> what is drawn; slots 0: all samples at once."""
    policy, params = tiny()
    tokens_ps, lengths_p = map(jnp.asarray, rollout.pad_prompts(PROMPTS, policy.pad_id, multiple=8))
    sampling = SamplingParams(jnp.ones(3))
    prompts = rollout.Prompts(tokens_ps, lengths_p, jnp.arange(3), jnp.zeros(3, jnp.int32), sampling)

    @functools.cache
    def drawn(slots: int) -> rollout.Drawn:
        settings = rollout.Settings(GROUP, WIDTH, policy.eos_ids, policy.pad_id, slots)
        return rollout.generate(policy.architecture, params, prompts, jax.random.key(1), settings)

    return drawn


def scheduled(lengths_pg: np.ndarray, slots: int) -> int:
    """Steps of the loop, by hand: rows take the samples of their prompt, or where rows do not divide of all."""
    own = slots % len(lengths_pg) == 0
    # The first token of a sample comes from the prompt: each step makes one more.
    waiting = [[n - 1 for n in row if n > 1] for row in (lengths_pg if own else lengths_pg.reshape(1, -1)).tolist()]
    rows = [[0] * (slots // len(waiting)) for _ in waiting]
    steps = 0
    while any(waiting):
        rows = [
            [left or (queue.pop(0) if queue else 0) for left in row] for row, queue in zip(rows, waiting, strict=True)
        ]
        steps += 1
        rows = [[max(0, left - 1) for left in row] for row in rows]
    return steps + max(max(row) for row in rows)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("slots", [12, 5, pytest.param(3, marks=SLOW), pytest.param(7, marks=SLOW)])
def test_refilled_rows_draw_what_all_rows_at_once_draw(draw, slots):
    """12 and 3: rows of their own for each prompt; 5 and 7: one queue. Ends are ragged, some at the first token."""
    whole, found = draw(0), draw(slots)
    lengths = np.asarray(whole.lengths)
    assert {1, 2, WIDTH} <= set(lengths.ravel().tolist()) and len(set(lengths.ravel().tolist())) > 8
    for name in ("tokens", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(found.logp, whole.logp, atol=1e-5)
    assert found.steps == scheduled(lengths, slots)
    assert whole.steps == lengths.max() - 1
    # Rows times steps: fewer than all at once, and never fewer than the tokens to be made.
    assert np.sum(lengths - 1) <= slots * found.steps < lengths.size * whole.steps


def test_a_step_count_by_hand():
    """Two rows, lengths 4 2 3 1 2: 3+1+2+1 steps of work; row one 4 then 2, row two 2 then 3: four steps."""
    assert scheduled(np.array([[4, 2, 3, 1, 2]]), 2) == 4


def test_completions_of_one_token_need_no_step(draw):
    policy, params = tiny()
    few = functools.partial(sample, policy, params, PROMPTS, key=jax.random.key(1), group_size=GROUP)
    one = few(max_new_tokens=1, slots=3)
    np.testing.assert_array_equal(one.tokens[..., 0], draw(0).tokens[..., 0])
    np.testing.assert_array_equal(one.finished, draw(0).tokens[..., 0] == END)
    with pytest.raises(ValueError, match="slots=-1 must be at least 0"):
        few(slots=-1)


def test_each_prompt_is_drawn_as_its_own_entries_say(draw):
    """An untouched prompt as before, a greedy one beside it, a third from its two likeliest tokens, all in
    the same few rows."""
    (policy, params), whole = tiny(), draw(0)
    settings = {"key": jax.random.key(1), "group_size": GROUP, "max_new_tokens": WIDTH}
    shaping = {"temperature": [1.0, 0.0, 2.0], "top_k": [0, 0, 2], "top_p": [1.0, 1.0, 1.0]}
    mixed = sample(policy, params, PROMPTS, **settings, **shaping, slots=5)
    np.testing.assert_array_equal(mixed.tokens[0], whole.tokens[0])
    greedy = np.asarray(mixed.tokens[1])
    assert (greedy == greedy[0]).all()
    logits = policy.logits(params, np.array([[*PROMPTS[2], 0, 0, 0]]), np.array([5]))[0, 4]
    first, second = np.argsort(-np.asarray(logits))[:2]
    counts = np.bincount(np.asarray(mixed.tokens[2, :, 0]), minlength=16)
    assert counts[first] + counts[second] == GROUP and min(counts[first], counts[second]) > 1
