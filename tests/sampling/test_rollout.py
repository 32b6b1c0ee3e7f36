"""Sampling against exact enumeration, the trainer's log-probs, and splits of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from stacking import to_scanned
from tiny_policy import END, all_strings, tiny

from mara_jax.sampling import logprobs, sample

completion_logps = jax.jit(logprobs.completion_logps, static_argnums=0)

PROMPTS = [[1, 2, 4], [5], [7, 7, 9, 1, 2]]


@pytest.fixture(scope="module")
def drawn():
    policy, params = tiny()
    return (
        policy,
        params,
        sample(policy, params, PROMPTS, key=jax.random.key(1), group_size=16, max_new_tokens=8),
    )


def test_returned_logp_is_the_trainers(drawn):
    policy, params, rollout = drawn
    logp = completion_logps(policy.architecture, params, rollout.prompt_tokens, rollout.prompt_lengths, rollout.tokens)
    mask = logprobs.mask(rollout.lengths, 8)
    np.testing.assert_allclose(rollout.logp, logp * mask, atol=1e-4)


def test_returned_logp_is_that_of_the_plain_forward(drawn):
    policy, params, rollout = drawn
    for p, prompt in enumerate(PROMPTS):
        for g in range(4):
            length = int(rollout.lengths[p, g])
            text = [*prompt, *np.asarray(rollout.tokens[p, g, :length]).tolist()]
            padded = np.array([text + [0] * (16 - len(text))])  # one shape, one compilation
            logits = policy.logits(params, padded, np.array([len(text)]))
            logp = jax.nn.log_softmax(logits[0])[np.arange(len(prompt) - 1, len(text) - 1), text[len(prompt) :]]
            np.testing.assert_allclose(rollout.logp[p, g, :length], logp, atol=1e-4)


def test_lengths_and_padding_come_from_the_first_end_token(drawn):
    _, _, rollout = drawn
    tokens, lengths = np.asarray(rollout.tokens), np.asarray(rollout.lengths)
    assert 0 < np.asarray(rollout.finished).sum() < rollout.finished.size  # both kinds occur
    for index in np.ndindex(lengths.shape):
        row, length, finished = tokens[index], lengths[index], bool(rollout.finished[index])
        assert (END in row[:length]) == finished
        assert (not finished) or row[length - 1] == END
        assert END not in row[: length - 1]
        assert ((row[length:] == 0).all() and finished) or length == 8


def test_any_split_of_the_batch_gives_the_same_text(drawn):
    policy, params, whole = drawn
    settings = {"key": jax.random.key(1), "max_new_tokens": 8}
    for p in range(3):
        for first in (0, 8):
            part = sample(
                policy,
                params,
                PROMPTS[p : p + 1],
                group_size=8,
                prompt_ids=[p],
                first_sample=first,
                **settings,
            )
            np.testing.assert_array_equal(part.tokens[0], whole.tokens[p, first : first + 8])


def test_rows_differ_between_samples_prompts_and_keys(drawn):
    policy, params, whole = drawn
    assert len({tuple(row) for row in np.asarray(whole.tokens[0]).tolist()}) > 8
    other = sample(policy, params, PROMPTS, key=jax.random.key(2), group_size=16, max_new_tokens=8)
    assert (np.asarray(other.tokens) != np.asarray(whole.tokens)).any(axis=-1).mean() > 0.5
    same = sample(policy, params, [PROMPTS[0]] * 2, key=jax.random.key(1), group_size=16, max_new_tokens=8)
    assert (np.asarray(same.tokens[0]) != np.asarray(same.tokens[1])).any(axis=-1).mean() > 0.5


def test_scanned_layers_draw_the_same_text(drawn):
    _, params, whole = drawn
    scanned, _ = tiny(scan=True)
    stacked = to_scanned(params, 2)
    again = sample(scanned, stacked, PROMPTS, key=jax.random.key(1), group_size=16, max_new_tokens=8)
    np.testing.assert_array_equal(again.tokens, whole.tokens)


def test_every_end_token_of_the_set_ends():
    policy, params = tiny(eos=(3, 8, 12, 14))
    rollout = sample(policy, params, PROMPTS, key=jax.random.key(1), group_size=32, max_new_tokens=12)
    last = np.asarray(rollout.tokens)[np.asarray(rollout.finished), np.asarray(rollout.lengths)[rollout.finished] - 1]
    assert {3, 8, 12, 14} >= set(last.tolist()) and len(set(last.tolist())) >= 3


def test_samples_follow_the_exact_distribution_of_strings():
    policy, params = tiny(vocab=4, eos=(END,))
    prompt, width, n = [1, 2], 3, 20_000
    strings = all_strings(width)
    padded = np.array([[*s, *[0] * (width - len(s))] for s in strings], np.int32)
    lengths = np.array([[len(s) for s in strings]])
    given = (jnp.array([prompt]), jnp.array([2]), jnp.asarray(padded[None]))
    logp = completion_logps(policy.architecture, params, *given)[0] * logprobs.mask(jnp.asarray(lengths), width)[0]
    exact = np.exp(np.asarray(logp, np.float64).sum(-1))
    assert abs(exact.sum() - 1) < 1e-5
    rollout = sample(policy, params, [prompt], key=jax.random.key(7), group_size=n, max_new_tokens=width)
    code = lambda tokens: np.asarray(tokens) @ [1, 4, 16]  # noqa: E731 - END is 3, so padding by 0 stays unique
    at = {(int(code(row)), len(s)): i for i, (row, s) in enumerate(zip(padded, strings, strict=True))}
    counts = np.zeros(len(strings))
    for row, length in zip(code(rollout.tokens[0]), np.asarray(rollout.lengths[0]), strict=True):
        counts[at[int(row), int(length)]] += 1
    rare = exact * n < 5
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, exact / exact.sum() * n))
    keep = expected > 0
    assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3


def test_zero_temperature_takes_the_likeliest_token(drawn):
    policy, params, _ = drawn
    rollout = sample(policy, params, PROMPTS[:1], key=jax.random.key(0), group_size=2, max_new_tokens=5, temperature=0)
    text = list(PROMPTS[0])
    for _ in range(int(rollout.lengths[0, 0])):
        logits = policy.logits(params, np.array([text + [0] * (16 - len(text))]), np.array([len(text)]))
        text.append(int(jnp.argmax(logits[0, len(text) - 1])))
    np.testing.assert_array_equal(rollout.tokens[0, 0, : rollout.lengths[0, 0]], text[len(PROMPTS[0]) :])
    np.testing.assert_array_equal(rollout.tokens[0, 0], rollout.tokens[0, 1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"group_size": 0}, "group_size=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": [1.0, 0.5, float("nan")]}, "temperature=nan must be at least 0"),
        ({"top_p": [1.0, 1.5, 0.1]}, r"top_p=1.5 must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_k": [4, 5]}, r"top_k has the shape \(2,\): give one number, or one for each of 3 prompts"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[1], []]}, "prompt 1 has no token"),
        ({"prompts": ["text"]}, "no tokenizer"),
    ],
)
def test_bad_input_is_one_clear_line(settings, words):
    policy, params = tiny()
    prompts = settings.pop("prompts", PROMPTS)
    with pytest.raises(ValueError, match=words) as caught:
        sample(policy, params, prompts, key=jax.random.key(0), **settings)
    assert "\n" not in str(caught.value)


def test_a_prompt_given_twice_has_two_groups_of_its_own(drawn):
    """Two groups of 8 of one prompt are the 16 samples of one group of it, in order."""
    policy, params, rollout = drawn
    settings = {"key": jax.random.key(1), "group_size": 8, "max_new_tokens": 8}
    twice = sample(policy, params, [PROMPTS[1]] * 2, prompt_ids=[1, 1], first_sample=[0, 8], **settings)
    np.testing.assert_array_equal(twice.tokens.reshape(16, 8), rollout.tokens[1])


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_with_the_completion(slots, value):
    policy, params = tiny()
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(value), params)
    with pytest.raises(
        ValueError, match=r"^tiny: logits are not finite at token 0 of completion 0 of prompt 0: [^\n]*$"
    ):
        sample(policy, broken, PROMPTS, key=jax.random.key(1), group_size=2, max_new_tokens=3, slots=slots)


@pytest.mark.parametrize(
    ("prompt", "new", "words"),
    [
        (
            [5] * 60,
            5,
            "max_new_tokens=5 after prompt 1 of 60 tokens makes 65, but tiny has 64 positions: use at most 4",
        ),
        (
            [5] * 64,
            1,
            "max_new_tokens=1 after prompt 1 of 64 tokens makes 65, but tiny has 64 positions: shorten the prompt",
        ),
        ([5] * 80, 4, "has 64 positions: shorten the prompt"),
    ],
)
def test_completions_past_the_last_position_are_refused(prompt, new, words):
    policy, params = tiny()
    with pytest.raises(ValueError, match=words):
        sample(policy, params, [[5], prompt], key=jax.random.key(1), group_size=2, max_new_tokens=new)
