"""Checkpoints whose files are not what was written: named, moved aside, and the run goes on from the one before."""

import json
import os
import pathlib
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import names
from test_loop import rows_of, setup, trained  # noqa: F401 - a fixture

from mara_jax import config
from mara_jax.config import Checkpoint, checks
from mara_jax.train import checkpoint, integrity, rollouts
from mara_jax.train.population import training
from mara_jax.train.state import State

PARAMS = {str(number): jnp.full((8, 8), number) for number in range(4)}
SETTINGS = Checkpoint(every=2, keep=9)


def flip(path: pathlib.Path) -> None:
    """Another byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def largest(folder: pathlib.Path) -> pathlib.Path:
    """The file with most of the arrays."""
    return max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)


def saved(folder: pathlib.Path, *steps: int, cfg: Checkpoint = SETTINGS) -> pathlib.Path:
    """Checkpoints of these steps; the parameters of each are those numbers and its step."""
    checkpoints = checkpoint.Checkpoints(folder, cfg)
    for step in steps:
        checkpoints.save(step, state(step))
    checkpoints.close()
    return folder


def state(step: int) -> State:
    return State(jnp.int32(step), {name: array + 0.5 * step for name, array in PARAMS.items()}, ())


def restored(folder: pathlib.Path) -> State:
    checkpoints = checkpoint.Checkpoints(folder, SETTINGS)
    try:
        return checkpoints.restore(state(0))
    finally:
        checkpoints.close()


# ---- what is noticed ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> pathlib.Path:
    return saved(tmp_path_factory.mktemp("one"), 2)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (flip, r" is not what was written"),
        (cut, r" has \d+ bytes of \d+"),
        (pathlib.Path.unlink, r"it lacks "),
    ],
)
@pytest.mark.parametrize("part", ["default/d/*", "default/manifest.ocdbt", "_CHECKPOINT_METADATA", "default/_METADATA"])
def test_each_kind_of_damage_is_named_with_its_file(one, tmp_path, harm, words, part):
    folder = tmp_path / "2"
    shutil.copytree(one / "checkpoints" / "2", folder)
    assert integrity.damage(folder) is None
    path = max(folder.glob(part), key=lambda path: path.stat().st_size)
    harm(path)
    said = integrity.damage(folder)
    assert said is not None and str(path.relative_to(folder)) in said
    assert re.search(words, said), said


def test_every_byte_of_every_file_counts(one, tmp_path):
    """But for the digests' own file, each byte of which is a digest, a size, a name, or JSON."""
    folder = tmp_path / "2"
    shutil.copytree(one / "checkpoints" / "2", folder)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != integrity.FILE]
    assert len(files) > 5
    for path in files:
        before = path.read_bytes()
        for place in {0, len(before) // 3, len(before) - 1} if before else ():
            path.write_bytes(before[:place] + bytes([before[place] ^ 128]) + before[place + 1 :])
            assert integrity.damage(folder) == f"{path.relative_to(folder)} is not what was written"
        path.write_bytes(before + b"x")
        assert integrity.damage(folder) is not None
        path.write_bytes(before)
    assert integrity.damage(folder) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {"a": 1}}', '{"files": 3}'])
def test_digests_that_cannot_be_read_are_damage(one, tmp_path, content):
    folder = tmp_path / "2"
    shutil.copytree(one / "checkpoints" / "2", folder)
    (folder / integrity.FILE).write_text(content)
    assert integrity.damage(folder) == "its digests.json cannot be read"


def test_what_a_run_keeps_on_the_host_belongs_to_its_checkpoint(tmp_path):
    beside = tmp_path / "task_state" / "step_000002.json"
    beside.parent.mkdir()
    beside.write_text('{"calls": 7}')
    saved(tmp_path, 2)
    folder = tmp_path / "checkpoints" / "2"
    assert integrity.damage(folder) is None
    beside.write_text('{"calls": 8}')
    assert integrity.damage(folder) == "task_state/step_000002.json is not what was written"
    beside.unlink()
    assert integrity.damage(folder) == "it lacks task_state/step_000002.json"


