"""The command's runs: what one leaves behind, kills, resumption, and what a workdir refuses."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import chex
import commands
import numpy as np
import pytest
from small_run import SMALL, evaluations, refused, rows

from mara_jax import config, hf
from mara_jax.policies import encoding
from mara_jax.tasks import onetwo
from mara_jax.train import checkpoint, evaluation, placement, prompts, reference, reference_samples, rollouts


@pytest.fixture(scope="module")
def whole(main, tmp_path_factory) -> pathlib.Path:
    """A run from beginning to end."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    done = main(*SMALL, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


KEYS = """step reward/mean reward/augmented_mean valid/fraction answers/entropy_bits kl/reverse tokens/generated
    time/rollout_s time/reward_s time/update_s length/mean mara/augmented_fraction""".split()


def test_metrics_have_the_keys_and_agree_with_each_other(whole):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == [1, 2, 3, 4, 5, 6]
    for row in lines:
        assert set(KEYS) <= row.keys()
        assert row["valid/fraction"] == pytest.approx(sum(row["answers/counts"]) / 8)
        assert row["tokens/generated"] == pytest.approx(8 * row["length/mean"])
        assert abs(row["sampler/logp_gap"]) < 1e-3  # the sampler's log-probs are the trainer's
        assert row["kl/reverse"] >= -1e-5
    assert lines[0]["kl/reverse"] == pytest.approx(0, abs=1e-5)  # before any update the policy is the reference
    assert lines[0]["kl/k1"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["kl/reverse"] > 1e-3
    assert any(0 < row["valid/fraction"] < 1 for row in lines)


def test_a_run_leaves_what_it_says(whole):
    assert {
        "config.json",
        "reference.json",
        "reference",
        "metrics.jsonl",
        "evaluation.jsonl",
        "evaluation.png",
        "tensorboard",
        "checkpoints",
        "rollouts",
        "model",
        "figure.png",
    } <= {path.name for path in whole.iterdir()}
    reference = json.loads((whole / "reference.json").read_text())
    shares = [count / 16 for count in reference["counts"]]
    assert reference["valid"] == pytest.approx(sum(shares))
    if sum(reference["counts"]):
        assert reference["optimum"]["vanilla"][0] == pytest.approx(shares[0] / sum(shares), abs=2e-3)
    assert checkpoint.saved_steps(whole) == sorted({4, 6, best(whole)})  # the newest two, and the best


def best(workdir: pathlib.Path) -> int:
    """The earliest step with a checkpoint after which the most completions had an answer."""
    after = [row for row in evaluations(workdir) if row["step"]]
    return min(row["step"] for row in after if row["valid"] == max(other["valid"] for other in after))


def test_rollouts_are_kept_with_all_that_metrics_are_made_of(whole):
    """Rewards and answers are the task's of the texts; log-probs and rewards have the means that the metrics say."""
    assert rollouts.read(whole).num_rows == 6 * 8 and rollouts.read(whole, 2, 3).num_rows == 2 * 8
    for number, row in enumerate(rows(whole), 1):
        one = rollouts.read(whole, number, number).to_pydict()
        assert one["step"] == [number] * 8 and one["sample"] == list(range(8)) and one["prompt_id"] == [0] * 8
        assert one["prompt"] == [onetwo.PROMPT] * 8
        score = onetwo.OneTwo().score(one["prompt_id"], one["completion"], one["finished"])
        assert (one["reward"], one["answer"]) == (score.reward, score.answer)
        assert np.mean(one["reward"]) == pytest.approx(row["reward/mean"])
        assert 1 - np.mean(one["finished"]) == pytest.approx(row["completions/truncated"])
        assert np.mean(one["logp"]) - row["sampler/logp_gap"] == pytest.approx(row["logp/mean"], rel=1e-5)
        assert row["logp/mean"] - np.mean(one["ref_logp"]) == pytest.approx(row["kl/k1"], abs=1e-3)


def test_evaluations_are_of_the_policies_of_their_steps(whole):
    """Before training the reference, at the end the model that the run left: measured again with the same numbers."""
    assert [row["step"] for row in evaluations(whole)] == [0, 2, 4, 6]
    task, key = onetwo.OneTwo(), reference.stream(0, "evaluation")
    sizes = evaluation.Sizes(8, 48, 0.5, prompts_at_once=1, samples_at_once=3)  # in other calls
    for step, folder in ((0, "reference"), (6, "model")):
        policy, params = hf.load(whole / folder)
        tokens = encoding.encode_prompts(policy.tokenizer, [task.prompt(0)], chat=True)
        policy = prompts.ended_by_turns(policy, True)
        measured = evaluation.measure(task, policy, params, tokens, key, sizes)
        (row,) = [row for row in evaluations(whole) if row["step"] == step]
        assert {"step": step} | measured["metrics"] == row
        table = json.loads((whole / "evaluation" / f"step_{step:06d}.json").read_text())
        assert table == {"step": step} | measured


def test_checkpoints_are_exported_as_models(whole, command, tmp_path):
    """The newest is the model that the run left, byte for byte; another step's is that step's checkpoint."""
    names = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json")
    for step, flags in ((6, []), (4, ["--step=4"]), (best(whole), ["--step=best"])):
        shutil.rmtree(tmp_path / str(step), ignore_errors=True)
        done = command("mara_jax.export", f"--workdir={whole}", f"--out={tmp_path / str(step)}", *flags)
        assert (done.returncode, done.stderr) == (0, "") and f"step {step} of {whole}: model: {tmp_path}" in done.stdout
        for name in names:
            same = (tmp_path / str(step) / name).read_bytes() == (whole / "model" / name).read_bytes()
            assert same == (step == 6 or name != "model.safetensors"), (step, name)
    policy, exported = hf.load(str(tmp_path / "4"))
    shapes = placement.abstract_params(policy.architecture)
    chex.assert_trees_all_equal(exported, checkpoint.read_params(whole, 4, shapes))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--step=5"], "holds no checkpoint of step 5: it has "),
        (["--step=bets"], "--step=bets is neither the number of a step nor best"),
        (["--out=mara_jax"], "mara_jax exists already: choose another --out"),
        (["--workdir=nowhere"], "nowhere/config.json does not exist: --workdir names the workdir of a run"),
    ],
)
def test_what_cannot_be_exported_is_one_line(whole, command, tmp_path, flags, words):
    done = command("mara_jax.export", f"--workdir={whole}", f"--out={tmp_path / 'out'}", *flags)
    refused(done, words)
    assert done.returncode == 2 and not (tmp_path / "out").exists()


