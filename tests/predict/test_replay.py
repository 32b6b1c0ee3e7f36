"""Stored rollouts replayed: signals by hand and by training's own metrics, optima of an enumerable policy, refusals."""

import functools
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from enumerated_rollouts import GROUP, POLICIES, REF, REWARD, settings, stored
from pyarrow import parquet
from rich.console import Console

from mara_jax import config
from mara_jax.core import augment, targets
from mara_jax.predict import batches, replay, replay_drawing, stored_rollouts
from mara_jax.predict.prediction import Settings
from mara_jax.train import rollouts

# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 0.05])
def test_vanilla_advantages_are_the_leave_one_out_returns(beta):
    rollout = stored()
    signal = batches.signal(rollout, settings(beta=beta))
    assert signal is not None
    return_kg = rollout.reward - beta * (rollout.logp - rollout.ref_logp)
    others_kg = (return_kg.sum(axis=1, keepdims=True) - return_kg) / (GROUP - 1)
    assert np.allclose(signal.advantage, return_kg - others_kg, atol=2e-6)
    assert np.allclose(signal.reward, rollout.reward) and not signal.changed.any()


@pytest.mark.parametrize("threshold", [0.8, 0.95])
def test_mara_over_strings_is_that_of_core(threshold):
    rollout = stored()
    signal = batches.signal(rollout, settings("strings", threshold=threshold))
    assert signal is not None
    want, _ = augment.mara(jnp.asarray(rollout.reward), jnp.asarray(rollout.ref_logp), beta=0.5, threshold=threshold)
    assert np.allclose(signal.reward, want, atol=1e-6)
    # By hand: z is the first completion, of ref .4; the second, of ref .2, gets 1 + .5 log 2.
    assert signal.reward[0, 4] == pytest.approx(1 + 0.5 * np.log(2), abs=1e-6)
    assert (signal.reward[0, 6] > 0.95) == (threshold == 0.8)


def test_mara_over_answers_is_that_of_core_on_the_masses_of_the_run():
    """Of four samples of the reference two say "a", one "b", all with reward 1; "b" gets beta log 2."""
    rollout = stored()
    signal = batches.signal(rollout, settings("answers"))
    assert signal is not None
    mass = augment.answer_log_mass(jnp.array([[1.0, 1.0, 1.0, 0.2]]), jnp.array([[0, 0, 1, -1]]), 3, 0.5, 0.8)
    index = {"a": 0, "b": 1, "c": 2, None: -1}
    answer_kg = np.array([[index[name] for name in group] for group in rollout.answer])
    want, _ = augment.mara_answers(
        jnp.asarray(rollout.reward), jnp.asarray(rollout.ref_logp), jnp.asarray(answer_kg),
        jnp.repeat(mass, len(answer_kg), axis=0), beta=0.5, threshold=0.8,
    )  # fmt: skip
    assert np.allclose(signal.reward, want, atol=1e-6)
    assert signal.reward[0, 4] == pytest.approx(1 + 0.5 * np.log(2), abs=1e-5)
    assert np.mean(signal.changed) == pytest.approx((0.4 + 0.2) / 2)  # the good "b" of both policies
    assert batches.signal(stored(reference=False), settings("answers")) is None


def test_forward_kl_is_that_of_the_ratio_estimator():
    """The factor of grad log pi holds the KL's own term, beta ref / pi, beside the reward without its baseline."""
    rollout = stored(config.Algorithm(method="reinforce", beta=0.5))
    signal = batches.signal(rollout, settings(kl="forward"))
    assert signal is not None
    want = rollout.reward + 0.5 * np.exp(rollout.ref_logp - rollout.logp)
    assert np.allclose(signal.advantage, want, atol=1e-5)


def test_truncated_completions_that_a_run_leaves_out_have_no_advantage():
    finished = np.ones((40, GROUP), bool)
    finished[:, 0] = False
    rollout = stored(finished=finished, leaves_out_truncated=True)
    signal = batches.signal(rollout, settings())
    assert signal is not None and np.all(signal.advantage[:, 0] == 0)
    assert np.allclose(signal.advantage.sum(axis=1), 0, atol=1e-5)
    with pytest.raises(ValueError, match="left out"):
        batches.signal(rollout, settings(kl="forward"))
    record = replay.replay(rollout, [settings()], resamples=0)
    assert record["settings"][0]["prompts"][0]["count"] == 40 * (GROUP - 1)


