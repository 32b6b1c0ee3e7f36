"""Search among molecules: completions of the empty prompt are SMILES, scored by an oracle with a budget of calls."""

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mara_jax import config
from mara_jax.config import limits, setting
from mara_jax.tasks.base import Score, Task, TaskError
from mara_jax.tasks.chemistry import molecules, named_oracles, report
from mara_jax.tasks.chemistry.calls import OracleCalls, Processes
from mara_jax.tasks.chemistry.program import Program
from mara_jax.tasks.chemistry.progress import Progress
from mara_jax.tasks.chemistry.randomised import randomised_smiles
from mara_jax.tasks.chemistry.scaffold_filter import ScaffoldFilter
from mara_jax.tasks.chemistry.terms import Scoring

ANSWERS = ("molecule", "scaffold")
FAILURE = ("stop", "zero")
ACYCLIC = "no ring"  # the scaffold of every molecule without a ring, as an answer
_MARGIN = 10.0  # seconds in which a worker process sees its program end


@dataclass(frozen=True)
class Config(config.Task):
    """Molecules that an oracle scores highly, within a budget of oracle calls."""

    module: str = config.task_module(__name__)
    oracle: str = setting(
        "qed",
        "an oracle of PMO, synth or amide, molexp:AP (A2A, BACE1, EGFR), FILE.py:FUNCTION of a list of SMILES, or "
        "program:COMMAND",
    )
    budget: int = setting(
        10_000, "oracle calls: each distinct molecule is charged once, and the run ends with the last", limits.COUNT
    )
    answer: str = setting(
        "molecule", "what MARA over answers makes equally likely: good molecules or scaffolds", ANSWERS
    )
    randomised: int = setting(
        16, "SMILES of each good molecule, its atoms in another order, that its mass is summed over", limits.FROM_ZERO
    )
    hit: float = setting(0.8, "the score from which a molecule counts as a hit in metrics", limits.REWARD)
    bucket_size: int = setting(
        0, "scaffold filter: good molecules of a scaffold that are rewarded, REINVENT's is 25; 0: no filter",
        limits.FROM_ZERO,
    )  # fmt: skip
    bucket_score: float = setting(0.4, "the score from which a molecule counts in the scaffold filter", limits.REWARD)
    processes: int = setting(
        0, "worker processes that call the oracle; 0: the run's own process, without a limit", limits.FROM_ZERO
    )
    seconds: float = setting(60.0, "in which a program, or a call in a worker process, must end", limits.POSITIVE)
    molecules: int = setting(1, "that a call of the oracle gets, at most", limits.COUNT)
    failure: str = setting("stop", "where the oracle fails at a molecule: stop the run, or score it with zero", FAILURE)
    seed: int = setting(0, "of the randomised SMILES", limits.FROM_ZERO)


