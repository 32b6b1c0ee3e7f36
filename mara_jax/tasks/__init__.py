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
    module = importlib.import_module(run.task.module)
    if not callable(getattr(module, "make", None)):
        raise ValueError(f"task.module={run.task.module!r} has no function make(config) that returns the task")
    try:
        task = module.make(run.task)
    except TypeError as error:  # of a class that lacks one of a task's methods, most likely
        raise ValueError(f"task.module={run.task.module!r}: make fails: {error}") from error
    if not isinstance(task, Task):
        raise ValueError(
            f"task.module={run.task.module!r}: make returned {task!r:.80}, which is no mara_jax.tasks.Task"
        )
    return task
