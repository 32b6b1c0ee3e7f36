"""`--dry_run`: what it shows is what the run would do, and nothing is written."""

import re

from small_run import SMALL, refused

from mara_jax.tasks import onetwo


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
