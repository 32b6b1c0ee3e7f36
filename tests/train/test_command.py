"""The command as a process: bad input, kills, resumption, and what a run leaves behind."""

import contextlib
import copy
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import commands
import jax
import numpy as np
import pytest

from mara_jax import config
from mara_jax.config import Algorithm, LanguageRun, Rollout, Toy, ToyRun, Warmup
from mara_jax.hf import tokenizer
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.tasks import onetwo
from mara_jax.train import loop, metrics, preflight, reference, startup
from mara_jax.train import workdir as workdirs

ROOT = pathlib.Path(__file__).parents[2]
SMALL = """--config=configs/onetwo.py:nano --config.policy.layers=1 --config.policy.embed=64
    --config.warmup.steps=120 --config.warmup.learning_rate=1e-2 --config.warmup.measure_samples=16
    --config.rollout.group_size=8 --config.rollout.max_new_tokens=48 --config.rollout.length_buckets=1
    --config.checkpoint.every=2
    --config.steps=6""".split()


@pytest.fixture(scope="session")
def main(command) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the command with flags."""
    return functools.partial(command, "mara_jax.main")


def rows(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without clocks."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in lines]


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
    assert {"config.json", "reference.json", "reference", "metrics.jsonl", "checkpoints", "figure.png"} <= {
        path.name for path in whole.iterdir()
    }
    reference = json.loads((whole / "reference.json").read_text())
    shares = [count / 16 for count in reference["counts"]]
    assert reference["valid"] == pytest.approx(sum(shares))
    if sum(reference["counts"]):
        assert reference["optimum"]["vanilla"][0] == pytest.approx(shares[0] / sum(shares), abs=2e-3)
    assert sorted(int(p.name) for p in (whole / "checkpoints").iterdir() if p.name.isdigit()) == [4, 6]


def test_the_gap_to_the_optimum_follows_from_counts(whole):
    """Pooled over at most 8 batches, so over all 6: MARA's optimum halves the answers but for what no answer gets."""
    reference = json.loads((whole / "reference.json").read_text())
    line = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    counts = np.sum([row["answers/counts"] for row in rows(whole)], axis=0)
    share = np.append(counts, 48 - counts.sum()) / 48
    optimum = np.exp(reference["log_optimum"])
    assert optimum.sum() == pytest.approx(1, abs=1e-5)
    assert line["gap/tv_optimum"] == pytest.approx(np.abs(share - optimum).sum() / 2, abs=1e-5)
    assert line["gap/tv_uniform"] == pytest.approx(np.abs(share - [0.5, 0.5, 0]).sum() / 2)
    assert min(line["gap/kl_to_optimum"], line["gap/kl_from_optimum"]) > 0
    # No answer earns 0, an answer 1: e^-10 of what the reference gives it, if it gave any.
    none = 1 - reference["valid"]
    if none and all(reference["counts"]):
        most = max(reference["counts"]) / 16
        assert reference["log_optimum"][2] == pytest.approx(np.log(none / (2 * most)) - 10, abs=1e-3)


def test_the_measured_samples_are_kept(whole):
    reference = json.loads((whole / "reference.json").read_text())
    kept = [json.loads(line) for line in (whole / "reference_samples.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in kept].count("1") == reference["counts"][0]
    assert len(kept) == 16 and [row["text"] for row in kept[:8]] == reference["text"][0]
    assert all(row["ref_logp"] < 0 and row["reward"] == (row["answer"] is not None) for row in kept)


def test_killed_and_resumed_equals_uninterrupted(main, whole, quick_environment, tmp_path):
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "mara_jax.main", *SMALL, f"--workdir={workdir}"],
        cwd=ROOT, env=os.environ | quick_environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
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


def test_more_steps_continue_a_finished_run(main, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    done = main(*SMALL, f"--workdir={workdir}", "--config.steps=7")
    assert done.returncode == 0, done.stderr
    assert rows(workdir)[:6] == rows(whole) and len(rows(workdir)) == 7


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """One line on stderr with these words, a non-zero status, no traceback."""
    assert done.returncode not in (0, None)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in done.stderr + done.stdout


def test_a_cut_checkpoint_is_one_clear_line(main, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    largest = max(
        (p for p in (workdir / "checkpoints" / "6").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    os.truncate(largest, largest.stat().st_size // 2)
    before = (workdir / "metrics.jsonl").read_bytes()
    refused(
        main(*SMALL, f"--workdir={workdir}", "--config.steps=8"),
        "checkpoints/6",
        "delete that folder",
        "step 4",
    )
    assert (workdir / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(workdir / "checkpoints" / "6")  # the cure that the line names
    done = main(*SMALL, f"--workdir={workdir}")
    assert done.returncode == 0 and rows(workdir) == rows(whole)


def test_a_workdir_of_another_config_is_refused(main, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*")}
    refused(main(*SMALL, f"--workdir={whole}", "--config.algorithm.beta=0.2"), "another config", "algorithm.beta")
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*")}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config.algorithm.bta=1"], ["algorithm.bta", "it has method, anchor, kl, beta, threshold"]),
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
        rope_scaling=None, norm_eps=1e-6, tie_embeddings=True, qkv_bias=True, qk_norm=False, max_positions=200,
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
    cfg = LanguageRun(policy=config.Policy(weights="nano"), warmup=Warmup(steps=2), rollout=Rollout(**rollout))
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
        preflight.check_threshold(run)


@pytest.mark.parametrize(
    "text", ["{}", "[]", "{", '{"samples": 1, "answers": [], "counts": [], "optimum": {}, "objective": ""}']
)
def test_a_damaged_reference_is_named_with_the_cure(tmp_path, text):
    (tmp_path / "reference.json").write_text(text)
    with pytest.raises(ValueError, match=r"reference\.json .* Delete it, and the reference is measured again$"):
        startup.measured_reference(LanguageRun(), None, None, None, None, tmp_path, None)


def test_metrics_keep_finished_steps_and_name_a_line_that_is_none(tmp_path):
    path, row = tmp_path / "metrics.jsonl", '{"step": 1, "answers/counts": [1, 2], "samples": 4}\n'
    path.write_text(row + row.replace("1", "2", 1) + '{"step": 3, "cut')
    log = metrics.Log(path, 1)
    log.close()
    assert [kept["step"] for kept in log.rows] == [1] and path.read_text() == row
    for line in ('{"a": 1}', "5", "cut"):
        path.write_text(row + line + "\n" + row)
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no step of a run: delete that line"):
            metrics.Log(path, 1)
        assert path.read_text() == row + line + "\n" + row


def test_a_prompt_and_its_completion_may_fill_the_context(monkeypatch):
    weights(monkeypatch, template="1" * 160)
    policy, _ = reference.load_base(LanguageRun(), onetwo.OneTwo())
    reference.check_context(LanguageRun(rollout=Rollout(max_new_tokens=40)), policy, onetwo.OneTwo())
    with pytest.raises(ValueError, match=r"use at most 40$"):
        reference.check_context(LanguageRun(rollout=Rollout(max_new_tokens=41)), policy, onetwo.OneTwo())


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
