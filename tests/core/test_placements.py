"""Every row of the table `kl.effective`, proven by enumeration of small policies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_policy

from mara_jax.audit import enumeration
from mara_jax.core import advantages, kl, objectives

pytestmark = pytest.mark.usefixtures("x64")

ROWS = sorted(kl._EFFECTIVE)
EXACT = ("reverse", "forward", "reverse_minus_forward", "square_minus_reverse")
SEEDS = (1, 2, 3)


def penalty_gradient(row, all_strings, params, ref_params):
    """Expected gradient of the penalty alone: no reward, beta 1."""
    estimator, placement, level = row
    ref_logp_nt = enumeration.token_logp(ref_params, all_strings)

    def loss(logp, mask, index):
        return objectives.placed(
            logp, mask, ref_logp_nt[index][None], jnp.zeros((1, 1)),
            beta=1.0, advantage=advantages.none, estimator=estimator, placement=placement, level=level,
        )[0]  # fmt: skip

    return small_policy.expected_gradient(loss, params, all_strings, 1)


def true_gradients(all_strings, params, ref_params):
    ref = enumeration.string_logp(ref_params, all_strings)

    def of(f):
        return jax.grad(lambda p: f(enumeration.string_logp(p, all_strings)))(params)

    reverse, forward = of(lambda logp: kl.reverse(logp, ref)), of(lambda logp: kl.forward(logp, ref))
    square = of(lambda logp: jnp.sum(jnp.exp(logp) * (logp - ref) ** 2 / 2))
    return {
        "reverse": reverse,
        "forward": forward,
        "reverse_minus_forward": reverse - forward,
        "square_minus_reverse": square - reverse,
    }


def tables(seed):
    """A policy that has moved some way off its reference, at every context."""
    ref = enumeration.random_logits(10 + seed)
    return ref + enumeration.random_logits(20 + seed, 0.7), ref


SINGLE = enumeration.outcomes(3)


@functools.cache
def gradients(variant):
    """Every row's gradient and the true ones, for three policies, as one compiled program."""
    all_strings = SINGLE if variant == "single" else enumeration.strings(variant)

    def one(params, ref_params):
        rows = {row: penalty_gradient(row, all_strings, params, ref_params) for row in ROWS}
        return rows, true_gradients(all_strings, params, ref_params)

    params, ref_params = (np.stack(x) for x in zip(*map(tables, SEEDS), strict=True))
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(params, ref_params))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("end", [None, 2])
@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_on_strings(row, end, seed):
    name, _ = kl.effective(*row)
    rows, true = jax.tree.map(lambda x: x[seed - 1], gradients(end))
    if name == "none":
        np.testing.assert_allclose(rows[row], 0, atol=1e-14)
    elif name in EXACT:
        assert small_policy.relative_error(rows[row], true[name]) < 1e-10
    elif name == "part_of_reverse":
        assert 0.1 < small_policy.relative_error(rows[row], true["reverse"]) < 1
    else:
        assert name == "neither"
        assert all(small_policy.relative_error(rows[row], wrong) > 0.1 for wrong in true.values())


ON_ONE_TOKEN = {
    ("k1", "loss"): None,
    ("k2", "loss"): "reverse",
    ("k3", "loss"): "forward",
    ("k1", "reward"): "reverse",
    ("k2", "reward"): "square_minus_reverse",
    ("k3", "reward"): "reverse_minus_forward",
    ("k1_ratio", "loss"): "reverse",
}


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_on_one_categorical(row):
    rows, true = gradients("single")
    name = ON_ONE_TOKEN[row[:2]]
    if name is None:
        np.testing.assert_allclose(rows[row], 0, atol=1e-14)
    else:
        assert small_policy.relative_error(rows[row], true[name]) < 1e-10


def test_crediting_each_token_with_the_rest_of_the_string_is_exact_too():
    all_strings = enumeration.strings(2)
    params, ref_params = tables(2)
    ref_nt = enumeration.token_logp(ref_params, all_strings)

    def loss(logp, mask, index):
        k1 = jax.lax.stop_gradient((logp - ref_nt[index][None]) * mask)
        rest = jnp.flip(jnp.cumsum(jnp.flip(k1, -1), -1), -1)
        return jnp.sum(rest * logp * mask)

    got = jax.jit(lambda params: small_policy.expected_gradient(loss, params, all_strings, 1))(params)
    assert small_policy.relative_error(got, gradients(2)[1]["reverse"][1]) < 1e-10


def test_string_level_references_may_be_passed_as_one_position():
    all_strings = enumeration.strings(2)
    params, ref_params = tables(3)
    ref_n = enumeration.string_logp(ref_params, all_strings)

    def loss(logp, mask, index):
        return objectives.placed(
            logp, mask, ref_n[index][None, :, None], jnp.zeros((1, 1)),
            beta=1.0, advantage=advantages.none, estimator="k3", placement="loss", level="sequence",
        )[0]  # fmt: skip

    got = jax.jit(lambda params: small_policy.expected_gradient(loss, params, all_strings, 1))(params)
    assert small_policy.relative_error(got, gradients(2)[1]["forward"][2]) < 1e-10


def test_an_unknown_use_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="k1/loss/sequence"):
        kl.effective("k4", "loss", "sequence")  # type: ignore[arg-type]


def test_sentences_name_the_kl_that_the_row_has():
    for row in ROWS:
        name, sentence = kl.effective(*row)
        assert len(sentence) > 30 and "\n" not in sentence
        if name in ("reverse", "part_of_reverse"):
            assert "reverse KL(pi || ref)" in sentence and "forward" not in sentence
        if name == "forward":
            assert "forward KL(ref || pi)" in sentence
