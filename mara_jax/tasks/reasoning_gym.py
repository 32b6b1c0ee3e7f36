"""Every dataset of the package `reasoning-gym`: prompts that it makes procedurally, scored by its own `score_answer`.

Prompts are made and completions scored in processes of their own, with a limit of time and memory: some scorers take
long, and some prompts depend on the order of sets, which is one there (see `tasks.worker`).
"""

import ast
import contextlib
import dataclasses
import decimal
import difflib
import functools
import inspect
import io
import json
import random
import re
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mara_jax import config
from mara_jax.config import limits, setting
from mara_jax.tasks.base import Score, Task, TaskError
from mara_jax.tasks.calls import Calls

_OF_TASK = ("seed", "size")  # options of every dataset that are fields of the task
_MOST = 2**20  # prompts of a dataset, so that those of another seed are others
_INSTRUCTION = "Reason step by step, then write the answer alone between <answer> and </answer>."
_SIZE = limits.Limit(lambda v: 1 <= v <= _MOST, f"at least 1 and at most {_MOST}")
_SEED = limits.Limit(lambda v: 0 <= v < 2**11, "at least 0 and below 2048")
# Scorers of these modules give text to Python's or sympy's evaluation.
_EVALUATES = re.compile(r"\b(?:eval|exec|sympify)\(|\b(?:sympy|sp)\.parse_expr\(|import parse_expr\b")
_HARMLESS_CALLS = frozenset(
    "abs Abs acos asin atan acosh asinh atanh cos cosh cot erf exp factorial Integer ln log Rational sec csc sin sinh "
    "sqrt tan tanh".split()
)
_HARMLESS = (
    ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.Name, ast.Load, ast.BinOp, ast.UnaryOp,
    ast.operator, ast.unaryop, ast.Call,
)  # fmt: skip


@dataclass(frozen=True)
class Config(config.Task):
    """Datasets of reasoning-gym: procedural prompts with a scorer each."""

    module: str = config.task_module(__name__)
    datasets: str = setting("", "names of datasets, separated by commas; prompts take turns among them")
    size: int = setting(1000, "prompts of each dataset", _SIZE)
    seed: int = setting(0, "which prompts: no two seeds share any", _SEED)
    options: str = setting("", "of the datasets, as in min_terms=2,max_terms=3; DATASET.NAME=VALUE is for one of them")
    instruction: str = setting(_INSTRUCTION, "is added to each prompt, after an empty line")
    answer_tag: str = setting("answer", "the tag whose last pair holds the answer; empty: all of a completion is it")
    time_limit: float = setting(30.0, "seconds in which a call for a step's completions must end", limits.POSITIVE)
    memory_limit: float = setting(8.0, "GiB of memory that a process of `workers` may allocate", limits.POSITIVE)
    workers: int = setting(1, "processes that score completions, each with whole groups of them", limits.COUNT)


class Source(NamedTuple):
    """A dataset as `create_dataset` makes it; options: its further arguments, a dict as Python writes it."""

    name: str
    options: str
    seed: int
    size: int