def test_orbax_alone_does_not_notice(tmp_path):
    """Why there are digests: of arrays that nothing compresses, some flipped bytes come back as other numbers."""
    random = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    checkpoints = checkpoint.Checkpoints(tmp_path, SETTINGS)
    checkpoints.save(2, State(jnp.int32(2), {"a": jnp.asarray(random)}, ()))
    checkpoints.close()
    folder = tmp_path / "checkpoints" / "2"
    flip(largest(folder))
    assert integrity.damage(folder) is not None
    again = checkpoint.Checkpoints(tmp_path, SETTINGS)
    got = np.asarray(again.restore(State(jnp.int32(0), {"a": jnp.zeros((64, 64))}, ())).params["a"])
    assert got.shape == random.shape and not np.array_equal(got, random)


# ---- what then happens ----------------------------------------------------------------------------------------------


def test_the_newest_whole_one_is_used_and_the_others_lie_aside(tmp_path):
    saved(tmp_path, 2, 4, 6, 8)
    flip(largest(tmp_path / "checkpoints" / "8"))
    cut(largest(tmp_path / "checkpoints" / "6"))
    lines = checkpoint.set_aside_damaged(tmp_path)
    assert len(lines) == 2 and all(line.startswith("WARNING: checkpoint ") and "\n" not in line for line in lines)
    assert "checkpoints/8 is damaged (default/" in lines[0] and "goes on from that of step 4" in lines[0]
    assert names(tmp_path) == {"2", "4"} and {path.name for path in (tmp_path / "damaged").iterdir()} == {"6", "8"}
    assert np.all(np.asarray(restored(tmp_path).params["3"]) == 3 + 0.5 * 4)
    assert json.loads((tmp_path / "saved.json").read_text()) == {"step": 4}
    assert checkpoint.set_aside_damaged(tmp_path) == []
    # The same step once more: nothing that lies aside is written over.
    saved(tmp_path, 6)
    cut(largest(tmp_path / "checkpoints" / "6"))
    assert len(checkpoint.set_aside_damaged(tmp_path)) == 1
    assert {path.name for path in (tmp_path / "damaged").iterdir()} == {"6", "6_2", "8"}


def test_without_a_whole_one_nothing_is_moved_and_one_line_says_what_to_do(tmp_path):
    saved(tmp_path, 2, 4)
    for step in (2, 4):
        flip(largest(tmp_path / "checkpoints" / str(step)))
    with pytest.raises(
        ValueError, match=r"checkpoints/4 cannot be read \(.* written\): no earlier one is whole, .*delete"
    ):
        checkpoint.set_aside_damaged(tmp_path)
    assert names(tmp_path) == {"2", "4"} and not (tmp_path / "damaged").exists()
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    with pytest.raises(ValueError, match=r"delete that folder and .*metrics.jsonl to start again$"):
        checkpoint.set_aside_damaged(tmp_path)


def test_a_member_goes_on_from_a_step_before_its_newest(tmp_path):
    """Of checkpoints after the step asked for nothing is said: they are dropped."""
    saved(tmp_path, 2, 4, 6)
    flip(largest(tmp_path / "checkpoints" / "6"))
    assert checkpoint.set_aside_damaged(tmp_path, 4) == [] and names(tmp_path) == {"2", "4", "6"}
    flip(largest(tmp_path / "checkpoints" / "4"))
    assert len(checkpoint.set_aside_damaged(tmp_path, 4)) == 1 and names(tmp_path) == {"2", "6"}


def test_checkpoints_of_versions_before_are_resumed_and_get_digests(tmp_path):
    saved(tmp_path, 2)
    sealed = tmp_path / "checkpoints" / "2" / integrity.FILE
    content = sealed.read_text()
    sealed.unlink()
    sealed.with_suffix(".part").write_text("a kill")
    assert checkpoint.set_aside_damaged(tmp_path) == []
    assert np.all(np.asarray(restored(tmp_path).params["1"]) == 2)
    assert sealed.read_text() == content and not sealed.with_suffix(".part").exists()