def test_summary_by_hand():
    """Two groups of two: rewards 1, 0 and 1, 1; the own advantages are their negatives, or constant."""
    reward, changed = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[True, False], [False, False]])
    signal = batches.Signal(reward, changed, np.array([[0.5, -0.5], [0.25, -0.25]]))
    other = signal._replace(advantage=-signal.advantage)
    got = batches.summary(signal, other)
    want = {"augmented": 0.25, "reward": 0.75, "advantage": 0.375, "equal_groups": 0.5, "correlation": -1.0}
    assert got == pytest.approx(want)
    assert np.isnan(batches.summary(signal, signal._replace(advantage=np.zeros((2, 2))))["correlation"])


# ---- optima ---------------------------------------------------------------------------------------------------------


def exact(one: Settings) -> np.ndarray:
    ref_logp, index = jnp.log(REF), jnp.array([0, 1, 1, 2, -1])
    if one.objective == "vanilla":
        optimum = targets.reverse_kl if one.kl == "reverse" else targets.forward_kl
        return np.exp(np.asarray(optimum(ref_logp, jnp.asarray(REWARD), one.beta), np.float64))
    if one.objective == "strings":
        return np.exp(np.asarray(targets.mara(ref_logp, REWARD, one.beta, one.threshold, one.kl), np.float64))
    best = targets.mara_answers(ref_logp, REWARD, index, one.beta, one.threshold, one.kl)
    return np.exp(np.asarray(best, np.float64))


@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize("method", ["vanilla", "answers", "strings"])
def test_another_setting_ends_where_enumeration_says(method, kl):
    """The run's own settings are vanilla at beta .5; what is stored gives the optimum of every other exactly."""
    for beta, threshold in ((0.1, 0.8), (2.0, 0.95)):
        one = settings(method, kl, beta, threshold)
        record = replay.replay(stored(reference=False), [settings(), one], resamples=0)
        at, p = record["settings"][1]["prompts"][0], exact(one)
        assert at["reward"] == pytest.approx(p @ REWARD, abs=3e-6)
        assert at["good"] == pytest.approx(p[threshold <= REWARD].sum(), abs=3e-6)
        assert at["none"] == pytest.approx(p[4], abs=3e-6)
        mass = np.array([p[0], p[1] + p[2], p[3]])
        share = mass / mass.sum()
        assert at["answers"] == ["a", "b", "c"] and at["share"] == pytest.approx(share.tolist(), abs=3e-6)
        assert at["entropy_bits"] == pytest.approx(-np.sum(share * np.log2(share)), abs=2e-4)
        assert at["number"] == pytest.approx(np.exp(-np.sum(share * np.log(share))), abs=2e-4)
        assert record["settings"][1]["mean"]["reward"] == at["reward"]


def test_effective_samples_decide_whether_an_estimate_counts():
    """400 completions: weights 1 in the first half; in the second 2/3, 2, 2, 1, 1 by hand."""
    record = replay.replay(stored(), [settings(), settings(beta=0.01)], resamples=0)
    weight = np.concatenate([np.ones(200), np.repeat(REF / POLICIES[1], [120, 20, 20, 20, 20])])
    assert record["reference"][0]["effective_samples"] == pytest.approx(weight.sum() ** 2 / np.sum(weight**2))
    assert record["reference"][0]["mean_weight"] == pytest.approx(1.0) and record["notes"] == []
    own = record["settings"][0]["prompts"][0]
    index = np.concatenate([np.repeat(np.arange(5), np.rint(p * 200).astype(int)) for p in POLICIES])
    combined = weight * np.exp(REWARD[index] / 0.5)
    assert own["effective_samples"] == pytest.approx(combined.sum() ** 2 / np.sum(combined**2), rel=1e-5)
    assert own["too_small"] is None
    few = replay.replay(stored(groups=4), [settings()], resamples=0)["settings"][0]
    assert few["prompts"][0]["too_small"].startswith("too small: 80 completions count as ")
    assert few["mean"]["too_small"] and "100 are needed" in few["prompts"][0]["too_small"]


