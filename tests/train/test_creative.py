"""configs/creative.py: every method and variant is a run, its prompts are apart, and the small path from end to end."""

import dataclasses
import importlib.util
import json
import pathlib

import numpy as np
import pytest
from pyarrow import parquet

from mara_jax import config, hf, main, tasks
from mara_jax.core import method_rules
from mara_jax.tasks import prompt_file
from mara_jax.train import reference, reward_model, shape

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "prompts"
# The flags of docs/creative.md for each method, and what the run says that it does.
METHODS = {
    "RLOO": (["algorithm.method=vanilla"], "maximises E[R] - beta KL(pi || ref) of whole completions, exactly"),
    "GRPO": (["algorithm.method=grpo"], "rewards over their group's deviation"),
    "entropy bonus": (["algorithm.method=entropy_bonus"], "plus eta times each completion's own -log pi"),
    "unlikeliness": (
        ["algorithm.method=unlikeliness", "task.reward_model_form=probability"], "the likeliest of the group ranking"
    ),
    "MARA, reverse": (["algorithm.anchor=string"], "every good completion the same mass; good are the best 10 %"),
    "MARA, forward": (["algorithm.anchor=string", "algorithm.kl=forward"], "KL(ref || pi)"),
    "MARA over answers": ([], "every good answer the same mass; good are the best 10 % of the rewards of the 8 steps"),
}  # fmt: skip


def run_of(variant: str, *fields: str) -> config.LanguageRun:
    file = f"--config={ROOT}/configs/creative.py" + (f":{variant}" if variant else "")
    run = main.run_of(main.parse(["main", file, "--workdir=x", *(f"--config.{field}" for field in fields)]))
    assert isinstance(run, config.LanguageRun)
    return run