def test_commands_refuse_parameters_of_a_damaged_checkpoint(tmp_path):
    saved(tmp_path, 2, 4)
    assert np.all(np.asarray(checkpoint.read_params(tmp_path, 4, PARAMS)["2"]) == 4)
    flip(largest(tmp_path / "checkpoints" / "4"))
    with pytest.raises(ValueError, match=r"checkpoints/4 cannot be read .*delete that folder to resume from step 2$"):
        checkpoint.read_params(tmp_path, 4, PARAMS)


def test_digests_are_written_behind_a_write_that_goes_on_beside_training(monkeypatch, tmp_path):
    """As on accelerators: a save returns before its files are there."""
    monkeypatch.setattr(checkpoint.jax, "default_backend", lambda: "gpu")
    checkpoints = checkpoint.Checkpoints(tmp_path, SETTINGS)
    assert checkpoints.asynchronous
    for step in (2, 4, 6):
        checkpoints.save(step, state(step))
        if step > 2:
            assert integrity.is_sealed(tmp_path / "checkpoints" / str(step - 2))
    checkpoints.close()
    for step in (2, 4, 6):
        assert integrity.is_sealed(tmp_path / "checkpoints" / str(step))
        assert integrity.damage(tmp_path / "checkpoints" / str(step)) is None


def test_which_checkpoints_stay(tmp_path):
    """Of 2, 4, ..., 20: the newest two, the best (6), and every sixth step's."""
    cfg = Checkpoint(every=2, keep=2, keep_every=6, best="reward")
    checkpoints = checkpoint.Checkpoints(tmp_path, cfg)
    for step in range(2, 21, 2):
        checkpoints.scores[step] = {6: 0.5, 8: 0.9}.get(step, 0.1)
        checkpoints.save(step, state(step))
    checkpoints.close()
    assert checkpoint.saved_steps(tmp_path) == [6, 8, 12, 18, 20]


def test_steps_that_have_no_checkpoint_cannot_be_kept():
    run = config.LanguageRun(checkpoint=Checkpoint(every=20, keep_every=50))
    with pytest.raises(
        ValueError, match=r"checkpoint.keep_every=50 is no multiple of checkpoint.every=20.*keep_every=40"
    ):
        checks._check_keep_every(run)


@pytest.mark.slow
@pytest.mark.parametrize("harm", [flip, cut, pathlib.Path.unlink])
def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_one_that_was_left_alone(
    monkeypatch,
    setup,  # noqa: F811
    tmp_path,
    capsys,
    harm,
):
    """All that was written after the step from which it goes on is written again."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    trained(monkeypatch, setup, whole)
    shutil.copytree(whole, workdir)
    harm(largest(workdir / "checkpoints" / "6"))
    capsys.readouterr()
    assert trained(monkeypatch, setup, workdir) == [(6, 6)]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: checkpoint ")]
    assert len(said) == 1 and "checkpoints/6 is damaged" in said[0] and "goes on from that of step 4" in said[0]
    assert rows_of(workdir) == rows_of(whole) and rollouts.read(workdir).equals(rollouts.read(whole))
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (workdir, whole)]
    assert weights[0] == weights[1] and checkpoint.saved_steps(workdir) == checkpoint.saved_steps(whole) == [2, 4, 6]
    assert integrity.damage(workdir / "checkpoints" / "6") is None


class Said(list):
    """A display that remembers its lines."""

    note = list.append


def test_members_go_on_from_the_newest_step_that_is_whole_in_all(tmp_path):
    """6 is damaged in one member and 4 in the other, where 6 is whole: 2 is left to both."""
    wave, said = [], Said()
    for name in ("a", "b"):
        saved(tmp_path / name, 2, 4, 6)
        wave.append(training.Member(name, None, tmp_path / name))
    assert training.common_step(wave, said) == 6 and said == []
    flip(largest(tmp_path / "a" / "checkpoints" / "6"))
    cut(largest(tmp_path / "b" / "checkpoints" / "4"))
    assert training.common_step(wave, said) == 2 and len(said) == 2
    assert names(tmp_path / "a") == {"2", "4"} and names(tmp_path / "b") == {"2", "6"}
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    assert training.common_step(wave, said) == 0
