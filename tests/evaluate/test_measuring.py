"""Weights measured on a file of prompts: pass@k by enumeration, and a whole evaluation by counting its completions."""

import base64
import html.parser
import itertools
import json

import numpy as np
import pytest

from mara_jax import tasks
from mara_jax.config import LanguageRun
from mara_jax.core import diversity
from mara_jax.evaluate import drawing, measuring, page, prompt_measures
from mara_jax.measures import equivalence
from mara_jax.tasks import prompts
from mara_jax.train import evaluation

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def test_pass_at_k_is_the_share_of_subsets_with_a_good_sample():
    for count, good in ((5, 2), (6, 0), (4, 4), (7, 1)):
        samples = [1] * good + [0] * (count - good)
        for k in range(1, count + 1):
            subsets = list(itertools.combinations(samples, k))
            expected = np.mean([any(subset) for subset in subsets])
            assert diversity.pass_at_k(count, good, k) == pytest.approx(expected)


def test_measures_of_a_prompt_by_hand():
    reward, finished = np.array([1.0, 0.5, 1.0, 0.0], np.float32), np.array([True, True, True, False])
    group = evaluation.Group(0, "p", ["a!", "b", "a", "?"], reward, ["a", "b", "a", None], finished)
    measured = evaluation._of_prompt(group, 0.8)
    # Two of four are good: pass@2 = 1 - (2 choose 2) / (4 choose 2). The answers' shares are 2/3 and 1/3.
    effective = 2 ** (-(2 / 3) * np.log2(2 / 3) - (1 / 3) * np.log2(1 / 3))
    assert measured == {
        "reward": 0.625, "pass@1": 0.5, "pass@2": pytest.approx(5 / 6), "pass@4": 1.0, "valid": 0.75,
        "answers/distinct": 2.0, "answers/good": 1.0, "answers/effective": pytest.approx(effective),
        "truncated": 0.25, "counts": {"a": 2, "b": 1},
    }  # fmt: skip


def test_more_measures_of_a_prompt_by_hand():
    """Answers a, b, a and none; a is good, b is not."""
    reward = np.array([1.0, 0.5, 1.0, 0.0], np.float32)
    group = evaluation.Group(0, "p", ["x y", "x", "x y", ""], reward, ["a", "b", "a", None], np.ones(4, bool))
    # Votes of two: six pairs, of which aa, a and none twice give a; ab twice is a tie; b and none gives b.
    # Votes of four: a. Words: x y x x y, of which 2 of 5 are different; pairs: xy twice.
    expected = [2 / (50257 * (1 - (50256 / 50257) ** 5)), 1 / (2 - 1 / 50257), 0, 0, 0]
    assert prompt_measures.of_group(group, 0.8) == {
        "majority@1": pytest.approx(0.5), "majority@2": pytest.approx((1 + 2 + 2 * 0.5) / 6), "majority@4": 1.0,
        "answers/entropy_bits": pytest.approx(np.log2(3) - 2 / 3), "answers/unseen": 0.25, "ngrams/distinct-1": 0.4,
        "ngrams/distinct-2": 0.5, "ngrams/distinct-3": 0.0, "ngrams/ead": pytest.approx(sum(expected) / 5),
    }  # fmt: skip


class Corners:
    """An embedder of four texts onto two axes, and its name."""

    name = "corners"

    def embed(self, texts):
        return np.array([{"red sea": (1.0, 0.0), "sea red": (1.0, 0.0)}.get(text, (0.0, 1.0)) for text in texts])