class Chemistry(Task):
    """One empty prompt, whose completions are SMILES; the reward is the oracle's score, 0 for what is no molecule.

    A completion that the length limit cut is no molecule. A molecule that the scaffold filter holds back has reward 0,
    and its score in the oracle's series.
    """

    name = "chemistry"
    invalid_reward = 0.0
    keeps_state = True
    lists_strings = True

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.oracle = oracle = named_oracles.named(cfg.oracle, cfg.seconds)
        self.max_reward = 1.0 if isinstance(oracle, Scoring) else None
        # A worker process needs longer than a program that it calls, see `calls.Processes`.
        seconds = cfg.seconds + (_MARGIN if isinstance(oracle, Program) else 0.0)
        self.calls = OracleCalls(
            oracle,
            cfg.budget,
            Processes(cfg.processes, seconds, molecules=cfg.molecules),
            None if cfg.failure == "stop" else 0.0,
            cfg.oracle,
        )
        self.filter = ScaffoldFilter(cfg.bucket_size, cfg.bucket_score) if cfg.bucket_size else None
        self.progress = Progress(cfg.hit)

    def __len__(self) -> int:
        return 1

    def prompt(self, index: int) -> str:
        """The empty text: what the tokenizer puts in front of it (BOS) is all that the policy sees."""
        return ""

    def code_files(self) -> list[str]:
        """The file of an oracle of the user's own."""
        own = isinstance(self.oracle, named_oracles.OwnFunction) and self.oracle.file
        return [own] if own else []

    def score(self, prompt_index: Sequence[int], texts: Sequence[str], finished: Sequence[bool]) -> Score:
        """Rewards, and as answers canonical SMILES or scaffolds; new molecules are charged.

        Returns:
          With the columns `unique`, 1 for a molecule that is not in the batch before; `filtered`, 1 for one that the
          scaffold filter holds back; and, the same for each completion, `oracle_calls`, `hits`, `circles` and `top10`
          of all molecules so far.
        """
        smiles = [text if ended else "" for text, ended in zip(texts, finished, strict=True)]
        scores = self.calls(smiles)
        self.progress.update(self.calls.series)
        with molecules.silence():
            parsed = list(molecules.parse_each(smiles))
            names = [None if one is None else one.canonical for one in parsed]
            scaffolds = [None if one is None else one.scaffold for one in parsed]
        rewards = [0.0 if value is None else value for value in scores.values]
        filtered = self._filtered(names, scaffolds, scores.values)
        seen: set[str] = set()
        unique = [name is not None and name not in seen and not seen.add(name) for name in names]
        columns = {"unique": unique, "filtered": filtered} | {
            name: [value] * len(texts) for name, value in self._so_far().items()
        }
        answers = names
        if self.cfg.answer == "scaffold":
            answers = [None if scaffold is None else scaffold or ACYCLIC for scaffold in scaffolds]
        return Score(
            [0.0 if out else reward for reward, out in zip(rewards, filtered, strict=True)],
            answers,
            {name: [float(value) for value in values] for name, values in columns.items()},
        )

    def _filtered(
        self, names: Sequence[str | None], scaffolds: Sequence[str | None], values: Sequence[float | None]
    ) -> list[bool]:
        """Which completions the scaffold filter holds back; without a filter none."""
        held = [False] * len(names)
        if self.filter is None:
            return held
        for row, (name, scaffold, value) in enumerate(zip(names, scaffolds, values, strict=True)):
            if name is not None and scaffold is not None and value is not None:
                (held[row],) = self.filter.zeroed([name], [scaffold], [value])
        return held

    def _so_far(self) -> dict[str, float]:
        progress = self.progress
        return {
            "oracle_calls": self.calls.calls,
            "hits": progress.hits,
            "circles": progress.circles,
            "top10": progress.top_mean,
        }

    def other_strings(self, index: int, text: str) -> list[str]:
        """Other SMILES of the molecule, see `randomised.randomised_smiles`."""
        return randomised_smiles(text, self.cfg.randomised, self.cfg.seed)

    def state(self) -> dict[str, Any]:
        """The oracle's calls with all scores, and the buckets of the scaffold filter."""
        return {"calls": self.calls.state(), "filter": self.filter.state() if self.filter else None}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where a task was that gave this state; errors as of `OracleCalls.restore`."""
        if (state["filter"] is None) != (self.filter is None):
            raise TaskError("the state is of a run with another scaffold filter: leave task.bucket_size as it was")
        self.calls.restore(state["calls"])
        if self.filter is not None:
            self.filter.restore(state["filter"])
        self.progress = Progress(self.cfg.hit)
        self.progress.update(self.calls.series)

    def ended(self) -> str:
        """Says so where the budget is used up."""
        if self.calls.remaining:
            return ""
        return f"the budget of {self.cfg.budget} oracle calls is used up; the step's molecules beyond it have reward 0"

    def write_report(self, folder: pathlib.Path) -> str:
        """molecules.csv and a picture of the best, see `report.write`."""
        return report.write(self.calls.series, self.cfg.hit, folder)

    def close(self) -> None:
        """Ends the oracle's worker processes."""
        self.calls.close()


def make(cfg: Config) -> Chemistry:
    """The task with these settings."""
    return Chemistry(cfg)
