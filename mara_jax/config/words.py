"""The words that fields of a config may be, where they are the names in a table of `core`."""

import importlib
from collections.abc import Callable

Words = tuple[str, ...]


def names(table: str, *others: str) -> Callable[[], Words]:
    """A function that returns words beside a table and the names in it.

    The table is read when the function is called, as a value is checked or listed: `core` brings jax, and importing a
    schema stays cheap.

    Args:
      table: "MODULE.TABLE" below mara_jax.core, as in "methods.METHODS".
      others: words that the field knows besides; they come first.
    """
    module, _, name = table.partition(".")
    return lambda: (*others, *getattr(importlib.import_module(f"mara_jax.core.{module}"), name))
