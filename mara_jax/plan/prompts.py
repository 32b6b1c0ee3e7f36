"""The length of a run's prompts, from the tokenizer alone."""

from pathlib import Path
from typing import Any

from mara_jax import config, tasks
from mara_jax.hf import tokenizer as tokenizers
from mara_jax.hf.load import EMBEDDED, embedded_file
from mara_jax.tasks.base import text_of
from mara_jax.train import reference, shape
from mara_jax.train.prompts import encode

MOST_READ = 1000  # prompts, the first ones


def longest(run: config.LanguageRun) -> int:
    """Tokens of the longest of the task's first prompts; without the tokenizer its bytes: no token holds less than one.

    Raises:
      ValueError, FileNotFoundError: the tokenizer that the weights should have is missing or broken.
    """
    task = tasks.make(run)
    prompts = [task.prompt(number) for number in range(min(len(task), MOST_READ))]
    tokenizer = _tokenizer(run, task)
    if tokenizer is None:
        return max(len(text_of(prompt).encode()) for prompt in prompts)
    return max(len(ids) for ids in encode(run.policy, tokenizer, prompts))


def _tokenizer(run: config.LanguageRun, task: tasks.Task) -> Any:
    where = run.policy.weights
    if where == shape.NANO:
        return reference.nano_tokenizer(run, task)
    file = embedded_file(where) if where in EMBEDDED else Path(where)
    if file.suffix == ".gguf":
        from mara_jax.hf.gguf import GGUF

        return tokenizers.from_gguf(file, GGUF(file).reader)
    return tokenizers.from_directory(file) if file.is_dir() else None