def test_measures_of_texts_by_hand():
    """Two orders of the same words are one class by ROUGE-1, and one direction; the third text is another."""
    reward, columns = np.array([2.0, 1.0, 4.0], np.float32), {"kept": np.array([0.5, 0.25, 0.75])}
    group = evaluation.Group(0, "p", ["red sea", "sea red", "sky"], reward, [None] * 3, np.ones(3, bool), columns)
    likeness = prompt_measures.Likeness(equivalence.by_rouge(), Corners())
    measured = prompt_measures.of_texts(group, likeness)
    # Of three pairs of texts one has cosine 1, two have 0. Eigenvalues of the cosines over three: 2/3 and 1/3.
    entropy = -(2 / 3) * np.log(2 / 3) - (1 / 3) * np.log(1 / 3)
    assert measured == {
        "novelty/distinct_3": 2.0,
        "novelty/utility_3": pytest.approx((2 + 0.8**2 * 4) / (1 + 0.8 + 0.8**2)),
        "embeddings/distance": pytest.approx(2 / 3),
        "embeddings/vendi": pytest.approx(np.exp(entropy)),
        "task/kept": 0.5,
    }
    longer = group._replace(completions=["red sea"] * 9 + ["sky", "bird"], reward=np.ones(11, np.float32), columns={})
    of_ten = prompt_measures.of_texts(longer, prompt_measures.Likeness(equivalence.exact()))
    assert of_ten["novelty/distinct_10"] == 2.0  # the eleventh, a class of its own, is not read
    assert prompt_measures.of_texts(longer, prompt_measures.NOTHING) == {}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("embedding", 0.8, ""), "needs --embedder"),
        (("embedding", 0.0, "DIR"), "needs --similarity"),
        (("rouge1", 0.0, "nowhere"), "nowhere has no model.onnx"),
    ],
)
def test_rules_that_lack_something_are_refused(flags, words, monkeypatch):
    if flags[2] == "DIR":
        monkeypatch.setattr(prompt_measures.embeddings, "load", lambda where: Corners())
    with pytest.raises((ValueError, OSError), match=words):
        prompt_measures.likeness_of(*flags)


def test_the_rule_stands_beside_its_numbers(measured):
    printed, out = measured
    written = json.loads((out / "evaluation.json").read_text())
    assert written["texts"] == {"rule": "ROUGE-1 > 0.458", "embedder": None}
    assert "novelty/distinct_10" in printed and "the same by ROUGE-1 > 0.458" in " ".join(printed.split())
    assert "the same by ROUGE-1 &gt; 0.458" in (out / "evaluation.html").read_text()
    assert written["metrics"]["task/failed"] == 0


@pytest.fixture(scope="module")
def measured(command, random_model, tmp_path_factory):
    """A whole evaluation of three prompts: what was printed, and the folder."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "own.py").write_text(
        "def reward(prompts, completions, wanted):\n"
        "    return [float(text[:1] in set(one)) for text, one in zip(completions, wanted)]\n"
        "def answer(prompt, completion):\n    return completion[:1] or None\n"
    )
    lines = [{"prompt": f"{letter}<b>?", "wanted": LETTERS} for letter in "abc"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = command(
        "mara_jax.evaluate", "run", f"--weights={random_model}", f"--prompts={folder}/rows.jsonl", "--samples=20",
        f"--reward={folder}/own.py:reward", f"--answer={folder}/own.py:answer", "--max_new_tokens=3",
        f"--out={folder}/out",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout, folder / "out"


def test_run_measures_weights_and_writes_what_it_prints(measured):
    """Each measure is counted again from the prompts' counts."""
    printed, out = measured
    written = json.loads((out / "evaluation.json").read_text())
    assert [row["prompt"] for row in written["prompts"]] == ["a<b>?", "b<b>?", "c<b>?"]
    for row in written["prompts"]:
        right = {answer: count for answer, count in row["counts"].items() if answer in LETTERS}
        good, ones = sum(right.values()), list(row["counts"].values()).count(1)
        assert row["reward"] == pytest.approx(good / 20) == row["pass@1"] == pytest.approx(row["majority@1"])
        assert row["pass@4"] == pytest.approx(diversity.pass_at_k(20, good, 4))
        assert row["answers/distinct"] == len(row["counts"]) and row["valid"] == sum(row["counts"].values()) / 20
        assert row["answers/unseen"] == ones / 20
        assert row["answers/effective"] == pytest.approx(2 ** row["answers/entropy_bits"])
    for name, value in written["metrics"].items():
        values = [row[name] for row in written["prompts"]]
        assert value == pytest.approx(np.mean(values))
        assert f"{name}" in printed and f"{value:.3f}" in printed
        low, high = written["intervals"][name]
        assert min(values) - 1e-9 <= low <= value + 1e-9 and value - 1e-9 <= high <= max(values) + 1e-9
        assert f"{low:.3f} to {high:.3f}" in printed
    assert 0 < written["metrics"]["reward"] < 1
    assert written["bootstrap"] == {"level": 0.95, "resamples": 2000, "seed": 0, "over": "prompts"}


class Texts(html.parser.HTMLParser):
    """What a browser shows in elements `pre`, and every other element's name and attributes."""

    def __init__(self, page):
        super().__init__()
        self.pre, self.elements, self.inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag == "pre"
        if self.inside:
            self.pre.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data):
        if self.inside:
            self.pre[-1] += data.removeprefix("" if self.pre[-1] else "\n")  # as a browser does


