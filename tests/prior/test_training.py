"""The update of a prior: its loss against the policy's own logits, its learning rate by hand, and that it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.policies import parameters, transformer
from mara_jax.prior import training
from mara_jax.prior.batches import TrainingSet
from mara_jax.prior.settings import Settings

SMILES = ["CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCl"]
SETTINGS = Settings(
    batch=4, held_out=1, layers=1, heads=1, feed_forward=32, steps=200, rise=5, learning_rate=0.01, max_grad_norm=0.0
)


@pytest.fixture(scope="module")
def small():
    data = TrainingSet(SMILES, SETTINGS)
    policy = training.policy_of(SETTINGS, data)
    return data, policy, transformer.init(policy.architecture, jax.random.key(0))


def test_loss_is_that_of_the_policy_s_logits(small):
    """Row by row, unpacked, with BOS in front."""
    data, policy, params = small
    batch = data.of_smiles(SMILES[:3])  # and an empty row
    total, count = training.nll(policy.architecture, params, batch, policy.tokenizer.bos_token_id)
    rows = [[*policy.tokenizer.encode(text), policy.tokenizer.eos_token_id] for text in SMILES[:3]]
    lengths, padded = [len(row) - 1 for row in rows], [row + [0] * (10 - len(row)) for row in rows]
    logp_btv = jax.nn.log_softmax(policy.logits(params, padded, lengths))
    expected = -sum(float(logp_btv[row, at, token]) for row, ids in enumerate(rows) for at, token in enumerate(ids[1:]))
    assert count == 4 + 4 + 9 and float(total) == pytest.approx(expected, rel=1e-5)


def test_held_out_loss_is_the_mean_over_molecules(small):
    data, policy, params = small
    assert len(data.held_out) == 1
    total, _ = training.nll(policy.architecture, params, data.of_smiles(data.held_out), policy.tokenizer.bos_token_id)
    assert training.held_out_loss(policy, params, data) == pytest.approx(float(total), rel=1e-5)
    bare = TrainingSet(SMILES, dataclasses.replace(SETTINGS, held_out=0))
    assert training.held_out_loss(policy, params, bare) is None


@pytest.mark.parametrize("decay", ["cosine", "linear", "none"])
def test_learning_rate_by_hand(decay):
    rate = training.learning_rate(dataclasses.replace(SETTINGS, steps=105, decay=decay))
    np.testing.assert_allclose([rate(n) for n in range(6)], [0.01 * (n + 1) / 6 for n in range(6)], rtol=1e-6)
    middle = {"cosine": 0.5 * 1.01, "linear": 0.505, "none": 1}[decay]  # between the highest and a hundredth of it
    np.testing.assert_allclose(rate(55), 0.01 * middle, rtol=1e-5)
    np.testing.assert_allclose(rate(105), 0.01 * (1 if decay == "none" else 0.01), rtol=1e-5)


def test_a_short_run_learns_its_molecules_by_one_compiled_program(small):
    """Four molecules at equal frequency: the loss of a batch that holds each once falls to log 4 a molecule."""
    data, policy, params = small
    tx, before = training.optimiser(SETTINGS), training.update._cache_size()
    state, losses = training.fresh(policy, params, tx), []
    for step in range(SETTINGS.steps):
        batch = data.batch(step)
        state, loss = training.update(
            state, batch, arch=policy.architecture, tx=tx, bos_id=policy.tokenizer.bos_token_id
        )
        losses.append(float(loss) * batch.lengths.sum() / 4)
    assert training.update._cache_size() == before + 1
    assert losses[0] > 15 and np.log(4) - 1e-3 < losses[-1] < np.log(4) + 0.5
    assert int(state.step) == SETTINGS.steps


def test_shipped_size_is_about_a_million_parameters_in_under_four_megabytes():
    settings = Settings()
    data = TrainingSet(SMILES, dataclasses.replace(settings, held_out=0))
    arch = training.policy_of(settings, data).architecture
    assert 0.8e6 < parameters.count(dataclasses.replace(arch, vocab_size=30)) < 1.4e6
    assert jnp.dtype(settings.dtype).itemsize * 1.4e6 < 4e6