@pytest.mark.parametrize("variant", ["", "smol", "nano"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_run_that_says_what_it_does(method, variant):
    fields, words = METHODS[method]
    run = run_of(variant, *fields)
    assert words in method_rules.describe(run.algorithm)
    assert (run.algorithm.threshold_percentile, run.rollout.group_size) == (90.0, 20)
    assert method_rules.moves_threshold(run.algorithm) == method.startswith("MARA")


def test_groups_have_two_good_completions_on_average_and_no_fewer():
    """A tenth of 20; one completion less is refused."""
    with pytest.raises(ValueError, match=r"makes 1.9 completions of a group good"):
        run_of("", "rollout.group_size=19", "optimiser.micro_batches=1")


def test_the_papers_models_have_known_shapes():
    run = run_of("")
    policy, scoring = shape.run_architecture(run), shape.reward_architecture(run)
    assert (policy.embed, policy.layers, policy.compute_dtype) == (2048, 28, "bfloat16")
    assert scoring is not None and (scoring.embed, scoring.layers) == (2560, 36)
    assert scoring.score_head and scoring.scan_layers and scoring.compute_dtype == "bfloat16"


def test_every_demonstration_fits_the_completions_of_the_small_model():
    """Its tokenizer of 512 tokens needs more of them than SmolLM2's."""
    run = run_of("nano", "task.reward_model=unread")
    task = tasks.make(run)
    policy, _ = reference.load_base(run, task)
    reference.check_demonstrations(run, policy, task)
    with pytest.raises(ValueError, match="max_new_tokens=48 is too short"):
        short = dataclasses.replace(run.rollout, max_new_tokens=48)
        reference.check_demonstrations(dataclasses.replace(run, rollout=short), policy, task)


def test_own_prompts_leave_out_ours_even_held_out_ones(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "Write a line."}\n')
    run = run_of("smol", f"task.prompts={tmp_path}/own.jsonl")
    assert run.evaluation.every == 0 and not run.evaluation.prompts


def test_the_prompts_are_different_ones_each_with_three_completions():
    files = [prompt_file.read(FOLDER / f"creative_{name}.jsonl") for name in ("train", "heldout")]
    assert [len(rows) for rows in files] == [40, 20]
    asked = [row["prompt"] for rows in files for row in rows]
    texts = [text for rows in files for row in rows for text in row["completion"]]
    assert len(set(asked)) == 60 and len(set(texts)) == 180
    assert all(len(row["completion"]) == 3 for rows in files for row in rows)
    assert max(len(text.split()) for text in texts) <= 26  # fits 48 tokens


SMALL = [
    "policy.layers=1", "policy.embed=64", "warmup.steps=8", "warmup.batch=8", "rollout.prompts_per_step=2",
    "rollout.max_new_tokens=48", "rollout.length_buckets=1", "reference.samples=20", "evaluation.every=0",
    "checkpoint.every=2", "steps=2", "algorithm.threshold=-100",
]  # fmt: skip


@pytest.fixture(scope="module")
def small(command, tmp_path_factory):
    """A reward model of two steps, and a run of two steps that it scores: the model's folder, and the run's."""
    folder = tmp_path_factory.mktemp("creative")
    done = command(
        "mara_jax.reward_model", f"--prompts={FOLDER}/creative_train.jsonl", f"--workdir={folder}/reward", "--steps=2",
        "--batch=4", "--every=2", "--layers=1", "--embed=32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fields = [*SMALL, f"task.reward_model={folder}/reward/model"]
    done = command(
        "mara_jax.main", f"--config={ROOT}/configs/creative.py:nano", f"--workdir={folder}/run",
        *(f"--config.{field}" for field in fields),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "reward" / "model", folder / "run"


def test_a_small_run_is_scored_by_the_model_and_its_threshold_is_the_percentile(small):
    """Rewards are the model's scores of the stored completions; the fourth largest of the first step's 40 is tau."""
    model = reward_model.RewardModel(*hf.load(small[0], score_head=True))
    rows = parquet.ParquetDataset(small[1] / "rollouts").read().to_pylist()
    expected = model.scores(model.encode([row["prompt"] for row in rows], [row["completion"] for row in rows]))
    np.testing.assert_allclose([row["reward"] for row in rows], expected, atol=1e-4)
    metrics = [json.loads(line) for line in (small[1] / "metrics.jsonl").read_text().splitlines()]
    first = sorted((row["reward"] for row in rows if row["step"] == 1), reverse=True)
    assert len(first) == 40 and metrics[0]["mara/threshold"] is None
    assert metrics[1]["mara/threshold"] == pytest.approx(first[3], abs=1e-6)
    classes = {json.loads(line)["text"] for line in (small[1] / "answer_classes.jsonl").read_text().splitlines()}
    assert {row["answer"] for row in rows} - {None} <= classes


def test_its_policy_is_measured_by_the_columns_of_the_table(small, command, tmp_path):
    """The model's score, another function's as a column beside it, EAD, classes by ROUGE-1."""
    (tmp_path / "own.py").write_text(
        "def words(prompts, completions):\n"
        "    return {'reward': [None] * len(completions), 'words': [len(text.split()) for text in completions]}\n"
    )
    lines = (FOLDER / "creative_heldout.jsonl").read_text().splitlines()[:2]
    (tmp_path / "two.jsonl").write_text("\n".join(lines) + "\n")
    done = command(
        "mara_jax.evaluate", "run", f"--weights={small[1]}", f"--prompts={tmp_path}/two.jsonl", "--samples=10",
        f"--reward={tmp_path}/own.py:words", f"--reward_model={small[0]}", "--max_new_tokens=12",
        f"--out={tmp_path}/out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for row in written["prompts"]:
        texts = [text for text, count in row["counts"].items() for _ in range(count)]
        assert row["task/words"] == pytest.approx(
            np.mean([len(text.split()) for text in texts] + [0] * (10 - len(texts)))
        )
        assert row["task/reward_model"] == pytest.approx(row["reward"])
        assert 1 <= row["novelty/distinct_10"] <= 10 and row["ngrams/ead"] > 0
    assert dataclasses.asdict(run_of("nano"))["evaluation"]["samples"] == 10  # as many as the protocol draws


@pytest.fixture(scope="module")
def script():
    """benchmarks/creative.py."""
    spec = importlib.util.spec_from_file_location("creative_table", ROOT / "benchmarks" / "creative.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_has_the_methods_of_the_page(script):
    page = (ROOT / "docs" / "creative.md").read_text()
    for name, flags in script.METHODS.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        assert line.split("|")[2].strip().strip("`") == (" ".join(flags) or "none")
    fields = [[flag.removeprefix("--config.") for flag in flags] for flags in script.METHODS.values()]
    assert sorted(fields) == sorted(given for given, _ in METHODS.values())
    assert len(script.runs(3)) == len(set(script.runs(3))) == 11


def test_the_table_by_hand(script, tmp_path):
    """Two seeds of RLOO on two prompts: seeds first, then prompts; what is not measured yet has no row."""
    path = tmp_path / "runs.jsonl"
    for seed, values, variant in ((0, (1.0, 3.0), "nano"), (1, (3.0, 5.0), "nano"), (2, (9.0, 9.0), "smol")):
        prompts = [{measure: value for measure in script.COLUMNS} for value in values]
        with path.open("a") as file:
            print(json.dumps({"variant": variant, "method": "RLOO", "seed": seed, "prompts": prompts}), file=file)
    (row,) = script.rows_of(script.recorded(path, "nano"))
    assert (row["method"], row["seeds"], row["prompts"], row["reward"]) == ("RLOO", 2, 2, 3.0)
    assert row["reward/sem"] == pytest.approx(np.std([2, 4]) / np.sqrt(2), rel=0.03)
    header, _, line = script.table([row]).splitlines()
    assert header.startswith("| method | seeds | reward, in distribution |")
    assert line.startswith(f"| RLOO | 2 | 3.000 ± {row['reward/sem']:.3f} |")
    assert row["reward/seeds_std"] == pytest.approx(np.std([2, 4], ddof=1))


def test_differences_by_hand(script):
    """GRPO against RLOO of its own seed alone, prompt by prompt: 1 more under each; the base, 1 more and 1 less."""
    prompts = {name: [{measure: value for measure in script.COLUMNS} for value in values] for name, values in {
        "base": (2.0, 2.0), "RLOO": (1.0, 3.0), "other seed": (9.0, 9.0), "GRPO": (2.0, 4.0),
    }.items()}  # fmt: skip
    found = {("RLOO", 0): prompts["RLOO"], ("RLOO", 1): prompts["other seed"], ("GRPO", 0): prompts["GRPO"]}
    lines = script.differences(found | {("base", 0): prompts["base"]}).splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| base", "1", "+0.000 [-1.000, +1.000]"],
        ["| GRPO", "1", "+1.000 [+1.000, +1.000]*"],
    ]


def test_what_is_recorded_is_not_made_again(script, tmp_path, monkeypatch):
    """The first pass makes a reward model, a base, seven runs and eight evaluations; a second pass nothing; a third,
    elsewhere with a record that lacks a run, a reward model, a base and that run."""
    asked = []

    def made(command, *flags):
        (where,) = [flag.split("=")[1] for flag in flags if flag.startswith(("--workdir=", "--out="))]
        asked.append(pathlib.Path(where).name if command == "main" else command)
        folder = pathlib.Path(where) if command == "evaluate" else pathlib.Path(where) / "model"
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text(json.dumps({"prompts": [dict.fromkeys(script.COLUMNS, 1.0)] * 2}))

    monkeypatch.setattr(script, "run", made)

    def whole(folder):
        asked.clear()
        main = f"creative.py --folder={folder} --variant=nano --seeds=1 --runs={tmp_path}/runs.jsonl"
        monkeypatch.setattr("sys.argv", main.split())
        script.main()

    whole(tmp_path / "here")
    assert asked[:5] == ["reward_model", "base", "evaluate", "RLOO-0", "evaluate"] and len(asked) == 1 + 1 + 7 + 8
    whole(tmp_path / "here")
    assert not asked
    lines = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(line for line in lines if "GRPO" not in line))
    whole(tmp_path / "there")
    assert asked == ["reward_model", "base", "GRPO-0", "evaluate"]
