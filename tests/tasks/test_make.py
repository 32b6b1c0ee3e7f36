"""From a config to its task: what a module may lack, each in one line."""

import sys
import types
from dataclasses import dataclass, field

import pytest

from mara_jax import config, tasks
from mara_jax.config import LanguageRun, setting
from mara_jax.tasks import digits


@dataclass(frozen=True)
class Config(config.Task):
    """A section in the module of this test."""

    module: str = config.task_module(__name__)
    words: tuple[str, ...] = setting(("a", "b"), "some words")


@dataclass(frozen=True)
class Plain(config.Task):
    wrong: float = 0.2


@dataclass(frozen=True)
class Bare(config.Task):
    words: tuple = setting(("a",), "some words")


@dataclass(frozen=True)
class Nothing(config.Task):
    path: str | None = setting(None, "a path")


@dataclass(frozen=True)
class Listed(config.Task):
    words: list = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Needed(config.Task):
    size: int


def module(monkeypatch, **names) -> str:
    """A module with these names in it."""
    made = types.ModuleType("a_task")
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, "a_task", made)
    return "a_task"


def test_a_section_comes_back_from_plain_values(monkeypatch):
    name = module(monkeypatch, Config=Config)
    run = config.build({"task": {"module": name, "words": ["x"]}})
    assert run.task == Config(module=name, words=("x",))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (Plain, "task.wrong says neither its meaning nor what it may be: write the field as wrong = config.setting("),
        (Bare, "task.words is typed as a bare tuple: say of what"),
        (Nothing, "the default of path is None: a field is a bool, int, float or str"),
        (Listed, "the default of words is []"),
        (Needed, "missing 1 required keyword-only argument: 'size': give every field a default"),
        (dict, "has no class Config(mara_jax.config.Task)"),
    ],
)
def test_a_section_that_cannot_be_is_one_line(monkeypatch, section, words):
    name = module(monkeypatch, Config=section)
    with pytest.raises(ValueError) as caught:
        config.build({"task": {"module": name, "words": ("b",)} if section is Bare else {"module": name}})
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["1 / 0", "raise RuntimeError('no')", "def (", "import nothing_of_this_name"])
def test_a_module_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, source):
    (tmp_path / "broken_task.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=r"^task.module='broken_task' cannot be imported \(\w+: .*name the module"
    ) as caught:
        config.build({"task": {"module": "broken_task"}})
    assert "\n" not in str(caught.value)


class Unfinished(tasks.Task):
    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({}, "has no function make(config)"),
        ({"make": lambda cfg: None}, "make returned None, which is no mara_jax.tasks.Task"),
        ({"make": lambda cfg: Unfinished()}, "make fails: TypeError: Can't instantiate abstract class Unfinished"),  # pyright: ignore
    ],
)
def test_what_makes_no_task_is_one_line(monkeypatch, names, words):
    name = module(monkeypatch, Config=Config, **names)
    with pytest.raises(ValueError) as caught:
        tasks.make(LanguageRun(task=Config(module=name)))
    assert words in str(caught.value)


def test_a_shipped_task_is_made_from_its_section():
    assert len(tasks.make(LanguageRun(task=digits.Config(prompts=7)))) == 7
