"""The enumerable policy of the laboratory, under the name by which these tests know it."""

from mara_jax.audit.small import (
    CONTEXTS,
    LENGTH,
    VOCAB,
    Strings,
    expected_gradient,
    relative_error,
    string_logp,
    strings,
    table,
    token_logp,
    tuples,
)

__all__ = [
    "CONTEXTS",
    "LENGTH",
    "VOCAB",
    "Strings",
    "expected_gradient",
    "relative_error",
    "string_logp",
    "strings",
    "table",
    "token_logp",
    "tuples",
]
