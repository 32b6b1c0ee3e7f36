"""Classes of open answers: known ones by hand, in an order that is defined, kept over steps and after a resume."""

import dataclasses
import json
import types

import numpy as np
import pytest
import test_loop
from test_loop import rows_of, trained

from mara_jax import config
from mara_jax.config import Algorithm, LanguageRun, Policy, Population, Reference
from mara_jax.measures import equivalence
from mara_jax.parallel import hosts
from mara_jax.tasks import digits, onetwo
from mara_jax.tasks.base import Score
from mara_jax.train import answer_classes, checkpoint, group_metrics, preflight, scoring, warnings
from mara_jax.train.answer_classes import AnswerClasses, classed
from mara_jax.train.reference_samples import PromptSamples
from mara_jax.train.scoring import GroupScores

setup = test_loop.setup  # the fixture
HILL, MILL, SEA = "the red house on the hill", "the red house by the mill", "a small boat at sea"
# Alike where they share two letters: the first and the last of a chain do not.
CHAIN = equivalence.Equivalence("two letters", lambda prompt, one, other: len(set(one) & set(other)) >= 2)


def open_run(**task) -> LanguageRun:
    fields = {"equivalence": "rouge1"} | task
    return LanguageRun(
        task=digits.Config(**fields), algorithm=Algorithm(threshold=0.5), policy=Policy(weights="somewhere")
    )


def classes_of(run: LanguageRun | None = None, path=None) -> AnswerClasses:
    run = run or open_run()
    return AnswerClasses(run, digits.make(run.task), path)


def scores_of(answers, reward=1.0) -> GroupScores:
    return GroupScores(np.broadcast_to(np.float32(reward), np.shape(answers)), answers, {})


def named(classes, ids, answers, step=1, reward=1.0):
    return classes.of_groups(np.array(ids), scores_of(answers, reward), step).answer


def test_hand_made_texts_have_the_classes_that_their_words_say():
    """ROUGE-1: six words each, four shared (the the red house), 8/12 = .667; nothing shared with the sea."""
    rule = equivalence.by_rouge()
    texts = [HILL, SEA, MILL, None, HILL, f" {SEA}."]
    one = classed(rule, "", [], texts, [True] * 6, 9)
    assert one == ([HILL, SEA, HILL, None, HILL, SEA], [HILL, SEA], 0)
    strict = equivalence.by_rouge(0.7)
    assert classed(strict, "", [], texts, [True] * 6, 9).begun == [HILL, SEA, MILL]
    assert classed(equivalence.exact(), "", [], ["a", " a\n", "A"], [True] * 3, 9).names == ["a", "a", "A"]


def test_a_text_without_words_is_equivalent_to_itself():
    """ROUGE-1 finds no word in it, and calls it unlike everything."""
    assert classed(equivalence.by_rouge(), "", ["!"], ["!", "?", "?"], [True] * 3, 9) == (["!", "?", "?"], ["?"], 0)


def test_only_good_answers_begin_classes_and_all_join_them():
    names, begun, beyond = classed(
        CHAIN, "", ["ab"], ["cd", "bc", "xab", "cd", "d"], [False, True, False, True, False], 9
    )
    assert names == [None, "bc", "ab", "cd", None] and begun == ["bc", "cd"] and beyond == 0


def test_a_prompt_with_all_its_classes_begins_no_more():
    one = classed(CHAIN, "", ["ab"], ["cd", "ef", "gh", "xab", "cde"], [True, True, False, True, True], 2)
    assert one == (["cd", None, None, "ab", "cd"], ["cd"], 1)


def test_an_answer_joins_the_first_class_in_the_order_in_which_they_began():
    """Not transitive: ab ~ abcd ~ cd. What stands first decides."""
    assert classed(CHAIN, "", [], ["ab", "abcd", "cd"], [True] * 3, 9).names == ["ab", "ab", "cd"]
    assert classed(CHAIN, "", [], ["abcd", "ab", "cd"], [True] * 3, 9).names == ["abcd"] * 3
    assert classed(CHAIN, "", ["cd", "ab"], ["abcd"], [True], 9).names == ["cd"]


def test_a_class_has_its_name_over_steps_and_prompts_have_classes_of_their_own():
    classes = classes_of()
    assert named(classes, [3, 5], [[HILL, SEA], [MILL, MILL]]) == [[HILL, SEA], [MILL, MILL]]
    assert named(classes, [5, 3], [[HILL], [MILL]], 2) == [[MILL], [HILL]]
    # A prompt that a step has twice: its second group knows the first one's classes.
    assert named(classes, [7, 7], [[SEA, HILL], [MILL, SEA]], 3) == [[SEA, HILL], [HILL, SEA]]


