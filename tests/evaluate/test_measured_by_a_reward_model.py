"""Weights measured by a reward model: the rewards are its scores of the very completions that were drawn."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from mara_jax import hf
from mara_jax.evaluate import command, measuring
from mara_jax.train import evaluation, reward_model


def test_rewards_are_the_scores_of_the_completions(random_model, tmp_path, monkeypatch):
    policy, params = hf.load(random_model)
    begun = reward_model.RewardModel(*reward_model.begun(policy, params, jax.random.key(3)))
    scoring = hf.export(*begun, tmp_path / "scoring")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a?"}\n{"prompt": "b?"}\n')
    drawn, draw = [], evaluation.draw
    monkeypatch.setattr(evaluation, "draw", lambda *given: drawn.extend(draw(*given)) or drawn)
    asked = {"weights": str(random_model), "prompts": f"{tmp_path}/rows.jsonl", "reward": "", "answer": ""}
    sizes = {"samples": 4, "max_new_tokens": 3, "threshold": 0.0, "failure": "stop", "chat": "auto", "seed": 0}
    measuring.run(
        measuring.Settings(reward_model=str(scoring), **asked, **sizes), tmp_path / "out", Console(quiet=True)
    )
    written = json.loads((tmp_path / "out" / measuring.FILE).read_text())
    for group, row in zip(drawn, written["prompts"], strict=True):
        expected = begun.scores(begun.encode([group.prompt] * 4, group.completions))
        np.testing.assert_allclose(group.reward, expected, rtol=1e-5, atol=1e-6)
        assert row["reward"] == pytest.approx(expected.mean(), abs=1e-6)
        assert row["pass@1"] == np.mean(expected >= 0)


def test_one_of_two_rewards_must_be_named():
    flags = ["evaluate", "run", "--weights=x", "--prompts=y", "--out=z"]
    assert command.parse([*flags, "--reward_model=r"])[1] == "run"
    assert command.parse([*flags, "--reward=r.py:f"])[1] == "run"
    with pytest.raises(ValueError, match="--reward is missing"):
        command.parse(flags)
