"""Calls of the user's functions for a batch of completions, shared out among worker processes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mara_jax.tasks.worker import Worker, WorkerError


class Outcome(NamedTuple):
    """What a function said of one completion: a reward or an answer, and further columns; or why it failed."""

    value: Any = None
    columns: Mapping[str, Any] = {}
    error: str | None = None


class Calls:
    """Worker processes, each of which has imported all functions.

    Args:
      names: of the functions; workers: how many processes; time_limit: seconds for a call; memory_limit: GiB of each;
      stop_at_first: whether one completion at which a function fails is all that is wanted to be known.
    """

    def __init__(
        self, names: Sequence[str], workers: int, time_limit: float, memory_limit: float, stop_at_first: bool = False
    ) -> None:
        self.stop_at_first = stop_at_first
        self.workers = [Worker(names, time_limit, memory_limit) for _ in range(workers)]
        first = self.workers[0]
        self.named, self.needed, self.files = first.named, first.needed, first.files

    def of(self, kind: str, name: str, values: Mapping[str, Sequence[Any]], groups: Sequence[int]) -> list[Outcome]:
        """Calls a function for n completions.

        Groups stay whole, as a function may compare the completions of a prompt. Where a call raises or hangs, its
        completions are given to the function one by one, so that only those are lost at which it fails; all of them
        are lost where it fails at none, or returns a wrong number of values.

        Args:
          kind: "reward" or "answer"; values: [n] of each argument; groups: [n] the prompt of each.
        """
        parts = _parts(groups, len(self.workers))
        pairs = list(zip(self.workers, parts, strict=False))
        for worker, part in pairs:
            worker.send(kind, name, _rows(values, part), len(part))
        outcomes: list[Outcome] = []
        for worker, part in pairs:
            try:
                outcomes += _outcomes(kind, name, worker.result())
            except WorkerError as error:
                alone = self._one_by_one(worker, kind, name, values, part) if error.repeated else []
                found = any(outcome.error is not None for outcome in alone)
                outcomes += alone if found else [Outcome(error=str(error))] * len(part)
        return outcomes

    def _one_by_one(
        self, worker: Worker, kind: str, name: str, values: Mapping[str, Sequence[Any]], part: Sequence[int]
    ) -> list[Outcome]:
        """The outcome of each completion by itself; with `stop_at_first` none is asked for behind one that fails."""
        outcomes: list[Outcome] = []
        for row in part:
            failed = bool(outcomes) and outcomes[-1].error is not None
            outcome = outcomes[-1] if failed and self.stop_at_first else None
            outcomes.append(outcome or self._alone(worker, kind, name, _rows(values, [row])))
        return outcomes

    def _alone(self, worker: Worker, kind: str, name: str, values: Mapping[str, Sequence[Any]]) -> Outcome:
        worker.send(kind, name, values, 1)
        try:
            return _outcomes(kind, name, worker.result())[0]
        except WorkerError as error:
            return Outcome(error=str(error))

    def close(self) -> None:
        """Ends all processes."""
        for worker in self.workers:
            worker.close()


def _outcomes(kind: str, name: str, returned: Any) -> list[Outcome]:
    values, columns = (returned, {}) if kind == "answer" else returned
    return [
        Outcome(
            None if isinstance(value, Exception) else value,
            {column: numbers[row] for column, numbers in columns.items()},
            f"{name}: {' '.join(str(value).split())}" if isinstance(value, Exception) else None,
        )
        for row, value in enumerate(values)
    ]


def _parts(groups: Sequence[int], count: int) -> list[list[int]]:
    """The rows in at most `count` parts of about equal size, in order, without splitting a run of equal groups."""
    parts: list[list[int]] = [[]]
    for row, group in enumerate(groups):
        full = len(parts[-1]) * count >= len(groups)
        if full and group != groups[row - 1]:
            parts.append([])
        parts[-1].append(row)
    return parts


def _rows(values: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
    return {name: [column[row] for row in rows] for name, column in values.items()}
