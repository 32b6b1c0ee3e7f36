"""Every method through the training step: its expected gradient by enumeration in float64, against a closed form.

The policy is a transformer without layers: a token depends on the one before it. Its completions have one or two
tokens, thirteen in all, or one token in the problem of four outcomes. The step's loss of every group is weighted by the
group's probability under the policy and differentiated; the other side of each comparison is written down from the
method's definition, over completions, and never uses the tables.
"""

import functools
import itertools
import math
from typing import NamedTuple

import documented
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mara_jax import config
from mara_jax.config import Algorithm
from mara_jax.core import method_rules, methods
from mara_jax.policies import transformer
from mara_jax.sampling import logprobs
from mara_jax.train import step
from mara_jax.train.state import Batch, BySampler, Hyperparameters, State

pytestmark = pytest.mark.usefixtures("x64")

END, BETA, TAU, ETA = 3, 0.3, 0.8, 0.2
HYPER = Hyperparameters(BETA, TAU, ETA)
with jax.enable_x64(True):
    ARCH = transformer.Architecture(
        family="qwen3", vocab_size=4, embed=8, layers=0, heads=1, kv_heads=1, head_dim=8, mlp=8, compute_dtype="float64"
    )
PROMPT, PROMPT_LENGTH = jnp.array([[1, 2, 0]]), jnp.array([2])


class Problem(NamedTuple):
    """All completions, with their rewards and answers."""

    tokens: np.ndarray
    lengths: np.ndarray
    reward: np.ndarray
    answer: np.ndarray


def _sequences() -> Problem:
    every = [
        s for n in (1, 2) for s in itertools.product(range(4), repeat=n) if END not in s[:-1] and (END in s or n == 2)
    ]
    tokens = np.array([[*s, *[0] * (2 - len(s))] for s in every])
    reward = [0.2, 1, 0, 0, 1, 0.5, 1, 0, 0, 0.9, 1, 0, 0.4]
    answer = [0, 0, -1, -1, 1, 1, 2, -1, -1, 0, 2, -1, 1]
    return Problem(tokens, np.array([len(s) for s in every]), np.array(reward), np.array(answer))


SEQUENCES = _sequences()
# Rewards of 0 and 1, no answer twice.
OUTCOMES = Problem(np.arange(4)[:, None], np.ones(4, int), np.array([1.0, 0, 1, 0]), np.array([0, -1, 1, -1]))
BINARY = SEQUENCES._replace(reward=(SEQUENCES.reward >= TAU).astype(float))


@functools.cache
def params_of(seed: int):
    with jax.enable_x64(True):
        table = jax.random.normal(jax.random.key(seed), (4, 8)) * 0.6
        return {"embed": {"embedding": table}, "final_norm": {"scale": jnp.full(8, 0.4)}}


PARAMS, REF = params_of(1), params_of(2)


def token_logp(params, problem: Problem):
    """[n, t], zero after the end."""
    tokens, lengths = jnp.asarray(problem.tokens)[None], jnp.asarray(problem.lengths)[None]
    logp = logprobs.completion_logps(ARCH, params, PROMPT, PROMPT_LENGTH, tokens)
    return (logp * logprobs.mask(lengths, tokens.shape[-1]))[0]


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


class Known(NamedTuple):
    """Log-probs [n] of policy and reference, and the policy's gradient of each [n, number of parameters]."""

    logp: np.ndarray
    ref: np.ndarray
    slopes: np.ndarray


_KNOWN: dict[str, Known] = {}


def known(problem: Problem) -> Known:
    name = problem.tokens.tobytes()
    if name not in _KNOWN:
        of = jax.jit(lambda params: jnp.sum(token_logp(params, problem), -1))
        jacobian = jax.jit(jax.jacrev(of))(PARAMS)
        rows = [np.reshape(x, (len(problem.tokens), -1)) for x in jax.tree.leaves(jacobian)]
        _KNOWN[name] = Known(np.asarray(of(PARAMS)), np.asarray(of(REF)), np.concatenate(rows, axis=1))
    return _KNOWN[name]


