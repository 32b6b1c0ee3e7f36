"""The schema: what is refused, and the words that say why."""

import dataclasses
import pathlib
import re

import pytest

from mara_jax import config
from mara_jax.config import Algorithm, LanguageRun, Lora, Optimiser, Policy, Rollout, Sweep, Toy, ToyRun, Warmup
from mara_jax.config.limits import Limit
from mara_jax.tasks import onetwo

NAN, INF = float("nan"), float("inf")
TASK = "mara_jax.tasks.onetwo"


def language(**algorithm):
    return LanguageRun(algorithm=Algorithm(**algorithm), warmup=Warmup(steps=1), task=onetwo.Config())


def several(updates, **algorithm):
    return dataclasses.replace(language(**algorithm), optimiser=Optimiser(updates=updates))


def toy(**algorithm):
    return Algorithm(anchor="string", baseline="none", **algorithm)


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
        (language(method="ppo"), "choose one of vanilla, reinforce, mara, entropy_bonus"),
        (language(baseline="group_normalised"), "use leave_one_out"),
        (LanguageRun(policy=Policy(weights="nano"), task=onetwo.Config()), "warmup.steps=0"),
        (LanguageRun(warmup=Warmup(steps=1)), "task.module is empty: give the run a task"),
        (
            LanguageRun(warmup=Warmup(steps=9, max_steps=8), task=onetwo.Config()),
            "warmup.max_steps=8 is below warmup.steps=9",
        ),
        (ToyRun(seed=2**31 - 2, sweep=Sweep(betas=(0.1,), seeds=3)), "seed=2147483646 with sweep.seeds=3"),
        (ToyRun(sweep=Sweep(betas=(0.1, float("nan")))), "sweep.betas=(0.1, nan) must be numbers above 0"),
        (dataclasses.replace(language(), rollout=Rollout(group_size=1)), "rollout.group_size=1"),
        (dataclasses.replace(language(), rollout=Rollout(length_buckets=-1)), "rollout.length_buckets=-1"),
        (
            dataclasses.replace(language(), optimiser=Optimiser(micro_batches=5)),
            "micro_batches=5 must divide",
        ),
        (dataclasses.replace(language(), lora=Lora(targets="q,head")), "names 'head', which is no kernel of a layer"),
        (dataclasses.replace(language(), lora=Lora(targets="")), "lora.targets='' names ''"),
        (
            dataclasses.replace(language(), lora=Lora(adapter="dir")),
            "lora.adapter='dir' has no effect with lora.rank=0",
        ),
        (several(1, importance="token"), "algorithm.importance='token' does nothing at optimiser.updates=1"),
        (several(2), "use algorithm.importance=sequence, or optimiser.updates=1"),
        (several(2, importance="string"), "choose one of none, sequence, length_normalised, token"),
        (several(1, clip=0.2), "algorithm.clip=0.2 clips the ratios of algorithm.importance, which is none"),
        (
            several(2, importance="sequence", clip=0.2, estimator="k2_in_loss", method="vanilla"),
            "algorithm.estimator=k2_in_loss has its KL beside the reward, out of the reach of importance=sequence",
        ),
        (several(2, importance="token", kl="forward"), "or the estimator ratio"),
        (several(1, truncate=2.0, truncate_level="token", kl="forward"), "truncate_level=token, so beta would not"),
        (several(1, truncate_level="token"), "does nothing at algorithm.truncate=0"),
        (several(1, truncate=0.5), "algorithm.truncate=0.5 must be 0 (no weights) or at least 1"),
        (ToyRun(algorithm=toy(importance="sequence")), "algorithm.importance=sequence does nothing in a toy run"),
        (ToyRun(algorithm=toy(truncate=2.0)), "algorithm.truncate=2.0 does nothing in a toy run"),
        (
            dataclasses.replace(language(), optimiser=Optimiser(first_moment="int8")),
            "optimiser.first_moment='int8' is unknown: choose one of float32, bfloat16",
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


LIMITS = {name: allowed for name, _, _, allowed in config.settings(language()) if isinstance(allowed, Limit)}

# A number past its limit, of every kind of limit and of every section.
PAST = {
    "steps": (0, 2**31),
    "seed": (-1, 2**31, 2**64),
    "show_samples": (-1,),
    "algorithm.beta": (INF, NAN, -0.1, 1e30),
    "algorithm.threshold": (NAN, INF, -INF),
    "policy.embed": (0,),
    "lora.rank": (-1,),
    "lora.alpha": (0.0, INF),
    "task.malformed": (-0.1, 1.1, NAN),
    "warmup.steps": (-2,),
    "warmup.batch": (0,),
    "warmup.learning_rate": (-1.0, 0.0, INF, NAN),
    "warmup.max_steps": (-1,),
    "task.valid_range": ((0.9, 0.6), (-0.1, 1.0), (0.5, 1.5), (NAN, 1.0)),
    "task.ones_range": ((0.9, 0.6),),
    "reference.samples": (-4,),
    "rollout.max_new_tokens": (0, 10**30),
    "rollout.length_buckets": (-1,),
    "rollout.slots": (-1,),
    "optimiser.warmup_steps": (-1,),
    "optimiser.decay_steps": (-1,),
    "optimiser.b1": (2.0, 1.0, -0.1, NAN),
    "optimiser.b2": (1.0,),
    "optimiser.eps": (0.0,),
    "optimiser.max_grad_norm": (-1.0, INF),
    "optimiser.micro_batches": (0,),
    "optimiser.updates": (0,),
    "algorithm.clip": (-0.1, INF, NAN),
    "algorithm.truncate": (0.5, -1.0, INF, NAN),
    "checkpoint.keep": (0,),
}


def put(run, name: str, value):
    """The run with one dotted field in place."""
    section, _, rest = name.partition(".")
    return dataclasses.replace(run, **{section: put(getattr(run, section), rest, value) if rest else value})


@pytest.mark.parametrize(("name", "values"), PAST.items())
def test_a_number_past_its_limit_is_named_with_value_limit_and_cure(name, values):
    good = dataclasses.replace(language(), warmup=Warmup(steps=1))
    for value in values:
        with pytest.raises(ValueError) as caught:
            config.resolve(config.to_config_dict(put(good, name, value)))
        said = str(caught.value)
        assert said.startswith(f"{name}={value} must ") and ": try " in said and "\n" not in said
        assert LIMITS[name].words in said


@pytest.mark.parametrize(("name", "value"), [("toy.batch", 0), ("toy.learning_rate", NAN), ("steps", 0), ("seed", -1)])
def test_toy_runs_have_the_same_limits(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value} must "):
        config.check(put(ToyRun(), name, value))


def test_every_number_has_a_limit_and_every_field_a_meaning_and_a_default_that_it_may_have():
    for run in (language(), ToyRun()):
        config.check_values(run)
        names = [setting.name for setting in config.settings(run)]
        assert names == [name for name, _ in leaves(dataclasses.asdict(run))]
        for setting in config.settings(run):
            assert len(setting.meaning) > 4, setting.name
            assert not isinstance(setting.value, int | float) or setting.value in (True, False) or setting.allowed


def test_words_that_the_documentation_allows_are_those_of_the_schema():
    """In the table of docs/configuration.md, where a field's values are words."""
    page = pathlib.Path(__file__).parents[1] / "docs" / "configuration.md"
    allowed = {name: words for name, _, _, words in config.settings(LanguageRun()) if type(words) is tuple}
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| `algorithm.")]
    checked = 0
    for field, _, values in rows:
        names = re.findall(r"`([a-z_.]+)`", field)
        if names[0] in allowed:
            assert set(re.findall(r"`(\w+)`", values)) <= set(allowed[names[0]]), field
            checked += 1
    assert checked >= 4


def leaves(values, prefix=""):
    """The dotted names and values of nested dicts."""
    for name, value in values.items():
        yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]


def test_resolve_undoes_to_config_dict_and_json():
    run = language(method="vanilla", beta=0.25)
    assert config.resolve(config.to_config_dict(run)) == run
    assert config.resolve(dataclasses.asdict(ToyRun())) == ToyRun()
    as_lists = dataclasses.asdict(run) | {"task": dataclasses.asdict(run.task) | {"ones_range": [0.78, 0.89]}}
    assert config.resolve(as_lists) == run


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"algorithm": {"bta": 0.1}},
            "'algorithm.bta': algorithm has no 'bta'; it has method, transform, objective, anchor, kl, beta",
        ),
        ({"optimizer": {}}, "'optimizer': the config has no 'optimizer'; it has steps, seed, show_samples, guard"),
        ({"algorithm": {"bta": 0.1}}, "; did you mean algorithm.beta?"),
        ({"beta": 0.1}, "; did you mean algorithm.beta?"),
        ({"optimizer": {}}, "; did you mean optimiser?"),
        ({"rollout": {"nothing_like_it": 1}}, "max_new_tokens"),
        ({"steps": "ten"}, "steps='ten' must be a int"),
        ({"algorithm": {"beta": "x"}}, "algorithm.beta='x' must be a float"),
        ({"task": {"module": TASK, "lenient": 1}}, "task.lenient=1 must be a bool"),
        ({"task": {"module": TASK, "strict": True}}, "task has no 'strict'; it has module, equivalence, similarity"),
        ({"task": {"module": "no.such.task"}}, "task.module='no.such.task' cannot be imported"),
        ({"task": {"module": "mara_jax.tasks.base"}}, "has no class Config(mara_jax.config.Task)"),
    ],
)
def test_unknown_fields_and_wrong_types_name_what_is_known(change, words):
    with pytest.raises(ValueError) as caught:
        config.resolve(change)
    assert words in str(caught.value)


def test_integers_stand_for_floats():
    assert (
        config.resolve({"algorithm": {"beta": 1}, "warmup": {"steps": 1}, "task": {"module": TASK}}).algorithm.beta
        == 1.0
    )


def test_several_updates_are_allowed_where_something_weights_them():
    for ratio in ("sequence", "length_normalised", "token"):
        config.check(several(2, importance=ratio, clip=0.2, truncate=2.0, truncate_level="token"))
    config.check(several(4, importance="sequence", kl="forward", truncate=2.0))
    config.check(several(2, importance="sequence", method="vanilla", estimator="k2_in_loss"))
    config.check(several(2, importance="token", kl="forward", estimator="ratio"))
