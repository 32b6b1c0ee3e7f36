"""Where training ends with masses from a few samples of the reference: by hand, and as docs/objectives.md prints it."""

import importlib.util
import pathlib
import re
import types

import jax
import numpy as np
import pytest

from mara_jax.core import targets

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("reference_masses", ROOT / "benchmarks" / "reference_masses.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_single_sample_by_hand(script):
    """Two answers of 1/2 and 1/4. Seen first: .5 / 1 and .25 / .5, equal. Seen second: 1 to 1/4. Seen none: vanilla."""
    cell = script.cell("geometric", 1, 2, 0.05, "half")
    np.testing.assert_allclose(cell["tv_mara"], 0.25 * (0.8 - 0.5) + 0.25 * (2 / 3 - 0.5), atol=1e-5)
    np.testing.assert_allclose(cell["tv_vanilla"], 0.5 * (2 / 3 - 0.5) + 0.25 * (0.8 - 2 / 3), atol=1e-5)
    assert cell["enumerated"] and cell["counts"] == 3 and cell["unseen_answers"] == pytest.approx(1.25)
    np.testing.assert_allclose(cell["tv_mara_vanilla"], 1 / 6, atol=1e-5)
    # The floor makes the unseen answer's bonus log 256: .5 and .25 * 256 if the first is seen, .5 * 256 and .25 if not.
    floor = script.cell("geometric", 1, 2, 0.05, "floor")
    want = 0.5 * (64 / 64.5 - 0.5) + 0.25 * (128 / 128.25 - 0.5) + 0.25 / 6
    np.testing.assert_allclose(floor["tv_mara"], want, atol=1e-5)


def test_enumerated_counts_are_those_of_the_multinomial(script):
    counts, weight, exact = script.possible_counts(6, script.reference("zipf", 5))
    assert exact and len(np.unique(counts, axis=0)) == len(counts) == 462 and np.all(counts.sum(axis=1) == 6)
    np.testing.assert_allclose(weight.sum(), 1, rtol=1e-9)
    np.testing.assert_allclose(weight @ counts, 6 * script.reference("zipf", 5), rtol=1e-9)


@pytest.mark.parametrize("name, answers, n", [("geometric", 2, 64), ("zipf", 5, 16)])
def test_the_pages_table_is_what_the_script_computes(script, name, answers, n):
    page = (ROOT / "docs" / "objectives.md").read_text()
    label = {2: "either", 5: "1/k"}[answers]
    (row,) = re.findall(rf"^\| {answers} \| {label} \| (.*) \|$", page, re.MULTILINE)
    between, *printed = row.split(" | ")
    cell = script.cell(name, n, answers, 0.1, "half")
    mara = f"{cell['tv_mara']:.2f} ({cell['tv_mara_low']:.2f}-{cell['tv_mara_high']:.2f})"
    assert printed[script.SAMPLES.index(n)] == f"{mara}, {cell['tv_vanilla']:.2f}".replace("0.", ".")
    assert between == f"{cell['tv_mara_vanilla']:.2f}".replace("0.", ".")


def test_the_full_table_is_what_the_script_computes(script):
    """A cell by either rule."""
    half, floor = (script.cell("geometric", 16, 2, 0.1, rule) for rule in ("half", "floor"))
    want = [half["tv_mara"], half["tv_vanilla"], half["nearer_than_vanilla"], floor["tv_mara"], floor["tv_vanilla"]]
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    (row,) = re.findall(r"^\| geometric \| 2 \| 16 \| \S+ \| (.*) \| all \|$", results, re.MULTILINE)
    printed = [float(cell.split(" ")[0]) for cell in row.split(" | ")][:5]
    assert printed == [float(f"{value:.{2 if i == 2 else 3}f}") for i, value in enumerate(want)]


def test_training_with_sampled_gradients_ends_there(script, x64):
    """Shorter than the script's own run; what Adam leaves is a tenth of the distance to the exact optimum."""
    trained = script.train("geometric", 16, 2, 0.1, prompts=16, steps=1000, group=16)
    assert trained["tv_trained_closed_form_largest"] < 0.01
    counts = np.array([[8, 4, 4], [12, 0, 4]])
    got = script.ends(counts, script.reference("geometric", 2), 0.1, "half")
    with jax.enable_x64(True):
        want = [targets.reverse_kl(np.log([0.5, 0.25, e]), np.array([1, 1 + 0.1 * np.log(m), 0]), 0.1)
                for m, e in ((2, 0.25), (24, 0.25))]  # fmt: skip
    np.testing.assert_allclose(got, np.exp(want), atol=1e-6)
