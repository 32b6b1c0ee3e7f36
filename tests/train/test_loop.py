"""The loop: rows written one step late, before a checkpoint and after an interruption."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import single_step

from mara_jax.config import Algorithm, Checkpoint, Evaluation, LanguageRun, Optimiser, Rollout
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.sampling import rollout
from mara_jax.tasks.base import Score, Task
from mara_jax.train import checkpoint, groups, held_out, loop, optim, placement, reference, startup, summary

ENDS = tuple(range(0, 64, 4))
PROMPTS = [[5] * 40, [7, 9]]  # padded to 64 and to 32 by themselves
RUN = LanguageRun(
    steps=6,
    algorithm=Algorithm(method="mara", anchor="string"),
    rollout=Rollout(group_size=4, max_new_tokens=7, length_buckets=2, slots=2),
    optimiser=Optimiser(learning_rate=1e-2),
    checkpoint=Checkpoint(every=2, keep=9),
    show_samples=0,
)
TX = optim.make(RUN.optimiser)
# Which a step made by itself does not have.
OF_WINDOW = ("answers/entropy_bits", "answers/effective", "modes/known", "modes/lost")


class Ended(Task):
    """Rewards completions that ended. `fails`: raises at the so-manieth verdict from now."""

    fails = 0

    def __len__(self) -> int:
        return len(PROMPTS)

    def prompt(self, index: int) -> str:
        return ""

    def score(self, prompt_index, texts, finished) -> Score:
        self.fails -= 1
        if self.fails == 0:
            raise KeyboardInterrupt
        return Score(
            [float(good) for good in finished],
            [("yes", "no")[i % 2] if good else None for i, good in enumerate(finished)],
        )


@pytest.fixture(scope="module")
def setup() -> startup.Setup:
    arch = transformer.Architecture("qwen2", 64, 16, 1, heads=2, kv_heads=1, head_dim=8, mlp=16)
    policy = Policy(arch, None, ENDS, 0, {}, "random")
    params = transformer.init(arch, jax.random.key(0))
    return startup.Setup(RUN, Ended(), policy, params, PROMPTS, TX)


@pytest.fixture(scope="module")
def steps(setup) -> list[dict]:
    """The rows of six steps, one at a time."""
    state, rows = placement.fresh(setup.policy.architecture, setup.ref_params, TX), []
    for done in range(RUN.steps):
        state, row = single_step.train_step(setup, state, done)
        rows.append(row)
    return rows


def trained(monkeypatch, setup, workdir, task=None, run=RUN) -> list[tuple[int, int]]:
    """Runs in workdir without warm-up and measurement; (step, rows written by then) of each checkpoint."""
    saved = []
    save = checkpoint.Checkpoints.save

    def counted(self, done, state, last=False):
        if self.due(done, last):
            saved.append((done, len((workdir / "metrics.jsonl").read_text().splitlines())))
        save(self, done, state, last)

    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(run)))
    for module, name, function in (
        (startup, "reference_policy", lambda *_: (setup.policy, setup.ref_params)),
        (startup, "measure", lambda *_: None),
        (startup, "EncodedPrompts", lambda *_: PROMPTS),
        (held_out, "EncodedPrompts", lambda *_: PROMPTS),
        (optim, "make", lambda _: TX),
        (summary, "final_figure", lambda _: None),
        (summary, "final_table", lambda _: ""),
        (checkpoint.Checkpoints, "save", counted),
    ):
        monkeypatch.setattr(module, name, function)
    loop.run(run, task or setup.task, workdir)
    return saved


def rows_of(workdir, name="metrics.jsonl") -> list[dict]:
    rows = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def test_a_run_writes_every_steps_row_before_its_checkpoint(monkeypatch, setup, steps, tmp_path):
    """The rows are those of steps made one at a time, and their times add up."""
    expected = [{k: v for k, v in row.items() if "time/" not in k} for row in steps]
    assert trained(monkeypatch, setup, tmp_path) == [(2, 2), (4, 4), (6, 6)]
    assert [{k: v for k, v in row.items() if k not in OF_WINDOW} for row in rows_of(tmp_path)] == expected
    for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        parts = [row[f"time/{name}_s"] for name in ("rollout", "reward", "update")]
        assert min(parts) >= 0 and row["time/step_s"] == pytest.approx(sum(parts), abs=1e-6)


EVALUATED = dataclasses.replace(RUN, evaluation=Evaluation(every=3, samples=6))


def test_evaluations_change_nothing(monkeypatch, setup, steps, tmp_path):
    """Six samples of each prompt, drawn by fours; the last evaluation is of the policy of the last checkpoint."""
    expected = [{k: v for k, v in row.items() if "time/" not in k} for row in steps]
    trained(monkeypatch, setup, tmp_path, run=EVALUATED)
    measured = rows_of(tmp_path, held_out.FILE)
    assert [{k: v for k, v in row.items() if k not in OF_WINDOW} for row in rows_of(tmp_path)] == expected
    assert [row["step"] for row in measured] == [0, 3, 6] and len({row["reward"] for row in measured}) > 1
    params = checkpoint.read_params(tmp_path, 6, jax.eval_shape(lambda: setup.ref_params))
    key, again = reference.stream(RUN.seed, "evaluation"), []
    for first, count in ((0, 4), (4, 2)):
        drawn = rollout.sample(
            setup.policy, params, PROMPTS, key=key, group_size=4, max_new_tokens=7, first_sample=first, slots=2
        )
        again.append(np.asarray(drawn.finished)[:, :count])
    assert measured[-1]["reward"] == pytest.approx(np.mean(np.concatenate(again, axis=1)))


@pytest.mark.slow
def test_evaluations_survive_an_end_between_them(monkeypatch, setup, tmp_path):
    """A run dies after an evaluation whose row is made again, as the checkpoint before it is older."""
    trained(monkeypatch, setup, tmp_path / "whole", run=EVALUATED)
    whole = rows_of(tmp_path / "whole", held_out.FILE)
    kept = Checkpoint(every=4, keep=1, best="reward")
    often = dataclasses.replace(RUN, evaluation=Evaluation(every=1, samples=6), checkpoint=kept)
    task = Ended()
    task.fails = 4 + 5 * (1 + 4) + 1  # a verdict a step, and four an evaluation: two prompts in two calls each
    with pytest.raises(KeyboardInterrupt):
        trained(monkeypatch, setup, tmp_path / "died", task, often)
    died = rows_of(tmp_path / "died", held_out.FILE)
    assert [row["step"] for row in died] == [0, 1, 2, 3, 4, 5] and checkpoint.saved_steps(tmp_path / "died") == [4]
    assert trained(monkeypatch, setup, tmp_path / "died", run=often) == [(6, 6)]
    assert rows_of(tmp_path / "died", held_out.FILE)[:6] == died
    assert rows_of(tmp_path / "died", held_out.FILE)[::3] == whole
    assert len(list((tmp_path / "died" / held_out.FOLDER).iterdir())) == 7
    assert died[4]["reward"] > whole[-1]["reward"] and checkpoint.saved_steps(tmp_path / "died") == [4, 6]


@pytest.mark.slow
def test_a_run_that_dies_in_a_step_has_told_of_those_before_and_goes_on(monkeypatch, setup, tmp_path):
    trained(monkeypatch, setup, tmp_path / "whole")
    whole = rows_of(tmp_path / "whole")
    task = Ended()
    task.fails = 4
    with pytest.raises(KeyboardInterrupt):
        trained(monkeypatch, setup, tmp_path / "died", task)
    # Step 3 was told while step 4 rolled out.
    assert rows_of(tmp_path / "died") == whole[:3]
    assert trained(monkeypatch, setup, tmp_path / "died") == [(4, 4), (6, 6)]
    assert rows_of(tmp_path / "died") == whole


class Scripted(Ended):
    """Gives the rewards that it was told, one table [p, g] a call."""

    def __init__(self, *tables) -> None:
        self.tables = list(tables)

    def score(self, prompt_index, texts, finished) -> Score:
        return Score(np.ravel(self.tables.pop(0)), [None] * len(texts))


def test_groups_of_equal_rewards_are_drawn_again_where_the_method_says_so(setup):
    """DAPO: the first prompt's group is replaced until its rewards differ, the second's stays."""
    same, differ = [1.0, 1, 1, 1], [0.0, 1, 1, 1]
    task = Scripted([same, differ], [same, same], [differ, same])
    cfg = dataclasses.replace(RUN, algorithm=Algorithm(method="dapo"))
    dapo, ids = setup._replace(cfg=cfg, task=task), np.array([0, 1])
    state = placement.fresh(setup.policy.architecture, setup.ref_params, TX)
    key = groups.rollout_key(RUN, "rollout", 0)

    def drawn(redraw):
        return rollout.collect(groups.start_rollout(dapo, setup.ref_params, ids, key, redraw))

    draws = [drawn(redraw) for redraw in range(4)]
    assert len({np.asarray(one.tokens).tobytes() for one in draws}) == 4
    varied = groups.varied(dapo, state, groups.Groups(draws[0], ids), 0)
    first = varied.completions
    assert varied.ids.tolist() == [0, 1] and varied.redrawn == 4
    # The first group is equal, then both, then the second; after three draws nothing is asked any more.
    for name in ("tokens", "logp", "lengths", "finished"):
        values = [np.asarray(getattr(one, name)) for one in (first, *draws)]
        assert np.array_equal(values[0][0], values[3][0]) and np.array_equal(values[0][1], values[4][1])
    assert not task.tables
    mara = dapo._replace(cfg=RUN)
    assert groups.varied(mara, state, groups.Groups(draws[0], ids), 0).completions is draws[0]


class OfReference(Ended):
    """Rewards of the reference's log-probs and the step."""

    reads_ref_logp = True

    def score_in_run(self, prompt_index, texts, finished, context) -> Score:
        return Score(context.step + np.asarray(context.ref_logp), [None] * len(texts))


