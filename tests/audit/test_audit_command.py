"""The audit command: what it prints, what it refuses, and that a refused configuration can still be audited."""

import json
import pathlib
import subprocess
import sys

import pytest

from mara_jax import config
from mara_jax.audit import command

ROOT = pathlib.Path(__file__).parents[2]
NANO = f"--config={ROOT}/configs/onetwo.py:nano"
TOY = f"--config={ROOT}/configs/toy.py"


def test_json_is_one_object_and_nothing_else():
    command = [sys.executable, "-m", "mara_jax.audit", "--as=k1_in_loss", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    record = json.loads(done.stdout)
    assert record["kl"] == {"name": "none", "level": None, "beta": 0.0}
    assert record["verdict"].startswith("nothing is regularised") and record["algorithm"]["level"] == "token"
    assert record["five_outcomes"]["mara"][2] > 0.9999
    assert record["refused"] is None and record["anchor_in_group"] == []
    listed = record["problem"]
    assert len({tuple(tokens) for tokens in listed["tokens"]}) == 15 and sum(listed["reference"]) == pytest.approx(1)
    # Every string ends with token 2 or is three tokens long, and nothing regularises: only the best rewards are left.
    assert all(len(tokens) == 3 or tokens[-1] == 2 for tokens in listed["tokens"])
    left = zip(record["stationary"]["probability"], listed["reward"], listed["answer"], strict=True)
    assert all(reward == 1 and answer in (0, 1, 2) for p, reward, answer in left if p > 1e-6)


def test_a_configuration_that_training_refuses_is_audited_and_the_refusal_is_told(capsys):
    flags = ["audit", TOY, "--config.algorithm.estimator=k3_in_loss", "--config.algorithm.method=vanilla"]
    assert command.main(flags) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Verdict: forward KL at sequence level, exactly; optimum: beta ref(y) / (Lambda - R(y))." in printed
    assert "Training refuses this configuration: algorithm.estimator=k3_in_loss" in printed
    assert "At sequence level, as here: k3 of the whole string as a loss term optimises the forward KL" in printed
    assert "without MARA 0.6287 0.3143 0.0524 0.0037 0.0009" in printed
    assert "with MARA over strings 0.2337 0.1600 0.6023" in printed
    assert "5 strings" in printed


def test_a_language_runs_threshold_out_of_reach_is_a_refusal():
    asked = command.parse(["audit", NANO, "--config.algorithm.threshold=5.0"])
    assert command.refusal(config.build(asked["config"].value)).startswith(
        "algorithm.threshold=5.0 is above every reachable reward (1.0)"
    )
    asked = command.parse(["audit", NANO, "--config.algorithm.threshold=1.0"])
    assert command.refusal(config.build(asked["config"].value)) == ""


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to audit: give --config=FILE.py or --as=NAME"),
        (["--as=grqo"], "--as=grqo is unknown: choose one of k1_in_loss"),
        (["--as=grpo", "--level=token"], "--level=token has no meaning for --as=grpo"),
        (["--as=k3_in_loss", "--level=word"], "--level=word"),
        (["--rivals", "--as=grpo"], "--as has no meaning with --rivals, which prints one table: leave it out"),
        ([NANO, "--level=token"], "of a configuration set --config.algorithm.level"),
        ([NANO, "--config.algorithm.betta=1"], "algorithm has no 'betta'; it has method"),
        (
            [NANO, "--config.algorithm.method=ppo"],
            "method='ppo' is unknown: choose one of vanilla, reinforce",
        ),
        ([NANO, "--config.algorithm.beta=-1.0"], "algorithm.beta=-1.0 must be at least 0"),
        ([NANO, "--config.algorithm.beta=x"], "--config.algorithm.beta=x"),
        ([NANO, "--group=1"], "leave_one_out needs groups of at least 2 samples"),
        ([NANO, "--group=9"], "--group=9"),
        ([f"--config={ROOT}/configs/none.py"], f"mara_jax: config file '{ROOT}/configs/none.py' does not exist: give"),
        ([f"--config={ROOT}/configs/none.py:nano", "--config.algorithm.beta=1.0"], "configs/none.py' does not exist"),
        (["--config", str(ROOT)], "is not a file: give --config=FILE.py"),
        (["loudly"], "unexpected argument 'loudly'"),
    ],
    ids=lambda x: " ".join(x).replace(str(ROOT), "") if isinstance(x, list) else "",
)
def test_bad_input_is_one_line(flags, words, capsys):
    assert command.main(["audit", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("mara_jax: ") and printed.err.count("\n") == 1
    assert words in printed.err


@pytest.mark.parametrize(
    ("text", "words"),
    [("def get_config(:", "SyntaxError"), ("def get_config():\n    return 1 / 0", "ZeroDivisionError")],
)
def test_a_config_file_that_cannot_be_run_is_one_line(tmp_path, text, words):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"the config file cannot be run: {words}") as raised:
        command.parse(["audit", f"--config={path}"])
    assert "\n" not in str(raised.value)
