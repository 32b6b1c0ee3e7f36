"""What the training command refuses, in one line and before it writes anything."""

import contextlib
import copy
import pathlib
from typing import Any, cast

import jax
import numpy as np
import pytest
from small_run import SMALL, refused

from mara_jax import config
from mara_jax.config import Algorithm, LanguageRun, Rollout, Toy, ToyRun, Warmup
from mara_jax.hf import tokenizer
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.tasks import onetwo
from mara_jax.train import loop, metrics, preflight, reference, startup
from mara_jax.train import workdir as workdirs
from mara_jax.train.prompts import EncodedPrompts

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.algorithm.bta=1"], ["algorithm.bta", "it has method, transform, objective, anchor, kl, beta"]),
        (["--config.optimizer.lr=1"], ["optimizer", "it has steps, seed"]),
        (["--config.steps=ten"], ["steps", "ten"]),
        (["--config.algorithm.beta=warm"], ["algorithm.beta", "warm"]),
        (["--config.algorithm.beta=0"], ["algorithm.beta=0.0", "positive"]),
        (["--config.algorithm.beta=-1"], ["algorithm.beta=-1.0"]),
        (["--config.algorithm.threshold=1.5"], ["algorithm.threshold=1.5", "above every reachable reward"]),
        (["--config.algorithm.estimator=k3_in_loss"], ["forward KL(ref || pi)", "k1_in_reward"]),
        (["--config.policy.weights=/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--config.rollout.max_new_tokens=8"], ["rollout.max_new_tokens=8", "demonstrations"]),
        (["--nonsense=1"], ["nonsense"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(main, tmp_path, flags, words):
    workdir = tmp_path / "run"
    refused(main(*SMALL, f"--workdir={workdir}", *flags), *words)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config=configs/missing.py"], ["configs/missing.py"]),
        (["--config=configs/onetwo.py:giant"], ["giant", "nano"]),
        (["--config=configs/toy.py", "--config.algorithm.anchor=answer"], ["anchor"]),
        (["--config=configs/toy.py", "--config.rollout.group_size=3"], ["rollout", "toy"]),
        ([], ["--config is missing"]),
    ],
)
def test_bad_configs_are_one_line_and_leave_nothing(main, tmp_path, flags, words):
    workdir = tmp_path / "run"
    refused(main(f"--workdir={workdir}", *flags), *words)
    assert not workdir.exists()


NANO = tokenizer.nano([text for _, text in onetwo.OneTwo().demonstrations(0, 0, 50)])


def weights(monkeypatch, *, ends=(2,), eos: str | None = "<|im_end|>", template: str | None = "{{ messages }}"):
    """Makes a run of "nano" load a policy that has a tokenizer and 200 positions, but no parameters."""
    nano = copy.deepcopy(NANO)
    nano.eos_token, nano.chat_template = eos, template
    arch = transformer.Architecture(
        family="qwen2", vocab_size=512, embed=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=32, rope_theta=1e4,
        rope_scaling=None, norm_eps=1e-6, tie_embeddings=True, max_positions=200,
    )  # fmt: skip
    policy = Policy(arch, nano, ends, 0, {}, "/some/model")
    monkeypatch.setattr(reference, "load_base", lambda *_: (policy, None))


