"""docs/methods.md against the tables that it describes: a method may lack a line there, a line may not be wrong."""

import functools
import pathlib
import re

import jax
import numpy as np
import pytest

from mara_jax.config import Algorithm
from mara_jax.core import augment, method_rules, methods
from mara_jax.core.method_rows import Outcomes
from mara_jax.core.scored import Numbers

ROOT = pathlib.Path(__file__).parents[1]
NEEDS = {
    "answers": "answers", "masses": "masses", "non_negative_rewards": "R >= 0", "groups": "groups",
    "positive_beta": "beta > 0", "positive_eta": "eta > 0",
}  # fmt: skip
# The problem of the page.
REF, REWARD, NUMBERS, GROUP = (
    np.log([0.60, 0.30, 0.05, 0.04, 0.01]),
    np.array([1.0, 1, 1, 0, 0]),
    Numbers(0.1, 0.8, 0.1),
    4,
)


@functools.cache
def lines() -> dict[str, list[str]]:
    """The page's first table: method -> its cells from the second on."""
    page = (ROOT / "docs" / "methods.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


def shares(algorithm: Algorithm, ref_logp, reward) -> str | None:
    """The three good outcomes at the optimum that the tables state, as the page prints them."""
    with jax.enable_x64(True):
        logp = method_rules.optimum(algorithm, Outcomes(ref_logp, reward, np.arange(5)), NUMBERS, GROUP)
    return None if logp is None else " ".join(f"{p:.3f}"[1:] for p in np.exp(np.asarray(logp)[:3]))


def test_the_page_has_the_methods_in_the_tables_order():
    assert len(lines()) >= 16
    assert list(lines()) == [name for name in methods.METHODS if name in lines()]


@pytest.mark.parametrize("name", lines())
def test_a_line_says_what_the_tables_say(name):
    algorithm = method_rules.resolved(Algorithm(method=name))
    _, objective = method_rules.rows(algorithm)
    _, kl, baseline, needs, _, _, paper = lines()[name]
    assert kl == ("`algorithm.kl`" if objective.placements else objective.kl)
    assert baseline == algorithm.baseline.replace("_", " ")
    assert needs == (", ".join(word for need, word in NEEDS.items() if need in method_rules.needs(algorithm)) or "-")
    assert set(re.findall(r"\d{4}\.\d{5}", paper)) == set(re.findall(r"\d{4}\.\d{5}", methods.METHODS[name].paper))


@pytest.mark.parametrize("name", lines())
def test_a_line_ends_where_the_tables_say(name):
    algorithm = Algorithm(method=name, anchor="string")
    transform, objective = method_rules.rows(algorithm)
    ends, with_mara = lines()[name][4:6]
    optimum = shares(algorithm, REF, REWARD)
    if optimum is not None:
        assert ends == optimum
    else:
        assert ends == ("a jump near .415 .415 .171" if name == "unlikeliness" else "anywhere good")
    if transform.anchor is not None or algorithm.method in methods.TRANSFORMS:
        return
    assert with_mara.startswith("refused") == bool(objective.refuses_mara)
    with jax.enable_x64(True):
        reward, ref = augment.mara(REWARD[None], REF[None], beta=NUMBERS.beta, threshold=NUMBERS.threshold)
    if not objective.refuses_mara:
        assert with_mara == shares(algorithm, np.asarray(ref[0]), np.asarray(reward[0]))
    elif printed := re.findall(r"\.\d{3}", with_mara):  # GRPO's: by enumeration alone
        label = {"grpo": "GRPO, N=4", "dr_grpo": "Dr. GRPO with k3, N=4"}[name]
        results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
        assert f"| {label} | mara | {' '.join('0' + share for share in printed)} " in results


def test_other_ends_are_those_of_the_full_table():
    page, results = ((ROOT / path).read_text() for path in ("docs/methods.md", "benchmarks/RESULTS.md"))
    named = {
        "k3 in the loss": "k3 in the loss, N=1",
        "forward KL, samples of the reference": "forward_kl_samples, no baseline, N=1",
        "REINVENT on uniform samples": "REINVENT, uniform samples",
        "k2 in the loss; forward KL toward G (Eq. 7)": "forward KL toward G (Eq. 7), N=4",
    }  # fmt: skip
    for label, full in named.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {label} |")]
        for kind, cell in zip(("vanilla", "mara"), row.strip("| ").replace("*", "").split(" | ")[1:], strict=True):
            printed = " ".join("0" + share for share in cell.split())
            assert f"| {full} | {kind} | {printed} |" in results, (label, kind)
