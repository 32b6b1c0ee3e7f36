"""Steps made again: equal, bit for bit, or each planted change is named."""

import hashlib
import json
import pathlib
import shutil

import pytest
from pyarrow import parquet, table

from mara_jax import main
from mara_jax.replay import command, computation
from mara_jax.train import rollouts

REWARD = """
import pathlib

def reward(prompts, completions, **_):
    scale = float(pathlib.Path(__file__).with_name("scale").read_text())
    return [scale * len(set(text)) for text in completions]
"""
RUN = """main --config=configs/prompts.py:nano --config.task.answer= --config.evaluation.every=0
    --config.evaluation.prompts= --config.policy.layers=1 --config.policy.embed=32 --config.warmup.steps=2
    --config.warmup.batch=2 --config.rollout.group_size=4 --config.rollout.prompts_per_step=2
    --config.rollout.length_buckets=0 --config.reference.samples=4 --config.rollout.max_new_tokens=8
    --config.algorithm.method=vanilla --config.task.truncated=score --config.checkpoint.every=2
    --config.steps=3""".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    """Of three steps, with checkpoints after the second and the third."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "reward.py").write_text(REWARD)
    (folder / "scale").write_text("0.125")
    rows = [{"prompt": f"{number} and", "completion": f"{number + 1}"} for number in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"--config.task.prompts={folder / 'prompts.jsonl'}", f"--config.task.reward={folder / 'reward.py'}:reward"]
    assert main.main([*RUN, *files, f"--workdir={folder / 'run'}"]) == 0
    return folder / "run"


@pytest.fixture
def copy(run, tmp_path) -> pathlib.Path:
    return shutil.copytree(run, tmp_path / "run")


def contents(workdir: pathlib.Path) -> dict[str, str]:
    files = [path for path in sorted(workdir.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def differing(workdir: pathlib.Path, step: int) -> list[set[str]]:
    return [{one.name for one in step.differences} for step in computation.replay(workdir, step)]


def test_a_step_from_the_checkpoint_before_it_is_equal_and_nothing_is_written(run, capsys):
    before = contents(run)
    assert command.main(["replay", f"--workdir={run}"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("step 3, from checkpoint 2: ") and line.endswith("compared, equal, bit for bit")
    assert int(line.split()[5]) > 25 and contents(run) == before


@pytest.mark.slow
def test_steps_before_the_first_checkpoint_start_from_the_reference(run):
    replayed = computation.replay(run, 2)
    assert [(one.step, one.start) for one in replayed] == [(1, "the reference"), (2, "the step before")]
    assert not any(one.differences for one in replayed)


def change_row(workdir: pathlib.Path, name: str, factor: float) -> None:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows[-1][name] *= factor
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_column(workdir: pathlib.Path, name: str, value) -> None:
    """Another value in the second row of the last step."""
    columns = rollouts.read(workdir, 3, 3).to_pydict()
    columns[name][1] = value
    schema = rollouts.read(workdir, 3, 3).schema
    parquet.write_table(table(columns, schema=schema), workdir / "rollouts" / "step_000003.parquet")


@pytest.mark.parametrize("name", ["loss", "grad/norm", "kl/k1"])
def test_a_number_that_was_changed_is_named(copy, name, capsys):
    change_row(copy, name, 1 + 1e-6)
    assert command.main(["replay", f"--workdir={copy}", "--step=3"]) == command.DIFFERS
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("1 differ") and second.strip().startswith(f"{name}: stored ")


@pytest.mark.slow
def test_a_reward_that_was_changed_is_named_with_its_place(copy):
    change_column(copy, "reward", 77.0)
    (step,) = computation.replay(copy, 3)
    (one,) = step.differences
    assert one.name == "reward" and one.place.endswith("sample 1") and one.stored == 77.0 and one.now < 2
    assert (one.count, one.total) == (1, 8)


@pytest.mark.slow
def test_a_completion_that_was_changed_is_scored_and_trained_on_as_it_is_stored(copy):
    """Its text, its log-probs, and all that follows from them."""
    change_column(copy, "completion", "2")
    (names,) = differing(copy, 3)
    assert {"completion", "logp", "ref_logp", "loss", "grad/norm"} <= names


@pytest.mark.slow
def test_a_reward_function_that_has_changed_is_named_with_what_follows(run):
    path = run.parent / "scale"
    path.write_text("0.25")
    try:
        (step,) = computation.replay(run, 3)
    finally:
        path.write_text("0.125")
    differences = {one.name: one for one in step.differences}
    assert differences["reward"].now == 2 * differences["reward"].stored > 0
    assert {"loss", "grad/norm", "reward/mean"} <= differences.keys() and not {
        "logp",
        "completion",
    } & differences.keys()


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--step=4"], "has no step 4: --step is one of 1 to 3"), (["--step=0"], "--step=0 must be at least 1")],
)
def test_what_cannot_be_replayed_is_one_line(run, flags, words, capsys):
    assert command.main(["replay", f"--workdir={run}", *flags]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_damaged_checkpoint_is_refused(copy, capsys):
    path = max((copy / "checkpoints" / "2").rglob("*"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    assert command.main(["replay", f"--workdir={copy}"]) == 2
    assert "checkpoints/2 cannot be read" in capsys.readouterr().err
