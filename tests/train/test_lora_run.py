"""A run that trains an adapter: where it starts, what it saves, that it resumes, and what it leaves."""

import dataclasses
import functools
import json
import pathlib
import shutil

import chex
import jax
import numpy as np
import pytest

from mara_jax import config, hf
from mara_jax.config import Algorithm, Checkpoint, LanguageRun, Optimiser, Policy, Reference, Rollout
from mara_jax.policies import lora
from mara_jax.tasks import base, onetwo
from mara_jax.train import adapter, checkpoint, evaluation, held_out, loop, optim, placement, reference

CFG = LanguageRun(
    steps=3,
    task=onetwo.Config(),
    policy=Policy(weights="nano", layers=1, embed=32),
    algorithm=Algorithm(method="vanilla"),
    lora=config.Lora(rank=2, alpha=8.0, targets="v,q,down"),
    reference=Reference(samples=4),
    rollout=Rollout(group_size=4, max_new_tokens=48, length_buckets=0),
    optimiser=Optimiser(learning_rate=3e-2),
    checkpoint=Checkpoint(every=2, keep=2),
    evaluation=config.Evaluation(every=3, samples=16),
    show_samples=0,
)


class Parity(onetwo.OneTwo):
    """Rewards completions by their first character, so that a policy that knows nothing has both rewards."""

    def score(self, prompt_index, texts, finished):
        odd = [ord(text[0]) % 2 if text else 0 for text in texts]
        return base.Score(odd, ["1" if one else None for one in odd])


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """A resumption uses the programs of its run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim, "make", functools.cache(optim.make))
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """The directory of a random model."""
    out = tmp_path_factory.mktemp("weights") / "nano"
    return str(hf.export(*reference.load_base(CFG, onetwo.OneTwo()), out))


@pytest.fixture(scope="module")
def cfg(weights) -> LanguageRun:
    return dataclasses.replace(CFG, policy=dataclasses.replace(CFG.policy, weights=weights))


@pytest.fixture(scope="module")
def whole(cfg, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run from beginning to end."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    loop.run(cfg, Parity(), workdir)
    return workdir


@pytest.fixture(scope="module")
def model(cfg):
    """The policy as the run trains it, and the reference's parameters."""
    policy, params = hf.load(cfg.policy.weights)
    return adapter.trained(cfg, policy), params


def rows(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without clocks."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]


def test_the_run_starts_at_the_reference_exactly_and_leaves_it(whole):
    lines = rows(whole)
    assert lines[0]["kl/reverse"] == lines[0]["kl/k1"] == 0
    assert lines[0]["grad/norm"] > 0 and 0 < lines[0]["reward/mean"] < 1
    assert lines[2]["kl/reverse"] > 0.01
    # The rollout's merged kernels are the policy that is trained, whatever the adapter has become.
    assert all(abs(line["sampler/logp_gap"]) < 1e-3 for line in lines)


def test_checkpoints_hold_the_adapter_alone_and_the_export_is_the_last_of_them(cfg, whole, model):
    policy, ref_params = model
    arch = policy.architecture
    state = checkpoint.Checkpoints(whole, CFG.checkpoint).restore(placement.abstract(arch, optim.make(CFG.optimiser)))
    # q: [32, 64], v: [32, 32], down: [128, 32], of rank 2.
    trained = 2 * ((32 + 64) + (32 + 32) + (128 + 32))
    assert lora.count(arch) == sum(x.size for x in jax.tree.leaves(state.params)) == trained
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * trained + 1  # two moments and a counter
    saved = sum(path.stat().st_size for path in (whole / "checkpoints" / "3").rglob("*") if path.is_file())
    assert saved < 4 * sum(x.size for x in jax.tree.leaves(ref_params))  # the base is in none of them
    shapes = placement.abstract_params(arch)
    chex.assert_trees_all_equal(checkpoint.read_params(whole, 3, shapes), state.params)
    loaded, written = hf.load_adapter(policy, whole / "adapter")
    assert loaded.architecture == arch
    chex.assert_trees_all_equal(written, state.params)
    told = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == cfg.policy.weights


def test_evaluations_are_of_the_base_with_the_adapter(cfg, whole, model):
    """Before training the base alone; after the last step the base with the exported adapter."""
    policy, ref_params = model
    task, key = Parity(), reference.stream(cfg.seed, "evaluation")
    prompts = held_out.encoded(cfg, policy, task)
    measured = [json.loads(line) for line in (whole / held_out.FILE).read_text().splitlines()]
    assert [row["step"] for row in measured] == [0, 3]
    trained = hf.load_adapter(policy, whole / "adapter")[1]
    for row, adapter_params in zip(measured, (adapter.start(cfg, policy, ref_params), trained), strict=True):
        params = lora.attached(policy.architecture, ref_params, adapter_params)
        again = evaluation.measure(task, policy, params, prompts, key, held_out.sizes(cfg))["metrics"]
        assert {name: row[name] for name in again} == again
    assert measured[0] | {"step": 3, "time/evaluation_s": 0} != measured[1] | {"time/evaluation_s": 0}


@pytest.mark.slow
def test_resumed_equals_uninterrupted(cfg, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints" / "3")  # as if killed after the second step
    shutil.rmtree(workdir / "adapter")
    loop.run(cfg, Parity(), workdir)
    assert rows(workdir) == rows(whole)
    name = "adapter/adapter_model.safetensors"
    assert (workdir / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_may_start_from_an_adapter_that_is_as_its_config_says(cfg, whole, model):
    policy, params = model
    at = dataclasses.replace(CFG.lora, adapter=str(whole / "adapter"))
    started = adapter.start(dataclasses.replace(CFG, lora=at), policy, params)
    chex.assert_trees_all_equal(started, hf.load_adapter(policy, whole / "adapter")[1])
    plain = dataclasses.replace(policy, architecture=dataclasses.replace(policy.architecture, lora=None))
    for change, words in (
        ({"rank": 4}, r"lora\.rank=4, but .* has 2: set --config\.lora\.rank=2"),
        ({"alpha": 16.0}, r"lora\.alpha=16\.0, but .* has 8\.0"),
        ({"targets": "q,v"}, r"lora\.targets=q,v, but .* has q,v,down"),
        ({"adapter": str(whole)}, r"has no adapter_config\.json"),
        ({"rank": 33, "adapter": ""}, r"lora\.rank=33 with .*: the adapter's rank is 33, but the model is 32 wide"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            adapter.check(dataclasses.replace(CFG, lora=dataclasses.replace(at, **change)), plain)


def test_an_adapter_is_drawn_from_the_seed(model):
    policy, params = model
    first, again, other = (adapter.start(dataclasses.replace(CFG, seed=s), policy, params) for s in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert not np.array_equal(first["layers_0"]["q"]["lora_a"], other["layers_0"]["q"]["lora_a"])
