"""A run whose own optimum is a collapse says so at its start: the rule, on samples and problems known by hand."""

import dataclasses
import json

import numpy as np
import pytest

from mara_jax.config import Algorithm, LanguageRun, Toy, ToyRun
from mara_jax.core import forecast, targets
from mara_jax.tasks import onetwo
from mara_jax.toy import problems
from mara_jax.toy import single_run as toy_run
from mara_jax.train import reference, report
from mara_jax.train.reference_samples import PromptSamples

TASK = onetwo.OneTwo()
ANSWERS = forecast.Task(onetwo.ANSWERS, TASK.answers_have_equally_many_strings)


def samples(ones: int, twos: int, none: int, reward: float = 1.0) -> PromptSamples:
    """A "1" earns `reward`, a "2" earns 1."""
    answer = ["1"] * ones + ["2"] * twos + [None] * none
    earned = np.repeat([reward, 1.0, 0.0], [ones, twos, none])
    return PromptSamples(earned, answer, np.full(len(answer), -3.0), [""] * len(answer))


def run(beta: float = 0.1, **algorithm) -> LanguageRun:
    return LanguageRun(algorithm=Algorithm(**{"method": "vanilla", "beta": beta, "threshold": 0.5} | algorithm))


def collapse(run: LanguageRun, drawn: PromptSamples):
    objective, key = reference.objective_of(run.algorithm), reference.stream(run.seed, "bootstrap")
    return forecast.collapse_at_optimum(objective, [drawn.indexed(onetwo.ANSWERS)], ANSWERS, key=key)


def log_optimum(run: LanguageRun, drawn: PromptSamples):
    return forecast.class_log_mass(reference.objective_of(run.algorithm), [drawn.indexed(onetwo.ANSWERS)], ANSWERS)


def test_equal_rewards_keep_the_reference_s_ratio_at_every_beta():
    for kl in ("reverse", "forward"):
        predicted = collapse(run(kl=kl), samples(192, 8, 56))
        assert predicted and predicted["answer"] == "1" and predicted["share"] == pytest.approx(0.96, abs=1e-4)
        assert (
            predicted["low"] < 0.95 < 0.96 < predicted["high"]
            and predicted["raise_above"] is None
            and predicted["seen"] == 2
        )
    assert collapse(run(), samples(188, 12, 56)) is None  # .94


def test_the_cure_is_the_beta_where_the_share_is_95_percent():
    """Ratio 2 : 1 = (40 / 160) exp(.1 / beta) reaches 19 at beta = .1 / log 76."""
    predicted = collapse(run(0.02), samples(160, 40, 56, reward=0.9))
    assert (
        predicted
        and predicted["answer"] == "2"
        and predicted["raise_above"] == pytest.approx(0.1 / np.log(76), rel=1e-3)
    )
    assert predicted["share"] == pytest.approx(1 / (1 + 4 * np.exp(-5)), abs=1e-4)
    assert collapse(run(0.024), samples(160, 40, 56, reward=0.9)) is None


def test_mara_does_not_collapse_unless_the_reference_has_one_answer_alone():
    assert collapse(run(method="mara"), samples(196, 4, 56)) is None
    assert collapse(run(method="mara", anchor="string"), samples(196, 4, 56)) is None
    predicted = collapse(run(method="mara"), samples(200, 0, 56))
    assert predicted and predicted["share"] == 1 and predicted["seen"] == 1 and predicted["low"] < 0.95


def test_nothing_valid_is_no_collapse():
    assert collapse(run(), samples(0, 0, 20)) is None


def test_what_is_measured_goes_to_the_file_and_comes_back(tmp_path):
    known = reference.measure(run(), [samples(150, 50, 56)], TASK)
    path = tmp_path / "reference.json"
    path.write_text(json.dumps(known, allow_nan=False))
    assert report.read_reference(path) == known
    assert known["counts"] == [150, 50] and known["valid"] == 200 / 256 and known["collapse"] is None
    assert known["optimum"]["vanilla"] == pytest.approx([0.75, 0.25, 0], abs=2e-4)


