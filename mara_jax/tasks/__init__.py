"""Tasks: prompts, rewards and answers. A task is one module with `Config`, its section of a run, and `make`."""

import importlib

from mara_jax.config import LanguageRun
from mara_jax.tasks.base import Score, Task, TaskError
from mara_jax.tasks.checked import checked, described

__all__ = ["Score", "Task", "TaskError", "make"]


def make(run: LanguageRun) -> Task:
    """The task of a run, as the module that `run.task` names makes it, with its values checked.

    Raises:
      ValueError, OSError: one line; settings or files that the task cannot use.
    """
    module = importlib.import_module(run.task.module)
    if not callable(getattr(module, "make", None)):
        raise ValueError(f"task.module={run.task.module!r} has no function make(config) that returns the task")
    try:
        task = module.make(run.task)
    except (TaskError, OSError):
        raise
    except Exception as error:  # a task is somebody's Python: it can fail in any way
        raise ValueError(f"task.module={run.task.module!r}: make fails: {described(error)}") from error
    if not isinstance(task, Task):
        raise ValueError(
            f"task.module={run.task.module!r}: make returned {task!r:.80}, which is no mara_jax.tasks.Task"
        )
    return checked(task)
