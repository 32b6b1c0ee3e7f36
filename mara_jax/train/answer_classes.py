"""Classes of open answers that keep their identity over the steps of a run: an equivalence and representatives.

Each prompt has a list of representatives, texts of answers in the order in which their classes began. An answer joins
the first class whose representative it is equivalent to and bears its name, which is the representative's text.
"""

import collections
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mara_jax.config import LanguageRun
from mara_jax.measures import embeddings, equivalence
from mara_jax.measures.equivalence import Equivalence
from mara_jax.parallel import hosts
from mara_jax.tasks.base import Task, text_of
from mara_jax.train import workdir as workdirs
from mara_jax.train.reference_samples import PromptSamples
from mara_jax.train.scoring import Answers, GroupScores

FILE = "answer_classes.jsonl"  # in WORKDIR: a row a class, in the order in which they began
OF_REFERENCE = 0  # in the place of a step: a class that a sample of the reference policy has begun
Names = list[str | None]


class Classed(NamedTuple):
    """Answers of one prompt by class: name of each, None without one; begun: representatives of new classes, in order;
    beyond: how many good answers have no class because the prompt has as many as it may have."""

    names: Names
    begun: list[str]
    beyond: int


def classed(
    rule: Equivalence, prompt: str, known: Sequence[str], answers: Sequence[str | None], good: Sequence[bool], most: int
) -> Classed:
    """Puts answers into classes, one after another in their order.

    An answer is compared with the representatives, in the order in which their classes began, and joins the first that
    is equivalent; one that is equal to a representative belongs to it whatever the rule says. Where there is none, a
    good answer begins a class and represents it; one that is not good has no class.

    Args:
      rule: says which answers are equivalent; it need not be transitive, so that the order matters.
      prompt: its text.
      known: representatives so far, which are not changed.
      answers: of completions, None for none.
      good: whether a completion may begin a class.
      most: classes that the prompt may have.
    """
    representatives, names, beyond = dict.fromkeys(known), [], 0
    for answer, may_begin in zip(answers, good, strict=True):
        name = answer
        if answer is not None and answer not in representatives:
            name = next((one for one in representatives if rule.same(prompt, one, answer)), None)
            if name is None and may_begin:
                if len(representatives) < most:
                    representatives[name := answer] = None
                else:
                    beyond += 1
        names.append(name)
    return Classed(names, list(representatives)[len(known) :], beyond)


def rule_of(run: LanguageRun) -> Equivalence | None:
    """The equivalence that a run names; None for none.

    Raises:
      ValueError, FileNotFoundError: an embedder that is not there.
    """
    task = run.task
    if not task.equivalence:
        return None
    if task.equivalence == "exact":
        return equivalence.exact()
    if task.equivalence == "rouge1":
        return equivalence.by_rouge(task.similarity or equivalence.ROUGE_THRESHOLD)
    embedder = embeddings.load(task.embedder or None)
    return equivalence.by_embedding(embedder.embed, task.similarity, embedder.name)


def check(run: LanguageRun) -> None:
    """Refuses an embedder that is not there, before anything is loaded; errors as of `rule_of`."""
    rule_of(run)


