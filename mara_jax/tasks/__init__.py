"""Tasks: prompts, rewards and answers. A task is one module with `Config`, its section of a run, and `make`."""

import importlib

from mara_jax.config import LanguageRun
from mara_jax.tasks.base import Score, Task

__all__ = ["Score", "Task", "make"]


def make(run: LanguageRun) -> Task:
    """The task of a run, as the module that `run.task` names makes it.

    Raises:
      ValueError, OSError: one line; settings or files that the task cannot use.
    """
    return importlib.import_module(run.task.module).make(run.task)
