"""What the audit says of settings whose answer is known, and of code with a planted bug."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mara_jax.audit import computation, enumeration, fixed_point, gradients, problems, published, verdict
from mara_jax.config import Algorithm
from mara_jax.core import diversity, method_rules, methods, objectives
from mara_jax.core.scored import Numbers, Scored

BETA = 0.1
VANILLA = Algorithm(method="vanilla", anchor="string", beta=BETA)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@functools.cache
def expected(name: str, level: str | None = None):
    return gradients.gradients(published.setting(name, VANILLA, level), problems.strings())


def end(setting, problem, size=gradients.GROUP, anchor=None) -> fixed_point.Point:
    return gradients.fixed_point_of(setting, problem, size, anchor or problems.anchors(problem, setting.algorithm))


# (name, level asked for) -> the KL, its level and strength, and what multiplies the gradient of E[R]; for two
# strings a group. What enumeration finds of each; None: no multiple at all.
KNOWN = {
    ("k1_in_loss", None): ("none", None, 0.0, 1.0),
    ("k2_in_loss", None): ("reverse", "token", BETA, 1.0),
    ("k2_in_loss", "sequence"): ("reverse", "sequence", BETA, 1.0),
    ("k3_in_loss", None): ("forward", "token", BETA, 1.0),
    ("k3_in_loss", "sequence"): ("forward", "sequence", BETA, 1.0),
    ("k1_in_reward", None): ("reverse", "sequence", BETA, 1.0),
    ("k1_in_reward", "token"): ("reverse", "token", BETA, 1.0),
    ("k3_in_reward", None): ("reverse_minus_forward", "sequence", BETA, 1.0),
    ("k3_sum_in_reward", None): ("reverse_minus_forward", "mixed", BETA, 1.0),
    ("ppo", None): ("reverse", "sequence", BETA, 1.0),
    ("dr_grpo", None): ("forward", "token", BETA, 0.5),
    ("reinvent", None): ("reverse", "sequence", 2.0, 2 / BETA),
    ("trajectory_balance", None): ("reverse", "sequence", 2.0, 2 / BETA),
    ("vargrad", None): ("reverse", "sequence", 2.0, 2 / BETA),
    ("vanilla", None): ("reverse", "sequence", BETA, 1.0),
    ("reinforce", None): ("reverse", "sequence", BETA, 1.0),
    ("mara", None): ("reverse", "sequence", BETA, 1.0),
    ("entropy_bonus", None): ("reverse", "sequence", BETA, None),
    ("dapo", None): ("none", None, 0.0, None),
    ("raft", None): ("none", None, 0.0, None),
    ("maxrl", None): ("none", None, 0.0, None),
    ("pass_at_k", None): ("none", None, 0.0, None),
    ("grpo", None): ("neither", None, None, None),
    ("length_normalised", None): ("neither", None, None, None),
}


@pytest.mark.parametrize(("name", "level"), KNOWN, ids=lambda x: str(x))
def test_which_kl_it_is(name, level):
    found = expected(name, level)
    kl = gradients.identify(found["expected"]["kl"], found["unit"], BETA)
    factor = gradients.factor_of(found["expected"]["objective"] - found["expected"]["kl"], found["reward"]["reward"])
    want = KNOWN[name, level]
    assert (kl["name"], kl["level"]) == want[:2]
    assert kl["beta"] == (want[2] if want[2] is None else pytest.approx(want[2], rel=1e-9))
    assert factor == (want[3] if want[3] is None else pytest.approx(want[3], rel=1e-9))


def test_how_far_off_wrong_ones_are():
    """Each token's own k1 misses a fifth to two thirds of the reverse KL's gradient; k1 in the loss all of it."""
    own, wanted = expected("k1_in_reward", "token"), "reverse_sequence"
    found = gradients.compare(own["expected"]["kl"], own["kl"][wanted])
    assert 0.2 < found["smallest_error"] < found["relative_error"] < 1.5
    assert verdict.percent(found).endswith(" %") and "-" in verdict.percent(found)
    nothing = expected("k1_in_loss")
    found = gradients.compare(nothing["expected"]["kl"], nothing["kl"][wanted])
    assert found == {"cosine": None, "relative_error": pytest.approx(1), "smallest_error": pytest.approx(1)}


def test_exact_gradients_by_hand():
    """d/d logit of a KL between two categoricals: reverse p (log p/r - KL), forward p - r; weighted by the visits."""
    problem = problems.strings()
    params = problem.params[0]
    found = gradients.exact_gradients(problem, params, problem.reward, problem.ref_logp)
    p, r = (np.asarray(jax.nn.softmax(x, axis=-1)) for x in (params, problem.ref_params))
    # Rows 0 (start), 1-3 (after one token), 4-12 (after two); token 2 ends a string.
    visits = np.concatenate([[1.0], p[0], np.outer(p[0], np.ones(3)).ravel() * p[1:4].ravel()])
    visits[[3, 6, 9, 10, 11, 12]] = 0
    ratio = np.log(p / r)
    reverse = visits[:, None] * p * (ratio - np.sum(p * ratio, axis=-1, keepdims=True))
    np.testing.assert_allclose(found["reverse_token"], reverse, atol=1e-14)
    np.testing.assert_allclose(found["forward_token"], visits[:, None] * (p - r), atol=1e-14)


@pytest.mark.parametrize("algorithm", [Algorithm(), Algorithm(anchor="string"), Algorithm(kl="forward")], ids=str)
def test_what_is_shipped_is_exact(algorithm):
    setting, problem = published.configured("shipped", algorithm), problems.strings()
    found, goal = gradients.gradients(setting, problem), f"{algorithm.kl}_sequence"
    for part in ("kl", "objective"):
        comparison = gradients.compare(found["expected"][part], found[part][goal])
        assert comparison["relative_error"] < 1e-10 and comparison["cosine"] > 1 - 1e-12
    point = end(setting, problem)
    form = problems.closed_forms(problem, algorithm)[f"{algorithm.kl}_mara_{algorithm.anchor}"]
    assert point.kind == "settled" and diversity.total_variation(point.probability, form) < 1e-8


@pytest.mark.parametrize(
    ("name", "method", "want"),
    [
        ("k1_in_reward", "mara", [1 / 3, 1 / 3, 1 / 3, 0, 0]),
        ("k3_in_loss", "mara", [0.2337, 0.1600, 0.6023, 0.0032, 0.0008]),
        ("k1_in_loss", "mara", [0, 0, 1, 0, 0]),
        ("k2_in_loss", "vanilla", [0.6316, 0.3158, 0.0526, 0, 0]),
    ],
)
def test_where_five_outcomes_end(name, method, want):
    setting = published.setting(name, dataclasses.replace(VANILLA, method=method))
    point = end(setting, problems.five())
    assert point.kind == "settled"
    np.testing.assert_allclose(point.probability, want, atol=1e-4)


def test_what_rewards_distance_from_the_reference_runs_away():
    assert end(published.setting("k3_in_reward", VANILLA), problems.five()).kind == "runs_away"


def test_scaling_reward_and_kl_together_turns_the_gradient_but_not_its_rest():
    """At ref exp(R/beta) every signal is the same, so no group or string has anything left to be rescaled."""
    problem = problems.strings()
    for name in ("length_normalised", "group_std"):
        point = end(published.setting(name, VANILLA), problem)
        form = problems.closed_forms(problem, VANILLA)["reverse"]
        assert diversity.total_variation(point.probability, form) < 1e-6, name
    found = gradients.gradients(published.setting("group_std", VANILLA), problem)
    assert gradients.compare(found["expected"]["objective"], found["objective"]["reverse_sequence"])["cosine"] < 0.95


@pytest.mark.parametrize(("size", "beta", "want"), [(2, 1.0, 0.021), (4, 1.0, 0.003), (4, 0.1, 0.0)])
def test_an_anchor_from_the_group_has_the_bias_of_the_published_table(size, beta, want):
    """benchmarks/RESULTS.md: leave-one-out, distances to Eq. 13 by counting multisets of a categorical."""
    algorithm = Algorithm(method="mara", anchor="string", beta=beta)
    setting, problem = published.configured("anchor", algorithm), problems.five()
    point = end(setting, problem, size, problems.FROM_GROUP)
    form = problems.closed_forms(problem, algorithm)["reverse_mara_string"]
    assert diversity.total_variation(point.probability, form) == pytest.approx(want, abs=6e-4)


def test_groups_by_multiplicity_are_all_ordered_groups():
    rows, log_orders = enumeration.groups(5, 4)
    assert len(rows) == 70 and np.exp(log_orders).sum() == pytest.approx(5**4)
    setting, problem = published.configured("x", Algorithm(anchor="string")), problems.five()
    over = gradients.case(setting, problem, 4, problems.FROM_GROUP)
    every_order = np.array(list(itertools.product(range(5), repeat=4)))
    ordered = over._replace(groups=enumeration.Groups(every_order, np.zeros(5**4)))
    got, want = (gradients.expected_gradient(setting, x, problem.params[0]) for x in (over, ordered))
    np.testing.assert_allclose(got, want, atol=1e-14)


def test_too_many_groups_are_refused():
    with pytest.raises(ValueError, match="over 50000"):
        enumeration.groups(20, 6)


def test_an_anchor_from_the_group_misses_less_of_the_gradient_in_larger_groups():
    algorithm = Algorithm(method="mara", anchor="string", baseline="none")
    setting, problem = published.configured("anchor", algorithm), problems.five()
    whole = problems.anchors(problem, algorithm)
    errors = []
    for size in (1, 2, 4):
        got, want = (gradients.at_policies(setting, problem, size, anchor) for anchor in (problems.FROM_GROUP, whole))
        errors.append(gradients.compare(got, want)["relative_error"])
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] > 0.1
    # A group of one is its own anchor, which is no augmentation at all.
    vanilla = published.configured("vanilla", dataclasses.replace(algorithm, method="vanilla"))
    alone = [gradients.at_policies(s, problem, 1, problems.FROM_GROUP) for s in (setting, vanilla)]
    np.testing.assert_allclose(*alone, atol=1e-14)


def test_grpo_by_hand():
    """Two strings of one and two tokens, rewards 1 and 0: advantages +-1/sqrt(2) (and the published epsilon)."""
    logp, ref = np.log([[0.5, 1.0], [0.25, 0.8]]), np.log([[0.4, 1.0], [0.5, 0.2]])
    mask, advantage = np.array([[1, 0], [1, 1]]), 0.5 / (np.sqrt(0.5) + 1e-4)
    setting = published.setting("grpo", VANILLA)

    def loss(logp):
        scored = Scored(
            *(jnp.asarray(x)[None] for x in (logp, mask, (ref * mask).sum(-1), [1.0, 0.0], [0, -1])),
            log_mass=jnp.zeros((1, 1)), ref_token_logp=jnp.asarray(ref)[None],
        )  # fmt: skip
        return setting.objective(setting.algorithm, scored, None, Numbers(BETA, 0.8))[0]

    # d k3 = 1 - ref/pi; the second string has two tokens, the mean is over two strings.
    k3 = BETA * (1 - np.exp(ref - logp))
    want = np.array([[k3[0, 0] - advantage, 0], (k3[1] + advantage) / 2]) / 2
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(logp)), want, rtol=1e-12)


def test_a_level_token_needs_the_references_tokens():
    one = jnp.zeros((1, 2))
    scored = Scored(one[..., None], one[..., None] + 1, one, one, one, one)
    with pytest.raises(ValueError, match="level='token' needs"):
        method_rules.loss(Algorithm(method="vanilla", level="token"), scored, None, Numbers(BETA, 0.8))


def test_unknown_settings_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="--as=k4 is not known: choose one of k1_in_loss"):
        published.setting("k4", VANILLA)
    with pytest.raises(ValueError, match="--level=token has no meaning for --as=grpo"):
        published.setting("grpo", VANILLA, "token")
    with pytest.raises(ValueError, match="--as=reinvent, which divides by beta"):
        published.setting("reinvent", dataclasses.replace(VANILLA, beta=0.0))


def halved(plain):
    return lambda *args, beta, **rest: plain(*args, beta=beta / 2, **rest)


def unmasked(plain):
    return lambda logp, mask, *args, **rest: plain(logp, jnp.ones_like(mask), *args, **rest)


def negated(plain):
    return lambda *args, beta, **rest: plain(*args, beta=-beta, **rest)


@pytest.mark.parametrize(
    ("bug", "words"),
    [
        (None, "reverse KL at sequence level, exactly; optimum: ref(y) exp(R(y)/beta)"),
        (halved, "reverse KL at sequence level, with 0.5 times the configured beta at groups of 2"),
        (unmasked, "neither KL, at neither level"),
        (negated, "reverse KL at sequence level, with -1 times the configured beta"),
    ],
    ids=["none", "halved", "unmasked", "negated"],  # a function's own name holds its address
)
def test_planted_bugs_change_the_verdict(monkeypatch, bug, words):
    if bug is not None:
        monkeypatch.setattr(objectives, "reverse_kl", bug(objectives.reverse_kl))
    monkeypatch.setattr(computation, "_five", lambda *_: {})
    # A name of its own: what is compiled is kept by setting.
    record = computation.audit(published.configured(f"with {bug}", VANILLA))
    assert record["verdict"].startswith(words), record["verdict"]


@pytest.mark.parametrize("anchor", ["string", "answer"])
def test_a_threshold_out_of_reach_is_told(monkeypatch, anchor):
    monkeypatch.setattr(computation, "_five", lambda *_: {})
    record = computation.audit(published.configured("out of reach", Algorithm(anchor=anchor, threshold=2.0)))
    assert record["verdict"] == (
        "reverse KL at sequence level, exactly; optimum: ref(y) exp(R(y)/beta), normalised; "
        "no string reaches the threshold of 2 (rewards here are at most 1): MARA changes nothing"
    )


@pytest.mark.parametrize(
    ("kl", "words"),
    [("reverse", "ref(y) exp(R(y)/beta)"), pytest.param("forward", "beta ref(y) / (Lambda", marks=pytest.mark.slow)],
)
def test_an_optimum_known_from_the_gradient_needs_no_search(monkeypatch, kl, words):
    """At this beta the search does not settle."""
    monkeypatch.setattr(computation, "_five", lambda *_: {})
    record = computation.audit(published.configured("tiny", Algorithm(method="vanilla", kl=kl, beta=1e-4)))
    assert record["optimum"] == kl
    assert f"{kl} KL at sequence level, exactly; optimum: {words}" in record["verdict"]
    told = "the search from the reference" in record["verdict"]
    assert told == (record["stationary"]["total_variation"][kl] >= verdict.REACHED)
    listed = record["problem"]
    log = np.log(listed["reference"]) + np.array(listed["reward"]) / 1e-4
    form = np.exp(log - np.logaddexp.reduce(log))
    outside = diversity.total_variation(np.array(record["stationary"]["probability"]), form)
    assert kl == "forward" or outside == pytest.approx(record["stationary"]["total_variation"]["reverse"], abs=1e-12)


def test_an_optimum_is_known_only_where_the_gradient_says_so():
    def asked(name="reverse", level="sequence", beta=0.1, factor=1.0, **algorithm):
        given = {"transform": "mara_answers", "anchor": "answer", "kl": "reverse", "beta": 0.1, **algorithm}
        kl = {"name": name, "level": level, "beta": beta}
        whole = {"name": "reverse_sequence", "factor": factor} if factor else None
        return verdict.optimum({"algorithm": given, "enumerated": {"good": 2}, "kl": kl, "objective": whole})

    assert asked() == "reverse_mara_answer" and asked(transform="none") == "reverse"
    assert asked(beta=2.0, factor=20.0) == "reverse_mara_answer"  # REINVENT's
    wrong = [{"name": "forward"}, {"level": "token"}, {"beta": 0.05}, {"factor": None}, {"beta": -0.1, "factor": -1.0}]
    assert [asked(**change) for change in wrong] == [None] * 5


def test_every_method_and_objective_of_the_table_is_a_name():
    assert {*methods.METHODS, *methods.OBJECTIVES} <= set(published.NAMES)
    assert {"k1_in_loss", "k2_in_loss", "k3_in_loss", "k1_in_reward", "k3_in_reward"} <= set(published.NAMES)
    base = Algorithm(beta=0.3, threshold=0.7, kl="forward", eta=0.2)
    for name in published.NAMES:
        setting = published.setting(name, base)
        kept = [getattr(setting.algorithm, field) for field in ("beta", "threshold", "kl", "eta")]
        assert kept == [0.3, 0.7, "forward", 0.2] and "auto" not in (setting.algorithm.transform, setting.form)


def test_a_name_keeps_maras_rewards_unless_it_has_its_own():
    base = Algorithm(anchor="string")
    transforms = {name: published.setting(name, base).algorithm.transform for name in published.NAMES}
    own = {"vanilla": "none", "reinforce": "none"} | {n: n for n in ("entropy_bonus", "unlikeliness", "darling", "ips")}
    assert transforms == dict.fromkeys(published.NAMES, "mara_strings") | own


@pytest.mark.parametrize("name, group", [("entropy_bonus", 2), ("ips", 4), ("darling", 4), ("grpo", 4), ("dr_grpo", 4)])
def test_methods_with_a_closed_form_of_their_own_end_there_on_five_outcomes(name, group):
    """Every outcome is its own answer there, bad ones too."""
    setting, problem = published.setting(name, VANILLA), problems.five()._replace(answer=np.arange(5))
    form = problems.closed_forms(problem, setting.algorithm, group)["own"]
    assert diversity.total_variation(end(setting, problem, group).probability, form) < 1e-8
    assert "own" not in problems.closed_forms(problems.strings(), published.setting("grpo", VANILLA).algorithm, group)


def test_a_verdict_on_a_method_with_an_optimum_of_its_own():
    record = computation.audit(published.setting("entropy_bonus", VANILLA))
    assert record["verdict"] == (
        "reverse KL at sequence level; rewards are not the task's own, so the gradient is that of no "
        "E[R] - beta KL; yet it ends at: that of the method itself, in closed form"
    )
    record = computation.audit(published.setting("maxrl", VANILLA))
    assert record["verdict"].startswith("nothing is regularised: it has no KL") and "mara" in record["five_outcomes"]
    assert record["verdict"].endswith("the policy collapses onto the best reward")
    # RAFT keeps strings of reward .9 as it keeps those of reward 1.
    record = computation.audit(published.setting("raft", VANILLA))
    assert record["verdict"].endswith(
        "the policy collapses onto strings that it keeps, in the proportions that it finds"
    )
