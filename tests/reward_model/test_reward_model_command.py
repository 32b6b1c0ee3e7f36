"""The command as a process: a small model learns a rule, goes on where it ended, and leaves a model to score with."""

import json

import numpy as np
import pytest

from mara_jax import hf
from mara_jax.train import reward_model

STEPS = 60


def flags(folder, random_model, workdir, steps=STEPS):
    return (
        "mara_jax.reward_model", f"--weights={random_model}", f"--pairs={folder}/pairs.jsonl", f"--workdir={workdir}",
        f"--steps={steps}", "--batch=8", "--every=30", "--learning_rate=1e-2", "--held_out=0.25",
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(command, random_model, tmp_path_factory):
    """A run on pairs whose better completion ends with b: what it printed, its folder, and the folder of the pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("xyz"), 4)) for _ in range(64)]
    rows = [{"prompt": f"{text[:2]}{n}?", "chosen": f"{text}b", "rejected": f"{text}c"} for n, text in enumerate(texts)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command(*flags(folder, random_model, folder / "run"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout, folder / "run", folder


def rows(workdir):
    """metrics.jsonl without clocks."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in lines]


def test_a_rule_is_learned_that_length_does_not_tell(trained):
    printed, workdir, _ = trained
    result = json.loads((workdir / "reward_model.json").read_text())
    assert result["held_out"]["accuracy"] >= 0.9 and result["held_out"]["prompts"] == 16
    assert result["length"]["characters"] == {"longer": 0.5, "fitted": 0.5}
    assert "64 pairs, 16 of them held out" in printed and f"{result['held_out']['accuracy']:.1%}" in printed
    metrics = rows(workdir)
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert metrics[-1]["pairs/loss"] < 0.3 < metrics[0]["pairs/loss"]
    measured = [row["step"] for row in metrics if "held_out/loss" in row]
    assert measured == [30, 60] and metrics[-1]["held_out/loss"] == pytest.approx(result["held_out"]["loss"], abs=1e-6)
    for name in ("calibration.png", "calibration.svg", "calibration.json"):
        assert (workdir / name).stat().st_size > 0
    assert json.loads((workdir / "calibration.json").read_text()) == result["calibration"]


def test_the_model_is_written_as_it_was_trained(trained):
    """Read again, it ranks the held-out pairs as the command has said."""
    _, workdir, folder = trained
    model = reward_model.RewardModel(*hf.load(workdir / "model", score_head=True))
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    asked = [pair["prompt"] for pair in pairs]
    chosen, rejected = (
        model.scores(model.encode(asked, [pair[name] for pair in pairs])) for name in pairs[0] if name != "prompt"
    )
    assert np.mean(chosen > rejected) >= 0.9


def test_a_run_that_ended_at_a_checkpoint_goes_on_as_if_it_had_not(trained, command, random_model):
    _, workdir, folder = trained
    first = command(*flags(folder, random_model, folder / "again", steps=30))
    assert first.returncode == 0, first.stderr
    second = command(*flags(folder, random_model, folder / "again"))
    assert second.returncode == 0 and "resuming after step 30" in second.stdout, second.stderr
    assert rows(folder / "again") == rows(workdir)
    names = ("reward_model.json", "model/model.safetensors")
    assert all((folder / "again" / name).read_bytes() == (workdir / name).read_bytes() for name in names)
    other = command(*flags(folder, random_model, folder / "again"), "--seed=1")
    assert other.returncode == 2 and "differs in seed" in other.stderr
    (folder / "pairs.jsonl").write_text(
        (folder / "pairs.jsonl").read_text() + '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
    )
    changed = command(*flags(folder, random_model, folder / "again"))
    assert changed.returncode == 2 and "began with something else (differs in pairs/pairs.jsonl" in changed.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "give one of --pairs and --prompts"),
        (["--pairs=none.jsonl"], "the prompt file none.jsonl does not exist"),
        (["--pairs=none.jsonl", "--prompts=a.jsonl"], "give one of --pairs and --prompts"),
    ],
)
def test_what_cannot_be_trained_is_one_line(command, tmp_path, given, words):
    done = command("mara_jax.reward_model", f"--workdir={tmp_path}/run", *given)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_completion_that_is_too_long_is_named(command, random_model, tmp_path):
    rows = [{"prompt": f"q{n}?", "chosen": "a" * (70 * n), "rejected": "b"} for n in (1, 2)]
    rows[0]["chosen"] = "a"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command(*flags(tmp_path, random_model, tmp_path / "run"), "--held_out=0.5")
    assert done.returncode == 2 and "the chosen completion 'aaaa" in done.stderr and "64 positions" in done.stderr
    assert not (tmp_path / "run").exists()
