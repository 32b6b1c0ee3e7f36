"""Rows told one step late, and programs compiled before they are needed."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from mara_jax.bench import speed
from mara_jax.config import Algorithm, Checkpoint, LanguageRun, Optimiser, Rollout
from mara_jax.policies import transformer
from mara_jax.policies.packing import bucket_sizes
from mara_jax.policies.policy import Policy
from mara_jax.sampling import logprobs
from mara_jax.tasks.base import Score
from mara_jax.train import ahead, checkpoint, loop, optim, placement, plots, reference, report, step

ENDS = tuple(range(0, 64, 4))
PROMPTS = [[5] * 40, [7, 9]]  # padded to 64 and to 32 by themselves
RUN = LanguageRun(
    steps=6,
    algorithm=Algorithm(method="mara", anchor="string"),
    rollout=Rollout(group_size=4, max_new_tokens=7, length_buckets=2, compile_ahead=True, slots=2),
    optimiser=Optimiser(learning_rate=1e-2),
    checkpoint=Checkpoint(every=2, keep=9),
    show_samples=0,
)
TX = optim.make(RUN.optimiser)


class Ended:
    """Rewards completions that ended. `fails`: raises at the so-manieth verdict from now."""

    answers, prompts, fails = ("yes", "no"), ("", ""), 0

    def score(self, prompt_index, texts, finished) -> Score:
        self.fails -= 1
        if self.fails == 0:
            raise InterruptedError("in the middle of a step")
        good = np.array(finished)
        return Score(good.astype(np.float32), np.where(good, np.arange(good.size) % 2, -1).astype(np.int32))


@pytest.fixture(scope="module")
def setup() -> loop.Setup:
    arch = transformer.Architecture("qwen2", 64, 16, 1, heads=2, kv_heads=1, head_dim=8, mlp=16, qkv_bias=True)
    policy = Policy(arch, None, ENDS, 0, {}, "random")
    params = transformer.init(arch, jax.random.key(0))
    task: Any = Ended()
    return loop.Setup(RUN, task, policy, params, PROMPTS, np.log(np.array([[0.5, 0.2]] * 2, np.float32)), TX)


@pytest.fixture(scope="module")
def steps(setup) -> list[dict]:
    """The rows of six steps, one at a time; of each what was compiled, and the widths of its prompts and streams."""
    state, compilations, sizes = (
        placement.fresh(setup.policy.architecture, setup.ref_params, TX),
        speed.Compilations(),
        [],
    )
    update = step.update

    def seen(state, ref_params, batch, *rest, **static):
        sizes.append((batch.prompt_tokens.shape[1], batch.packing.place_cn.shape[1]))
        return update(state, ref_params, batch, *rest, **static)

    seen.lower = update.lower
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "update", seen)
        for done in range(RUN.steps):
            with compilations.counted() as compiled:
                state, begun = loop.begin(setup, state, done, ahead=done == 0)
                row, _, _ = loop.finish(setup, begun)
            rows.append({**row, "compiled": compiled["programs"], "sizes": sizes[-1]})
    return rows


def test_nothing_is_compiled_after_the_first_step(steps):
    """Two prompts of different lengths, one a step, and completions that fill streams of both sizes."""
    assert {width for width, _ in (row["sizes"] for row in steps)} == {64}
    first, *later = [row["sizes"] for row in steps]
    assert len({first, *later}) >= 2 and any(size != first for size in later), "no step met another size"
    assert steps[0]["compiled"] > 3
    assert [row["compiled"] for row in steps[1:]] == [0] * 5


@pytest.mark.parametrize(("shape", "parts"), [((1, 4), 1), ((3, 4), 2)])
def test_every_declared_size_is_compiled(shape, parts):
    """The sizes of the packings are those that `packing.bucket` can give, each full to the last token."""
    for buckets in (1, 3, 8):
        made = ahead.packings(shape, 7, buckets, parts)
        rows = shape[0] * shape[1] // parts
        assert [one.place_cn.shape[-1] for one in made if one] == bucket_sizes(rows * 6, buckets)
        assert all((one.place_cn >= 0).all() and one.slot_bt.ndim == 2 + (parts > 1) for one in made if one)
    assert ahead.packings(shape, 7, 0, parts) == [None]
    assert logprobs.packed(np.full(shape, 7), 7, 0, parts=parts) is None


def trained(monkeypatch, setup, workdir, task=None) -> list[tuple[int, int]]:
    """Runs in workdir without warm-up and measurement; (step, rows written by then) of each checkpoint."""
    saved = []
    save = checkpoint.Checkpoints.save

    def counted(self, done, state, last=False):
        if self.due(done, last):
            saved.append((done, len((workdir / "metrics.jsonl").read_text().splitlines())))
        save(self, done, state, last)

    known = {"log_mass": setup.log_mass, "log_optimum": None}
    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(RUN)))
    for module, name, function in (
        (loop, "_reference", lambda *_: (setup.policy, setup.ref_params)),
        (loop, "_measured", lambda *_: known),
        (reference, "prompt_tokens", lambda *_: PROMPTS),
        (optim, "make", lambda _: TX),
        (plots, "final_figure", lambda _: None),
        (report, "final_table", lambda _: ""),
        (checkpoint.Checkpoints, "save", counted),
    ):
        monkeypatch.setattr(module, name, function)
    loop.run(RUN, task or setup.task, workdir)
    return saved


def told(workdir) -> list[dict]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def test_a_run_writes_every_steps_row_before_its_checkpoint(monkeypatch, setup, steps, tmp_path):
    """The rows are those of steps made one at a time, and their times add up."""
    expected = [{k: v for k, v in row.items() if k not in ("compiled", "sizes") and "time/" not in k} for row in steps]
    assert trained(monkeypatch, setup, tmp_path) == [(2, 2), (4, 4), (6, 6)]
    assert [{k: v for k, v in row.items() if k != "answers/entropy_bits"} for row in told(tmp_path)] == expected
    for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        parts = [row[f"time/{name}_s"] for name in ("rollout", "reward", "update")]
        assert min(parts) >= 0 and row["time/step_s"] == pytest.approx(sum(parts), abs=1e-6)


@pytest.mark.slow
def test_a_run_that_dies_in_a_step_has_told_of_those_before_and_goes_on(monkeypatch, setup, tmp_path):
    trained(monkeypatch, setup, tmp_path / "whole")
    whole = told(tmp_path / "whole")
    task: Any = Ended()
    task.fails = 4
    with pytest.raises(InterruptedError):
        trained(monkeypatch, setup, tmp_path / "died", task)
    # Step 3 was told while step 4 rolled out.
    assert told(tmp_path / "died") == whole[:3]
    assert trained(monkeypatch, setup, tmp_path / "died") == [(4, 4), (6, 6)]
    assert told(tmp_path / "died") == whole