def test_run_writes_a_page_that_needs_no_other_file(measured):
    out = measured[1]
    page_read = Texts((out / "evaluation.html").read_text())
    (image,) = [attributes["src"] for tag, attributes in page_read.elements if tag == "img"]
    assert base64.b64decode(image.split(",")[1]) == (out / "evaluation.png").read_bytes()
    assert not [tag for tag, attributes in page_read.elements if tag in ("link", "script", "b")]
    assert all(attributes.get("href", "#").startswith("#") for _, attributes in page_read.elements)
    counts = [row["counts"] for row in json.loads((out / "evaluation.json").read_text())["prompts"]]
    assert page_read.pre.count("a<b>?") == 1
    folded = [attributes for tag, attributes in page_read.elements if tag == "details"]
    assert len(folded) >= 3 + sum(map(len, counts))


def test_the_page_shows_completions_by_answer_and_escapes_them(tmp_path):
    evil = "<script>alert('x')</script> & \"q\" {{ 1 }}"
    texts = [evil, evil, "\n\nplain", "z" * 3000, *map(str, range(30))]
    answers = ["<i>", "<i>", "<i>", None, *["n"] * 30]
    group = evaluation.Group(0, f"p {evil}", texts, np.arange(34, dtype=np.float32), answers, np.ones(34, bool))
    shown = page.by_answer(group)
    assert [(row.name, row.count, row.reward, row.left_out) for row in shown] == [
        ("n", 30, pytest.approx(18.5), 10), ("<i>", 3, 1.0, 0), (None, 1, 3.0, 0),
    ]  # fmt: skip
    assert shown[1].texts == [(evil, 2), ("\n\nplain", 1)]
    assert shown[2].texts == [("z" * 2000 + "… (1000 more characters)", 1)]
    few = evaluation.Group(0, "p", ["x", "y", "z"], np.ones(3, np.float32), [None, None, "z"], np.ones(3, bool))
    assert [row.name for row in page.by_answer(few)] == ["z", None]  # last, though there are more
    result = prompt_measures.extended(evaluation.summary([group], 0.8), [group], 0.8, 0)
    assert result["intervals"] == {}
    settings = {"weights": evil, "prompts": "f", "samples": 34, "max_new_tokens": 4, "threshold": 0.8}
    result |= {"settings": settings}
    page.write(tmp_path / "page.html", result, [group], drawing.draw(tmp_path / "page.png", result))
    raw = (tmp_path / "page.html").read_text()
    assert "<script" not in raw and "<i>" not in raw
    read = Texts(raw)
    assert read.pre[0] == f"p {evil}" and read.pre.count(evil) == 1 and "\n\nplain" in read.pre


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--weights=x", "--prompts=y", "--out=z"], "--reward is missing: evaluate run takes --weights"),
        (["--weights=x", "--prompts=y", "--out=z", "--reward=r.py:f", "more"], "unexpected argument 'more'"),
        (["--weights=x", "--prompts=y", "--out=z", "--reward=r.py:f"], "the prompt file y does not exist"),
    ],
)
def test_what_cannot_be_measured_is_one_line(command, flags, words):
    done = command("mara_jax.evaluate", "run", *flags)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_prompts_that_stand_twice_are_counted(tmp_path):
    config = prompts.Config(prompts=f"{tmp_path}/rows.jsonl", reward="mara_jax.tasks.rewards.grammar:grammar")
    for texts, said in ((["a", "b"], ""), (["a", "b", "a", "a"], "WARNING: 2 of 4 prompts repeat an earlier one")):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        line = measuring.repeated(tasks.make(LanguageRun(task=config)))
        assert line.startswith(said) and bool(line) == bool(said)


@pytest.mark.parametrize(
    ("threshold", "out", "words"),
    [
        ("nan", "new", "--threshold=nan must be a finite number, as 0.8"),
        ("inf", "new", "--threshold=inf must be a finite number, as 0.8"),
        ("0.5", "run", "is a run's, whose figures would be replaced: choose another, as"),
        ("0.5", "file", "/file is a file; choose a folder"),
        ("0.5", "file/below", "/file is a file; choose a folder"),
    ],
)
def test_nothing_is_measured_that_could_not_be_written(command, threshold, out, words, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    given = [
        "--weights=nowhere",
        "--prompts=y",
        "--reward=r.py:f",
        f"--threshold={threshold}",
        f"--out={tmp_path}/{out}",
    ]
    done = command("mara_jax.evaluate", "run", *given)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