class ReasoningGym(Task):
    """The reward is the score that the dataset gives the answer, 1 at best; no answer, no reward."""

    name = "reasoning_gym"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.sources = _sources(cfg)
        self.calls = Calls(
            [_named(one) for one in (question, solution, score)], cfg.workers, cfg.time_limit, cfg.memory_limit
        )
        weakref.finalize(self, self.calls.close)
        self._text = functools.lru_cache(1 << 14)(functools.partial(self._said, question))
        for number in range(len(self.sources)):
            self._text(number)

    def __len__(self) -> int:
        return len(self.sources) * self.cfg.size

    def prompt(self, index: int) -> str:
        """The dataset's question and the instruction."""
        return "\n\n".join(filter(None, (self._text(index).strip(), self.cfg.instruction)))

    def code_files(self) -> list[str]:
        """This file."""
        return [*self.calls.files]

    def demonstrations(self, seed: int, step: int, batch: int) -> list[tuple[str, str]]:
        """The datasets' own answers to prompts drawn at random, in the tag; none where they know none."""
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step])))
        pairs: list[tuple[str, str]] = []
        for _ in range(4 * batch):
            index = int(draws.integers(len(self)))
            text = self._said(solution, index) if len(pairs) < batch else None
            if text is not None:
                tag = self.cfg.answer_tag
                pairs.append((self.prompt(index), f"<{tag}>{text}</{tag}>" if tag else text))
        return pairs if len(pairs) == batch else []

    def score(self, prompt_index: Sequence[int], texts: Sequence[str], finished: Sequence[bool]) -> Score:
        """The datasets' scores, and answers in one spelling where a completion has any."""
        cut = [self._cut(text) for text in texts]
        values = self._values(prompt_index) | {"completions": cut}
        outcomes = self.calls.of("reward", _named(score), values, prompt_index)
        names = ("raised", "refused")
        columns = {name: [float(outcome.columns.get(name, 0.0)) for outcome in outcomes] for name in names}
        columns["failed"] = [float(outcome.error is not None) for outcome in outcomes]
        reward = [0.0 if outcome.error is not None else float(outcome.value) for outcome in outcomes]
        return Score(reward, [None if text is None else spelt(text) for text in cut], columns)

    def _cut(self, text: str) -> str | None:
        """The answer of a completion, None where it has none."""
        tag = re.escape(self.cfg.answer_tag)
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL) if tag else [text]
        return (found[-1].strip() or None) if found else None

    def _values(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        count = len(self.sources)
        return {
            "source": [self.sources[index % count] for index in indices],
            "number": [index // count for index in indices],
        }

    def _said(self, function: Any, index: int) -> Any:
        """What a function says of one prompt."""
        name = _named(function)
        outcome = self.calls.of("answer", name, self._values([index]), [index])[0]
        if outcome.error is not None:
            raise TaskError(outcome.error.removeprefix(f"{name}: "))
        return outcome.value


# ---- in the worker --------------------------------------------------------------------------------------------------


def question(source: Source, number: int) -> str:
    """The question of an entry."""
    return str(_entry(Source(*source), number)["question"])


def solution(source: Source, number: int) -> str | None:
    """The answer of an entry, None where the dataset names none."""
    answer = _entry(Source(*source), number)["answer"]
    return None if answer is None else str(answer)


def score(completions: Sequence[str | None], source: Sequence[Source], number: Sequence[int]) -> dict[str, list[float]]:
    """The datasets' scores of answers; 0 for none, for one at which a scorer raises and for one that would be run."""
    rewards, raised, refused = [], [], []
    for answer, one, entry in zip(completions, source, number, strict=True):
        one = Source(*one)
        bad = answer is not None and _evaluates(one) and not is_harmless(answer)
        value, failed = 0.0, False
        if answer is not None and not bad:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    value = float(_dataset(one).score_answer(answer, _entry(one, entry)))
            except MemoryError:
                raise
            except Exception:  # a scorer that is not made for such a text
                failed = True
        rewards.append(value)
        raised.append(float(failed))
        refused.append(float(bad))
    return {"reward": rewards, "raised": raised, "refused": refused}


def is_harmless(text: str) -> bool:
    """Whether Python and sympy run nothing if they evaluate a text: it calls nothing but functions of mathematics."""
    if "(" not in text:
        return True
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    texts = any(isinstance(node, ast.Constant) and isinstance(node.value, str | bytes) for node in nodes)
    return (
        all(isinstance(node, _HARMLESS) for node in nodes)
        and all(isinstance(call.func, ast.Name) and call.func.id in _HARMLESS_CALLS for call in calls)
        and not (texts and calls)  # sympy evaluates texts that its functions are given
    )


@functools.lru_cache(maxsize=4096)
def _entry(source: Source, number: int) -> dict[str, Any]:
    random.seed(source.seed + number)  # some datasets draw from Python's own generator, too
    with contextlib.redirect_stdout(io.StringIO()):  # and some print
        return _dataset(source)[number]


@functools.cache
def _evaluates(source: Source) -> bool:
    """Whether the module of a dataset evaluates text."""
    return bool(_EVALUATES.search(inspect.getsource(sys.modules[type(_dataset(source)).__module__])))


@functools.cache
def _dataset(source: Source) -> Any:
    """The dataset; TaskError, one line, where the package has none of this name or the options are not its own."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise TaskError(f'reasoning-gym is not installed ({error}): pip install "mara_jax[reasoning]"') from None
    name, options = source.name, ast.literal_eval(source.options)
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 3, 0.5)
        hint = f"near it are {', '.join(near)}" if near else f"it has {', '.join(sorted(DATASETS))}"
        raise TaskError(f"reasoning-gym has no dataset {name!r}, which task.datasets names; {hint}")
    if name == "composite":
        raise TaskError("task.datasets=composite: name its parts, as in task.datasets=chain_sum,lcm; they take turns")
    fields = {field.name: field for field in dataclasses.fields(DATASETS[name][1]) if field.name not in _OF_TASK}
    for option in options:
        if option in _OF_TASK:
            raise TaskError(f"task.options: {option!r} of {name} is task.{option}")
        if option not in fields:
            known = ", ".join(f"{key}={_default(field)}" for key, field in fields.items())
            raise TaskError(f"task.options: {name} has no option {option!r}; it has {known or 'none'}")
    try:
        return create_dataset(name, seed=source.seed, size=source.size, **options)
    except Exception as error:  # its own checks are assertions and others
        words = " ".join(str(error).split()) or type(error).__name__
        raise TaskError(f"task.options: {name} refuses {options}: {words}") from None


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return "..." if field.default_factory is dataclasses.MISSING else repr(field.default_factory())


# ---- texts ----------------------------------------------------------------------------------------------------------


def spelt(text: str) -> str:
    """An answer in one spelling: numbers without needless zeros, JSON without spaces, else single spaces."""
    with contextlib.suppress(decimal.InvalidOperation, ValueError):
        number = decimal.Decimal(text.strip())
        if number.is_finite() and abs(number.adjusted()) <= 30:
            return f"{number.normalize() + 0:f}"
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, list | dict):
            return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return " ".join(text.split())


def _sources(cfg: Config) -> list[Source]:
    """The datasets of a config, each with its own options."""
    names = [name.strip() for name in cfg.datasets.split(",") if name.strip()]
    if not names:
        raise TaskError("task.datasets is empty: set --config.task.datasets=chain_sum, or several, separated by commas")
    if len(set(names)) < len(names):
        raise TaskError(f"task.datasets={cfg.datasets!r} names a dataset twice: name each once")
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for part in re.split(r",\s*(?=[A-Za-z_][\w.]*\s*=)", cfg.options.strip()) if cfg.options.strip() else ():
        key, equals, text = (piece.strip() for piece in part.partition("="))
        owner, _, option = key.rpartition(".")
        if not equals or not option.isidentifier() or (owner and owner not in options):
            raise TaskError(f"task.options: {part!r} is not of the form NAME=VALUE or DATASET.NAME=VALUE: min_terms=2")
        value: Any = text
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text)
        for name in [owner] if owner else names:
            options[name][option] = value
    return [Source(name, repr(options[name]), cfg.seed * _MOST, cfg.size) for name in names]


def _named(function: Any) -> str:
    return f"{__name__}:{function.__name__}"


def make(cfg: Config) -> ReasoningGym:
    """The task with these settings."""
    return ReasoningGym(cfg)