def test_open_answers_collapse_under_the_worst_prompt():
    """A task that declares no answers: each prompt has those that its samples gave."""

    class Open(onetwo.OneTwo):
        def __len__(self) -> int:
            return 3

        def answer_set(self, index):
            return None

    drawn = [samples(100, 100, 56), samples(192, 8, 56), samples(196, 4, 56)]
    known = reference.measure(run(), drawn, Open())
    assert known["answers"] is None and known["optimum"] == {} and known["samples"] == 768
    collapse = known["collapse"]
    assert (collapse["answer"], collapse["prompts"], collapse["collapsing"]) == ("1", 3, 2)
    assert collapse["share"] == pytest.approx(0.98, abs=1e-4)


def test_one_right_answer_among_wrong_ones_is_no_collapse():
    """A "1" earns .2, below the threshold of .5: the optimum gives the "2" nearly everything, as it should."""
    assert collapse(run(0.02), samples(160, 40, 56, reward=0.2)) is None
    assert collapse(run(0.02, method="mara"), samples(160, 40, 56, reward=0.2)) is None
    assert collapse(run(0.02, threshold=0.1), samples(160, 40, 56, reward=0.2)) is not None


def test_log_optimum_has_every_class():
    vanilla = log_optimum(run(1e-3), samples(30, 10, 20))
    assert vanilla == pytest.approx([np.log(0.75), np.log(0.25), np.log(0.5) - 1000], rel=1e-5)
    assert np.all(np.isfinite(log_optimum(run(), samples(20, 0, 0))))
    strings = log_optimum(run(method="mara", anchor="string"), samples(30, 10, 20))
    assert strings[:2] == pytest.approx([np.log(0.5)] * 2, abs=1e-4)
    assert strings[2] == pytest.approx(np.log(0.5) - 10, 1e-4)


@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize(("method", "figure"), [("vanilla", 2), ("vanilla", 6), ("mara", 2)])
def test_toy_runs_are_warned_exactly(kl, method, figure):
    """Against the optimum itself, on both sides of the beta that the warning names."""
    algorithm = Algorithm(method=method, anchor="string", kl=kl, beta=0.002, baseline="none")
    problem = problems.PROBLEMS[f"figure{figure}"]()
    cfg = ToyRun(algorithm=algorithm, toy=Toy(figure=figure))
    predicted = toy_run.collapse_at_optimum(cfg, problem)
    optimum = targets.reverse_kl if kl == "reverse" else targets.forward_kl
    if (method, figure) != ("vanilla", 2):
        assert predicted is None
        return
    best = float(np.exp(optimum(problem.ref_logp, problem.reward, 0.002)).max())
    assert predicted and predicted["answer"] == "79" and predicted["share"] == pytest.approx(best, abs=1e-5)
    at_edge = np.exp(optimum(problem.ref_logp, problem.reward, predicted["raise_above"])).max()
    assert at_edge == pytest.approx(0.95, abs=2e-3)
    above = dataclasses.replace(algorithm, beta=1.02 * predicted["raise_above"])
    assert toy_run.collapse_at_optimum(dataclasses.replace(cfg, algorithm=above), problem) is None


def test_a_toy_run_logs_its_exact_gap(tmp_path, capsys):
    """Before the first step the policy is uniform over 100 outcomes, so every distance is known."""
    algorithm = Algorithm(method="vanilla", anchor="string", beta=0.002, baseline="none")
    toy_run.run(ToyRun(steps=20, algorithm=algorithm, toy=Toy(figure=2)), tmp_path / "run")
    problem = problems.figure2()
    optimum = np.asarray(targets.reverse_kl(problem.ref_logp, problem.reward, 0.002), np.float64)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 10]
    first, mass = rows[0], np.exp(optimum)
    assert first["gap/kl_to_optimum"] == pytest.approx(np.mean(np.log(0.01) - optimum), rel=1e-5)
    assert first["gap/kl_from_optimum"] == pytest.approx(mass @ (optimum - np.log(0.01)), rel=1e-5)
    assert first["gap/tv_optimum"] == pytest.approx(np.abs(mass - 0.01).sum() / 2, rel=1e-5)
    good = int((problem.reward >= 0.8).sum())
    assert first["gap/tv_uniform"] == pytest.approx(1 - good / 100, rel=1e-5)
    shown = capsys.readouterr().out
    assert shown.count("WARNING") == 1 and 'of the answers "79"; raise algorithm.beta above 0.0041' in shown