def test_samples_of_the_reference_begin_the_first_classes():
    classes = classes_of()
    samples = PromptSamples(np.array([1.0, 0, 1, 1], np.float32), [SEA, MILL, HILL, MILL], np.zeros(4), [""] * 4)
    (kept,) = classes.of_samples([0], [samples])
    assert kept.answer == [SEA, None, HILL, HILL]  # the bad one came before there was a class to join
    assert named(classes, [0], [[MILL, SEA]]) == [[HILL, SEA]]
    # Two of three good samples are in one class.
    assert answer_classes.alone_in_reference([kept], 0.5) == pytest.approx(1 / 3)
    assert answer_classes.alone_in_reference([], 0.5) == 0


def test_what_is_logged_by_hand():
    classes = classes_of(open_run(most_classes=3))
    named(classes, [0], [[HILL]])
    answers = [[MILL, SEA, "x y"], ["one", "two", "three"]]
    reward = [[1, 1, 1], [1, 1, 0]]
    scores = classes.of_groups(np.array([0, 1]), GroupScores(np.array(reward, np.float32), answers, {}), 2)
    # Five good ones; four are alone in a class of this step: MILL has joined the first step's. "three" began none.
    assert scores.classes == {"answers/alone": 4 / 5, "answers/classes": 2.5, "answers/beyond_limit": 0}
    assert scores.answer == [[HILL, SEA, "x y"], ["one", "two", None]]
    again = classes.of_groups(np.array([0]), scores_of([["one more", "one more", SEA]]), 3)
    assert again.classes == {"answers/alone": 0, "answers/classes": 3, "answers/beyond_limit": 2 / 3}
    tokens, lengths = np.zeros((1, 3, 1), int), np.ones((1, 3), int)
    row = group_metrics.of_step(again, tokens, lengths, lengths == 1)
    assert row["answers/beyond_limit"] == 2 / 3 and row["answers/distinct"] == 1


def test_evaluations_have_classes_of_their_own():
    classes = classes_of()
    named(classes, [0], [[HILL]])
    apart = classes.apart(["", ""], [[MILL, HILL], [SEA, HILL]], [np.ones(2), np.ones(2)])
    assert apart == [[MILL, MILL], [SEA, HILL]] and classes.representatives == {0: [HILL]}


STEPS = [[HILL, SEA], ["two words", MILL], ["a b c d", SEA], ["a b c e", "two words more"]]


def test_resumed_classes_are_those_of_before_and_what_came_after_the_checkpoint_is_forgotten(tmp_path):
    path = tmp_path / answer_classes.FILE
    whole = classes_of(path=path)
    samples = PromptSamples(np.ones(1, np.float32), [HILL], np.zeros(1), [""])
    (kept,) = whole.of_samples([0], [samples])
    expected = [named(whole, [0], [group], step) for step, group in enumerate(STEPS, 1)]
    assert expected[3] == [["a b c d", "two words"]]
    content = path.read_text()
    # A kill behind step 4, whose last row is cut short; the checkpoint is step 2's.
    path.write_text(content[:-9])
    resumed = classes_of(path=path)
    resumed.restore(2, {0: kept})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["text"]) for row in rows] == [(0, HILL), (1, SEA), (2, "two words")]
    assert [named(resumed, [0], [group], step) for step, group in enumerate(STEPS[2:], 3)] == expected[2:]
    assert path.read_text() == content
    # What the rows hold is what decides: without step 2's class the last answer begins one.
    forgot = classes_of(path=path)
    forgot.restore(1, {0: kept})
    assert named(forgot, [0], [STEPS[3]], 4) != expected[3]


def test_lost_or_damaged_classes_are_named(tmp_path):
    path = tmp_path / answer_classes.FILE
    classes = classes_of(path=path)
    classes.restore(0, {})
    assert path.read_text() == ""
    named(classes, [0], [[HILL]])
    path.unlink()
    with pytest.raises(ValueError, match=r"answer_classes\.jsonl lacks classes of answers.*put the file back"):
        classes_of(path=path).restore(2, {})
    samples = PromptSamples(np.ones(1, np.float32), [HILL], np.zeros(1), [""])
    with pytest.raises(ValueError, match="put the file back"):
        classes_of(path=path).restore(0, {0: samples})
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"line 1 is no class of answers"):
        classes_of(path=path)


