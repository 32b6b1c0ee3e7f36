"""The variants of configs/prompts.py that name a real model: what they need, and what they say without it."""

import importlib.util
import pathlib

import pytest

import mara_jax
from mara_jax import config, tasks
from mara_jax.hf import shapes

FILE = pathlib.Path(mara_jax.__file__).parents[1] / "configs" / "prompts.py"
VARIANTS = ("math", "code", "reasoning_gym")


def run_of(variant: str) -> config.LanguageRun:
    spec = importlib.util.spec_from_file_location("prompts_config", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = config.resolve(module.get_config(variant))
    assert isinstance(run, config.LanguageRun)
    return run


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_name_a_model_whose_shape_is_known(variant):
    run = run_of(variant)
    assert run.policy.weights == "Qwen/Qwen2.5-1.5B-Instruct"
    assert shapes.architecture_of(run.policy.weights).embed == 1536


@pytest.mark.parametrize("variant", ["math", "code"])
def test_variants_without_a_file_say_what_to_set(variant):
    with pytest.raises(ValueError, match=r"^task.prompts is empty: set --config.task.prompts=prompts.jsonl$"):
        tasks.make(run_of(variant))
