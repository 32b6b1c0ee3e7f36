"""`--dry_run`: what it shows is what the run would do, and nothing is written."""

import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_run import SMALL, refused

from mara_jax.config import Algorithm, LanguageRun, Rollout
from mara_jax.tasks import onetwo
from mara_jax.train import dry_run, reference


@pytest.mark.slow
def test_a_dry_run_shows_the_prompt_scored_completions_and_the_cost_and_writes_nothing(main, tmp_path):
    workdir = tmp_path / "run"
    done = main(*SMALL, f"--workdir={workdir}", "--dry_run")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert not workdir.exists() and not list(tmp_path.iterdir())
    lines = done.stdout
    assert f"<|im_start|>user\n{onetwo.OneTwo().prompt(0)}<|im_end|>\n<|im_start|>assistant" in lines
    table = lines[lines.index("Completions of it") : lines.index("Forecast from")]
    assert len(re.findall(r" -?[0-9.]+$", table, re.MULTILINE)) == 8  # a reward each
    assert re.search(r"reference: \d.*% of 32 samples valid", lines) and "optimum (" in lines
    assert re.search(r"a later one [\d.]+ s: \d+ steps about \d+ ", lines)
    assert re.search(r"Memory at its highest: \d+\.\d\d GiB", lines) and "Nothing was written" in lines


def test_a_dry_run_refuses_what_the_run_would_refuse(main, tmp_path):
    refused(main(*SMALL, f"--workdir={tmp_path / 'run'}", "--dry_run", "--config.algorithm.threshold=1.5"), "threshold")
    refused(main("--config=configs/toy.py", f"--workdir={tmp_path / 'run'}", "--dry_run"), "leave out --dry_run")


@pytest.mark.parametrize(("sizes", "steps"), [((2, 3, 3, 4, 4), 3), ((2, 3, 4, 5, 6, 7), 5), ((2, 2), 2)])
def test_the_step_that_is_quoted_compiles_nothing(monkeypatch, sizes, steps):
    """Sizes of each step: the first of a size compiles. Where all do, five steps are enough. The last takes 1 s."""
    program, made, clock = jax.jit(lambda x: x * 1.5 + len(sizes)), [], [0]
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def step(state, done):
        made.append(state)
        program(np.zeros(sizes[done])).block_until_ready()
        clock[0] += 1 if done == steps - 1 else 9
        return state + 1

    assert dry_run.seconds_of_steps(step, 0) == (9, 1)
    assert made == list(range(steps))


def test_the_objective_says_what_is_left_out():
    sizes = LanguageRun(algorithm=Algorithm(method="vanilla"), rollout=Rollout(equal_groups="replace"))
    task = onetwo.OneTwo()
    assert "left out (rollout.equal_groups=replace)" in reference.describe_run(sizes, task)
    task.leaves_out_truncated = True
    words = reference.describe_run(LanguageRun(algorithm=Algorithm(method="vanilla")), task)
    assert "E[R | finished]" in words and "equal_groups" not in words
    assert reference.describe_run(LanguageRun(), onetwo.OneTwo()) == reference.describe(LanguageRun().algorithm)