# ---- order ----------------------------------------------------------------------------------------------------------

TEXTS = [["ab", "abcd", "cd", "bx"], ["cd", "abcd", "ab", "xd"]]


class Spoken:
    """A task whose answers are the texts."""

    name, reads_ref_logp, leaves_out_truncated, learned_reward = "spoken", False, False, None


def scored_by(monkeypatch, parts: list[list[int]]) -> GroupScores:
    """Scores of TEXTS, whose eight rows lie with processes as `parts` says, which answer in that order."""

    class Scorer:
        def score_in_run(self, prompt_index, texts, finished, context):
            return Score(np.ones(len(texts)), list(texts))

    shape = np.shape(TEXTS)
    completions = types.SimpleNamespace(lengths=np.ones(shape), finished=np.ones(shape, bool), text=TEXTS)
    rows = [text for group in TEXTS for text in group]
    answers = [[part, [1.0] * len(part), [rows[i] for i in part], {}] for part in parts]
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "checked", lambda task: Scorer())
        patch.setattr(hosts, "gather_json", lambda own: answers)
        return scoring.score(Spoken(), np.array([0, 1]), completions)


def in_arrival(classes, scores, parts):
    """A planted error: answers are put into classes process by process, as they arrive."""
    names = np.empty(np.shape(TEXTS), object)
    for row in (row for part in parts for row in part):
        at = divmod(row, len(TEXTS[0]))
        names[at] = named(classes, [at[0]], [[scores.answer[at[0]][at[1]]]])[0][0]
    return names.tolist()


def test_classes_do_not_depend_on_which_process_has_which_rows(monkeypatch):
    shared = [
        [list(range(8))],
        [[4, 5, 6, 7], [0, 1, 2, 3]],
        [[1, 3, 5, 7], [0, 2, 4, 6]],
        [[7, 2], [6, 1, 0], [5, 4, 3]],
    ]
    right, planted = [], []
    for parts in shared:
        scores, classes, wrong = scored_by(monkeypatch, parts), classes_of(), classes_of()
        classes.rule = wrong.rule = CHAIN
        right.append(named(classes, [0, 1], scores.answer))
        planted.append(in_arrival(wrong, scores, parts))
    assert right == [[["ab", "ab", "cd", "bx"], ["cd", "cd", "ab", "xd"]]] * 4
    assert planted[0] == right[0] and planted[2] != right[2] and planted[3] != right[3]


def test_other_processes_are_told_the_names(monkeypatch):
    """They compare nothing: what process 0 says goes as JSON."""
    first = classes_of()
    told = []

    def on_zero(function):
        told.append(json.loads(json.dumps(function())))
        return told[-1]

    monkeypatch.setattr(hosts, "on_process_zero", on_zero)
    names = named(first, [0], [[HILL, MILL, None]])
    monkeypatch.setattr(hosts, "on_process_zero", lambda function: told[-1])
    other = classes_of()
    assert other.rule is None and named(other, [0], [[HILL, MILL, None]]) == names == [[HILL, HILL, None]]


# ---- runs -----------------------------------------------------------------------------------------------------------

WORDS = "one two three four five six seven eight nine ten eleven".split()


class Spelt(test_loop.Ended):
    """Answers of three words, of which two depend on place and step: some are alike, some are not."""

    def score_in_run(self, prompt_index, texts, finished, context) -> Score:
        score = self.score(prompt_index, texts, finished)
        place = 5 * np.arange(len(texts)) + 3 * context.step
        answer = [f"{WORDS[n % 11]} {WORDS[n % 4]} {WORDS[(n + context.step) % 7]}" for n in place]
        return Score(score.reward, [text if good else None for text, good in zip(answer, finished, strict=True)])


RUN = dataclasses.replace(
    test_loop.RUN,
    algorithm=Algorithm(method="mara", anchor="answer", beta=0.3, threshold=0.5),
    task=config.Task(equivalence="rouge1", similarity=0.5),
    reference=Reference(samples=4, drawn="on_first_use"),
)


