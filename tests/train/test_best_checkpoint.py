"""The best checkpoint by coverage: most good answers among those whose reward equals the best within its interval."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.config import Checkpoint, Evaluation, LanguageRun, checks
from mara_jax.train import best_checkpoint, checkpoint, evaluation_report, held_out
from mara_jax.train.best_checkpoint import Covered, most_covering
from mara_jax.train.state import State


def of(good: float, *reward_p: float, samples: int = 16) -> Covered:
    return Covered(good, list(reward_p), float(np.mean(reward_p)), samples)


BEST = of(1.0, 0.9, 0.8, 1.0, 0.9)


def test_a_reward_is_equal_where_the_interval_of_the_difference_holds_0():
    assert best_checkpoint.equal_reward(BEST, of(1.0, 0.9, 0.9, 0.9, 0.8))
    assert best_checkpoint.equal_reward(BEST, BEST)
    assert not best_checkpoint.equal_reward(BEST, of(1.0, 0.8, 0.7, 0.9, 0.8))  # .1 less on every prompt
    # Prompts differ by far more than the policies: a bootstrap that resamples them apart would call these equal.
    hard = [0.1, 0.3, 0.5, 0.7, 0.9]
    assert not best_checkpoint.equal_reward(of(1.0, *hard), of(1.0, *(value - 0.05 for value in hard)))


def test_of_one_prompt_the_share_of_good_completions_is_compared():
    """14 of 16 good: Wilson's interval begins at .640, between 10 and 11 of 16."""
    best = of(1.0, 14 / 16)
    assert best_checkpoint.equal_reward(best, of(1.0, 11 / 16)) and not best_checkpoint.equal_reward(
        best, of(1, 10 / 16)
    )
    many = of(1.0, 14 / 16, samples=1600)
    assert not best_checkpoint.equal_reward(many, of(1.0, 13 / 16, samples=1600))


def test_the_most_covering_at_equal_reward():
    lower, equal = of(9.0, 0.7, 0.6, 0.8, 0.7), of(3.0, 0.9, 0.9, 0.9, 0.8)
    assert most_covering([1, 2, 3], {0: of(99.0, 1, 1, 1, 1), 1: BEST, 2: lower, 3: equal}) == 3
    assert most_covering([1, 2], {1: BEST, 2: lower}) == 1
    assert most_covering([2], {1: BEST, 2: lower}) == 2  # nothing saved is equal: the highest reward
    assert most_covering([1, 2], {1: BEST, 2: BEST}) == 1 and most_covering([1], {}) is None
    # Each loses on two prompts of four against the one before, the third on all against the first, whose checkpoint is
    # gone by then: rewards must not drift down.
    first, second, third = of(1.0, 0.9, 0.9, 0.9, 0.9), of(2.0, 0.8, 0.8, 0.9, 0.9), of(3.0, 0.8, 0.8, 0.8, 0.8)
    assert most_covering([1, 2], {1: first, 2: second}) == 2 == most_covering([2, 3], {1: first, 2: second, 3: third})
    assert most_covering([2, 3], {2: second, 3: third}) == 3


def test_checkpoints_are_kept_by_coverage_and_after_a_resume(tmp_path):
    scores = {1: BEST, 2: of(3.0, 0.9, 0.9, 0.9, 0.8), 3: of(9.0, 0.7, 0.6, 0.8, 0.7), 4: of(2.0, 0.9, 0.8, 0.9, 0.9)}
    cfg = Checkpoint(every=1, keep=1, best="coverage")

    def save(*steps: int) -> list[int]:
        checkpoints = checkpoint.Checkpoints(tmp_path, cfg)
        checkpoints.scores.update((step, one) for step, one in scores.items() if step <= steps[-1])
        for step in steps:
            checkpoints.save(step, State(jnp.int32(step), {"a": jnp.ones(3)}, ()))
        checkpoints.close()
        return checkpoint.saved_steps(tmp_path)

    assert save(1, 2, 3) == [2, 3] and save(4) == [2, 4]
    (tmp_path / held_out.FOLDER).mkdir()
    with (tmp_path / held_out.FILE).open("w") as file:
        for step, one in scores.items():
            row = {"step": step, "reward": one.reward, "pass@1": one.pass_1, "answers/good": one.good}
            file.write(json.dumps(row) + "\n")
            prompts = [{"reward": value} for value in one.reward_p]
            held_out.table_of(tmp_path, step).write_text(json.dumps({"prompts": prompts}))
            assert held_out.score_of(tmp_path, row, "coverage", 16) == one  # what a resumed run reads
            assert held_out.score_of(tmp_path, row, "reward", 16) == one.reward
    (tmp_path / "config.json").write_text(json.dumps({"algorithm": {}, "seed": 0, "evaluation": {"samples": 16}}))
    assert evaluation_report.best_step(tmp_path, "coverage") == 2
    held_out.table_of(tmp_path, 2).unlink()
    assert evaluation_report.best_step(tmp_path, "coverage") == 4


def test_coverage_needs_evaluations_as_any_measure_does():
    run = LanguageRun(checkpoint=Checkpoint(every=20, best="coverage"), evaluation=Evaluation(every=5))
    checks._check_best(run)
    with pytest.raises(ValueError, match=r"checkpoint.best='coverage' needs an evaluation at each checkpoint"):
        checks._check_best(LanguageRun(checkpoint=Checkpoint(best="coverage")))
