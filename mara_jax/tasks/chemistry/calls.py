"""Oracle calls that are counted: a budget, a cache of molecules, worker processes, and what is done where one fails."""

import io
import math
import pickle
import queue
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

from mara_jax.tasks.base import TaskError
from mara_jax.tasks.checked import described, is_number
from mara_jax.tasks.chemistry import molecules
from mara_jax.tasks.chemistry.program import Program
from mara_jax.tasks.worker import Worker, WorkerError

Oracle = Callable[[Sequence[str]], Sequence[float]]  # n canonical SMILES to n numbers
_CALL = f"{__name__}:call_oracle"
_VERSION = 1  # of what `state` gives


class OracleError(TaskError):
    """An oracle that gave no number for a molecule, which the message names.

    Attributes:
      smiles: the canonical SMILES of the molecule; why: what went wrong there.
    """

    def __init__(self, smiles: str, why: str) -> None:
        super().__init__(f"the oracle fails at {smiles}: {why}")
        self.smiles, self.why = smiles, why

    def __reduce__(self) -> tuple[type["OracleError"], tuple[str, str]]:
        return type(self), (self.smiles, self.why)  # an exception's own would give its message alone


class Scores(NamedTuple):
    """What a batch of n SMILES got.

    values: [n] scores; 0 where a SMILES does not parse, None where the budget did not reach. charged: calls that the
    batch cost. beyond: molecules without a score, each counted once.
    """

    values: list[float | None]
    charged: int
    beyond: int


@dataclass(frozen=True)
class Processes:
    """Worker processes, started afresh (they inherit nothing), and their limits.

    Args:
      count: how many; with 0 the oracle is called in this process, without any limit.
      seconds: in which a call must end; memory: GiB of each process (on Linux).
      molecules: that a call gets at most, in worker processes or not; 1 suits an oracle that takes seconds a molecule,
        64 one that takes milliseconds. Where a call of several fails, they are tried one by one, each with the limit of
        a call.
    """

    count: int = 0
    seconds: float = 60.0
    memory: float = 8.0
    molecules: int = 1