@pytest.fixture(scope="module")
def whole(setup, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("classes") / "run"
    with pytest.MonkeyPatch.context() as patch:
        trained(patch, setup, workdir, Spelt(), RUN)
    return workdir


def test_answers_of_a_run_are_the_names_of_its_classes(whole):
    rows = rows_of(whole)
    classes = [json.loads(line) for line in (whole / answer_classes.FILE).read_text().splitlines()]
    known = {(row["prompt"], group_metrics.short(row["text"])) for row in classes}
    for row in rows:
        for number, counts in row["answers/by_prompt"]:
            assert {(number, name) for name in counts if name} <= known
    assert any(row["step"] == 0 for row in classes) and any(row["step"] > 1 for row in classes)
    # Some class is met at several steps, under the name that it began with.
    seen = [(number, name) for row in rows for number, counts in row["answers/by_prompt"] for name in counts if name]
    assert len(seen) > len(set(seen))
    assert any(row["mara/augmented_fraction"] > 0 for row in rows)
    assert any(0 < row["answers/alone"] < 1 for row in rows) and rows[-1]["answers/classes"] > 1


@pytest.mark.parametrize("planted", [False, True])
def test_stopped_at_a_checkpoint_and_resumed_is_the_same(monkeypatch, setup, whole, tmp_path, planted):
    """A planted error, classes that do not come back, gives answers other names."""
    task = Spelt()
    task.fails = 6  # two steps with samples of the reference, one step, and the fourth's verdict
    with pytest.raises(KeyboardInterrupt):
        trained(monkeypatch, setup, tmp_path, task, RUN)
    assert checkpoint.saved_steps(tmp_path) == [2]
    if planted:
        monkeypatch.setattr(AnswerClasses, "restore", lambda self, *_: self._put([]))
    trained(monkeypatch, setup, tmp_path, Spelt(), RUN)
    same = rows_of(tmp_path) == rows_of(whole)
    for name in (answer_classes.FILE, "reference_samples.jsonl"):
        same &= (tmp_path / name).read_text() == (whole / name).read_text()
    assert same is not planted


# ---- refusals and warnings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (open_run(equivalence="embedding"), "task.equivalence='embedding' needs task.similarity"),
        (
            open_run(equivalence="exact", similarity=0.5),
            "task.similarity=0.5 has no effect with task.equivalence='exact'",
        ),
        (open_run(equivalence="", most_classes=3), "use one of exact, rouge1, embedding, or leave it at 512"),
        (open_run(equivalence="rouge1", embedder="x"), "task.embedder='x' has no effect"),
        (
            open_run(equivalence="bleu"),
            "task.equivalence='bleu' is unknown: choose one of '', exact, rouge1, embedding",
        ),
        (dataclasses.replace(open_run(), population=Population(seeds=2)), "task.equivalence=rouge1 is for single runs"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(run, words):
    with pytest.raises(ValueError) as caught:
        config.check(run)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_declared_answers_have_no_classes():
    run = LanguageRun(task=onetwo.Config(equivalence="exact"))
    with pytest.raises(ValueError, match=r"declares the answers of prompt 0 \(1, 2\)"):
        preflight.check_task(run, onetwo.make(run.task))
    preflight.check_task(open_run(), digits.make(open_run().task))


def test_an_embedder_that_is_not_there_is_named(tmp_path):
    run = open_run(equivalence="embedding", similarity=0.8, embedder=str(tmp_path))
    for asked in (answer_classes.check, classes_of):
        with pytest.raises((FileNotFoundError, ValueError), match=r"model\.onnx|onnxruntime"):
            asked(run)


def test_most_good_completions_alone_and_too_many_classes_are_told_once():
    watch, lines = warnings.Warnings(dataclasses.replace(open_run(), steps=9), digits.make(open_run().task)), []
    for number in range(1, 6):
        row = {"step": number, "completions/truncated": 0, "completions/commonest": 0.1}
        row |= {"answers/alone": 0.75, "answers/beyond_limit": 0.2}
        lines += watch.of_step(row, np.array([0]), np.array([[0.0, 1.0]]))
    assert len(lines) == 2
    assert "75% of the good completions are alone in their class (task.equivalence=rouge1)" in lines[0]
    assert "20% of the good completions have no class, as their prompts have task.most_classes=512" in lines[1]
    samples = PromptSamples(np.ones(3, np.float32), ["a", "b", "b"], np.zeros(3), [""] * 3)
    assert warnings.of_lone_answers(open_run(), [samples]) is None
    line = warnings.of_lone_answers(open_run(), [samples._replace(answer=["a", "b", "c"])])
    assert line and line.startswith("WARNING: 100% of the good samples of the reference policy are alone")
