"""The pairwise loss by hand, batches of scores, and rewards that a reward model gives in a run."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pyarrow import parquet

from mara_jax import hf
from mara_jax.config import LanguageRun
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.sampling import rollout
from mara_jax.tasks import make, prompts
from mara_jax.tasks.base import LearnedReward
from mara_jax.train import preference, reward_model, scoring


def test_the_loss_and_its_gradient_by_hand():
    """Margins log 3, 0 and -log 3: the chosen one wins with probability 3/4, 1/2 and 1/4."""
    chosen, rejected = jnp.array([math.log(3), 1.0, 0.0]), jnp.array([0.0, 1.0, math.log(3)])
    loss, grads = jax.value_and_grad(preference.pair_loss, argnums=(0, 1))(chosen, rejected)
    assert loss == pytest.approx((math.log(4 / 3) + math.log(2) + math.log(4)) / 3, rel=1e-6)
    expected = -np.array([1 / 4, 1 / 2, 3 / 4]) / 3  # of log sigmoid: minus the probability of the rejected one
    np.testing.assert_allclose(grads, [expected, -expected], rtol=1e-6)
    metrics = preference.metrics_of(chosen, rejected)
    assert metrics["pairs/accuracy"] == 0.5 and metrics["pairs/margin"] == pytest.approx(0, abs=1e-6)
    # Far apart, neither overflows in float32.
    far = jnp.array([-1e4]), jnp.array([1e4])
    assert preference.pair_loss(*far) == 2e4 and preference.pair_loss(*reversed(far)) == 0


def test_batches_hold_each_row_once_in_few_shapes():
    rows = [list(range(1, 2 + (7 * number) % 90)) for number in range(150)]
    seen, shapes = [], set()
    for numbers, tokens_bt, lengths_b in reward_model.batches(rows, shards=3):
        assert len(tokens_bt) % 3 == 0 and tokens_bt.dtype == np.int32
        for number, tokens, length in zip(numbers, tokens_bt, lengths_b, strict=False):
            assert tokens[:length].tolist() == rows[number] and not tokens[length:].any()
        assert (lengths_b[len(numbers) :] == 1).all()
        seen += numbers
        shapes.add(tokens_bt.shape)
    assert sorted(seen) == list(range(150)) and len(shapes) <= 6
    widths = [tokens.shape for _, tokens, _ in reward_model.batches([[1] * 9000, [1] * 4], shards=1)]
    assert widths == [(1, 32), (1, 12288)]  # a long row is a batch by itself
    padded = {longest: reward_model.padded_width(longest) for longest in (1, 32, 33, 64, 65, 96, 97, 129, 192, 193)}
    assert padded == {1: 32, 32: 32, 33: 64, 64: 64, 65: 96, 96: 96, 97: 128, 129: 192, 192: 192, 193: 256}


@pytest.fixture(scope="module")
def scored_by(random_model, tmp_path_factory):
    """A directory of a reward model of 64 positions, and the model itself."""
    policy, params = hf.load(random_model)
    policy, params = reward_model.begun(policy, params, jax.random.key(3))
    out = hf.export(policy, params, tmp_path_factory.mktemp("scored") / "model")
    return out, reward_model.RewardModel(policy, params)


def test_scores_do_not_depend_on_the_batch(scored_by):
    model = scored_by[1]
    rows = model.encode(["q"] * 5, ["a", "b c", "a", "c" * 30, ""])
    together = model.scores(rows)
    assert together[0] == together[2] and len(set(together.tolist())) == 4
    np.testing.assert_allclose(together, [model.scores([row])[0] for row in rows], atol=1e-5)


FUNCTIONS = """
def length(prompts, completions):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("user")
    (where / "own.py").write_text(FUNCTIONS)
    (where / "rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a?", "b?")))
    return where


def scores(folder, texts, finished=None, **fields):
    """What a run's scoring says of completions, two of each prompt."""
    task = make(LanguageRun(task=prompts.Config(prompts=str(folder / "rows.jsonl"), **fields)))
    finished = np.ones((2, 2), bool) if finished is None else finished
    empty = np.zeros((2, 2, 1))
    drawn = rollout.Rollout(empty, empty, np.ones((2, 2), int), finished, texts, np.zeros((2, 1)), np.ones(2))
    return scoring.score(task, np.arange(2), drawn)


TEXTS = [["a", "b c"], ["b", ""]]