class AnswerClasses:
    """The classes of a run's prompts, in WORKDIR/answer_classes.jsonl.

    Process 0 compares, and tells the others the names: each answer has the same class on all of them. Whole groups are
    looked at, in the order of prompts and samples, so that nothing depends on how devices or micro-batches shared them.
    """

    def __init__(self, run: LanguageRun, task: Task, path: pathlib.Path | None) -> None:
        """Reads what an earlier start of the run has kept; path: the file, or None to keep the classes in memory alone.

        Raises:
          ValueError, OSError: one line; an embedder that is not there, or a line that is no class.
        """
        self.task, self.path, self.most = task, path, run.task.most_classes
        self.threshold = np.float32(run.algorithm.threshold)  # from which an answer may begin a class: a constant
        self.rule: Equivalence | None = None
        self.rows: list[dict[str, Any]] = []
        self.representatives: dict[int, list[str]] = {}  # on process 0 alone, as the rule and the rows
        hosts.on_process_zero(lambda: self._begin(run))

    def _begin(self, run: LanguageRun) -> None:
        self.rule = rule_of(run)
        self._put([] if self.path is None else _read(self.path))
        if self.path is not None and self.path.exists():
            self._write()  # without what a kill has cut short

    def _put(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows, self.representatives = list(rows), {}
        for row in self.rows:
            self.representatives.setdefault(row["prompt"], []).append(row["text"])

    def restore(self, steps_done: int, samples: Mapping[int, PromptSamples]) -> None:
        """Forgets classes that began behind the restored step, which the run makes again.

        Args:
          steps_done: of the restored state.
          samples: of the reference policy, by prompt, as kept: each of their classes must be there.

        Raises:
          ValueError: the file has gone, or lacks classes that answers of the run are in.
        """

        def cut() -> None:
            path = self.path
            if path is None:
                return
            kept = [row for row in self.rows if row["step"] <= steps_done]
            known = {number: set(group) for number, group in self.representatives.items()}
            lost = {name for number, one in samples.items() for name in set(one.answer) - known.get(number, set())}
            if (steps_done and not path.exists()) or lost - {None}:
                raise ValueError(
                    f"{path} lacks classes of answers that this run is in the middle of: put the file back, or choose "
                    "another --workdir"
                )
            self._put(kept)
            self._write()

        hosts.on_process_zero(cut)

    def _write(self) -> None:
        assert self.path is not None
        workdirs.replace(self.path, "".join(map(_line, self.rows)))

    def of_samples(self, ids: Sequence[int] | np.ndarray, samples_p: Sequence[PromptSamples]) -> list[PromptSamples]:
        """Samples of the reference policy under each of these prompts, with the names of their classes as answers."""
        answers, rewards = [one.answer for one in samples_p], [one.reward for one in samples_p]
        names, _ = self._named(ids, answers, rewards, OF_REFERENCE)
        return [one._replace(answer=own) for one, own in zip(samples_p, names, strict=True)]

    def of_groups(self, ids: np.ndarray, scores: GroupScores, step: int) -> GroupScores:
        """The scores of a step's groups, with the names of their classes as answers, and what is logged of these.

        `answers/alone`: share of the good completions that are alone in a class which this step has begun, so that no
        sample of the reference policy and no completion so far is in it; `answers/classes`: classes of a prompt so far,
        a mean; `answers/beyond_limit`: share of the good completions that have no class because their prompt has
        as many as it may have.
        """
        names, logged = self._named(ids, scores.answer, list(scores.reward), step)
        return scores._replace(answer=names, classes=logged)

    def apart(self, prompts: Sequence[str], answers: Answers, rewards: Sequence[np.ndarray]) -> list[Names]:
        """Names of the answers of other prompts, each with classes of its own that are not kept; as for evaluations."""

        def named() -> list[Names]:
            assert self.rule is not None
            groups, most = zip(prompts, answers, rewards, strict=True), self.most
            return [classed(self.rule, text, [], own, self._good(reward), most).names for text, own, reward in groups]

        return hosts.on_process_zero(named)

    def _good(self, reward: np.ndarray) -> list[bool]:
        return (np.asarray(reward, np.float32) >= self.threshold).tolist()

    def _named(
        self, ids: Sequence[int] | np.ndarray, answers: Answers, rewards: Sequence[np.ndarray], step: int
    ) -> tuple[list[Names], dict[str, float]]:
        """Names of answers, group by group, and what is logged; the same on every process."""

        def on_zero() -> list[Any]:
            assert self.rule is not None
            names, begun, beyond, good = [], collections.Counter(), 0, 0
            for number, own, reward in zip(map(int, ids), answers, rewards, strict=True):
                may_begin, known = self._good(reward), self.representatives.setdefault(number, [])
                one = classed(self.rule, text_of(self.task.prompt(number)), known, own, may_begin, self.most)
                known += one.begun
                self._keep([{"prompt": number, "step": step, "text": text} for text in one.begun])
                begun.update({(number, text): 0 for text in one.begun})
                begun.update((number, name) for name in one.names if (number, name) in begun)
                names.append(one.names)
                beyond, good = beyond + one.beyond, good + sum(may_begin)
            alone = sum(count == 1 for count in begun.values())
            count = np.mean([len(self.representatives[int(number)]) for number in ids])
            return [names, alone / max(good, 1), float(count), beyond / max(good, 1)]

        names, *shares = hosts.on_process_zero(on_zero)
        return names, dict(zip(("answers/alone", "answers/classes", "answers/beyond_limit"), shares, strict=True))

    def _keep(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        if self.path is not None and rows:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, rows)))


def opened(run: LanguageRun, task: Task, path: pathlib.Path | None) -> AnswerClasses | None:
    """The classes of a run's answers; None where it names no equivalence. Arguments and errors as of AnswerClasses."""
    return AnswerClasses(run, task, path) if run.task.equivalence else None


def alone_in_reference(samples: Iterable[PromptSamples], threshold: float) -> float:
    """Share of the good samples of the reference policy that are alone in their class under their prompt; 0 of none."""
    counts = [
        collections.Counter(name for name, reward in zip(one.answer, one.reward, strict=True) if reward >= threshold)
        for one in samples
    ]
    for one in counts:
        del one[None]
    total = sum(one.total() for one in counts)
    return sum(count == 1 for one in counts for count in one.values()) / max(total, 1)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a file, without a last line that a kill cut short.

    Raises:
      ValueError: a whole line that is no class.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            rows.append({"prompt": int(row["prompt"]), "step": int(row["step"]), "text": str(row["text"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no class of answers: put the file back, or choose another --workdir"
            ) from error
    return rows