def exact(problem: Problem, objective) -> np.ndarray:
    """The gradient of a function of the completions' log-probs in the policy's parameters."""
    return np.asarray(jax.grad(objective)(jnp.asarray(known(problem).logp))) @ known(problem).slopes


def batch_of(problem: Problem, index_pg) -> Batch:
    """Groups of completions under copies of one prompt."""
    tokens, count = jnp.asarray(problem.tokens)[index_pg], index_pg.shape[0]
    prompt, length = jnp.repeat(PROMPT, count, 0), jnp.repeat(PROMPT_LENGTH, count, 0)
    return Batch(
        prompt_tokens=prompt,
        prompt_lengths=length,
        tokens=tokens,
        lengths=jnp.asarray(problem.lengths)[index_pg],
        reward=jnp.asarray(problem.reward)[index_pg],
        answer=jnp.asarray(problem.answer)[index_pg],
        prompt_ids=jnp.arange(count),
        ref_hidden=logprobs.reference_hidden(ARCH, REF, prompt, length, tokens),
    )


def choices_of(algorithm: Algorithm, micro_batches: int = 1) -> step.Choices:
    return step.Choices(ARCH, algorithm, optax.sgd(0.5), micro_batches)


def expected_gradient(problem: Problem, algorithm: Algorithm, group: int, hyper=HYPER, log_z=None) -> np.ndarray:
    """Of minus the step's loss, over all groups of the policy's completions."""
    index_mg = np.array(list(itertools.product(range(len(problem.tokens)), repeat=group)))
    weight_m = np.exp(known(problem).logp[index_mg].sum(-1))
    assert abs(weight_m.sum() - 1) < 1e-12

    def loss(params):
        def of_group(index_g):
            batches = BySampler(batch_of(problem, index_g[None]))
            return step.loss(params, REF, batches, hyper, choices_of(algorithm), None, log_z)[0]

        return jnp.asarray(weight_m) @ jax.vmap(of_group)(jnp.asarray(index_mg))

    return -flat(jax.jit(jax.grad(loss))(PARAMS))


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    assert np.linalg.norm(want) > 1e-3
    np.testing.assert_allclose(got, want, atol=1e-10 * np.linalg.norm(want), rtol=0)


def reverse_objective(problem: Problem, beta: float = BETA, eta: float = 0.0, factor=1.0):
    """E[factor R] - beta KL(pi || ref) + eta H(pi); the factor does not depend on the policy."""
    ref = known(problem).ref

    def objective(logp):
        return jnp.sum(jnp.exp(logp) * (factor * problem.reward - beta * (logp - ref) - eta * logp))

    return objective


def success(problem: Problem):
    return lambda logp: jnp.sum(jnp.exp(logp) * (problem.reward >= TAU))


# ---- the policy gradient and its squared disguises ----------------------------------------------------------------


@pytest.mark.parametrize(("method", "group"), [("reinforce", 1), ("reinforce", 2), ("vanilla", 2)])
def test_policy_gradient_is_that_of_the_regularised_reward(method, group):
    got = expected_gradient(SEQUENCES, Algorithm(method=method), group)
    assert_same(got, exact(SEQUENCES, reverse_objective(SEQUENCES)))


def test_the_entropy_bonus_adds_eta_times_the_entropy():
    got = expected_gradient(SEQUENCES, Algorithm(method="entropy_bonus"), 2)
    assert_same(got, exact(SEQUENCES, reverse_objective(SEQUENCES, eta=ETA)))


@pytest.mark.parametrize(
    ("method", "group", "scale", "log_z"),
    [
        ("trajectory_balance", 1, 2 / BETA, -2.0),
        ("trajectory_balance", 2, 2 / BETA, 7.0),
        ("vargrad", 2, 2 / BETA, None),
        ("reinvent", 1, 2 / BETA, None),
    ],
)
def test_squared_losses_on_their_own_samples_are_policy_gradients(method, group, scale, log_z):
    """2 grad KL(pi || G) = -2 / beta grad J for any log Z, and -2 sigma grad J with sigma = 1 / beta."""
    log_z = None if log_z is None else jnp.array([log_z])
    got = expected_gradient(SEQUENCES, Algorithm(method=method), group, log_z=log_z)
    assert_same(got, scale * exact(SEQUENCES, reverse_objective(SEQUENCES)))


