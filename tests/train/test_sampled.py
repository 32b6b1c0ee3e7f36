"""Weights by the name of a run: what it left, its newest checkpoint, or that of a step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax import hf
from mara_jax.config import Checkpoint, LanguageRun, Lora, Policy
from mara_jax.policies import lora
from mara_jax.tasks import onetwo
from mara_jax.train import adapter, checkpoint, sampled
from mara_jax.train import workdir as workdirs
from mara_jax.train.state import State

TOKENS, LENGTHS = np.array([[5, 6, 7]]), np.array([3])


def logits(where, chat="auto"):
    policy, params, _ = sampled.load(str(where), chat)
    return np.asarray(policy.logits(params, TOKENS, LENGTHS))


def begun(workdir, weights, **fields) -> LanguageRun:
    run = LanguageRun(task=onetwo.Config(), policy=Policy(weights=str(weights), **fields.pop("policy", {})), **fields)
    workdirs.claim(workdir, run)
    return run


def saved(workdir, params) -> None:
    """Checkpoints after steps 1 and 2: `params` times the step."""
    checkpoints = checkpoint.Checkpoints(workdir, Checkpoint(every=1, keep=2))
    for step in (1, 2):
        checkpoints.save(step, State(jnp.int32(step), jax.tree.map(lambda x, step=step: x * step, params), ()))
    checkpoints.close()


def test_a_run_is_its_model_or_its_newest_checkpoint(random_model, tmp_path):
    policy, params = hf.load(random_model)
    workdir = tmp_path / "run"
    begun(workdir, random_model)
    with pytest.raises(ValueError, match=r"run holds no checkpoint yet: wait for the first"):
        sampled.load(str(workdir), "auto")
    saved(workdir, params)
    twice = np.asarray(policy.logits(jax.tree.map(lambda x: x * 2, params), TOKENS, LENGTHS))
    np.testing.assert_allclose(logits(workdir), twice, atol=1e-6)
    np.testing.assert_allclose(logits(workdir / "checkpoints" / "1"), logits(random_model), atol=1e-6)
    assert np.abs(twice - logits(random_model)).max() > 1e-3
    hf.export(policy, jax.tree.map(lambda x: x * 3, params), workdir / "model")
    np.testing.assert_allclose(logits(workdir), logits(workdir / "model"))
    with pytest.raises(ValueError, match=r"run holds no checkpoint of step 7: it has 1, 2"):
        sampled.load(str(workdir / "checkpoints" / "7"), "auto")
    with pytest.raises(ValueError, match=r"checkpoints/best is no checkpoint: name WORKDIR/checkpoints/STEP"):
        sampled.load(str(workdir / "checkpoints" / "best"), "auto")
    (workdir / "population.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"is a population: --weights names one of its members"):
        sampled.load(str(workdir), "auto")


def test_a_checkpoint_of_an_adapter_is_put_upon_its_base(random_model, tmp_path):
    policy, params = hf.load(random_model)
    run = begun(tmp_path / "run", random_model, lora=Lora(rank=2, alpha=4.0, targets="q,down"))
    policy = adapter.trained(run, policy)
    factors = jax.tree.map(lambda x: x + 0.1, lora.init(policy.architecture, jax.random.key(1)))
    saved(tmp_path / "run", factors)
    for step in (1, 2):
        own = lora.attached(policy.architecture, params, jax.tree.map(lambda x, step=step: x * step, factors))
        expected = np.asarray(policy.logits(own, TOKENS, LENGTHS))
        np.testing.assert_allclose(logits(tmp_path / "run" / "checkpoints" / str(step)), expected, atol=1e-6)


def test_prompts_stand_in_the_template_as_in_training(random_model, tmp_path):
    begun(tmp_path / "run", random_model, policy={"chat": False})
    saved(tmp_path / "run", hf.load(random_model)[1])
    assert sampled.load(str(random_model), "auto").chat
    assert not sampled.load(str(tmp_path / "run"), "auto").chat and sampled.load(str(tmp_path / "run"), "yes").chat
