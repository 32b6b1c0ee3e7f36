"""What a training step computes, against torch on the same sequences: log-probs, sampled and trained, and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_models

from mara_jax import hf
from mara_jax.policies import parameters
from mara_jax.sampling import logprobs, sample

NEW = 6
PROMPTS = [[5, 9, 33, 8], [7], [40, 2, 61]]


@pytest.fixture(scope="module", params=["mistral-own-head-dim", "olmo2-untied"])
def drawn(request, tmp_path_factory):
    """(torch model, our policy and parameters, completions that it sampled)."""
    directory = tmp_path_factory.mktemp("model")
    model = torch_models.save(request.param, directory)
    policy, params = hf.load(directory, tokenizer=False, scan_layers="olmo2" in request.param)
    policy = dataclasses.replace(policy, eos_ids=tuple(range(1, 12)))  # so that lengths differ
    rollout = sample(policy, params, PROMPTS, key=jax.random.key(0), group_size=4, max_new_tokens=NEW)
    assert 1 <= rollout.lengths.min() < rollout.lengths.max() == NEW
    return model, policy, params, rollout


def torch_logps(model, rollout):
    """Log-probs of completion tokens [p, g, t], each sequence being its prompt and completion written out."""
    rows = []
    for p, prompt in enumerate(PROMPTS):
        for completion in np.asarray(rollout.tokens[p]).tolist():
            logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            rows.append(torch.log_softmax(logits, -1)[torch.arange(NEW), torch.tensor(completion)])
    return torch.stack(rows).reshape(rollout.tokens.shape)


def trainer_logps(arch, params, rollout):
    """The trainer's, from packed sequences."""
    packing = logprobs.packed(np.asarray(rollout.lengths), NEW, 500)
    assert packing is not None and packing.place_cn.shape[1] < 12 * (NEW - 1)
    given = (rollout.prompt_tokens, rollout.prompt_lengths, rollout.tokens)
    return logprobs.completion_logps(arch, params, *given, packing)


def test_sampled_log_probs_are_the_trainers_and_torchs(drawn):
    model, policy, params, rollout = drawn
    mask = np.asarray(logprobs.mask(rollout.lengths, NEW))
    with torch.no_grad():
        expected = torch_logps(model, rollout).numpy() * mask
    assert expected.min() < -1
    np.testing.assert_allclose(rollout.logp, expected, atol=1e-4)
    trained = jax.jit(lambda params: trainer_logps(policy.architecture, params, rollout))(params)
    np.testing.assert_allclose(trained * mask, expected, atol=1e-4)


def test_the_gradient_of_every_parameter_is_torchs(drawn):
    """In float64, but for the rotary angles that both sides make in float32."""
    model, policy, params, rollout = drawn
    weight = np.random.default_rng(1).normal(size=rollout.tokens.shape) * logprobs.mask(rollout.lengths, NEW)
    theirs = model.double()
    (torch.tensor(np.asarray(weight)) * torch_logps(theirs, rollout)).sum().backward()
    expected = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    model.float()
    with jax.enable_x64(True):
        arch = dataclasses.replace(policy.architecture, compute_dtype="float64")
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        gradient = jax.grad(lambda params: jnp.sum(weight * trainer_logps(arch, params, rollout)))
        ours, rows = jax.jit(gradient)(params), parameters.table(arch)
        assert {row.name for row in rows} == expected.keys()
        for row in rows:
            array, largest = np.asarray(parameters.read(ours, row)), np.abs(expected[row.name]).max()
            assert largest > 1e-3, row.name
            array = array.T if row.transpose else array
            np.testing.assert_allclose(array, expected[row.name], rtol=0, atol=1e-5 * largest, err_msg=row.name)
