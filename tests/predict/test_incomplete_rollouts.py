"""Stored rollouts that lack something: completions cut at the limit, answers, samples of the reference, task files."""

import json
import pathlib

import numpy as np
import pyarrow
import pytest
from enumerated_rollouts import settings, stored
from pyarrow import parquet

from mara_jax import config
from mara_jax.core import reweighted
from mara_jax.predict import replay, stored_rollouts
from mara_jax.tasks import onetwo, prompts
from mara_jax.train import reference_samples, rollouts
from mara_jax.train import workdir as workdirs

# ---- what a run stores ----------------------------------------------------------------------------------------------


def write_run(workdir: pathlib.Path, **changed) -> pathlib.Path:
    """The run directory of two steps, each a group of two completions under prompt 7."""
    folder = workdir / rollouts.FOLDER
    folder.mkdir(parents=True)
    workdirs.claim(workdir, config.LanguageRun(policy=config.Policy(weights="weights"), **changed))
    for step in (1, 2):
        columns = {
            "step": np.full(2, step, np.int32),
            "prompt_id": np.full(2, 7),
            "prompt": ["Which?"] * 2,
            "sample": np.arange(2, dtype=np.int32),
            "completion": ["one", "two"],
            "reward": [1.0, 0.5],
            "answer": ["a", None],
            "logp": np.log([0.5, 0.25]),
            "ref_logp": np.log([0.25, 0.5]),
            "finished": [True, False],
        }
        parquet.write_table(pyarrow.table(columns), folder / f"step_{step:06d}.parquet")
    return workdir


def test_the_task_says_whether_truncated_completions_are_left_out(tmp_path, monkeypatch):
    workdir = write_run(tmp_path / "run", task=onetwo.Config())
    assert not stored_rollouts.read(workdir).leaves_out_truncated
    monkeypatch.setattr(onetwo.OneTwo, "leaves_out_truncated", True)
    assert stored_rollouts.read(workdir).leaves_out_truncated


@pytest.mark.parametrize("truncated", ["mask", "score"])
def test_a_task_whose_files_have_gone_is_judged_by_its_settings(tmp_path, truncated):
    task = prompts.Config(prompts=str(tmp_path / "gone.jsonl"), reward="gone.py:right", truncated=truncated)
    workdir = write_run(tmp_path / "run", task=task)
    assert stored_rollouts.read(workdir).leaves_out_truncated == (truncated == "mask")


def test_only_the_columns_that_are_asked_for_are_read(tmp_path, monkeypatch):
    """All that a step's file should have is checked, and completions stay on the disk."""
    workdir, asked = write_run(tmp_path / "run", task=onetwo.Config()), []
    read_table = parquet.read_table
    monkeypatch.setattr(
        parquet, "read_table", lambda path, columns=None: asked.append(columns) or read_table(path, columns=columns)
    )
    rollout = stored_rollouts.read(workdir)
    assert len(asked) == 2 and all(columns and "completion" not in columns for columns in asked)
    assert rollout.text == {7: "Which?"} and rollout.prompt_id.tolist() == [7, 7] and rollout.step.tolist() == [1, 2]
    assert rollout.answer == [["a", None]] * 2 and rollout.finished.tolist() == [[True, False]] * 2
    assert rollout.reward.tolist() == [[1.0, 0.5]] * 2 and np.allclose(np.exp(rollout.logp), [0.5, 0.25])
    assert rollouts.read(workdir, 2, columns=["reward"]).to_pydict() == {"reward": [1.0, 0.5]}
    path = workdir / rollouts.FOLDER / "step_000002.parquet"
    parquet.write_table(read_table(path).drop_columns(["completion"]), path)
    with pytest.raises(ValueError, match="lacks the column completion"):
        rollouts.read(workdir, columns=["reward"])