def test_weights_that_are_not_reference_over_policy_are_noticed():
    """Inverted log-probabilities have a mean weight far above 1; a policy that forgot half, one far below."""
    rollout = stored()
    logp = rollout.logp - np.where(rollout.step[:, None] == 2, 2.0, 0.0)
    assert "not those with which" in replay.replay(rollout._replace(logp=logp), [settings()], resamples=0)["notes"][0]
    assert (
        "hardly reach"
        in replay.replay(rollout._replace(logp=rollout.logp + 0.7), [settings()], resamples=0)["notes"][0]
    )


def test_means_over_prompts():
    """Two prompts, the second with the rewards of the first halved: the mean reward is that of both optima."""
    rollout = stored(prompt_id=np.repeat([3, 5], 20), text={3: "x", 5: "y"})
    rollout = rollout._replace(reward=rollout.reward * np.where(rollout.prompt_id == 5, 0.5, 1.0)[:, None])
    (entry,) = replay.replay(rollout, [settings()], resamples=50)["settings"]
    first, second = entry["prompts"]
    assert (first["prompt_id"], second["prompt_id"]) == (3, 5)
    assert entry["mean"]["reward"] == pytest.approx((first["reward"] + second["reward"]) / 2)
    assert entry["mean"]["effective_samples"] == first["effective_samples"] + second["effective_samples"]
    assert entry["mean"]["reward_low"] < entry["mean"]["reward"] < entry["mean"]["reward_high"]


@pytest.mark.parametrize("prompts, answers, samples", [(60, 3, 40), (60, 4, 30), (8, 5, 100)])
def test_intervals_of_bits_and_numbers_hold_the_truth_and_the_estimate(prompts, answers, samples):
    """Means over prompts with equally likely answers: noise averages out, and the bias of few samples does not."""
    random, held, runs = np.random.default_rng(0), np.zeros(2), 60
    for _ in range(runs):
        share_pa = random.multinomial(samples, [1 / answers] * answers, size=prompts) / samples
        drawn_rpa = random.multinomial(samples, share_pa, size=(200, prompts)) / samples
        rows_rpa = np.concatenate([share_pa[None], drawn_rpa])
        bits_rp = -np.sum(rows_rpa * np.log2(np.maximum(rows_rpa, 1e-9)), axis=-1)
        numbers = {"entropy_bits": bits_rp.mean(axis=1), "number": (2**bits_rp).mean(axis=1)}
        ends = replay.intervals(numbers)
        for place, (name, truth) in enumerate((("entropy_bits", np.log2(answers)), ("number", answers))):
            assert ends[f"{name}_low"] <= ends[name] <= ends[f"{name}_high"]
            held[place] += ends[f"{name}_low"] <= truth <= ends[f"{name}_high"]
    assert (held >= 0.8 * runs).all(), held


def test_intervals_of_a_sure_answer_and_of_none():
    numbers = {
        "entropy_bits": np.array([0.1, 0.0, 0.9]),
        "number": np.full(3, 1.0),
        "reward": np.array([0.5, 0.4, 0.7]),
    }
    ends = replay.intervals(numbers)
    assert ends["entropy_bits_low"] == 0 and ends["entropy_bits_high"] == pytest.approx(0.2 - 0.0225)
    assert ends["number_low"] == ends["number_high"] == 1
    assert ends["reward_low"] == pytest.approx(0.4075) and ends["reward_high"] == pytest.approx(0.6925)
    assert replay.intervals({"number": np.array([2.0])})["number_low"] is None


def test_the_sweep_begins_with_the_own_settings():
    own = settings(beta=0.03)
    rollout = stored(config.Algorithm(method="vanilla", beta=0.03))
    plain = replay.sweep(rollout, {})
    assert plain[0] == own and len(plain) == len(set(plain)) == 10
    assert {one.objective for one in plain} == {"vanilla", "answers"}
    assert sorted({one.beta for one in plain}) == pytest.approx([0.003, 0.009, 0.03, 0.09, 0.3])
    chosen = replay.sweep(rollout, {"beta": (0.1, 0.3), "threshold": (0.5,)})
    assert chosen == [own, own._replace(beta=0.1, threshold=0.5), own._replace(beta=0.3, threshold=0.5)]
    grpo, note = replay.own_settings(config.LanguageRun(algorithm=config.Algorithm(method="grpo", beta=0.1)))
    assert grpo.objective == "vanilla" and "method=grpo is not known" in note
    _, note = replay.own_settings(config.LanguageRun(algorithm=config.Algorithm(method="vargrad", beta=0.1)))
    assert "its advantages are those of" in note
    with pytest.raises(ValueError, match="beta=1e-40"):
        replay.sweep(rollout, {"beta": (1e-40,)})