@pytest.mark.parametrize(
    ("loaded", "rollout", "words"),
    [
        ({"template": None}, {}, ["no chat template", "--config.policy.chat=False"]),
        ({"template": "{% if"}, {}, ["chat template", "--config.policy.chat=False"]),
        ({"template": "{{ raise_exception('no system') }}"}, {}, ["no system", "--config.policy.chat=False"]),
        ({"template": "{{ messages + 1 }}"}, {}, ["chat template", "--config.policy.chat=False"]),
        ({}, {"max_new_tokens": 190}, ["rollout.max_new_tokens=190", "/some/model has 200 positions: use at most"]),
        ({"template": "1" * 300}, {}, ["200 positions: choose a model with a longer context"]),
        ({"ends": (7, 9)}, {}, ["/some/model", "the id 2, but completions end at [7, 9]", "eos_token_id"]),
        ({"eos": None}, {}, ["/some/model", "eos_token", "is not set", "warmup.steps=0"]),
    ],
)
def test_what_only_the_weights_can_tell_is_refused_before_anything_is_written(
    monkeypatch, tmp_path, loaded, rollout, words
):
    weights(monkeypatch, **loaded)
    cfg = LanguageRun(
        policy=config.Policy(weights="nano"), warmup=Warmup(steps=2), rollout=Rollout(**rollout), task=onetwo.Config()
    )
    with pytest.raises(ValueError) as caught:
        loop.run(cfg, onetwo.OneTwo(), tmp_path / "run")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_run_that_no_memory_holds_is_one_line():
    with (
        pytest.raises(ValueError, match=r"^out of memory \(RESOURCE_EXHAUSTED: Out of memory allocating"),
        preflight.too_large(),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nand more")
    with pytest.raises(ValueError, match=r"lower rollout\.group_size"), preflight.too_large():
        np.empty(2**55)
    with pytest.raises(jax.errors.JaxRuntimeError), preflight.too_large():
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")


@pytest.mark.parametrize(
    ("threshold", "method", "good"), [(0.0, "mara", False), (0.1, "mara", True), (0.0, "vanilla", True)]
)
def test_mara_refuses_a_threshold_that_invalid_completions_reach(threshold, method, good):
    run = LanguageRun(algorithm=Algorithm(threshold=threshold, method=method))
    with (
        contextlib.nullcontext() if good else pytest.raises(ValueError, match=r"threshold=0.0 is not above the reward")
    ):
        preflight.check_task(run, onetwo.OneTwo())


@pytest.mark.parametrize(
    "text", ["{}", "[]", "{", '{"samples": 1, "valid": 1.0, "answers": null, "optimum": {}, "objective": ""}']
)
def test_a_damaged_reference_is_named_with_the_cure(tmp_path, text):
    (tmp_path / "reference.json").write_text(text)
    with pytest.raises(ValueError, match=r"reference\.json .* Delete it, and the reference is measured again$"):
        run, anything = LanguageRun(), cast(Any, None)
        startup.measure(startup.Setup(run, onetwo.OneTwo(), anything, None, [], anything), tmp_path, anything)


def test_metrics_keep_finished_steps_and_name_a_line_that_is_none(tmp_path):
    path, row = tmp_path / "metrics.jsonl", '{"step": 1, "answers/by_prompt": [], "samples": 4}\n'
    path.write_text(row + row.replace("1", "2", 1) + '{"step": 3, "cut')
    log = metrics.Log(path, 1)
    log.close()
    assert [kept["step"] for kept in log.rows] == [1] and path.read_text() == row
    for line in ('{"a": 1}', "5", "cut"):
        path.write_text(row + line + "\n" + row)
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is (no step of a run|step 1 again): delete"):
            metrics.Log(path, 1)
        assert path.read_text() == row + line + "\n" + row


def test_a_prompt_and_its_completion_may_fill_the_context(monkeypatch):
    weights(monkeypatch, template="1" * 160)
    policy, _ = reference.load_base(LanguageRun(), onetwo.OneTwo())
    assert len(EncodedPrompts(LanguageRun(rollout=Rollout(max_new_tokens=40)), policy, onetwo.OneTwo())[0]) == 160
    with pytest.raises(ValueError, match=r"after prompt 0 of 160 tokens .* use at most 40, or set"):
        EncodedPrompts(LanguageRun(rollout=Rollout(max_new_tokens=41)), policy, onetwo.OneTwo())[0]


def test_a_run_refused_before_its_first_result_does_not_hold_its_workdir(tmp_path):
    mine, other = ToyRun(), ToyRun(toy=Toy(figure=2))
    workdirs.claim(tmp_path, mine)
    workdirs.check(tmp_path, other)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="another config"):
        workdirs.check(tmp_path, other)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # no run's, and not to be overwritten
    with pytest.raises(ValueError, match="another config"):
        workdirs.check(tmp_path, other)


@pytest.mark.parametrize("name", ["file", "file/run", "x" * 300, "/proc/run", "/proc/version/run"])
def test_a_workdir_that_cannot_be_is_refused_at_once(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError) as caught:
        workdirs.check(tmp_path / name, ToyRun())
    assert str(tmp_path / name) in str(caught.value) and "choose another --workdir" in str(caught.value)


def test_a_completion_that_is_left_out_is_no_anchor():
    """Its reward is 0: with a threshold of 0 it would count as good."""
    task = onetwo.OneTwo()
    task.leaves_out_truncated, task.invalid_reward = True, None
    with pytest.raises(ValueError, match=r"threshold=0.0 is not above the reward 0 of truncated completions"):
        preflight.check_task(LanguageRun(algorithm=Algorithm(method="mara", threshold=0.0)), task)
    preflight.check_task(LanguageRun(algorithm=Algorithm(method="mara", threshold=0.5)), task)