def test_rewards_of_the_step_and_the_references_log_probs(setup):
    """The first step's policy is the reference, so the sampler's own log-probs are the reference's."""
    run, ids = setup._replace(task=OfReference()), np.array([0, 1])
    completions = rollout.collect(
        groups.start_rollout(run, setup.ref_params, ids, groups.rollout_key(RUN, "rollout", 4))
    )
    scores = loop.scored_batches(run, completions, ids, 4)[0]
    np.testing.assert_allclose(scores.reward, 5 + np.asarray(completions.logp).sum(-1), rtol=1e-5)


def test_groups_of_equal_rewards_are_replaced_by_other_prompts(setup):
    """The second group is replaced once, by a wider prompt; every row is then of the prompt that its id says."""
    wide, ids = [[5] * 3, [6] * 40], np.array([0])
    task = Scripted([[1.0, 1, 1, 1]], [[0.0, 1, 1, 1]])
    sizes = dataclasses.replace(RUN.rollout, prompts_per_step=1, equal_groups="replace")
    run = setup._replace(cfg=dataclasses.replace(RUN, rollout=sizes), task=task, prompts=wide)
    state = placement.fresh(setup.policy.architecture, setup.ref_params, TX)
    key = groups.rollout_key(RUN, "rollout", 0)
    first = rollout.collect(groups.start_rollout(run, setup.ref_params, ids, key))
    varied = groups.varied(run, state, groups.Groups(first, ids), 0)
    assert varied.ids.tolist() == [1] and varied.redrawn == 1 and not task.tables
    expected = rollout.collect(groups.start_rollout(run, setup.ref_params, np.array([1]), key, 1))
    for name in ("tokens", "logp", "prompt_tokens", "prompt_lengths"):
        np.testing.assert_array_equal(getattr(varied.completions, name), getattr(expected, name))
    assert first.prompt_tokens.shape[1] < expected.prompt_tokens.shape[1]