def test_rollouts_without_any_answer():
    """There are no shares; MARA over answers changes nothing, and the sweep takes MARA over strings."""
    rollout = stored(answer=[[None] * GROUP for _ in range(40)])
    first, second = replay.replay(rollout, [settings(), settings("answers")], resamples=10)["settings"]
    assert first["prompts"][0]["share"] == [] and first["prompts"][0]["number"] == 0
    assert second["prompts"][0] == first["prompts"][0] and first["prompts"][0]["none"] == pytest.approx(1)
    assert replay.sweep(rollout, {})[-1].objective == "strings"


def test_the_tables_say_what_is_too_small():
    record = replay.replay(stored(groups=4, reference=False), replay.sweep(stored(), {"objective": ("answers",)}))
    with (console := Console(width=100)).capture() as captured:
        replay_drawing.show(record, console)
    text = captured.get()
    assert "rollouts: 80 completions of steps 1 to 2" in text and "> vanilla, 0.5" in text
    assert "?: MARA answers, 0.5: too small: 80 completions count as" in text
    assert "need samples of the reference" in " ".join(text.split())


# ---- what a run stores ----------------------------------------------------------------------------------------------

SMALL = """--config=configs/onetwo.py:nano --config.policy.layers=1 --config.policy.embed=64 --config.warmup.batch=16
    --config.warmup.steps=120 --config.warmup.learning_rate=1e-2 --config.reference.samples=64
    --config.rollout.group_size=32 --config.rollout.max_new_tokens=48 --config.rollout.length_buckets=1
    --config.algorithm.method=mara --config.algorithm.anchor=answer --config.optimiser.learning_rate=2e-3
    --config.steps=3""".split()


