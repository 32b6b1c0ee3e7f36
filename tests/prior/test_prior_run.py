"""The prior command: what a run leaves, that one which was stopped ends as one that was not, and what is refused."""

import dataclasses
import json
import shutil

import pytest

from mara_jax import hf
from mara_jax.config import Checkpoint
from mara_jax.prior import command, loop, training
from mara_jax.prior.settings import Settings

LINES = [f"{'C' * n}{end}" for n in range(1, 7) for end in ("O", "N", "Cl", "c1cc[nH]c1")]
TIMES = {"time/step_s", "time/evaluation_s"}


def rows(workdir, name):
    lines = (workdir / name).read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("smiles") / "own.smi"
    path.write_text("\n".join(LINES) + "\n")
    return Settings(
        smiles=str(path), steps=6, batch=4, layers=1, heads=1, feed_forward=16, held_out=4, evaluate_every=3,
        samples=8, final_samples=8, randomised=0.5, longest=20, rise=2, checkpoint=Checkpoint(every=2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    loop.run(settings, workdir)
    return workdir


def test_what_a_run_leaves(whole, settings):
    assert [row["step"] for row in rows(whole, "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(whole, "evaluations.jsonl")] == [3, 6]
    tokens = [row["tokens/trained"] for row in rows(whole, "metrics.jsonl")]
    assert tokens == sorted({*tokens}) and rows(whole, "evaluations.jsonl")[1]["tokens/trained"] == tokens[-1]
    assert (whole / "validity.png").stat().st_size > 5000 and (whole / "molecules.smi").is_file()
    told = json.loads((whole / "statistics.json").read_text())
    assert told == json.loads((whole / "model" / "statistics.json").read_text())
    assert told["settings"]["steps"] == 6 and told["molecules"] == 8 and told["tokens_trained"] == tokens[-1]
    assert 0 <= told["statistics"]["valid"] <= 1 and told["missing"][0].startswith("FCD")


def test_the_model_is_one_of_hugging_face_s(whole):
    """transformers writes the logits that our policy does, from files in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole / "model", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(whole / "model")("CCc1cc[nH]c1").input_ids
    policy, params = hf.load(whole / "model")
    ours = policy.logits(params, [ids], [len(ids)])
    theirs = model(torch.tensor([ids])).logits.detach().numpy()
    assert abs(ours - theirs).max() < 1e-4 and ids[0] == policy.tokenizer.bos_token_id
    assert policy.eos_ids == (2,) and policy.architecture.max_positions == 256


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_lost_rows_are_named_and_their_tokens_counted_again(whole, settings, tmp_path, capsys, kept):
    """The last checkpoint is gone, so that two updates are made again; of four rows before them some are lost."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "6")
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:kept]))
    loop.run(settings, workdir)
    assert rows(workdir, "metrics.jsonl") == rows(whole, "metrics.jsonl")[:kept] + rows(whole, "metrics.jsonl")[4:]
    lost = ", ".join(map(str, range(kept + 1, 5)))
    assert f"WARNING: {workdir / 'metrics.jsonl'} has lost the rows of steps {lost}: " in capsys.readouterr().out
    before, after = (json.loads((run / "statistics.json").read_text()) for run in (whole, workdir))
    assert after["tokens_trained"] == before["tokens_trained"]


def test_a_run_that_was_stopped_ends_like_one_that_was_not(whole, settings, tmp_path, monkeypatch):
    """Before the fourth update: the row and the evaluation of the third stand behind the checkpoint of the second."""
    real, calls = training.update, []

    def stopped(*args, **named):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **named)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "update", stopped)
        loop.run(settings, tmp_path / "run")
    loop.run(settings, tmp_path / "run")
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert rows(tmp_path / "run", name) == rows(whole, name)
    for name in ("model/model.safetensors", "molecules.smi", "statistics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 8}, "is of a run of 6 updates, over which its learning rate falls: give --steps=6"),
        ({"layers": 2}, "was made by another config (differs in layers)"),
        ({"learning_rate": 0.1}, "differs in learning_rate"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_alone(change, words, whole, settings):
    with pytest.raises(ValueError) as error:
        loop.run(dataclasses.replace(settings, **change), whole)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_run_goes_on_with_its_own_molecules_alone(whole, settings, monkeypatch):
    path = settings.smiles
    with open(path) as file:
        before = file.read()
    try:
        with open(path, "w") as file:
            file.write(before.replace("CCCl", "CCBr"))
        with pytest.raises(ValueError, match=r"began with something else \(differs in smiles"):
            loop.run(settings, whole)
    finally:
        with open(path, "w") as file:
            file.write(before)


def test_a_loss_that_is_not_finite_ends_the_run(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "update", lambda state, batch, **_: (state, float("nan")))
    with pytest.raises(ValueError, match=r"update 1: the loss is not finite: lower --learning_rate=0\.003"):
        loop.run(settings, tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--smiles=nothing.smi"], "nothing.smi does not exist"),
        (["--smiles=own.txt"], "own.txt is neither .smi nor .csv"),
        (["--steps=0"], "--steps=0 must be at least 1"),
        (["--randomised=1.5"], "--randomised=1.5 must be a share"),
        (["--decay=sudden"], "--decay=sudden is unknown: choose one of cosine, linear, none"),
    ],
)
def test_the_command_refuses_in_one_line(flags, words, tmp_path, capsys):
    assert command.main(["prior", f"--workdir={tmp_path / 'run'}", *flags]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_flags_set_every_field():
    values = command.parse(["prior", "--workdir=x", "--steps=7", "--checkpoint_every=3", "--smiles=a.csv"])
    assert command.settings_of(values) == Settings(steps=7, smiles="a.csv", checkpoint=Checkpoint(every=3))