# ---- reward transforms --------------------------------------------------------------------------------------------


def class_probability(problem: Problem) -> np.ndarray:
    """Of the class of every completion; those without an answer are one class."""
    probability = np.exp(known(problem).logp)
    return np.array([probability[problem.answer == a].sum() for a in problem.answer])


def mean_worth(probability: np.ndarray, group: int, worth) -> np.ndarray:
    """E[worth(copies)], the other copies among g - 1 samples being binomial."""
    ways = [math.comb(group - 1, m) * probability**m * (1 - probability) ** (group - 1 - m) for m in range(group)]
    return sum(way * worth(m) for m, way in enumerate(ways))


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_ips_divides_by_the_frequency(beta):
    got = expected_gradient(SEQUENCES, Algorithm(method="ips", baseline="none"), 3, HYPER._replace(beta=beta))
    p = class_probability(SEQUENCES)
    assert_same(got, exact(SEQUENCES, reverse_objective(SEQUENCES, beta, factor=(1 - (1 - p) ** 3) / p)))


def test_darling_multiplies_by_the_share_of_others():
    got = expected_gradient(SEQUENCES, Algorithm(method="darling", baseline="none"), 3)
    factor = mean_worth(class_probability(SEQUENCES), 3, {0: 1.0, 1: 0.5, 2: 0.1}.__getitem__)
    assert_same(got, exact(SEQUENCES, reverse_objective(SEQUENCES, factor=factor)))


def test_unlikeliness_ranks_a_fixed_group_by_the_mean_log_prob_of_tokens():
    """Leave-one-out over R (1 - .25 rank / 3) - beta k1; rank 2 is the likeliest token by token."""
    index = np.array([0, 1, 6])
    logp, ref, slopes = known(SEQUENCES)
    rank = np.argsort(np.argsort(logp[index] / SEQUENCES.lengths[index]))
    assert (rank != np.argsort(np.argsort(logp[index]))).any()
    signal = SEQUENCES.reward[index] * (1 - 0.25 * rank / 3) - BETA * (logp - ref)[index]
    advantage = signal - (signal.sum() - signal) / 2
    assert_same(gradient_of(SEQUENCES, "unlikeliness", index[None]), advantage @ slopes[index] / 3)


def gradient_of(problem: Problem, method: str, index_pg, hyper=HYPER) -> np.ndarray:
    """Of minus the loss of these groups, as `step.gradient` has it."""
    batches = BySampler(batch_of(problem, jnp.asarray(index_pg)))
    log_z = jnp.full(len(index_pg), -jnp.inf) if method == "trajectory_balance" else None
    choices = choices_of(Algorithm(method=method))
    return -flat(jax.jit(lambda params: step.gradient(params, REF, batches, hyper, choices, None, log_z)[0])(PARAMS))


# ---- objectives with a form of their own --------------------------------------------------------------------------


def forward_kl(problem: Problem):
    ref = known(problem).ref
    return lambda logp: -jnp.sum(jnp.exp(ref) * logp)


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_grpo_has_a_slope_of_its_own_and_the_forward_kl_on_one_token(beta):
    """In groups of two, one success of two has the advantages +-.5 / (1 / sqrt 2 + 1e-4)."""
    got = expected_gradient(OUTCOMES, Algorithm(method="grpo"), 2, HYPER._replace(beta=beta))
    slope = 0.5 / (math.sqrt(0.5) + 1e-4)
    want = slope * exact(OUTCOMES, success(OUTCOMES)) - beta * exact(OUTCOMES, forward_kl(OUTCOMES))
    assert_same(got, want)