@pytest.fixture(scope="module")
def run(main, tmp_path_factory) -> pathlib.Path:
    """A finished run of three steps of 32 completions, some of which answer "2"."""
    workdir = tmp_path_factory.mktemp("replayed") / "run"
    done = main(*SMALL, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir


def test_the_own_settings_give_the_metrics_of_training(run):
    """The replayed transform and KL are those that each step of the run has logged."""
    rollout = stored_rollouts.read(run)
    own, _ = replay.own_settings(rollout.run)
    assert own == Settings("answers", "reverse", 0.1, 0.8)
    signal = batches.signal(rollout, own)
    assert signal is not None and signal.changed.any()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for k, row in enumerate(rows):
        assert signal.reward[k].mean() == pytest.approx(row["reward/augmented_mean"], abs=1e-6)
        assert signal.changed[k].mean() == pytest.approx(row["mara/augmented_fraction"])
        returned = signal.reward[k] - 0.1 * (rollout.logp[k] - rollout.ref_logp[k])
        assert returned.mean() == pytest.approx(row["objective/return/mean"], abs=1e-4)
        assert np.allclose(signal.advantage[k], (returned - returned.mean()) * 32 / 31, atol=1e-4)


def test_the_command_writes_what_it_says(command, run, tmp_path):
    before = sorted(path for path in run.rglob("*"))
    flags = ["--method=vanilla,answers", "--beta=.03,.1", f"--out={tmp_path}", "--json", "--resamples=100"]
    done = command("mara_jax.predict", f"--rollouts={run}", *flags)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "replay.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {f"replay.{x}" for x in ("json", "png", "svg")}
    assert record["rollouts"] | {"reward": 0} == {
        "steps": [1, 3], "count": 96, "group_size": 32, "prompts": 1, "prompts_left_out": 0, "reward": 0,
    }  # fmt: skip
    named = [(one["objective"], one["beta"]) for one in record["settings"]]
    assert named == [("answers", 0.1), ("vanilla", 0.03), ("vanilla", 0.1), ("answers", 0.03)]
    assert record["settings"][0]["batches"]["correlation"] == pytest.approx(1)
    assert all("too small: 96 completions" in one["prompts"][0]["too_small"] for one in record["settings"])
    assert sorted(path for path in run.rglob("*")) == before
    shown = command("mara_jax.predict", f"--rollouts={run}", "--resamples=100")
    assert "where each setting ends" in shown.stdout and "too small" in shown.stdout


def without_rollouts(run: pathlib.Path, workdir: pathlib.Path, **changed) -> pathlib.Path:
    """A copy of the run's config, with an empty folder of rollouts."""
    (workdir / rollouts.FOLDER).mkdir(parents=True)
    settings = json.loads((run / "config.json").read_text())
    settings["rollout"] |= changed
    (workdir / "config.json").write_text(json.dumps(settings))
    return workdir


def copy_without(run: pathlib.Path, workdir: pathlib.Path, change) -> pathlib.Path:
    """A copy of the run's rollouts with the second step's file changed."""
    without_rollouts(run, workdir)
    for path in (run / rollouts.FOLDER).iterdir():
        shutil.copy(path, workdir / rollouts.FOLDER)
    change(workdir / rollouts.FOLDER / "step_000002.parquet")
    return workdir


def without_column(path: pathlib.Path) -> None:
    parquet.write_table(parquet.read_table(path).drop_columns(["ref_logp"]), path)


def with_nan(path: pathlib.Path) -> None:
    table = parquet.read_table(path)
    place = table.column_names.index("logp")
    parquet.write_table(
        table.set_column(place, "logp", pyarrow.array(np.full(table.num_rows, np.nan, np.float32))), path
    )


def shorter(path: pathlib.Path) -> None:
    parquet.write_table(parquet.read_table(path).slice(0, 5), path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (functools.partial(without_rollouts, save=False), ["rollout.save=False"]),
        (without_rollouts, ["holds no step yet"]),
        (functools.partial(without_rollouts, equal_groups="redraw"), ["no step yet"]),
        (functools.partial(copy_without, change=lambda path: path.write_bytes(b"PAR1")), ["000002", "damaged"]),
        (functools.partial(copy_without, change=without_column), ["000002", "ref_logp", "lacks"]),
        (functools.partial(copy_without, change=with_nan), ["logp of step 2 is nan"]),
        (functools.partial(copy_without, change=shorter), ["not whole"]),
    ],
)
def test_rollouts_that_cannot_be_read_are_one_line(run, tmp_path, make, words):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        stored_rollouts.read(make(run, tmp_path / "run"))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_step_without_any_answer_is_read(run, tmp_path):
    def unanswered(path: pathlib.Path) -> None:
        table = parquet.read_table(path)
        place = table.column_names.index("answer")
        parquet.write_table(table.set_column(place, "answer", pyarrow.nulls(table.num_rows)), path)

    rollout = stored_rollouts.read(copy_without(run, tmp_path / "run", unanswered))
    assert rollout.answer[1] == [None] * 32 and any(rollout.answer[0])


def test_groups_that_were_chosen_by_their_rewards_are_refused(run, tmp_path):
    workdir = copy_without(run, tmp_path / "run", lambda path: None)
    settings = json.loads((workdir / "config.json").read_text())
    settings["rollout"]["equal_groups"] = "redraw"
    (workdir / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"rollout.equal_groups=redraw"):
        stored_rollouts.read(workdir)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rollouts=docs"], ["config.json", "does not exist", "--rollouts"]),
        (["--rollouts=docs", "--rows=x.csv"], ["rows and rollouts"]),
        (["--rollouts=docs", "--beta=.1,0"], ["--beta=0.0", "positive"]),
        (["--rollouts=docs", "--beta=.1,much"], ["beta", "much"]),
        (["--rollouts=docs", "--method=vanilla,grpo"], ["--method=grpo", "answers"]),
        (["--rollouts=docs", "--samples=3"], ["--samples", "--rollouts"]),
        (["--rows=x.csv", "--beta=.1,.2"], ["--beta", "several are for --rollouts"]),
    ],
)
def test_bad_flags_are_one_line(command, flags, words):
    done = command("mara_jax.predict", *flags)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and not done.stdout and len(lines) == 1 and lines[0].startswith("mara_jax: ")
    assert all(word in lines[0] for word in words), lines[0]


def test_a_prompt_without_rollouts_is_refused(command, run):
    done = command("mara_jax.predict", f"--rollouts={run}", "--prompt=7")
    assert done.returncode == 2 and "--prompt=7" in done.stderr and "prompts 0" in done.stderr
