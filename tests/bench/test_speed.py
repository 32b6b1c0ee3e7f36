"""The work of a step's real programs against the least, and the numbers that bench reports, against hand arithmetic."""

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from mara_jax import config, hf
from mara_jax.bench import command, phases, scores, speed
from mara_jax.plan import abstract, work
from mara_jax.policies import transformer
from mara_jax.policies.policy import Policy
from mara_jax.tasks.base import LearnedReward
from mara_jax.train import reward_model, startup


def setup_of(policy: Policy, params, prompt: int, new: int, group: int, samples: int, **sections) -> startup.Setup:
    prompts = phases.random_prompts(policy.architecture.vocab_size, samples // group, prompt)
    return phases.setup_of(phases.run_of(len(prompts), group, new, **sections), policy, params, prompts)


def counted_of(policy: Policy, prompt: int, new: int, group: int, samples: int, micro_batches: int = 1) -> work.Least:
    """FLOPs of the programs of a step in which no completion ends early, from shapes alone."""
    optimiser = config.Optimiser(micro_batches=micro_batches)
    run, sizes = (
        phases.run_of(samples // group, group, new, optimiser=optimiser),
        (samples // group, prompt, group, new),
    )
    sizes = abstract.Sizes(samples // group, prompt, group, new)
    planned = abstract.phase_programs(run, policy.architecture, sizes)
    return work.Least(*(planned[name].flops() for name in phases.NAMES))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("tiny", (64, 64, 8, 32)),
        ("tiny", (256, 64, 16, 32)),
        pytest.param("small", (64, 64, 8, 32), marks=pytest.mark.slow),
    ],
)
def test_a_step_does_at_most_a_tenth_more_than_the_least(name, shape):
    """Counted from the programs themselves; every part of the step has its own bound."""
    policy = phases.random_policy(name)
    _check_work(policy, *shape)


def _check_work(policy: Policy, prompt: int, new: int, group: int, samples: int, most: float = 1.10) -> None:
    counted = counted_of(policy, prompt, new, group, samples)
    least = work.least(policy.architecture, [prompt] * (samples // group), [[new] * group] * (samples // group))
    for name in phases.NAMES:
        assert 1 <= getattr(counted, name) / getattr(least, name) <= most, name


@pytest.mark.parametrize(("new", "most"), [(256, 1.10), (512, 1.11)])
def test_long_completions_do_little_more_than_the_least(new, most):
    """Decoding reads all slots of a static KV cache: in scores of slots that are not yet written it does more."""
    _check_work(phases.random_policy("tiny"), 64, new, 8, 8, most)


def test_micro_batches_compute_each_prompt_once_for_every_part():
    policy = phases.random_policy("tiny")
    layers = 2 * work.layer_parameters(policy.architecture)
    one, two = (counted_of(policy, 64, 64, 8, 32, micro_batches) for micro_batches in (1, 2))
    assert two.rollout == one.rollout
    prompts = layers * 4 * 64
    assert two.reference - one.reference == pytest.approx(prompts, rel=0.1)


@pytest.fixture(scope="module")
def record():
    arch = transformer.Architecture("qwen2", 64, 16, 1, 4, 2, 4, 32)
    policy = Policy(arch, None, (), 0, {}, "random")
    params = transformer.init(arch, jax.random.key(0))
    return speed.measure("case", setup_of(policy, params, 8, 6, 2, 4), repeats=2)


def test_nothing_is_compiled_after_the_first_step(record):
    assert record["compiled"]["warm_up"]["programs"] > 3
    assert record["compiled"]["afterwards"]["programs"] == 0


def test_an_update_with_truncated_weights_is_measured():
    arch = transformer.Architecture("qwen2", 64, 16, 1, 4, 2, 4, 32)
    algorithm = config.Algorithm(method="mara", anchor="string", truncate=2.0)
    params = transformer.init(arch, jax.random.key(0))
    policy = Policy(arch, None, (), 0, {}, "random")
    steps = speed.steps(setup_of(policy, params, 8, 6, 2, 4, algorithm=algorithm), repeats=1)
    assert all(len(times) == 1 for times in steps.spent.values())
    assert steps.batches.policy.sampler_logp is not None


def test_tokens_and_bytes_by_hand(record):
    # Two prompts of 8; four completions of 6, the last token of each read by nothing.
    assert [record["phases"][name]["tokens"] for name in phases.NAMES] == [4 * 6, 16 + 4 * 5, 16 + 4 * 5]
    weights = 64 * 16 + 16 + (16 * 16 + 16 + 2 * (16 * 8 + 8) + 16 * 16 + 3 * 16 * 32 + 2 * 16)
    # The five steps see 1 to 5 slots of each of 4 rows, and each prompt's 8.
    cache = 2 * 2 * 4 * (2 * 8 + 4 * (1 + 2 + 3 + 4 + 5) / 5)
    assert record["decode"]["steps"] == 5
    assert record["decode"]["bytes_per_step"] == 4 * (weights + cache)
    for row in (record["phases"][name] for name in phases.NAMES):
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["gflops_per_s"] == pytest.approx(row["flops"] / row["seconds"] / 1e9)
    rates = [record["machine"][name] for name in ("matmul_decode_gflops_per_s", "matmul_gflops_per_s")]
    for name, rate in zip(("rollout", "update"), rates, strict=True):
        row = record["phases"][name]
        assert row["of_matmul"] == pytest.approx(row["gflops_per_s"] / rate)


def test_the_table_fits_a_terminal(record):
    console = Console(width=80, record=True, highlight=False)
    command.show({"threads": 1, "load": 0.5, **record}, console)
    text = console.export_text()
    assert all(name in text for name in phases.NAMES)
    assert "…" not in text


def test_a_reward_model_is_timed_by_itself(random_model, tmp_path):
    """Four completions of two prompts, sequences as its own tokenizer has them; padding is what it does too much."""
    policy, params = hf.load(random_model)
    begun, scoring = reward_model.begun(policy, params, jax.random.key(3))
    where = str(hf.export(begun, scoring, tmp_path / "scoring"))
    run = phases.run_of(2, 2, 6)
    setup = phases.setup_of(run, policy, params, [[3, 4], [5, 6, 7]])
    row = scores.measure(scores.Asked(LearnedReward(where), ["ab", "cde"]), setup, repeats=2)
    texts = phases.sample_completions(setup, params, 0).text
    rows = reward_model.RewardModel(begun, scoring).encode(["ab", "ab", "cde", "cde"], [*texts[0], *texts[1]])
    different = set(map(tuple, rows))
    assert (row["completions"], row["tokens"]) == (len(different), sum(map(len, different)))
    assert len(row["all_seconds"]) == 2 and row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
    kernels = 16 * 16 * 2 + 2 * 16 * 8 + 3 * 16 * 16
    pairs = sum(len(one) * (len(one) + 1) // 2 for one in different)
    assert row["flops_least"] == 2 * kernels * row["tokens"] + 4 * 2 * 8 * pairs
    assert row["flops"] >= 2 * kernels * 32 * len(different)  # padded to 32


def test_compilations_are_counted():
    counter = speed.Compilations()
    function = jax.jit(lambda x: x * 3 + 1)
    with counter.counted() as found:
        jax.block_until_ready([function(jnp.ones(size)) for size in (3, 5, 3)])
    assert found["programs"] >= 2
    with counter.counted() as found:
        jax.block_until_ready(function(jnp.ones(5)))
    assert found["programs"] == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give either --model=NAME or --config=FILE.py"),
        (["--model=tiny", "--config=configs/toy.py"], "give either --model=NAME or --config=FILE.py"),
        (["--model=huge"], "huge"),
        (["--model=tiny", "--samples=30"], "--samples=30 is no multiple of --group=8"),
        (["--model=tiny", "--group=0"], "--group=0"),
        (["--model=tiny", "--threads=4096"], "--threads=4096"),
        (["--config=configs/toy.py"], "the toy has no language model"),
        (["--config=configs/onetwo.py:nano", "--prompt=9"], "--prompt goes with --model"),
        (["--config=configs/onetwo.py:nano", "--config.algorithm.kl=forward"], "makes two rollouts a step"),
        (["--config=configs/onetwo.py:nano", "--config.rollout.slots=4"], "rollout.slots=4"),
        (
            ["--config=configs/onetwo.py:nano", "--config.optimiser.updates=2", "--config.algorithm.importance=token"],
            "optimiser.updates=2",
        ),
        (["--model=tiny", "--out=pyproject.toml"], "is not a folder"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags, said, capsys, monkeypatch):
    monkeypatch.setattr(
        command, "use_threads", command.use_threads if "--threads=4096" in flags else lambda count: None
    )
    assert command.main(["bench", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mara_jax: ")
    assert err.count("\n") == 1
    assert said in err