def test_a_member_has_the_reference_samples_of_its_population(tmp_path):
    """Drawn on first use they lie in the population's folder alone; another run beside such a file has none."""
    workdir = write_run(tmp_path / "members" / "vanilla", task=onetwo.Config())
    rows = [{"prompt": 7, "ref_logp": -1.0, "reward": reward, "answer": "a", "text": ""} for reward in (1.0, 0.25)]
    (tmp_path / reference_samples.FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert stored_rollouts.read(workdir).reference == {}
    workdirs.write_json(tmp_path / "population.json", {"members": []})
    assert stored_rollouts.read(workdir).reference[7].reward.tolist() == [1.0, 0.25]
    (workdir / reference_samples.FILE).write_text(json.dumps(rows[0]) + "\n")
    assert stored_rollouts.read(workdir).reference[7].reward.tolist() == [1.0]


# ---- what is made of it ---------------------------------------------------------------------------------------------


def test_the_mean_weight_is_that_of_all_completions():
    """The second policy has .6 of what does not end, the reference .4: the finished alone average 1.2,
    and all of them 1."""
    rollout = stored(leaves_out_truncated=True)
    rollout = rollout._replace(finished=rollout.ref_logp < np.log(0.3))
    record = replay.replay(rollout, [settings()], resamples=0)
    (reference,) = record["reference"]
    assert reference["mean_weight"] == pytest.approx(1.0) and reference["count"] == 400
    assert record["notes"] == []
    assert record["settings"][0]["prompts"][0]["count"] == 20 * 6 + 20 * 4


def test_a_prompt_without_a_finished_completion_is_left_out():
    """The optimum is that of the other prompt alone; where no prompt is left there is nothing to replay."""
    two = stored(prompt_id=np.repeat([3, 5], 20), text={3: "x", 5: "y"}, leaves_out_truncated=True)
    two = two._replace(finished=two.finished & (two.prompt_id == 3)[:, None])
    one = two._replace(**{name: getattr(two, name)[:20] for name in ("step", "prompt_id", "reward", "logp")})
    one = one._replace(answer=two.answer[:20], ref_logp=two.ref_logp[:20], finished=two.finished[:20], text={3: "x"})
    left, alone = (replay.replay(rollout, [settings()], resamples=0) for rollout in (two, one))
    assert left["settings"][0]["mean"] == alone["settings"][0]["mean"]
    assert [one["prompt_id"] for one in left["reference"]] == [3] and left["rollouts"]["prompts_left_out"] == 1
    assert left["notes"] == ["Optima lack 1 of 2 prompts: no completion under them ends"] and alone["notes"] == []
    with pytest.raises(ValueError, match=r"no stored completion ends.*truncated=mask"):
        replay.replay(two._replace(finished=np.zeros_like(two.finished)), [settings()], resamples=0)


def test_a_mean_weight_above_one_has_two_causes():
    rollout = stored()
    record = replay.replay(rollout._replace(logp=rollout.logp - 0.5), [settings()], resamples=0)
    assert record["notes"][0].endswith(
        "or sampler and trainer round differently: see sampler/logp_gap in metrics.jsonl"
    )


def test_a_note_says_where_masses_are_those_of_the_completions():
    """Prompt 0 has samples of the reference, prompt 5 has none; vanilla RL needs none."""
    rollout = stored(prompt_id=np.repeat([0, 5], 20), text={0: "x", 5: "y"})
    record = replay.replay(rollout, [settings(), settings("answers")], resamples=0)
    assert [one["own_samples"] for one in record["reference"]] == [4, 0]
    assert any("under 1 of 2 prompts, whose masses" in note for note in record["notes"])
    assert replay.replay(rollout, [settings()], resamples=0)["notes"] == []
    measured = replay.replay(stored(), [settings("answers")], resamples=0)
    assert measured["notes"] == []


def test_resamples_without_an_answer_are_left_out_of_the_intervals_of_shares():
    """One completion of 400 has an answer: 37 % of the resamples have none, and all others give it the whole share."""
    answer = [["a" if group + sample == 0 else None for sample in range(10)] for group in range(40)]
    record = replay.replay(stored(answer=answer), [settings()], resamples=60)
    (prompt,) = record["settings"][0]["prompts"]
    assert prompt["share"] == prompt["share_low"] == prompt["share_high"] == [1.0]
    assert prompt["number_low"] == 1.0 and prompt["number_high"] == 2.0  # their 0, mirrored at the estimate of 1


def test_an_interval_is_over_the_resamples_that_have_a_number():
    rows = np.array([[0.5, 0.5, np.nan], [0.2, np.nan, np.nan], [0.4, 0.6, np.nan]])
    ends = replay.intervals({"share": rows, "reward": rows[:, 0], "alone": rows[:1]})
    assert ends["share_low"] == [pytest.approx(0.205), pytest.approx(0.6), None]
    assert ends["reward_high"] == pytest.approx(0.395)
    assert ends["alone_low"] == [None, None, None]


def test_only_what_is_shown_is_resampled(monkeypatch):
    """Prompt 5 has 20 completions at an optimum of one: the mean is not shown, and prompt 3 alone is resampled; its
    numbers are those that it has without the other."""
    resampled, optimum = [], reweighted.optimum

    def counted(*args, resamples, **named):
        resampled.append(resamples)
        return optimum(*args, resamples=resamples, **named)

    monkeypatch.setattr(reweighted, "optimum", counted)
    rollout = stored(prompt_id=np.repeat([3, 5], [38, 2]), text={3: "x", 5: "y"})
    rollout = rollout._replace(reward=rollout.reward + 40.0 * (np.arange(400) == 399).reshape(40, 10))
    (entry,) = replay.replay(rollout, [settings()], resamples=20)["settings"]
    assert sorted(resampled) == [0, 0, 20]
    shown, few = entry["prompts"]
    assert shown["too_small"] is None and shown["reward_low"] < shown["reward"] < shown["reward_high"]
    assert few["too_small"] and few["reward_low"] is None and entry["mean"]["too_small"]
    assert entry["mean"]["reward_low"] is None
    assert entry["mean"]["reward"] == pytest.approx((shown["reward"] + few["reward"]) / 2)
    names = ("step", "prompt_id", "reward", "answer", "logp", "ref_logp", "finished")
    first = rollout._replace(text={3: "x"}, **{name: getattr(rollout, name)[:38] for name in names})
    assert replay.replay(first, [settings()], resamples=20)["settings"][0]["prompts"] == [shown]
