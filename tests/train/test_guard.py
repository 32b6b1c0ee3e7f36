"""Values that are not finite: what stops a run, what is saved then, and updates that are skipped."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_run
import test_loop
import test_updates
from test_loop import setup  # noqa: F401 - a fixture

from mara_jax.config import Algorithm, Rollout
from mara_jax.core.scored import Numbers
from mara_jax.train import checkpoint, finite, guard, loop, optim, reference, startup, step, strict_json, summary
from mara_jax.train.state import BySampler

# One shape of prompts and of completions: few programs to compile.
PROMPTS = [[7, 9], [5]]
RUN = dataclasses.replace(test_loop.RUN, rollout=Rollout(group_size=4, max_new_tokens=7, length_buckets=0))
SKIP = dataclasses.replace(RUN, guard="skip", guard_limit=3)
ADAM = optax.inject_hyperparams(optax.adam)(1e-2)  # its rate is a part of the state: one program for all rates
FINITE_ROW = dict.fromkeys(finite.SUMMARIES, 1.0)


def strict(text: str):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def rows_of(workdir) -> list[dict]:
    return [strict(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def trained(monkeypatch, setup, workdir, run, at=(), poison=jnp.inf, draws=False):  # noqa: F811
    """Runs in workdir; at these steps the device sees `poison` in place of the reward of sample 2."""
    update = loop.update

    def poisoned(setup, state, batches):
        if int(state.step) + 1 in at:
            ones = batches.policy
            batches = batches._replace(policy=ones.replace(reward=ones.reward.at[0, 2].set(poison)))
        return update(setup, state, batches)

    workdir.mkdir(exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(run)))
    (workdir / "reference.json").write_text(json.dumps(reference.unmeasured(run, setup.task)))
    with monkeypatch.context() as patched:
        for module, name, function in (
            (startup, "reference_policy", lambda *_: (setup.policy, setup.ref_params)),
            (startup, "measure", lambda *_: None),
            (startup, "EncodedPrompts", lambda *_: PROMPTS),
            (optim, "make", lambda _: test_loop.TX),
            (loop, "update", poisoned),
        ):
            patched.setattr(module, name, function)
        if not draws:
            patched.setattr(summary, "final_figure", lambda _: None)
        loop.run(run, setup.task, workdir)


@pytest.mark.parametrize("name", finite.SUMMARIES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_each_summary_is_named_by_itself(name, value):
    assert finite.first_nonfinite(FINITE_ROW) is None
    assert finite.first_nonfinite(FINITE_ROW | {name: value}) == finite.SUMMARIES[name]
    assert not finite.is_finite({name: jnp.float32(value), "loss": jnp.float32(value)})


def test_the_first_in_the_order_of_computation_is_named():
    assert finite.first_nonfinite(FINITE_ROW | {"loss": np.nan, "kl/k1": np.nan, "grad/norm": np.nan}) == (
        "a log-prob of the reference policy"
    )


def test_json_that_holds_no_nan():
    assert strict_json.text({"a": [np.nan, 1.5, (np.inf,)], "b": -np.inf, "c": True}) == (
        '{"a": [null, 1.5, [null]], "b": null, "c": true}'
    )


def test_the_first_array_that_is_not_finite_is_named():
    state = test_updates.fresh(test_updates._adam()).replace(log_z=jnp.array([-jnp.inf, 1.0]))
    assert finite.nonfinite_array(state) is None
    assert finite.nonfinite_array(state.replace(log_z=jnp.array([jnp.inf, 1.0]))) == "log_z"
    large = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(1e20), state.params)
    assert finite.nonfinite_array(state.replace(params=large)).startswith("params[")
    nu = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.inf), state.opt_state[1][0].nu)
    adam = state.opt_state[1][0]._replace(nu=nu)
    broken = state.replace(opt_state=(state.opt_state[0], (adam, *state.opt_state[1][1:])))
    assert finite.nonfinite_array(broken).startswith("opt_state[1][0].nu[")


@functools.cache
def one_update(reward: float, updates: int, skip: bool, rate: float = 1e-2):
    algorithm = test_updates.SEQUENCE if updates > 1 else Algorithm(method="vanilla")
    one = test_updates.batch().replace(reward=jnp.array([[reward, 0.0, 0.8, 0.3]]))
    choices = step.Choices(test_updates.ARCH, algorithm, ADAM, 1, updates, skip)
    before = test_updates.fresh(ADAM)
    before.opt_state.hyperparams["learning_rate"] = jnp.float32(rate)
    copy = jax.tree.map(np.array, before)
    numbers = Numbers(jnp.float32(0.1), jnp.float32(0.5), jnp.float32(0.0))
    state, metrics = step.update(before, test_updates.params_of(2), BySampler(one), numbers, choices)
    return copy, state, metrics


def test_a_skipped_update_leaves_every_bit_of_the_state_and_counts_the_step():
    before, after, metrics = one_update(np.inf, 3, True)
    assert metrics["guard/skipped"] == 1 and int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, before.replace(step=np.int32(1)), after)


def test_an_update_that_is_finite_is_the_same_whether_it_may_be_skipped_or_not():
    (_, plain, _), (_, after, metrics) = one_update(1.0, 3, False), one_update(1.0, 3, True)
    assert metrics["guard/skipped"] == 0
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), plain, after)


def test_a_later_update_that_is_not_finite_is_told_though_the_first_was_fine():
    """Adam's first update leaves weights of 1e30, at which the second has no log-probs."""
    _, state, metrics = one_update(1.0, 3, False, rate=1e30)
    assert finite.first_nonfinite(FINITE_ROW | metrics) is not None and finite.nonfinite_array(state) is not None
    before, after, metrics = one_update(1.0, 3, True, rate=1e30)
    assert metrics["guard/skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


@pytest.mark.parametrize("rate", [1e39, 1e21])  # 1e21 is finite, its square is not, as RMSNorm takes it
def test_an_update_to_infinite_parameters_is_skipped(rate):
    before, after, metrics = one_update(1.0, 1, True, rate=rate)
    assert metrics["guard/skipped"] == 1 and np.isfinite(metrics["grad/norm"])
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


def test_a_run_stops_at_the_step_and_keeps_the_checkpoint_before_it(monkeypatch, setup, tmp_path):  # noqa: F811
    with pytest.raises(guard.NonFiniteError) as caught:
        trained(monkeypatch, setup, tmp_path, RUN, at=(5,))
    message = str(caught.value)
    assert "\n" not in message and message.startswith("step 5: a reward is not finite; the batch is in ")
    assert f"the newest good checkpoint is {tmp_path / 'checkpoints' / '4'}: lower optimiser.learning_rate" in message
    assert saved(tmp_path) == [2, 4] and [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4]
    told = strict((tmp_path / "nonfinite" / "step_5.json").read_text())
    assert told["not_finite"] == "a reward" and told["metrics"]["reward/mean"] is None and told["prompts"] == {"1": ""}
    assert [one["sample"] for one in told["completions"]] == [0, 1, 2, 3]
    for one in told["completions"]:
        assert one["reward"] == float(one["finished"]) and len(one["tokens"]) == len(one["logp"]) <= 7
        assert one["finished"] == (one["tokens"][-1] in test_loop.ENDS)
    # The same command goes on after the checkpoint, to the same end as a run that was never stopped.
    trained(monkeypatch, setup, tmp_path, RUN)
    assert saved(tmp_path) == [2, 4, 6]


def test_the_last_checkpoint_is_not_written_from_a_bad_step(monkeypatch, setup, tmp_path):  # noqa: F811
    with pytest.raises(guard.NonFiniteError, match=r"^step 4: a reward is not finite"):
        trained(monkeypatch, setup, tmp_path, dataclasses.replace(RUN, steps=4), at=(4,), poison=jnp.nan)
    assert saved(tmp_path) == [2] and len(rows_of(tmp_path)) == 3


def test_a_state_that_is_not_finite_is_not_saved_though_its_row_is_fine(monkeypatch, setup, tmp_path):  # noqa: F811
    """The update of step 2 itself ends in infinite weights, which no later forward pass has seen."""
    update = loop.update

    def overflow(setup, state, batches):
        done = int(state.step) + 1
        state, scalars = update(setup, state, batches)
        return (jax.tree.map(lambda x: x * jnp.inf, state) if done == 2 else state), scalars

    monkeypatch.setattr(loop, "update", overflow)
    with pytest.raises(
        guard.NonFiniteError, match=r"^step 2: params\[.* after the update is not finite, and is not saved; there"
    ):
        trained(monkeypatch, setup, tmp_path, RUN)
    assert saved(tmp_path) == [] and len(rows_of(tmp_path)) == 1


@pytest.mark.parametrize(
    ("cfg", "broken", "words", "kept"),
    [
        (RUN, 2, "step 2: the policy after the update gives values that are not finite, and is not saved", []),
        (SKIP, 3, r"step 4: a log-prob that the sampler recorded \(prompt .* is not finite; the batch is in ", [2]),
    ],
)  # fmt: skip
def test_a_policy_that_no_longer_works_is_not_kept(monkeypatch, setup, tmp_path, cfg, broken, words, kept):  # noqa: F811
    """Weights that are finite, whose attention overflows: seen when they are saved, or sampled from; no skip heals."""
    update = loop.update

    def large(setup, state, batches):
        done = int(state.step) + 1
        state, scalars = update(setup, state, batches)
        if done == broken:
            state = state.replace(params=jax.tree.map(lambda x: x * 1e15, state.params))
        return state, scalars

    monkeypatch.setattr(loop, "update", large)
    with pytest.raises(guard.NonFiniteError, match=words):
        trained(monkeypatch, setup, tmp_path, cfg)
    assert saved(tmp_path) == kept and not (tmp_path / "model").exists()


@pytest.mark.slow
def test_skipped_steps_are_written_shown_counted_and_passed_over(monkeypatch, setup, tmp_path, capsys):  # noqa: F811
    trained(monkeypatch, setup, tmp_path, SKIP, at=(2, 5), draws=True)
    said, rows = capsys.readouterr().out, rows_of(tmp_path)
    assert [row["guard/skipped"] for row in rows] == [0, 1, 0, 0, 1, 0]
    assert rows[1]["reward/mean"] is None and rows[0]["reward/mean"] is not None
    assert "WARNING: step 2: a reward is not finite, and its update was skipped (guard=skip)" in said
    assert "2 of 6 updates were skipped" in said and saved(tmp_path) == [2, 4, 6]
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and "nan" not in said.lower()
    assert guard.skipped_in_a_row(rows) == 0 and guard.skipped_in_a_row(rows[:5]) == 1


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_across_a_resume(monkeypatch, setup, tmp_path):  # noqa: F811
    """Steps 3 and 4 are skipped, the run ends there and is made longer: step 5 is the third in a row."""
    trained(monkeypatch, setup, tmp_path, dataclasses.replace(SKIP, steps=4), at=(3, 4))
    with pytest.raises(
        guard.NonFiniteError, match=r"step 5: a reward is not finite; 3 updates in a row were skipped, guard_limit=3; "
    ):
        trained(monkeypatch, setup, tmp_path, SKIP, at=(5,))
    assert saved(tmp_path) == [2, 4] and len(rows_of(tmp_path)) == 4
    trained(monkeypatch, setup, tmp_path, dataclasses.replace(SKIP, guard_limit=4), at=(5,))
    assert [row["guard/skipped"] for row in rows_of(tmp_path)] == [0, 0, 1, 1, 1, 0]


@pytest.mark.slow
def test_a_run_that_diverges_ends_in_one_line(main, quick_environment, tmp_path):
    """The command itself, with a learning rate at which weights become 1e20: nothing that is not finite is kept."""
    workdir = tmp_path / "run"
    changes = ["--config.optimiser.learning_rate=1e20", "--config.algorithm.kl=forward"]
    done = main(*small_run.SMALL, f"--workdir={workdir}", *changes)
    small_run.refused(done, "step ", "not finite", "nonfinite/step_", "learning_rate")
    assert done.returncode == 2
    for row in rows_of(workdir):
        assert all(value is not None for value in row.values())
    assert checkpoint.check(workdir, 6) is None
