"""What `replay` prints: a line for each step that was made again, and one for each number that differs."""

from collections.abc import Iterator, Sequence

from mara_jax.replay.computation import Difference, Replayed


def lines(replayed: Sequence[Replayed]) -> Iterator[str]:
    """The lines, steps in their order."""
    for one in replayed:
        ends = "equal, bit for bit" if not one.differences else f"{len(one.differences)} differ"
        yield f"step {one.step}, from {one.start}: {one.compared} numbers and texts compared, {ends}"
        for difference in one.differences:
            yield f"    {_line(difference)}"


def _line(difference: Difference) -> str:
    where = f" of {difference.place}" if difference.place else ""
    many = f" ({difference.count} of {difference.total} differ)" if difference.total > 1 else ""
    return f"{difference.name}{where}: stored {_value(difference.stored)}, now {_value(difference.now)}{many}"


def _value(value: object) -> str:
    text = f"{value:.9g}" if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
