"""Open answers: their indices, metrics by hand, kept samples of the reference policy, and a run that is killed."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import commands
import numpy as np
import pytest
from small_run import rows

from mara_jax.config import LanguageRun, Reference
from mara_jax.train import group_metrics, reference_samples, scoring
from mara_jax.train.reference_samples import PromptSamples, ReferenceSamples

DIGITS = """--config=configs/digits.py --config.task.prompts=20 --config.policy.layers=1 --config.policy.embed=64
    --config.warmup.batch=16 --config.warmup.steps=60 --config.warmup.learning_rate=1e-2 --config.reference.samples=6
    --config.rollout.prompts_per_step=4 --config.rollout.group_size=4 --config.rollout.length_buckets=1
    --config.steps=6 --config.checkpoint.every=2""".split()


def test_an_answer_has_one_index_within_its_prompt():
    answers = scoring.AnswerIndices(2)
    assert answers.of([["red", None, "red"], ["blue", "red", "blue"]]).tolist() == [[0, -1, 0], [0, 1, 0]]
    # Another array of the same prompts: what is known keeps its index, what is new has the next.
    assert answers.of([["green", "red"], ["", "red"]]).tolist() == [[1, 0], [2, 1]]


def test_metrics_of_a_step_by_hand():
    tokens = np.array([[[1, 2, 9], [1, 2, 7], [3, 4, 5]], [[1, 1, 1], [1, 1, 1], [1, 1, 1]]])
    lengths = np.array([[2, 2, 3], [3, 3, 3]])  # behind its end the second differs from the first
    finished = np.array([[True, True, False], [True, True, True]])
    answers = [["x", "x", None], ["x", "y", "z"]]
    scores = scoring.GroupScores(
        np.array([[1, 0, 0.5], [2, 2, 2]]), answers, {"words": np.array([[1, 2, 3], [4, 5, 6]])}
    )
    assert group_metrics.of_step(scores, tokens, lengths, finished) == pytest.approx(
        {
            "valid/fraction": 5 / 6,
            "answers/distinct": 2.0,  # one and three
            "groups/equal_rewards": 0.5,
            "completions/duplicates": 0.5,  # one of the first group, two of the second
            "completions/commonest": 5 / 6,  # two thirds and all
            "completions/truncated": 1 / 6,
            "task/words": 3.5,
        }
    )


def test_entropy_is_a_mean_over_the_prompts_of_the_window():
    steps = [
        group_metrics.by_prompt(np.array([7, 8]), [["a", "a", None], [None, None, None]]),
        group_metrics.by_prompt(np.array([7, 9]), [["b", "b", "a"], ["a", "", "c"]]),
    ]
    assert json.loads(json.dumps(steps)) == steps
    counts = group_metrics.pooled(steps)
    assert counts[7] == {"a": 3, "b": 2, None: 1} and counts[8] == {None: 3}
    of_7 = -(0.6 * np.log2(0.6) + 0.4 * np.log2(0.4))
    of_9 = np.log2(3)  # an empty answer is one like any other
    assert group_metrics.of_window(counts) == pytest.approx(
        {"answers/entropy_bits": (of_7 + 0 + of_9) / 3, "answers/effective": (2**of_7 + 0 + 3) / 3}
    )


def test_long_answers_stay_apart_in_the_log():
    long = "x" * 500
    ((number, counts),) = group_metrics.by_prompt(np.array([3]), [[long + "1", long + "2", long + "1"]])
    assert number == 3 and sorted(counts.values()) == [1, 2] and max(map(len, counts)) == group_metrics.LONGEST_NAME


def sample(number: int, count: int) -> PromptSamples:
    reward = np.arange(count, dtype=np.float32) + np.float32(0.1) * number
    return PromptSamples(reward, [None, *"abcdefgh"][:count], -reward.astype(np.float64), [f"{number}\n…"] * count)


def test_samples_are_drawn_once_and_read_back(tmp_path):
    path, calls = tmp_path / "samples.jsonl", []

    def draw(ids):
        calls.append(ids.tolist())
        return [sample(int(number), 3) for number in ids]

    store = ReferenceSamples(path, 3, at_once=2)
    assert [one.text[0][0] for one in store.of([4, 1, 4, 2], draw)] == ["4", "1", "4", "2"]
    assert calls == [[4, 1], [2, 2]]  # always two prompts, so that one program serves all calls
    again = ReferenceSamples(path, 3, at_once=2)
    for number in (1, 2, 4):
        for name, value in store.known[number]._asdict().items():
            assert (
                np.array_equal(value, getattr(again.known[number], name))
                if name in ("reward", "logp")
                else (value == getattr(again.known[number], name))
            )
    again.of([1, 2], draw)
    assert len(calls) == 2
    again.of([2, 3], draw)
    assert calls[2:] == [[3, 3]]


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_file_that_a_kill_cut_short_is_mended(tmp_path, cut):
    path = tmp_path / "samples.jsonl"
    draw = lambda ids: [sample(int(number), 3) for number in ids]  # noqa: E731
    ReferenceSamples(path, 3, at_once=1).of([5, 6], draw)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    store = ReferenceSamples(path, 3, at_once=1)
    assert set(store.known) == {5} and path.read_bytes() == whole[: len(path.read_bytes())]
    store.of([6], draw)
    assert path.read_bytes() == whole


def test_a_line_that_is_no_sample_is_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 1 is no sample: delete the file"):
        ReferenceSamples(path, 3, 1)


def test_few_prompts_are_sampled_before_training_and_many_on_first_use():
    assert reference_samples.before_training(LanguageRun(), 16) and not reference_samples.before_training(
        LanguageRun(), 17
    )
    assert (reference_samples.count(LanguageRun(), 16), reference_samples.count(LanguageRun(), 17)) == (256, 16)
    always = LanguageRun(reference=Reference(drawn="before_training", samples=9))
    assert reference_samples.before_training(always, 10**6) and reference_samples.count(always, 10**6) == 9
    assert not reference_samples.before_training(LanguageRun(reference=Reference(drawn="on_first_use")), 1)


@pytest.fixture(scope="module")
def whole(main, tmp_path_factory) -> pathlib.Path:
    """A run with open answers and samples drawn on first use, from beginning to end."""
    workdir = tmp_path_factory.mktemp("open") / "run"
    done = main(*DIGITS, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "reference: not measured before training" in done.stdout and "how the run changed" in done.stdout
    return workdir


def test_each_prompt_is_sampled_when_a_step_first_uses_it(whole):
    used = [[number for number, _ in row["answers/by_prompt"]] for row in rows(whole)]
    kept = [json.loads(line) for line in (whole / "reference_samples.jsonl").read_text().splitlines()]
    order = list(dict.fromkeys(row["prompt"] for row in kept))
    assert order == list(dict.fromkeys(number for step in used for number in step)) and len(kept) == 6 * len(order)
    assert sorted(number for step in used[:5] for number in step) == list(range(20))  # an epoch: every prompt once
    # A prompt that comes back has no new samples.
    assert len(order) == 20 and len(used[5]) == 4


def test_killed_and_resumed_equals_uninterrupted(main, whole, quick_environment, tmp_path):
    """The run dies after its first checkpoint, in the middle of writing samples of prompts that came after it."""
    resumes_exactly(main, DIGITS, whole, quick_environment, tmp_path / "run")


@pytest.mark.slow
def test_prompts_that_are_replaced_are_the_same_after_a_kill(main, quick_environment, tmp_path):
    """Groups of two often have equal rewards."""
    flags = [*DIGITS, "--config.rollout.equal_groups=replace", "--config.rollout.long_prompts=replace"]
    flags += ["--config.rollout.group_size=2"]
    whole = tmp_path / "whole"
    done = main(*flags, f"--workdir={whole}")
    assert done.returncode == 0, done.stderr
    assert sum(row["groups/redrawn"] for row in rows(whole)) > 0 and rows(whole)[0]["prompts/too_long"] == 0
    resumes_exactly(main, flags, whole, quick_environment, tmp_path / "run")
    for path in (whole / "rollouts").iterdir():
        assert path.read_bytes() == (tmp_path / "run" / "rollouts" / path.name).read_bytes()


def resumes_exactly(main, flags, whole, environment, workdir) -> None:
    """Kills a run in `workdir` that begins as `whole` did, resumes it, and compares what both wrote."""
    kept = "checkpoints", "metrics.jsonl", "figure.*", "reference_samples.jsonl", "rollouts"
    shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns(*kept))
    process = subprocess.Popen(
        [sys.executable, "-m", "mara_jax.main", *flags, f"--workdir={workdir}"],
        cwd=commands.ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.time() + 240
    while not (workdir / "metrics.jsonl").exists() or len(rows(workdir)) < 3:
        assert process.poll() is None and time.time() < deadline, "ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    samples = workdir / "reference_samples.jsonl"
    assert len(rows(workdir)) < 6
    expected = (whole / samples.name).read_bytes()
    assert expected.startswith(samples.read_bytes())
    samples.write_bytes(samples.read_bytes()[:-50])
    done = main(*flags, f"--workdir={workdir}")
    assert done.returncode == 0 and "resuming after step" in done.stdout, done.stderr
    assert rows(workdir) == rows(whole)
    assert samples.read_bytes() == expected
