"""The command refuses, before it reads or writes anything, what no memory here can hold."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from mara_jax import config
from mara_jax.hf import shapes
from mara_jax.tasks import prompts
from mara_jax.train import capacity, preflight

ROOT = pathlib.Path(__file__).parents[2]


def test_the_command_refuses_a_model_larger_than_memory(tmp_path):
    """A thousand layers: terabytes. Its directory has no weights, so that reading them would say something else."""
    (tmp_path / "huge").mkdir()
    shape = shapes.PUBLISHED["qwen2.5-32b"] | {"num_hidden_layers": 1000}
    (tmp_path / "huge/config.json").write_text(json.dumps(shape))
    flags = [f"--workdir={tmp_path / 'run'}", f"--config.policy.weights={tmp_path / 'huge'}"]
    command = [sys.executable, "-m", "mara_jax.main", "--config=configs/onetwo.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("mara_jax: it does not fit: ") and done.stderr.count("\n") == 1
    assert "must hold" in done.stderr and "python -m mara_jax.plan" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_limit_decides(monkeypatch):
    """nano, alone on a device: four times its parameters and the cache, to the byte."""
    run = config.LanguageRun(warmup=config.Warmup(steps=1))
    parameters = 512 * 128 + 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512 + 2 * 128 + 256) + 128
    cache = 2 * 2 * 32 * 2 * 40 * 32 * 4  # keys and values, layers, completions, key heads, tokens, width, float32
    need = 4 * 4 * parameters + 4 + cache
    monkeypatch.setattr(capacity, "limit_here", lambda: (float(need), 1))
    preflight.check_room(run)
    monkeypatch.setattr(capacity, "limit_here", lambda: (need - 1.0, 1))
    with pytest.raises(ValueError, match="it does not fit: a device must hold"):
        preflight.check_room(run)


def test_a_reward_model_has_its_part(monkeypatch, tmp_path):
    """The parameters of the same shape once more, and a score of 128 numbers; one whose shape is unknown has none."""
    task = prompts.Config(reward_model=str(tmp_path))
    run = config.LanguageRun(warmup=config.Warmup(steps=1), task=task)
    shape = dict(zip(shapes._KEYS, (512, 128, 512, 2, 4, 2, True, 1e-6, 512), strict=True)) | {"head_dim": 32}
    named = {"model_type": "qwen2", "architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1}
    (tmp_path / "config.json").write_text(json.dumps(shape | named))
    parameters = 512 * 128 + 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 512 + 2 * 128 + 256) + 128
    need = 4 * 4 * parameters + 4 + 2 * 2 * 32 * 2 * 40 * 32 * 4 + 4 * (parameters + 128)
    monkeypatch.setattr(capacity, "limit_here", lambda: (float(need), 1))
    preflight.check_room(run)
    monkeypatch.setattr(capacity, "limit_here", lambda: (need - 1.0, 1))
    with pytest.raises(ValueError, match=r"reward model .* GiB"):
        preflight.check_room(run)
    unknown = dataclasses.replace(run, task=dataclasses.replace(task, reward_model="somebody/unknown"))
    preflight.check_room(unknown)


def test_what_there_is_here():
    """On a CPU without a layout: the whole host's memory for its one device."""
    limit, devices = capacity.limit_here()
    assert devices == 1 and 2**28 < limit < 2**60
