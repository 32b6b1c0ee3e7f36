"""The figures command: what it writes in the paper's settings, what it refuses, and its exit status."""

import copy
import json

import numpy as np
import pytest

from mara_jax.figures import command, computation, drawing


def strict(text: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


STEMS = [*(f"figure{n}" for n in range(1, 7)), "iclr3", "iclr4"]


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def faithful(request, tmp_path_factory):
    """Figures in the papers' settings: some, or in the slow tests all, as the command makes them by default."""
    out = tmp_path_factory.mktemp("figures") / "new" / "folder"
    if request.param == "all":
        return command.main(["figures", f"--out={out}"]), out, STEMS
    return command.main(["figures", f"--out={out}", "--only=1,3,6"]), out, ["figure1", "figure3", "figure6"]


def test_the_papers_settings_show_what_the_figures_must(faithful):
    status, out, stems = faithful
    assert status == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(f"{s}.{e}" for s in stems for e in ("png", "svg", "json"))
    for stem in stems:
        record = strict((out / f"{stem}.json").read_text())
        assert record["mode"] == "faithful" and record["settings"]["learning_rate"] == 5e-3
        assert record["settings"]["steps"] == 1000
        assert [check["name"] for check in record["checks"] if not check["pass"]] == []
        for panel in record["panels"]:
            p, q = np.array(panel["trained"]), np.array(panel["optimum"])
            np.testing.assert_allclose([p.sum(), q.sum()], 1.0, atol=1e-5)
            np.testing.assert_allclose(panel["tv_to_optimum"], np.abs(p - q).sum() / 2, atol=1e-9)
            assert panel["kl_trained_to_optimum"] >= 0 and panel["kl_optimum_to_trained"] >= 0
        if stem != "figure1":
            assert record["settings"]["batch"] == 32 and record["settings"]["baseline"] == "none"
    # Half-trained is told apart from converged: beta .01 is far from its optimum in these settings.
    panels = strict((out / "figure6.json").read_text())["panels"]
    (far,) = (p for p in panels if p["objective"] == "reverse" and p["beta"] == 0.01)
    assert 0.40 < far["tv_to_optimum"] < 0.50
    assert far["tv_to_uniform_good"] < far["optimum_tv_to_uniform_good"] / 2


def test_pictures_are_drawn_from_the_numbers_alone_and_repeat(faithful, tmp_path):
    _, out, _ = faithful
    for stem in ("figure3", "figure1"):
        record = strict((out / f"{stem}.json").read_text())
        again = drawing.write(record, tmp_path / f"{stem}.png")
        for suffix in (".png", ".svg"):
            assert again.with_suffix(suffix).read_bytes() == (out / f"{stem}{suffix}").read_bytes()
    other = copy.deepcopy(record)
    other["panels"][0]["trained"].reverse()
    assert drawing.write(other, tmp_path / "other.png").read_bytes() != again.read_bytes()


def test_a_picture_says_what_it_shows(faithful):
    _, out, _ = faithful
    svg = (out / "figure6.svg").read_text()
    record = strict((out / "figure6.json").read_text())
    for words in (record["title"], "exact optimum", "reference", "reward", "(Algorithm 2)", "reward: not flat"):
        assert words in svg
    shown = [p for p in record["panels"] if p["beta"] in record["drawn_betas"]]
    assert len(shown) == 25
    for panel in shown:
        assert f"TV {panel['tv_to_optimum']:.2f}" in svg


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only=7"], "--only=7: '7' is no figure; use some of 1,2,3,4,5,6,iclr3,iclr4"),
        (["--only="], "--only=: '' is no figure"),
        (["--mode=quick"], "--mode=quick is unknown: choose one of faithful, converged"),
        (["--colour=red"], "Unknown command line flag 'colour'"),
        (["2"], "unexpected argument '2'"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, arguments, words):
    out = tmp_path / "out"
    assert command.main(["figures", f"--out={out}", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("mara_jax: ") and words in said.err
    assert not out.exists()


def test_a_file_is_no_folder(tmp_path, capsys):
    file = tmp_path / "taken"
    file.write_text("mine")
    for out in (file, file / "deeper"):
        assert command.main(["figures", f"--out={out}"]) == 2
        assert f"{file} is a file; choose a folder" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_a_failed_check_is_named_and_ends_the_command_with_one(faithful, tmp_path, capsys, monkeypatch):
    honest = strict((faithful[1] / "figure3.json").read_text())

    def planted(name, mode):
        record = copy.deepcopy(honest)
        record["checks"][0] |= {"measured": 7.0, "pass": False}
        return record

    monkeypatch.setattr(computation, "record", planted)
    monkeypatch.setenv("COLUMNS", "200")
    assert command.main(["figures", f"--out={tmp_path}", "--only=3"]) == 1
    said = capsys.readouterr().out
    assert f"{len(honest['checks']) - 1} of {len(honest['checks'])}" in said
    assert f"{honest['checks'][0]['name']}: 7, not = 2.69e+43" in said
    assert strict((tmp_path / "figure3.json").read_text())["checks"][0]["measured"] == 7.0