def test_grpo_of_a_fixed_group_divides_by_lengths():
    """A completion of one token and two of two: k3 and advantage token by token, a mean over each length."""
    index = np.array([0, 4, 12])
    logp, ref = (np.asarray(token_logp(params, SEQUENCES))[index] for params in (PARAMS, REF))
    lengths, reward = SEQUENCES.lengths[index], SEQUENCES.reward[index]
    mask = np.arange(2) < lengths[:, None]
    advantage = (reward - reward.mean()) / (reward.std(ddof=1) + 1e-4)
    slopes = np.concatenate(
        [np.reshape(x, (13, 2, -1)) for x in jax.tree.leaves(jax.jacrev(lambda p: token_logp(p, SEQUENCES))(PARAMS))],
        -1,
    )[index]
    # d k3 / d log pi = 1 - ref / pi
    of_token = (advantage[:, None] - BETA * (1 - np.exp(ref - logp))) * mask / lengths[:, None] / 3
    assert_same(gradient_of(SEQUENCES, "grpo", index[None]), np.einsum("gt,gtd->d", of_token, slopes))


def test_dr_grpo_shrinks_the_reward_but_not_the_penalty():
    got = expected_gradient(OUTCOMES, Algorithm(method="dr_grpo"), 3)
    want = 2 / 3 * exact(OUTCOMES, success(OUTCOMES)) - BETA * exact(OUTCOMES, forward_kl(OUTCOMES))
    assert_same(got, want)


def test_dapo_is_one_mean_over_the_tokens_of_the_batch():
    """Two groups, one of equal rewards: it has no gradient, but its tokens count."""
    index = np.array([[0, 4, 12], [1, 6, 10]])
    assert np.ptp(SEQUENCES.reward[index[1]]) == 0
    reward = SEQUENCES.reward[index[0]]
    advantage = (reward - reward.mean()) / (reward.std(ddof=1) + 1e-4)
    want = advantage @ known(SEQUENCES).slopes[index[0]] / SEQUENCES.lengths[index].sum()
    assert_same(gradient_of(SEQUENCES, "dapo", index), want)


def test_raft_is_the_likelihood_of_what_is_kept():
    """A group of three keeps something with probability 1 - (1 - s)^3, each good completion in proportion."""
    got = expected_gradient(SEQUENCES, Algorithm(method="raft"), 3)
    s = float(success(SEQUENCES)(known(SEQUENCES).logp))
    assert_same(got, (1 - (1 - s) ** 3) / s * exact(SEQUENCES, success(SEQUENCES)))


@pytest.mark.parametrize("group", [2, 3])
def test_maxrl_divides_by_the_success_rate_to_the_groups_order(group):
    got = expected_gradient(BINARY, Algorithm(method="maxrl"), group)
    s = float(success(BINARY)(known(BINARY).logp))
    assert_same(got, (1 - (1 - s) ** (group - 1)) / s * exact(BINARY, success(BINARY)))


def test_pass_at_k_is_the_gradient_of_the_expected_best():
    """E[max of 3] = sum over the levels r of r (P(R <= r)^3 - P(R < r)^3), with rewards between 0 and 1, too."""

    def best(logp):
        level = sorted(set(SEQUENCES.reward))
        below = [jnp.sum(jnp.exp(logp) * (SEQUENCES.reward <= r)) ** 3 for r in level]
        return sum(r * (up - low) for r, up, low in zip(level, below, [0, *below[:-1]], strict=True))

    assert_same(expected_gradient(SEQUENCES, Algorithm(method="pass_at_k"), 3), exact(SEQUENCES, best))


# ---- every row ----------------------------------------------------------------------------------------------------


def scored_batch(index) -> Batch:
    """With samples of the reference, which masses of answers are estimated from."""
    samples = jnp.asarray(np.repeat(np.arange(13)[None], len(index), 0))
    reward, answer = jnp.asarray(SEQUENCES.reward)[samples], jnp.asarray(SEQUENCES.answer)[samples]
    return batch_of(SEQUENCES, jnp.asarray(index)).replace(ref_reward=reward, ref_answer=answer)


