"""The predictor against exact enumeration of a small policy's completions, and as a command."""

import csv
import functools
import itertools
import json
import subprocess
from collections.abc import Callable

import commands
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mara_jax import config
from mara_jax.core import augment, forecast, forecast_curves, targets
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.predict import drawing, prediction, reference_samples
from mara_jax.sampling import logprobs, rollout
from mara_jax.tasks import onetwo
from mara_jax.tasks.chemistry import task as chemistry
from mara_jax.train import reference, warmup
from mara_jax.train.state import State

# A vocabulary of pieces, so that every completion of up to six tokens can be written down: 9,331 that end, of which
# the task accepts 14 (seven thoughts, two digits).
PIECES = ("<think>", "heads ", "tails ", "</think><answer>1", "</think><answer>2", "</answer>")
END = len(PIECES)
PROMPT = END + 1  # a token of its own, for one layer cannot tell two equal ones apart; sampled, it spoils the format
LONGEST = 6
SETS, DRAWN = 100, 256
TASK = onetwo.OneTwo()


def judged(tokens: np.ndarray) -> np.ndarray:
    """The task's answer class of each row of tokens, read as text up to its end token."""
    rows = [row.tolist() for row in tokens]
    written = (*PIECES, "", "<answer>")
    texts = ["".join(written[t] for t in itertools.takewhile(lambda t: t != END, row)) for row in rows]
    answers = TASK.score([0] * len(rows), texts, [END in row for row in rows]).answer
    return np.array([-1 if answer is None else onetwo.ANSWERS.index(answer) for answer in answers])


