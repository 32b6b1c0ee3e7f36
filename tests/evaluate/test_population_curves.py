"""Figures 7 and 8 from numbers whose result is known by hand."""

import json

import numpy as np
import pytest

from mara_jax.evaluate import command, population_curves, population_drawing
from mara_jax.evaluate.population_curves import Checkpoint, Curves


def member(kind, beta, seed, bits, reward=(0.5, 0.7), forecast=None, distance=None) -> Curves:
    share = np.linspace(0.5, 0.9, len(bits))
    name = f"{kind}-{beta}-{seed}"
    return Curves(name, kind, beta, seed, share, np.array(bits), np.array(reward), 1.0, forecast, distance)


MEMBERS = [
    member("vanilla", 0.1, 0, (0.6, 0.05), forecast=0.7, distance=0.4),
    member("vanilla", 0.1, 1, (0.6, 0.15), reward=(0.5, 0.9), forecast=0.7, distance=0.2),
    member("MARA over answers", 0.1, 0, (0.7, 0.95), forecast=1.0, distance=0.1),
    member("MARA over answers", 0.3, 0, (0.7, 0.85)),
]


def test_ends_are_counted_by_kind_and_beta():
    rows = population_curves.counts(MEMBERS)
    assert [(row["kind"], row["beta"], row["members"], row["one"], row["equal"]) for row in rows] == [
        ("vanilla", 0.1, 2, 1, 0), ("MARA over answers", 0.1, 1, 0, 1), ("MARA over answers", 0.3, 1, 0, 0)
    ]  # fmt: skip
    assert rows[0]["bits"] == pytest.approx(0.1)


def test_checkpoints_are_means_over_seeds_with_their_errors():
    points = population_curves.checkpoints(MEMBERS, every=1)
    assert [(point.kind, point.step) for point in points[:2]] == [("vanilla", 1), ("vanilla", 2)]
    last = points[1]
    assert (last.seeds, last.reward, last.bits) == (2, pytest.approx(0.8), pytest.approx(0.1))
    # Two values .2 apart: a sample deviation of .2 / sqrt 2, over sqrt 2.
    assert (last.reward_error, last.bits_error) == (pytest.approx(0.1), pytest.approx(0.05))
    assert points[2].bits_error == 0  # one seed
    assert len(population_curves.checkpoints(MEMBERS, every=8)) == 3  # the last step of each


def test_the_front_is_what_no_other_beats():
    def point(bits, reward):
        return Checkpoint("a", 0.1, 1, 1, reward, 0.0, bits, 0.0)

    points = [point(0.2, 0.9), point(0.5, 0.8), point(0.4, 0.8), point(0.9, 0.3), point(0.9, 0.2), point(0.1, 0.9)]
    assert [(one.bits, one.reward) for one in population_curves.front(points)] == [(0.2, 0.9), (0.5, 0.8), (0.9, 0.3)]


def test_shares_and_entropy_pool_eight_batches(tmp_path):
    """Nine steps of a member: the first eight give "1" alone, the last as many "2" as keep 1 bit out of reach."""
    folder = tmp_path / "members" / "one"
    folder.mkdir(parents=True)
    settings = {
        "method": "vanilla",
        "anchor": "answer",
        "kl": "reverse",
        "beta": 0.1,
        "threshold": 0.8,
        "learning_rate": 1e-3,
        "seed": 0,
    }
    listed = {"members": [{"name": "one", "workdir": "members/one"} | settings]}
    (tmp_path / "population.json").write_text(json.dumps(listed))
    (folder / "config.json").write_text(json.dumps({"seed": 0, "algorithm": {"method": "vanilla", "beta": 0.1}}))
    optimum = {"vanilla": [0.6, 0.3, 0.1]}
    reference = {"samples": 9, "valid": 0.9, "answers": ["1", "2"], "counts": [6, 3], "objective": "", "collapse": None}
    (folder / "reference.json").write_text(json.dumps(reference | {"optimum": optimum}))
    rows = [
        {
            "step": step, "samples": 4, "answers/counts": [4, 0] if step < 9 else [0, 4], "reward/mean": step / 9,
            "answers/by_prompt": [], "valid/fraction": 1.0, "kl/reverse": 0.0, "length/mean": 5.0,
        }
        for step in range(1, 10)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (one,) = population_curves.read(tmp_path)
    np.testing.assert_allclose(one.share, [1.0] * 8 + [28 / 32])
    np.testing.assert_allclose(one.bits[-1], -(7 / 8 * np.log2(7 / 8) + 1 / 8 * np.log2(1 / 8)))
    np.testing.assert_allclose(one.reward[[0, -1]], [1 / 9, np.mean(np.arange(2, 10)) / 9])
    assert one.forecast == pytest.approx(-(2 / 3 * np.log2(2 / 3) + 1 / 3 * np.log2(1 / 3)))
    assert one.distance == pytest.approx(7 / 8 - 2 / 3)
    shown = population_curves.as_json([one])
    assert json.loads(json.dumps(shown))["members"][0]["bits"][-1] == one.bits[-1]


def test_the_figures_are_drawn(tmp_path):
    unknown = [one._replace(forecast=None, distance=None) for one in MEMBERS[:1]]
    assert population_drawing.figure8(tmp_path / "unknown.png", unknown).exists()  # of a method without a forecast
    for draw in (population_drawing.figure7, population_drawing.figure8):
        path = draw(tmp_path / f"{draw.__name__}.png", MEMBERS)
        assert path.stat().st_size > 10_000 and path.with_suffix(".svg").exists()


def test_no_population_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"population\.json does not exist: name the workdir of a population"):
        population_curves.read(tmp_path)


def test_a_population_is_no_run(tmp_path, capsys):
    (tmp_path / "population.json").write_text("{}")
    for action in ("show", "compare"):
        assert command.main(["evaluate", action, str(tmp_path)]) == 2
        assert "is a population: evaluate population shows it, its runs are members/NAME" in capsys.readouterr().err