def test_the_gap_to_the_optimum_follows_from_counts(whole):
    """Pooled over at most 8 batches, so over all 6: MARA's optimum halves the answers but for what no answer gets."""
    measured = json.loads((whole / "reference.json").read_text())
    kept = reference_samples.ReferenceSamples(whole / "reference_samples.jsonl", 16, 1).known[0]
    log_optimum = reference.log_optimum(config.Algorithm(), kept, onetwo.ANSWERS, onetwo.OneTwo())
    assert log_optimum is not None
    line = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    counts = np.sum([row["answers/counts"] for row in rows(whole)], axis=0)
    share = np.append(counts, 48 - counts.sum()) / 48
    optimum = np.exp(log_optimum)
    assert optimum.sum() == pytest.approx(1, abs=1e-5)
    assert line["gap/tv_optimum"] == pytest.approx(np.abs(share - optimum).sum() / 2, abs=1e-5)
    assert line["gap/tv_uniform"] == pytest.approx(np.abs(share - [0.5, 0.5, 0]).sum() / 2)
    assert min(line["gap/kl_to_optimum"], line["gap/kl_from_optimum"]) > 0
    # No answer earns 0, an answer 1: e^-10 of what the reference gives it, if it gave any.
    none = 1 - measured["valid"]
    if none and all(measured["counts"]):
        most = max(measured["counts"]) / 16
        assert log_optimum[2] == pytest.approx(np.log(none / (2 * most)) - 10, abs=1e-3)