class OracleCalls:
    """An oracle whose calls are counted: each distinct molecule is charged once, up to a budget.

    Args:
      oracle: a function of n canonical SMILES that returns n numbers. For worker processes it must be picklable:
        a `terms.Scoring`, a `program.Program`, or a function of a module.
      budget: calls that may be charged.
      processes: where it is called.
      failure_value: the score of a molecule at which the oracle fails (charged, counted in `failed`); None raises.
      name: of the oracle, so that `restore` refuses the state of another.

    Attributes:
      series: scores by canonical SMILES, in the order in which they were charged: what `metrics` read.
      failed: molecules at which the oracle failed. invalid: SMILES that did not parse; repeats: those of molecules
        that had a score already or stood in the batch before; refused: those beyond the budget.
    """

    def __init__(
        self,
        oracle: Oracle,
        budget: int = 10_000,
        processes: Processes | None = None,
        failure_value: float | None = None,
        name: str = "",
    ) -> None:
        if budget < 1:
            raise TaskError(f"budget={budget}: give at least 1 call")
        if failure_value is not None and not math.isfinite(failure_value):
            raise TaskError(f"failure_value={failure_value}: give a finite number, or None to stop at a failure")
        self.oracle, self.budget, self.failure_value, self.name = oracle, budget, failure_value, name
        self.series: dict[str, float] = {}
        self.failed: list[str] = []
        self.invalid = self.repeats = self.refused = 0
        processes = processes or Processes()
        self._per_call = max(processes.molecules, 1)
        self._pool = _Pool(oracle, processes) if processes.count else None

    @property
    def calls(self) -> int:
        """How many calls have been charged."""
        return len(self.series)

    @property
    def remaining(self) -> int:
        """How many calls the budget has left."""
        return self.budget - self.calls

    def __call__(self, smiles: Sequence[str]) -> Scores:
        """Scores a batch.

        New molecules are charged in the order of the batch until the budget is spent; those behind have no score.

        Raises:
          OracleError: the oracle failed at a molecule, which is not charged, and there is no `failure_value`. Molecules
            before it are charged, and kept.
        """
        with molecules.silence():
            parsed = list(molecules.parse_each(smiles))
            names = [None if molecule is None else molecule.canonical for molecule in parsed]
        wanted = list(dict.fromkeys(name for name in names if name is not None and name not in self.series))
        new, beyond = wanted[: self.remaining], set(wanted[self.remaining :])
        self._score(new)
        valid = [name for name in names if name is not None]
        refused = sum(name in beyond for name in valid)
        self.invalid += len(names) - len(valid)
        self.refused += refused
        self.repeats += len(valid) - refused - len(new)
        values = [0.0 if name is None else self.series.get(name) for name in names]
        return Scores(values, len(new), len(beyond))

    def _score(self, new: Sequence[str]) -> None:
        """Calls the oracle for molecules without a score, and keeps what it says in their order."""
        chunks = [new[start : start + self._per_call] for start in range(0, len(new), self._per_call)]
        results = self._pool.map(chunks) if self._pool else map(self._here, chunks)
        # Kept as they come, so that what was paid for is not lost if a later molecule stops the run.
        for chunk, chunk_outcomes in zip(chunks, results, strict=True):
            for name, outcome in zip(chunk, chunk_outcomes, strict=True):
                if isinstance(outcome, float):
                    self.series[name] = outcome
                elif self.failure_value is None:
                    raise OracleError(name, str(outcome))
                else:
                    self.series[name] = float(self.failure_value)
                    self.failed.append(name)

    def _here(self, chunk: Sequence[str]) -> list[float | TaskError]:
        return outcomes(lambda part: _numbers(self.oracle, part), chunk)

    def state(self) -> dict[str, Any]:
        """Cache and counts as plain data, which JSON keeps exactly."""
        return {
            "version": _VERSION,
            "name": self.name,
            "series": [[name, value] for name, value in self.series.items()],
            "failed": list(self.failed),
            "invalid": self.invalid,
            "repeats": self.repeats,
            "refused": self.refused,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes the place of the object that gave this state; the budget stays this object's own.

        Raises:
          ValueError: it is of another version, of another oracle, or has more calls than the budget.
        """
        if state["version"] != _VERSION:
            raise TaskError(f"the state of oracle calls has version {state['version']}, not {_VERSION}")
        if state["name"] != self.name:
            raise TaskError(f"the state is of the oracle {state['name']!r}, and this one is {self.name!r}")
        if len(state["series"]) > self.budget:
            raise TaskError(f"the state has {len(state['series'])} calls, more than budget={self.budget}")
        self.series = {str(name): float(value) for name, value in state["series"]}
        self.failed = list(state["failed"])
        self.invalid, self.repeats, self.refused = (int(state[key]) for key in ("invalid", "repeats", "refused"))

    def close(self) -> None:
        """Ends the worker processes; a batch that is being scored in another thread raises `CancelledError`."""
        if self._pool:
            self._pool.close()

    def __enter__(self) -> "OracleCalls":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Pool:
    """Worker processes that take the next part of a batch as soon as they are free."""

    def __init__(self, oracle: Oracle, processes: Processes) -> None:
        _check_picklable(oracle)
        if isinstance(oracle, Program) and oracle.seconds >= processes.seconds:
            raise TaskError(
                f"the program has {oracle.seconds:g} s and the worker process that calls it {processes.seconds:g} s: "
                "give Processes(seconds=...) more than the program's, as a killed worker cannot end its program"
            )
        self.oracle, self.closing = oracle, False
        # Its threads live as long as the pool: the kernel ends a worker together with the thread that started it.
        self.threads = ThreadPoolExecutor(processes.count)
        starts = [
            self.threads.submit(Worker, [_CALL], processes.seconds, processes.memory) for _ in range(processes.count)
        ]
        self.workers = [start.result() for start in starts]
        self.idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def map(self, chunks: Sequence[Sequence[str]]) -> Any:
        """The outcomes of each part, in order."""
        return self.threads.map(self._part, chunks)

    def _part(self, chunk: Sequence[str]) -> list[float | TaskError]:
        worker = self.idle.get()
        try:
            return outcomes(lambda part: self._call(worker, part), chunk)
        finally:
            self.idle.put(worker)

    def _call(self, worker: Worker, part: Sequence[str]) -> list[float | TaskError]:
        self._check_open()
        worker.send("reward", _CALL, {"oracle": [self.oracle] * len(part), "smiles": list(part)}, len(part))
        try:
            values, _ = worker.result()
        except WorkerError as error:
            self._check_open()
            raise TaskError(str(error).removeprefix(_CALL).lstrip(": ")) from None
        return values

    def _check_open(self) -> None:
        """Keeps a call that `close` has ended from being taken for a failure, and tried again."""
        if self.closing:
            raise CancelledError("the oracle calls are closed")

    def close(self) -> None:
        self.closing = True
        # The threads wait for the workers, so that these go first; all at once, as each may take its time.
        with ThreadPoolExecutor(len(self.workers)) as ending:
            list(ending.map(Worker.end, self.workers))
        self.threads.shutdown(wait=True, cancel_futures=True)
        for worker in self.workers:
            worker.close()


def call_oracle(oracle: Sequence[Oracle], smiles: Sequence[str]) -> list[float | TaskError]:
    """The reward function of the worker processes."""
    return _numbers(oracle[0], smiles)


def outcomes(call: Callable[[Sequence[str]], list[float | TaskError]], part: Sequence[str]) -> list[Any]:
    """What a call says of each molecule: a number, or why there is none. Where it fails, each is tried by itself."""
    try:
        return call(part)
    except TaskError as error:
        return [error] if len(part) == 1 else [outcomes(call, [name])[0] for name in part]


def _numbers(oracle: Oracle, part: Sequence[str]) -> list[float | TaskError]:
    """The oracle's numbers, with an error in the place of each that is none.

    Raises:
      TaskError: it raises, or does not return as many.
    """
    try:
        returned = oracle(list(part))
        if not isinstance(returned, Iterable):
            raise TaskError(f"it returned {returned!r:.80} in place of a list of numbers")
        values = list(returned)
    except TaskError:
        raise
    except Exception as error:  # somebody's Python: it can fail in any way
        raise TaskError(described(error)) from None
    if len(values) != len(part):
        raise TaskError(f"it returned {len(values)} values for {len(part)} molecules")
    return [_number(value) for value in values]


def _number(value: Any) -> float | TaskError:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if is_number(number):
        return number
    width = " of 32 bits" if math.isfinite(number) else ""  # as rewards are
    return TaskError(f"it returned {value!r:.80}, which is no finite number{width}")


class _Pickler(pickle.Pickler):
    """Notes whether any class or function is of the script that runs; texts may say what they like."""

    of_script = False

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | FunctionType) and obj.__module__ == "__main__":
            self.of_script = True
        return NotImplemented


def _check_picklable(oracle: Oracle) -> None:
    """Refuses what worker processes cannot import."""
    pickler = _Pickler(io.BytesIO())
    try:
        pickler.dump(oracle)
    except Exception as error:  # of any object's own __reduce__, too
        raise TaskError(f"worker processes cannot be given the oracle ({error}): use a function of a module") from None
    if pickler.of_script:
        raise TaskError("worker processes cannot import the script that runs: put the oracle into a module of its own")
