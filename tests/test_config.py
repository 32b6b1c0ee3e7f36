"""The schema: what is refused, and the words that say why."""

import dataclasses

import pytest

from mara_jax import config
from mara_jax.config import Algorithm, LanguageRun, Optimiser, Policy, Rollout, Toy, ToyRun, Warmup


def language(**algorithm):
    return LanguageRun(algorithm=Algorithm(**algorithm), warmup=Warmup(steps=1))


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ({"estimator": "k1_in_loss"}, "nothing is regularised"),
        ({"estimator": "k3_in_loss"}, "optimises the forward KL(ref || pi), not reverse"),
        ({"estimator": "k3_in_loss", "level": "token"}, "optimises neither KL"),
        ({"estimator": "k3_in_reward"}, "reverse KL(pi || ref) minus the forward KL"),
        ({"estimator": "k1_in_reward", "level": "token"}, "just that share of the reverse KL"),
        ({"estimator": "k2_in_loss", "level": "token"}, "own share of the reverse KL"),
        ({"estimator": "k1_in_reward", "kl": "forward"}, "optimises reverse KL(pi || ref), exactly"),
        ({"estimator": "k2_in_loss", "kl": "forward"}, "optimises the reverse KL(pi || ref), exactly"),
        ({"estimator": "ratio"}, "optimises the forward KL, not the reverse one"),
        ({"level": "token", "kl": "forward"}, "algorithm.level='token'"),
    ],
)
def test_wrong_placement_is_refused_with_the_kl_it_would_optimise(algorithm, words):
    with pytest.raises(ValueError) as caught:
        config.check(language(**algorithm))
    assert words in str(caught.value) and "algorithm.estimator=" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"estimator": "k1_in_reward"},
        {"estimator": "k2_in_loss"},
        {"kl": "forward"},
        {"kl": "forward", "estimator": "ratio"},
        {"kl": "forward", "estimator": "k3_in_loss"},
        {"method": "vanilla", "beta": 0.0},
    ],
)
def test_exact_placements_are_accepted(algorithm):
    config.check(language(**algorithm))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (language(beta=0.0), "algorithm.beta=0.0 with algorithm.method='mara'"),
        (language(beta=-0.1), "algorithm.beta=-0.1"),
        (language(beta=float("nan")), "algorithm.beta=nan"),
        (language(method="grpo"), "choose one of vanilla, mara"),
        (language(baseline="group_normalised"), "use leave_one_out"),
        (LanguageRun(policy=Policy(weights="nano")), "warmup.steps=0"),
        (
            dataclasses.replace(language(), rollout=Rollout(top_p=0.9)),
            "rollout.top_p=0.9 with algorithm.beta=0.1",
        ),
        (dataclasses.replace(language(), rollout=Rollout(temperature=0.7)), "rollout.temperature=0.7"),
        (dataclasses.replace(language(), rollout=Rollout(group_size=1)), "rollout.group_size=1"),
        (dataclasses.replace(language(), rollout=Rollout(length_buckets=-1)), "rollout.length_buckets=-1"),
        (
            dataclasses.replace(language(), optimiser=Optimiser(micro_batches=5)),
            "micro_batches=5 must divide",
        ),
        (dataclasses.replace(language(), steps=0), "steps=0"),
        (ToyRun(toy=Toy(figure=3)), "toy.figure=3"),
        (ToyRun(algorithm=Algorithm(anchor="answer")), "algorithm.anchor=string"),
    ],
)
def test_values_that_cannot_work_are_refused_in_one_line(run, words):
    with pytest.raises(ValueError) as caught:
        config.check(run)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_top_p_without_a_kl_is_allowed():
    config.check(dataclasses.replace(language(method="vanilla", beta=0.0), rollout=Rollout(top_p=0.9)))


def test_resolve_undoes_to_config_dict_and_json():
    run = language(method="vanilla", beta=0.25)
    assert config.resolve(config.to_config_dict(run)) == run
    assert config.resolve(dataclasses.asdict(ToyRun())) == ToyRun()
    as_lists = dataclasses.asdict(run) | {"warmup": dataclasses.asdict(run.warmup) | {"ones_range": [0.78, 0.89]}}
    assert config.resolve(as_lists) == run


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"algorithm": {"bta": 0.1}},
            "'algorithm.bta': algorithm has no 'bta'; it has method, anchor, kl, beta",
        ),
        ({"optimizer": {}}, "'optimizer': the config has no 'optimizer'; it has steps, seed, algorithm"),
        ({"steps": "ten"}, "steps='ten' must be a int"),
        ({"algorithm": {"beta": "x"}}, "algorithm.beta='x' must be a float"),
        ({"task": {"lenient": 1}}, "task.lenient=1 must be a bool"),
    ],
)
def test_unknown_fields_and_wrong_types_name_what_is_known(change, words):
    with pytest.raises(ValueError) as caught:
        config.resolve(change)
    assert words in str(caught.value)


def test_integers_stand_for_floats():
    assert config.resolve({"algorithm": {"beta": 1}, "warmup": {"steps": 1}}).algorithm.beta == 1.0
