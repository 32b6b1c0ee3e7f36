"""Evaluations of a run: what they are made on, what is refused, and the checkpoint that they keep."""

import dataclasses
import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from test_inputs import Many, begun, policy

from mara_jax import config, main
from mara_jax.config import Checkpoint, Evaluation, LanguageRun, checks
from mara_jax.tasks import digits, onetwo, prompts
from mara_jax.train import checkpoint, evaluation_report, held_out, inputs
from mara_jax.train import workdir as workdirs
from mara_jax.train.state import State

MATCHING = "mara_jax.tasks.rewards.matching"
EVERY = Evaluation(every=5)


def lines(path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_of(task, **fields) -> LanguageRun:
    return LanguageRun(task=task, evaluation=dataclasses.replace(EVERY, **fields))


def test_evaluations_are_of_the_tasks_functions_on_the_rows_of_the_other_file(tmp_path):
    rows = [{"prompt": name, "answers": [name.upper()]} for name in ("a", "b", "c")]
    own = prompts.Config(
        prompts=lines(tmp_path / "train.jsonl", *rows[:2]), reward=f"{MATCHING}:one_of", answer=f"{MATCHING}:which_of"
    )
    cfg = run_of(own, prompts=lines(tmp_path / "held.jsonl", *rows[1:]))
    task, other = prompts.make(own), held_out.make_task(cfg, prompts.make(own))
    assert other is not None and [other.prompt(0), other.prompt(1), len(other)] == ["b", "c", 2]
    score = other.score([1, 1], ["C", "A"], [True, True])
    assert list(score.reward) == [1, 0] and score.answer == ["C", None]
    told = held_out.describe(cfg, task, other)
    assert told == [
        f"evaluation: {tmp_path}/held.jsonl: 2 prompts, 16 completions each, every 5 steps",
        "WARNING: 1 of 2 prompts of evaluation.prompts are prompts of training, too",
    ]
    assert len(held_out.describe(cfg, onetwo.OneTwo(), other)) == 1
    lines(tmp_path / "held.jsonl", {"prompt": "d"})
    with pytest.raises(ValueError, match=r"evaluation.prompts='.*held.jsonl': .*:one_of wants the argument 'answers'"):
        held_out.make_task(cfg, task)


def test_a_task_without_files_is_evaluated_on_its_own_prompts():
    task = onetwo.OneTwo()
    assert held_out.make_task(run_of(onetwo.Config(), every=0), task) is None
    assert held_out.make_task(run_of(onetwo.Config()), task) is task
    many = digits.Digits(digits.Config(prompts=1000))
    with pytest.raises(ValueError, match=r"evaluates all 1000 prompts of training, more than 256: name a file"):
        held_out.make_task(run_of(digits.Config()), many)
    with pytest.raises(ValueError, match=r"'x.jsonl': the task 'digits' reads no file of prompts: leave"):
        held_out.make_task(run_of(digits.Config(), prompts="x.jsonl"), many)


@pytest.mark.parametrize(
    ("flags", "prompts", "every"),
    [
        ([], "heldout.jsonl", 12),
        (["evaluation.every=7"], "heldout.jsonl", 7),
        (["task.prompts=own.jsonl"], "", 0),
        (["task.prompts=own.jsonl", "evaluation.every=7"], "", 7),
        (["task.prompts=own.jsonl", "evaluation.prompts=held.jsonl"], "held.jsonl", 12),
    ],
)
def test_held_out_prompts_of_a_config_file_belong_to_its_training_prompts(flags, prompts, every):
    values = main.parse(["main", "--config=configs/prompts.py", "--workdir=x", *(f"--config.{flag}" for flag in flags)])
    run = main.run_of(values)
    assert isinstance(run, LanguageRun)
    assert (run.evaluation.prompts.rpartition("/")[2], run.evaluation.every) == (prompts, every)


def test_the_shape_of_a_rollout_is_that_of_its_evaluations():
    def of(samples: int, prompts: int, group: int):
        rollout = config.Rollout(prompts_per_step=prompts, group_size=group)
        return held_out.sizes(LanguageRun(rollout=rollout, evaluation=Evaluation(samples=samples)))[3:5]

    assert of(16, 8, 8) == (8, 8) and of(17, 4, 8) == (4, 8)  # prompts and samples at once
    assert of(16, 1, 32) == (2, 16) and of(7, 1, 10) == (1, 7)


def test_resuming_with_another_file_of_held_out_prompts_is_refused(tmp_path):
    cfg, file = run_of(onetwo.Config()), tmp_path / "held.jsonl"
    file.write_text("a")
    evaluated = Many(file=str(file))
    workdir = begun(tmp_path / "run", inputs.of_run(cfg, Many(), policy()))
    assert inputs.check(workdir, inputs.of_run(cfg, Many(), policy(), evaluated)) == []  # evaluations begin later
    inputs.record(workdir, "nano", inputs.of_run(cfg, Many(), policy(), evaluated))
    file.write_text("b")
    with pytest.raises(ValueError, match=rf"differs in evaluation file/{file}"):
        inputs.check(workdir, inputs.of_run(cfg, Many(), policy(), evaluated))
    assert inputs.check(workdir, inputs.of_run(cfg, Many(), policy())) == []  # or end


def test_a_resumed_run_may_be_evaluated_more_often_but_not_otherwise(tmp_path):
    run = run_of(onetwo.Config())
    workdirs.claim(tmp_path, run)
    (tmp_path / "reference.json").touch()
    workdirs.check(tmp_path, dataclasses.replace(run_of(onetwo.Config(), every=1), tracker="wandb"))
    with pytest.raises(ValueError, match=r"differs in evaluation.samples\)"):
        workdirs.check(tmp_path, run_of(onetwo.Config(), every=1, samples=2))


@pytest.mark.parametrize(
    ("best", "every", "evaluation", "words"),
    [
        ("pass@1", 20, Evaluation(), "needs an evaluation at each checkpoint, .* set evaluation.every=20"),
        ("pass@1", 20, Evaluation(every=15), "checkpoint.every=20 is no multiple of evaluation.every=15"),
        (
            "pass@8",
            20,
            Evaluation(every=10, samples=7),
            "is no measure of .*=7: choose one of reward, pass@1, pass@2, ",
        ),
        ("truncated", 20, EVERY, "is no measure of .* pass@16, valid, answers/distinct, answers/good, "),
    ],
)
def test_what_cannot_tell_the_best_is_refused(best, every, evaluation, words):
    run = LanguageRun(checkpoint=Checkpoint(every=every, best=best), evaluation=evaluation)
    with pytest.raises(ValueError, match=words):
        checks._check_best(run)
    checks._check_best(LanguageRun(checkpoint=Checkpoint(every=20, best="pass@16"), evaluation=EVERY))


def test_the_measures_are_those_that_evaluations_have(tmp_path):
    import numpy as np

    from mara_jax.train import evaluation

    group = evaluation.Group(0, "p", ["t"] * 6, np.ones(6, np.float32), ["a"] * 6, np.ones(6, bool))
    measured = evaluation._of_prompt(group, 0.5)
    assert {*config.measures(Evaluation(samples=6))} == {*measured} - {"truncated", "counts"}


def test_the_best_checkpoint_stays_beside_the_newest_ones(tmp_path):
    """0.2, 0.5, 0.4, 0.5 after steps 1 to 4: the earliest of the best is 2."""
    scores = {1: 0.2, 2: 0.5, 3: 0.4, 4: 0.5}

    def save(*steps: int) -> list[int]:
        """As a run does that begins, or is resumed, before these steps."""
        checkpoints = checkpoint.Checkpoints(tmp_path, Checkpoint(every=1, keep=1))
        checkpoints.scores.update((step, score) for step, score in scores.items() if step <= steps[-1])
        for step in steps:
            checkpoints.save(step, State(jnp.int32(step), {"a": jnp.ones(3)}, ()))
        checkpoints.close()
        return checkpoint.saved_steps(tmp_path)

    assert save(1, 2, 3) == [2, 3] and save(4) == [2, 4]
    rows = [{"step": step, "reward": score, "pass@1": 0.0} for step, score in ({0: 0.9} | scores).items()]
    lines(tmp_path / "evaluation.jsonl", *rows)
    assert evaluation_report.best_step(tmp_path, "reward") == 2  # of those that have a checkpoint

    def kept(keep: int, of: dict[int, float]) -> list[bool]:
        saved = [SimpleNamespace(step=step) for step in (1, 2, 3, 4)]
        return checkpoint.Kept(keep, of).should_preserve(saved, context=None)

    assert kept(2, scores) == [False, True, True, True] and kept(2, {1: 0.9}) == [True, False, True, True]
    assert kept(1, {}) == [False, False, False, True] and kept(9, scores) == [True] * 4


def test_the_change_of_an_evaluation_by_hand(tmp_path):
    """Two prompts: pass@1 from 0 and .5 to .5 and .6, so .3 in the mean, with a standard error of .2."""
    names = {"reward": 1.0, "valid": 1.0, "answers/distinct": 1.0, "answers/good": 1.0, "answers/effective": 1.0}
    (tmp_path / "evaluation").mkdir()
    for step, values in ((0, [0.0, 0.5]), (4, [0.5, 0.6])):
        table = [names | {"pass@1": value} for value in values]
        held_out.table_of(tmp_path, step).write_text(json.dumps({"step": step, "prompts": table}))
    rows = [{"step": step, "pass@1": value} | names for step, value in ((0, 0.25), (2, 0.4), (4, 0.55))]
    lines(tmp_path / "evaluation.jsonl", *rows)
    assert evaluation_report._changes(tmp_path, 0, 4, ["pass@1"]) == ["+0.300\n[dim]± 0.200[/dim]"]
    table = evaluation_report.final_table(tmp_path, "pass@1")
    assert table is not None and [*table.columns[0].cells] == ["step 0", "step 4 (last)", "last - first"]
    assert [*table.columns[2].cells][:2] == ["0.250", "0.550"]
    assert evaluation_report.final_table(tmp_path / "evaluation") is None
    assert evaluation_report.final_figure(tmp_path).stat().st_size > 0