INDEX = np.array([[0, 4, 12, 9], [1, 6, 2, 5]])


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_takes_a_step_along_its_gradient_in_one_part_or_two(method):
    """Plain gradient descent at rate .5 from the public update, against the gradient in two micro-batches."""
    algorithm = Algorithm(method=method)
    log_z = jnp.full(2, -jnp.inf) if method_rules.learns_log_z(algorithm) else None
    batches = BySampler(scored_batch(INDEX))
    choices = choices_of(algorithm, 2)
    hidden = [logprobs.reference_hidden(ARCH, REF, *prompted(), batches.policy.tokens, None, parts) for parts in (1, 2)]
    parts = BySampler(batches.policy.replace(ref_hidden=hidden[1]))
    grads = jax.jit(lambda params: step.gradient(params, REF, parts, HYPER, choices, None, log_z)[0])(PARAMS)
    assert np.linalg.norm(flat(grads)) > 1e-3
    before = flat(PARAMS)
    state = State(jnp.int32(0), jax.tree.map(jnp.array, PARAMS), choices.tx.init(PARAMS), log_z)
    state, metrics = step.update(state, REF, batches, HYPER, choices_of(algorithm))
    assert_same(flat(state.params) - before, -0.5 * flat(grads))
    assert float(metrics["reward/mean"]) == pytest.approx(SEQUENCES.reward[INDEX].mean())
    assert {"loss", "reward/augmented_mean", "mara/augmented_fraction", "kl/k1", "logp/mean"} <= set(metrics)


def prompted():
    return jnp.repeat(PROMPT, 2, 0), jnp.repeat(PROMPT_LENGTH, 2, 0)


def test_log_z_starts_at_the_groups_own_estimate_and_moves_half_of_the_way():
    """Prompt 1 is not visited; prompt 0 twice in one batch: the mean of both."""
    algorithm = Algorithm(method="trajectory_balance")
    logp, ref, _ = known(SEQUENCES)
    estimate = (ref + SEQUENCES.reward / BETA - logp)[INDEX].mean(-1)

    def learned(log_z, ids):
        batch = scored_batch(INDEX).replace(prompt_ids=jnp.array(ids))
        tx = optax.sgd(0.0)
        state = State(jnp.int32(0), jax.tree.map(jnp.array, PARAMS), tx.init(PARAMS), jnp.array(log_z))
        choices = step.Choices(ARCH, algorithm, tx)
        return np.asarray(step.update(state, REF, BySampler(batch), HYPER, choices)[0].log_z)

    unknown = -np.inf
    np.testing.assert_allclose(learned([unknown] * 3, [2, 0]), [estimate[1], unknown, estimate[0]], rtol=1e-12)
    np.testing.assert_allclose(learned([1.0, 5.0, 3.0], [0, 2]), [(1 + estimate[0]) / 2, 5, (3 + estimate[1]) / 2])
    both = ((1 + estimate[0]) / 2 + (1 + estimate[1]) / 2) / 2
    np.testing.assert_allclose(learned([1.0, 5.0], [0, 0]), [both, 5.0])


def test_the_rows_of_the_documentation_make_methods_trainable(monkeypatch):
    """The Python of docs/extending.md: rewards clipped to -1 and 1, and reward-weighted regression."""
    tables = {name: dict(getattr(methods, name)) for name in ("TRANSFORMS", "OBJECTIVES", "METHODS")}
    for name, table in tables.items():
        monkeypatch.setattr(methods, name, table)
    exec(compile("\n".join(documented.python_blocks("docs/extending.md")), "documented", "exec"), {})
    wide = SEQUENCES._replace(reward=4 * SEQUENCES.reward - 2)
    got = expected_gradient(wide, Algorithm(method="clipped"), 2)
    assert_same(got, exact(wide, reverse_objective(wide._replace(reward=np.clip(wide.reward, -1, 1)))))
    weight = np.exp(SEQUENCES.reward[INDEX[:1]] / BETA)
    want = (weight / weight.sum()) @ known(SEQUENCES).slopes[INDEX[0]]
    assert_same(gradient_of(SEQUENCES, "reward_weighted", INDEX[:1]), want[0])
    for method in ("clipped", "reward_weighted"):
        config.algorithm_checks.check(Algorithm(method=method))
    with pytest.raises(ValueError, match=r"is not balanced beside algorithm.objective=reward_weighted: it has no KL"):
        config.algorithm_checks.check(Algorithm(objective="reward_weighted"))
    assert "with rewards clipped to -1 and 1" in method_rules.describe(Algorithm(method="clipped"))
    assert "clipped" in next(
        one.allowed for one in config.settings(config.LanguageRun()) if one.name == "algorithm.method"
    )
