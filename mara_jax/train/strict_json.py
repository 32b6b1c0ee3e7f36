"""JSON that every reader takes: no NaN and no Infinity, which the standard lacks; null stands for them."""

import json
import math
from typing import Any


def text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, with null for numbers that are not finite: of a metric that has no value."""
    return json.dumps(_with_nulls(value), indent=indent, allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _with_nulls(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(one) for one in value]
    return value
