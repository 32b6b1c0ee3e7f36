"""The length of a run's prompts, from the tokenizer alone."""

import dataclasses
from pathlib import Path
from typing import Any

from mara_jax import config
from mara_jax.hf import tokenizer as tokenizers
from mara_jax.hf.load import EMBEDDED, embedded_file
from mara_jax.tasks import onetwo
from mara_jax.train import shape


def longest(run: config.LanguageRun) -> int:
    """Tokens of the task's longest prompt; without the tokenizer its bytes, since no token holds less than one.

    Raises:
      ValueError, FileNotFoundError: the tokenizer that the weights should have is missing or broken.
    """
    task = onetwo.OneTwo(**dataclasses.asdict(run.task))
    tokenizer = _tokenizer(run, task)
    if tokenizer is None:
        return max(len(text.encode()) for text in task.prompts)
    return max(len(ids) for ids in tokenizers.encode_prompts(tokenizer, task.prompts, run.policy.chat))


def _tokenizer(run: config.LanguageRun, task: onetwo.OneTwo) -> Any:
    where = run.policy.weights
    if where == shape.NANO:
        pairs = task.demonstrations(run.seed, 0, 2000)
        return tokenizers.nano([text for pair in pairs for text in pair], shape.NANO_VOCABULARY)
    file = embedded_file(where) if where in EMBEDDED else Path(where)
    if file.suffix == ".gguf":
        from mara_jax.hf.gguf import GGUF

        return tokenizers.from_gguf(file, GGUF(file).reader)
    return tokenizers.from_directory(file) if file.is_dir() else None