def test_the_measured_samples_are_kept(whole):
    reference = json.loads((whole / "reference.json").read_text())
    kept = [json.loads(line) for line in (whole / "reference_samples.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in kept].count("1") == reference["counts"][0]
    assert len(kept) == 16 and [row["text"] for row in kept[:8]] == reference["text"][0]
    assert all(row["ref_logp"] < 0 and row["reward"] == (row["answer"] is not None) for row in kept)


def test_the_mode_ledger_is_counted_from_rollouts_and_reference_samples(whole):
    (one,) = [json.loads(line) for line in (whole / "modes.jsonl").read_text().splitlines()]
    kept = [json.loads(line) for line in (whole / "reference_samples.jsonl").read_text().splitlines()]
    given = rollouts.read(whole).to_pydict()
    assert (one["completions"], one["window"], one["reference_samples"]) == (48, 48, 16)
    good = {row["answer"] for row in kept if row["reward"]} | {
        answer for answer, reward in zip(given["answer"], given["reward"], strict=True) if reward
    }
    assert {row["answer"] for row in one["answers"]} == good != set()
    for row in one["answers"]:
        steps = [step for step, answer in zip(given["step"], given["answer"], strict=True) if answer == row["answer"]]
        assert row["reference"] == sum(other["answer"] == row["answer"] for other in kept) / 16
        assert row["policy"] == len(steps) / 48 and row["missed"] == 8 * (6 - max(steps, default=0))
        assert [row["first_step"], row["last_step"]] == ([min(steps), max(steps)] if steps else [None, None])
    assert [row["modes/known"] for row in rows(whole)][-1] == len(good)
    assert one["prompt"] == onetwo.PROMPT[:200]


def test_killed_and_resumed_equals_uninterrupted(main, whole, quick_environment, tmp_path):
    """From the warmed-up reference on."""
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl", "figure.png"))
    process = subprocess.Popen(
        [sys.executable, "-m", "mara_jax.main", *SMALL, f"--workdir={workdir}"],
        cwd=commands.ROOT, env=os.environ | quick_environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.time() + 240
    while not (workdir / "metrics.jsonl").exists() or len(rows(workdir)) < 3:
        assert process.poll() is None and time.time() < deadline, "ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(rows(workdir)) < 6
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "cut')  # what a kill in mid-write leaves
    done = main(*SMALL, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout
    assert rows(workdir) == rows(whole)
    assert evaluations(workdir) == evaluations(whole) and best(workdir) in checkpoint.saved_steps(workdir)
    assert rollouts.read(workdir).equals(rollouts.read(whole))
    assert (workdir / "modes.jsonl").read_bytes() == (whole / "modes.jsonl").read_bytes()


def test_more_steps_continue_a_finished_run(main, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    done = main(*SMALL, f"--workdir={workdir}", "--config.steps=7")
    assert done.returncode == 0, done.stderr
    assert rows(workdir)[:6] == rows(whole) and len(rows(workdir)) == 7
    assert evaluations(workdir)[:4] == evaluations(whole)
    assert [row["step"] for row in evaluations(workdir)] == [0, 2, 4, 6, 7]


def test_a_run_goes_on_from_the_checkpoint_before_one_that_was_cut(main, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    largest = max(
        (p for p in (workdir / "checkpoints" / "6").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    os.truncate(largest, largest.stat().st_size // 2)
    done = main(*SMALL, f"--workdir={workdir}", "--config.steps=7")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "is damaged" in line]
    assert "checkpoints/6 is damaged" in line and "goes on from that of step 4" in line
    assert (workdir / "damaged" / "6").is_dir() and rows(workdir)[:6] == rows(whole) and len(rows(workdir)) == 7
    (workdir / "checkpoints" / "7").rename(tmp_path / "7")  # steps are left, of a run that had ended
    done = main(*SMALL, f"--workdir={workdir}", "--config.steps=7")
    assert done.returncode == 0 and "resuming after step 6" in done.stdout
    refused(main(*SMALL, f"--workdir={workdir}", "--config.steps=7"), "no step is left: ", "after step 7 (steps=7)")


def test_a_workdir_of_another_config_is_refused(main, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    refused(main(*SMALL, f"--workdir={whole}", "--config.algorithm.beta=0.2"), "another config", "algorithm.beta")
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*")}


def test_a_tokenizer_that_is_not_utf8_is_one_line(whole, tmp_path):
    weights = tmp_path / "weights"
    shutil.copytree(whole / "reference", weights)
    path = weights / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:200] + b"\xff\xfe" + path.read_bytes()[200:])
    workdir = tmp_path / "run"
    given = [*SMALL, f"--workdir={workdir}", f"--config.policy.weights={weights}", "--config.warmup.steps=0"]
    done = commands.alone("mara_jax.main", *given)  # as a person starts it: what is imported on the way says nothing
    refused(done, "tokenizer.json", "UTF-8")
    assert not workdir.exists()


def test_a_saved_reference_serves_as_weights_of_another_run(main, whole, tmp_path):
    workdir = tmp_path / "run"
    done = main(
        *SMALL, f"--workdir={workdir}", f"--config.policy.weights={whole / 'reference'}", "--config.warmup.steps=0",
        "--config.steps=1", "--config.algorithm.method=vanilla",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after = (json.loads((x / "reference.json").read_text()) for x in (whole, workdir))
    assert before["counts"] == after["counts"] and before["text"] == after["text"]  # the same weights, bit for bit
    assert not (workdir / "reference").exists()


SEVERAL = """--config.optimiser.updates=3 --config.algorithm.importance=token --config.algorithm.clip=0.2
    --config.algorithm.truncate=2.0 --config.optimiser.first_moment=bfloat16 --config.steps=4""".split()


@pytest.mark.slow
def test_several_updates_a_rollout_resume_exactly(main, tmp_path):
    """A step is a rollout with all its updates: two runs of two steps are one of four, bfloat16 moments included."""
    done = main(*SMALL, *SEVERAL, f"--workdir={tmp_path}/whole")
    assert done.returncode == 0, done.stderr
    for steps in (2, 4):
        done = main(*SMALL, *SEVERAL, f"--config.steps={steps}", f"--workdir={tmp_path}/cut")
        assert done.returncode == 0, done.stderr
    assert "resuming after step 2" in done.stdout
    several = rows(tmp_path / "whole")
    assert rows(tmp_path / "cut") == several and len(several) == 4
    assert several[0]["kl/reverse"] == pytest.approx(0, abs=1e-5)  # of the first update, before which nothing moved
    for row in several:
        assert row["ratio/max"] > 1.001 and 1 <= row["ratio/effective_samples"] <= 8
        # The sampler is the trainer: weights of 1 but for rounding.
        assert row["sampler_weight/mean"] == pytest.approx(1, abs=1e-3)
        assert row["sampler_weight/max"] == pytest.approx(1, abs=1e-2)
        assert row["sampler_weight/truncated_fraction"] == 0