def test_a_run_takes_its_rewards_from_a_reward_model(folder, scored_by):
    """Alone, weighted, and added to a function's; a completion that was cut gets what task.truncated says."""
    where, model = scored_by
    expected = model.scores(model.encode(["a?", "a?", "b?", "b?"], [*TEXTS[0], *TEXTS[1]])).reshape(2, 2)
    alone = scores(folder, TEXTS, reward_model=str(where))
    np.testing.assert_allclose(alone.reward, expected, rtol=1e-5, atol=1e-6)
    assert alone.answer == [["a", "b c"], ["b", None]]
    cut = np.array([[True, False], [True, True]])
    both = scores(
        folder, TEXTS, cut, reward_model=str(where), reward_model_weight=-0.5, reward=f"{folder}/own.py:length",
        reward_weights="2", truncated="zero",
    )  # fmt: skip
    lengths = np.array([[1, 3], [1, 0]])
    np.testing.assert_allclose(both.reward, np.where(cut, 2 * lengths - 0.5 * expected, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(both.columns["reward_model"], expected, rtol=1e-5, atol=1e-6)
    assert both.columns["length"].tolist() == lengths.tolist()


def test_a_score_as_a_probability(folder, scored_by):
    """1 / (1 + exp(-score)), weighted, while the score itself is what is logged; from 0 to 1, without overflow."""
    where, model = scored_by
    score = np.float64(model.scores(model.encode(["a?", "a?", "b?", "b?"], [*TEXTS[0], *TEXTS[1]])).reshape(2, 2))
    own = {"reward_model": str(where), "reward_model_form": "probability", "reward_model_weight": 2.0}
    alone = scores(folder, TEXTS, **own)
    np.testing.assert_allclose(alone.reward, 2 / (1 + np.exp(-score)), rtol=1e-6)
    both = scores(folder, TEXTS, reward=f"{folder}/own.py:length", **own)
    np.testing.assert_allclose(both.reward - alone.reward, [[1, 3], [1, 0]], atol=1e-6)
    np.testing.assert_allclose(both.columns["reward_model"], score, rtol=1e-5, atol=1e-6)
    assert [prompts.preferred(x) for x in (-1e4, 0.0, 1e4)] == [0.0, 0.5, 1.0]


def test_a_completion_too_long_for_the_reward_model_fails_alone(folder, scored_by):
    texts = [["a", "b" * 70], ["b", ""]]
    with pytest.raises(ValueError, match=r"task.reward_model=.*tokens with its prompt, but .* reads 64.*'bbbb"):
        scores(folder, texts, reward_model=str(scored_by[0]))
    values = scores(folder, texts, reward_model=str(scored_by[0]), failure="value", failure_value=-7.0)
    assert values.reward[0, 1] == -7 and values.columns["failed"].tolist() == [[0, 1], [0, 0]]


def test_what_cannot_score_is_one_line(folder, scored_by, random_model, tmp_path):
    for where, words in ((random_model, "mara_jax.reward_model"), (tmp_path / "none", "does not exist")):
        with pytest.raises((ValueError, OSError)) as caught:
            scores(folder, TEXTS, reward_model=str(where))
        assert words in str(caught.value) and "\n" not in str(caught.value)
    policy, params = scored_by[1]
    hf.export(dataclasses.replace(policy, tokenizer=None), params, tmp_path / "bare")
    with pytest.raises(ValueError, match=r"no tokenizer"):
        reward_model.loaded(LearnedReward(str(tmp_path / "bare")))
    task = make(LanguageRun(task=prompts.Config(prompts=str(folder / "rows.jsonl"), reward_model="x")))
    with pytest.raises(ValueError, match="scored nothing"):
        task.score([0], ["a"], [True])
    with pytest.raises(ValueError, match=r"task.reward is empty"):
        make(LanguageRun(task=prompts.Config(prompts=str(folder / "rows.jsonl"))))


def test_bfloat16_keeps_the_head_in_float32(scored_by):
    """Scores as of float32 but for the rounding of activations."""
    where, model = scored_by
    narrow = reward_model.loaded(LearnedReward(str(where), "bfloat16"))
    assert (
        narrow.params["score"]["kernel"].dtype == np.float32
        and str(narrow.params["embed"]["embedding"].dtype) == "bfloat16"
    )
    rows = model.encode(["q"] * 3, ["a", "b c", "c c c"])
    np.testing.assert_allclose(narrow.scores(rows), model.scores(rows), atol=0.1)


def test_a_head_is_drawn_once_and_kept():
    arch = transformer.Architecture("qwen2", 300, 64, 1, heads=2, kv_heads=1, head_dim=8, mlp=16, tie_embeddings=False)
    params = transformer.init(arch, jax.random.key(0))
    policy, begun = reward_model.begun(Policy(arch, None, (1,), 0, {}, "x"), params, jax.random.key(1))
    assert begun["embed"] is params["embed"] and "head" not in begun
    assert float(jnp.std(begun["score"]["kernel"])) == pytest.approx(64**-0.5, rel=0.3)
    assert reward_model.begun(policy, begun, jax.random.key(2))[1] is begun


@pytest.mark.slow
def test_a_run_is_scored_by_a_reward_model_and_resumed_with_the_same(main, folder, scored_by, random_model, tmp_path):
    """Its logged rewards are the model's scores of the stored completions; another model is refused on resumption."""
    model = tmp_path / "model"
    shutil.copytree(scored_by[0], model)
    flags = [
        "--config=configs/prompts.py:nano", f"--workdir={tmp_path}/run", f"--config.policy.weights={random_model}",
        f"--config.task.prompts={folder}/rows.jsonl", "--config.task.reward=", "--config.task.answer=",
        f"--config.task.reward_model={model}", "--config.task.reward_model_weight=2", "--config.warmup.steps=0",
        "--config.rollout.max_new_tokens=4", "--config.rollout.prompts_per_step=2", "--config.rollout.group_size=4",
        "--config.checkpoint.every=1", "--config.reference.samples=4", "--config.task.truncated=score",
        "--config.evaluation.every=0", "--config.task.demonstrations=",
    ]  # fmt: skip
    done = main(*flags, "--config.steps=2")
    assert done.returncode == 0, done.stderr
    assert f"rewards are scored by the reward model {model}" in done.stdout
    table = parquet.read_table(sorted((tmp_path / "run" / "rollouts").glob("*.parquet"))[-1]).to_pylist()
    rows = scored_by[1].encode([row["prompt"] for row in table], [row["completion"] for row in table])
    np.testing.assert_allclose([row["reward"] for row in table], 2 * scored_by[1].scores(rows), atol=1e-4)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    changed = main(*flags, "--config.steps=3")
    assert changed.returncode == 2 and "reward model/config.json" in changed.stderr