def demonstrations() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and lengths: all seven thoughts with four "1" to two "2" of each, and a quarter that break the format."""
    thoughts = [t for n in range(3) for t in itertools.product((1, 2), repeat=n)]
    good = [(0, *t, digit, 5, END) for t in thoughts for digit in (3, 3, 3, 3, 4, 4)]
    bad = [(0, *t, 5, END) for t in thoughts] * 2
    rows = [row + (END,) * (LONGEST - len(row)) for row in good + bad]
    return np.array([rows]), np.array([[row.index(END) + 1 for row in rows]])


@pytest.fixture(scope="module")
def world():
    """A trained policy, the exact reference (good strings, and the mass of all others), and 100 sets of 256 samples."""
    arch = transformer.Architecture(
        family="qwen2", vocab_size=PROMPT + 1, embed=32, layers=1, heads=2, kv_heads=1, head_dim=16, mlp=64,
        rope_theta=10_000.0, rope_scaling=None, norm_eps=1e-6, tie_embeddings=True,
        max_positions=64, scan_layers=False, compute_dtype="float32", remat="none",
    )  # fmt: skip
    policy = Policy(arch, None, (END,), END, {}, "enumerable")
    params = jax.jit(transformer.init, static_argnums=0)(arch, jax.random.key(0))
    tx = optax.adam(1e-2)
    state = State(jnp.int32(0), params, jax.jit(tx.init)(params))
    prompt, lengths = np.array([[PROMPT]]), np.array([1])
    tokens, ends = demonstrations()
    for _ in range(80):
        state, _ = warmup.supervised_update(state, prompt, lengths, tokens, ends, arch=arch, tx=tx)
    every = [s + (END,) * (LONGEST - n) for n in range(LONGEST) for s in itertools.product(range(END), repeat=n)]
    every = np.array(every)
    answer = judged(every)
    good = every[answer >= 0]
    counts = np.argmax(good == END, axis=1) + 1
    logp_of = jax.jit(logprobs.completion_logps, static_argnums=0)
    logp = logp_of(arch, state.params, prompt, lengths, jnp.asarray(good)[None])[0]
    logp = np.sum(np.asarray(logp, np.float64) * (np.arange(LONGEST) < counts[:, None]), axis=1)
    sampled = rollout.sample(
        policy, state.params, [[PROMPT]], key=jax.random.key(1), group_size=SETS * DRAWN, max_new_tokens=LONGEST
    )
    got = judged(np.asarray(sampled.tokens[0]))
    ref_logp = np.asarray(sampled.logp[0], np.float64).sum(axis=1)
    # The strings without reward share one fate: one outcome stands for all of them.
    exact = np.append(logp, np.log1p(-np.exp(logp).sum())), np.append(answer[answer >= 0], -1)
    return exact, got.reshape(SETS, DRAWN), ref_logp.reshape(SETS, DRAWN)


def test_the_enumeration_is_whole_and_the_sampler_samples_from_it(world):
    (logp, answer), got, ref_logp = world
    assert len(answer) == 15 and np.sum(answer == 0) == np.sum(answer == 1) == 7
    assert 0.5 < np.exp(logp[:-1]).sum() < 0.95 and np.exp(logp[:-1]).min() > 5e-3
    for a in (0, 1):
        want = np.exp(logp[answer == a]).sum()
        assert np.mean(got == a) == pytest.approx(want, abs=4 * np.sqrt(want * (1 - want) / got.size))
    sampled_logp = np.unique(np.round(ref_logp[got >= 0], 3))
    assert np.allclose(sampled_logp, np.unique(np.round(logp[:-1], 3)), atol=2e-3)  # the sampler's own log-probs


def exact_masses(world, name, direction, beta, measured=None):
    """[3] mass of "1", "2" and neither at the optimum, in float64, over the enumerated strings."""
    (logp, answer), *_ = world
    reward = np.where(answer >= 0, 1.0, 0.0)
    with jax.enable_x64(True):
        if name == "answers":
            seen = np.where(measured >= 0, 1.0, 0.0)
            mass = augment.answer_log_mass(seen[None], measured[None], 2, beta, 0.8, direction)
            signal, ref = augment.mara_answers(
                reward[None], logp[None], answer[None], mass, beta=beta, threshold=0.8, direction=direction
            )
            optimum = targets.reverse_kl if direction == "reverse" else targets.forward_kl
            best = optimum(ref[0], signal[0], beta)
        elif name == "strings":
            # Over the good set; the one outcome that stands for all bad strings keeps its mass.
            best = targets.mara(logp, reward, beta, 0.8, direction)
        else:
            best = (targets.reverse_kl if direction == "reverse" else targets.forward_kl)(logp, reward, beta)
        mass = np.exp(np.asarray(best))
    return np.array([mass[answer == a].sum() for a in (0, 1, -1)])


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("name", ["vanilla", "answers", "strings"])
def test_95_percent_intervals_hold_the_exact_optimum(world, name, direction):
    """Each of 100 sets of 256 samples predicts; the exact optimum lies inside as often as 95 % allows.

    For MARA over answers each set has its own exact optimum: that of a run whose masses were measured on the set.
    Of 100 intervals of 95 %, fewer than 88 hold with probability .002; bootstrap intervals may fall a little short.
    """
    _, answers, ref_logp = world
    beta = 0.5  # weak enough to leave what gives no answer some mass
    inside = np.zeros((SETS, 3))
    errors = []
    for i in range(SETS):
        samples = forecast.Samples(np.where(answers[i] >= 0, 1.0, 0.0), answers[i], ref_logp[i])
        objective = forecast.Objective(name, direction, beta, 0.8)
        mass = forecast.class_mass(objective, samples, 2, np.array([beta]), key=jax.random.key(i), resamples=400)
        read = forecast_curves.summarise(mass, 400)
        want = exact_masses(world, name, direction, beta, answers[i])
        inside[i] = (read.mass_low[0] - 1e-6 <= want) & (want <= read.mass_high[0] + 1e-6)
        errors.append(read.mass[0] - want)
    print(name, direction, "inside:", inside.sum(axis=0), "mean error:", np.mean(errors, axis=0).round(4))
    assert np.all(inside.sum(axis=0) >= 88) and inside.sum(axis=0).mean() >= 91
    assert np.all(np.abs(np.mean(errors, axis=0)) < 4 * np.std(errors, axis=0) / np.sqrt(SETS) + 5e-3)


def predicted(kind: str, beta: float, answers: int = 2, **kwargs) -> dict:
    """The prediction for 100 samples: 80 "a" of reward 1 - gap, 20 "b" of reward 1."""
    gap = kwargs.pop("gap", 0.0)
    reward = np.repeat([1 - gap, 1.0], [80, 20])
    answer = np.repeat([0, 1], [80, 20])
    ref_logp = np.repeat([-2.0, -3.0], [80, 20]) - np.linspace(0, kwargs.pop("spread", 0.0), 100)
    samples = prediction.ReferenceSamples(reward, answer, ref_logp, ("a", "b")[:answers])
    return prediction.predict(samples, prediction.Settings(kind, "reverse", beta, 0.5), **{"resamples": 200} | kwargs)


def test_flip_collapse_and_cure_by_hand():
    """Ratio b : a = (20 / 80) exp(gap / beta): equal at gap / log 4, 19 : 1 at gap / log 76, both by hand."""
    record = predicted("vanilla", 0.02, gap=0.1)
    flip, stretch = (
        record["objectives"]["reverse"]["vanilla"]["flips"][0],
        record["objectives"]["reverse"]["vanilla"]["collapsed"],
    )
    assert flip["beta"] == pytest.approx(0.1 / np.log(4), rel=1e-4) and (flip["below"], flip["above"]) == ("b", "a")
    assert flip["leads"] and flip["low"] < flip["beta"] < flip["high"]
    assert len(stretch) == 1 and stretch[0]["from"] is None and stretch[0]["answer"] == "b"
    assert stretch[0]["to"] == pytest.approx(0.1 / np.log(76), rel=1e-3)
    share = 1 / (1 + 4 * np.exp(-5))
    assert f"{share:.1%}" in record["verdict"] and '"b": expect collapse' in record["verdict"]
    assert "above 0.0231" in record["verdict"] and '"a" 50%, "b" 50%' in record["verdict"]


def test_no_collapse_is_called_none():
    record = predicted("vanilla", 0.02)
    assert "puts 80.0%" in record["verdict"] and "no collapse is predicted" in record["verdict"]
    assert "1.6 of 2 answers" in record["verdict"]  # exp of the entropy of (.8, .2) is 1.65
    assert record["objectives"]["reverse"]["vanilla"]["flips"] == []


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_two_answers_always_flip_as_leaders(direction):
    """Wherever the crossing falls between two betas of the grid: 26 samples of none, and 160 to 200 "a" against "b"."""
    for count in range(160, 201, 5):
        reward, answer = (
            np.repeat([0.9, 1.0, 0.0], [count, 230 - count, 26]),
            np.repeat([0, 1, -1], [count, 230 - count, 26]),
        )
        record = prediction.predict(
            prediction.ReferenceSamples(reward, answer, None, ("a", "b")),
            prediction.Settings("vanilla", direction, 0.1, 0.8),
            resamples=100,
        )
        (flip,) = record["objectives"][direction]["vanilla"]["flips"]
        assert flip["leads"] and flip["share"] == pytest.approx(0.5, abs=2e-3), count


def test_two_answers_that_cross_below_a_third_do_not_lead():
    reward, answer = np.repeat([0.9, 1.0, 1.0], [20, 10, 70]), np.repeat([0, 1, 2], [20, 10, 70])
    samples = prediction.ReferenceSamples(reward, answer, None, ("a", "b", "c"))
    record = prediction.predict(samples, prediction.Settings("vanilla", "reverse", 0.1, 0.8), resamples=100)
    (flip,) = record["objectives"]["reverse"]["vanilla"]["flips"]
    assert flip["beta"] == pytest.approx(0.1 / np.log(2), rel=1e-3) and not flip["leads"]
    assert flip["share"] == pytest.approx(1 / 9, abs=1e-3)  # 10 of 10 + 10 + 70


@pytest.mark.parametrize("kind", ["answers", "strings"])
def test_mara_without_a_good_sample_changes_nothing(kind):
    samples = prediction.ReferenceSamples(
        np.repeat([0.1, 0.2], [80, 20]), np.repeat([0, 1], [80, 20]), None, ("a", "b")
    )
    record = prediction.predict(samples, prediction.Settings(kind, "reverse", 10.0, 0.5), resamples=100)
    assert "no sample reaches the threshold 0.5: MARA changes nothing" in record["verdict"]
    assert "puts 79.8%" in record["verdict"]  # 80 / (80 + 20 exp(.01))


def test_three_samples_are_too_few():
    samples = prediction.ReferenceSamples(np.array([1.0, 1.0, 0.0]), np.array([0, 1, -1]), None, ("a", "b"))
    record = prediction.predict(samples, prediction.Settings("vanilla", "reverse", 0.1, 0.5), resamples=100)
    assert "cannot be determined from these samples" in record["verdict"] and "[0%, 100%]" in record["verdict"]


@pytest.mark.parametrize(("reward", "beta"), [(1e39, 0.1), (-1e31, 0.1), (1.0, 1e-40), (1.0, 1e39)])
def test_what_float32_cannot_hold_is_refused(reward, beta):
    samples = prediction.ReferenceSamples(np.array([reward, 0.0]), np.array([0, 1]), None, ("a", "b"))
    with pytest.raises(ValueError, match=r"reward of sample 1|beta="):
        prediction.predict(samples, prediction.Settings("vanilla", "reverse", beta, 0.5), resamples=100)


def test_json_has_no_nan():
    assert json.loads(drawing.to_json({"a": [float("nan"), 1.5], "b": float("inf")})) == {"a": [None, 1.5], "b": None}


def test_rows_with_a_mark_in_front_and_with_prompts(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("reward,answer,prompt\n1,x,0\n0.5,y,2\n0.25,y,2\n", encoding="utf-8-sig")
    assert reference_samples.read_file(path, prompt=2).reward.tolist() == [0.5, 0.25]
    with pytest.raises(ValueError, match=r"--prompt=1.*only of 0, 2"):
        reference_samples.read_file(path, prompt=1)
    path.write_text("reward,answer,prompt\n1,x,2\n")
    assert reference_samples.read_file(path).reward.tolist() == [1.0]


def test_strings_are_predicted_only_from_samples_that_determine_them():
    """Weights 1 / ref: 80 e^2 against 20 e^3 strings; spread over 60 nats one sample alone would decide."""
    strings = predicted("strings", 0.02)["objectives"]["reverse"]["strings"]
    assert not strings["trust"]["useful"] and strings["trust"]["effective_draws"] == pytest.approx([80, 20])
    assert strings["at_own"]["share"][1] == pytest.approx(20 * np.e / (80 + 20 * np.e), rel=1e-4)
    wide = predicted("strings", 0.02, spread=60.0)
    assert max(wide["objectives"]["reverse"]["strings"]["trust"]["effective_draws"]) < 5
    assert "cannot be determined" in wide["verdict"]


def test_numbers_are_plain_json_and_a_function_of_the_seed():
    record, again, other = predicted("vanilla", 0.02), predicted("vanilla", 0.02), predicted("vanilla", 0.02, seed=1)
    assert json.loads(json.dumps(record, allow_nan=False)) == record == again
    ends = [x["objectives"]["reverse"]["vanilla"]["at_own"]["share_low"] for x in (record, other)]
    assert ends[0] != ends[1] and np.allclose(ends[0], ends[1], atol=0.03)


def test_rows_of_both_kinds_are_read_alike(tmp_path):
    rows = [(-1.5, 1.0, "x"), (-2.5, 0.5, "y"), (-9.0, 0.0, None)]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("ref_logp", "reward", "answer"), *((a, b, c or "") for a, b, c in rows)])
    names = ("ref_logp", "reward", "answer")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("rows.csv", "rows.jsonl"):
        read = reference_samples.read_file(tmp_path / name)
        assert read.answers == ("x", "y") and read.answer.tolist() == [0, 1, -1]
        assert read.reward.tolist() == [1.0, 0.5, 0.0] and read.ref_logp.tolist() == [-1.5, -2.5, -9.0]
    (tmp_path / "bare.csv").write_text("reward,answer\n1,x\n0.5,y\n")
    assert reference_samples.read_file(tmp_path / "bare.csv").ref_logp is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("reward,answer\nwarm,x\n", ["row 1", "'warm'"]),
        ("reward,answer\nnan,x\n", ["row 1", "finite"]),
        ("ref_logp,reward,answer\n2.5,1,x\n", ["row 1", "ref_logp=2.5"]),
        ("reward\n1\n", ["'reward'", "lacks"]),
        ("reward;answer\n1;x\n", ["'reward;answer'", "commas"]),
        ("reward,answer\n1e39,x\n", ["rows.csv, row 1", "1e39"]),
        ("reward,answer,prompt\n1,x,0\n1,x,one\n", ["rows.csv, row 2", "prompt='one'"]),
        ("reward,answer,prompt\n1,x,0\n1,x,2\n", ["prompts 0, 2", "--prompt=0"]),
        ("reward,answer\n", ["no rows"]),
    ],
)
def test_bad_rows_are_named(tmp_path, text, words):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(ValueError) as caught:
        reference_samples.read_file(tmp_path / "rows.csv")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.fixture
def predict(command) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the command with flags."""
    return functools.partial(command, "mara_jax.predict")


def test_the_command_writes_what_it_says(tmp_path):
    """The toy's optimum is exact: figure 2 at beta .002, where outcome 79 has nearly everything."""
    done = commands.alone(
        "mara_jax.predict", "--config=configs/toy.py", "--config.toy.figure=2", "--config.algorithm.method=vanilla",
        "--config.algorithm.beta=0.002", f"--out={tmp_path / 'out'}", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads((tmp_path / "out" / "prediction.json").read_text())
    flips = record["objectives"]["reverse"]["vanilla"]["flips"]
    assert any(flip["beta"] == pytest.approx(0.1316, abs=1e-3) and flip["leads"] for flip in flips)
    assert '"79": expect collapse' in record["verdict"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"prediction.{x}" for x in ("json", "png", "svg")}
    assert "leader changes" in (tmp_path / "out" / "prediction.svg").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--config", "--run", "--rows"]),
        (["--rows=nowhere.csv"], ["nowhere.csv"]),
        (["--rows=configs/toy.py"], [".csv"]),
        (["--run=docs"], ["config.json", "does not exist"]),
        (["--config=configs/toy.py", "--beta=0.1"], ["--config.algorithm.beta"]),
        (["--rows=x.csv", "--beta=0"], ["--beta=0.0", "positive"]),
        (["--rows=x.csv", "--beta=nan"], ["--beta=nan", "finite"]),
        (["--rows=x.csv", "--threshold=nan"], ["--threshold=nan", "finite"]),
        (["--rows=x.csv", "--method=both"], ["--method=both", "vanilla"]),
    ],
)
def test_bad_input_is_one_line(predict, tmp_path, flags, words):
    done = predict(*flags, f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "out").exists()
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("mara_jax: "), done.stderr
    assert all(word in lines[0] for word in words)


def test_no_samples_are_drawn_for_a_task_whose_scores_are_counted(monkeypatch):
    run = config.LanguageRun(policy=config.Policy(weights="chemistry-prior", chat=False), task=chemistry.Config())
    monkeypatch.setattr(reference, "load_base", lambda *_: pytest.fail("the policy was loaded"))
    with pytest.raises(ValueError, match="the task 'chemistry' keeps a state of its scores") as error:
        reference_samples.from_config(run)
    assert "\n" not in str(error.value) and "--rollouts=WORKDIR" in str(error.value)
