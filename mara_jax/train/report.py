"""What a run wrote, read back, and the tables made of it."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mara_jax.config import Algorithm
from mara_jax.core import diversity, method_rules
from mara_jax.train.tables import NumberTable

LAST_KL = 10  # steps whose KL is averaged and must be level
_METRICS = ("step", "answers/by_prompt", "samples", "valid/fraction", "kl/reverse", "length/mean")


@dataclass(frozen=True)
class Outcome:
    """Where completions end: one row of the final table.

    Attributes:
      name: what is described.
      shares: [a + 1] probability of each answer, then of none.
      intervals: [a + 1] 95 % intervals of measured shares; None for a predicted row.
      samples: completions measured; None for a predicted row.
    """

    name: str
    shares: np.ndarray
    intervals: list[tuple[float, float]] | None = None
    samples: int | None = None

    @property
    def valid(self) -> float:
        return float(self.shares[:-1].sum())

    @property
    def entropy_bits(self) -> float:
        return diversity.entropy_bits(self.shares[:-1])

    @property
    def answer_shares(self) -> np.ndarray:
        """[a] share of each answer among the valid completions; nan where none is valid."""
        return diversity.shares(self.shares[:-1])


@dataclass(frozen=True)
class Record:
    """What a run left in its workdir.

    Attributes:
      workdir: the folder.
      config: config.json.
      reference: reference.json: samples, valid, answers, optimum, objective; counts where there are answers.
      rows: metrics.jsonl, one dict a finished step.
    """

    workdir: Path
    config: dict[str, Any]
    reference: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def answers(self) -> list[str]:
        """The answers that all prompts share; none where they are not known beforehand."""
        return self.reference["answers"] or []

    @property
    def counts_ta(self) -> np.ndarray:
        """[t, a] valid answers of each step's batch, where all prompts share a set of answers."""
        return np.array([row["answers/counts"] for row in self.rows], np.float64).reshape(-1, len(self.answers))

    def series(self, key: str) -> np.ndarray:
        """[t] one metric over the steps; nan where it has no value, as in a step whose update was skipped."""
        return np.array([row[key] for row in self.rows], np.float64)

    @property
    def method(self) -> str:
        """The objective in two or three words."""
        algorithm = self.algorithm
        words = f"MARA over {algorithm.anchor}s" if algorithm.method == "mara" else algorithm.method.replace("_", " ")
        changed = [getattr(algorithm, name) for name in ("transform", "objective")]
        words += "".join(f" with {_words(name)}" for name in changed if name != "auto")
        return words if algorithm.kl == "reverse" else f"{words}, forward KL"

    @property
    def algorithm(self) -> Algorithm:
        """The run's, as configured."""
        return Algorithm(**self.config["algorithm"])

    @property
    def optimum_of_own(self) -> str | None:
        """The name of the run's own optimum in `reference["optimum"]`: "vanilla", "mara", or None if unknown."""
        method = method_rules.forecast_method(self.algorithm)
        return method if method in (None, "vanilla") else "mara"

    @property
    def measured_reference(self) -> Outcome:
        known = self.reference
        return _measured("reference", known["counts"], known["samples"])

    @property
    def reached(self) -> Outcome | None:
        """The last batches' completions pooled; None before the first step, or where answers are not known before."""
        rows = self.rows[-diversity.WINDOW :]
        if not rows or not self.answers:
            return None
        counts, samples = self.counts_ta[-diversity.WINDOW :].sum(axis=0), sum(row["samples"] for row in rows)
        return _measured(f"this run, last {_count(len(rows), 'batch', 'batches')}", counts, samples)

    def optimum(self, method: str) -> Outcome | None:
        """The predicted optimum of "vanilla" or "mara", which is then the run's own; None where it was not computed."""
        shares = self.reference["optimum"].get(method)
        name = "vanilla" if method == "vanilla" else self.method
        return None if shares is None else Outcome(f"optimum: {name}", np.asarray(shares, np.float64))

    @property
    def own_optimum(self) -> Outcome | None:
        return None if self.optimum_of_own is None else self.optimum(self.optimum_of_own)


def read(workdir: str | os.PathLike) -> Record:
    """Reads what a language-model run wrote.

    Args:
      workdir: folder with config.json, reference.json and metrics.jsonl.

    Returns:
      The record; a last line of metrics that is still being written is left out.

    Raises:
      FileNotFoundError: one of the files is missing.
      ValueError: one of them cannot be read, or lacks a field; names file and field.
    """
    workdir = Path(workdir)
    config = read_config(workdir)
    reference = read_reference(workdir / "reference.json")
    rows = []
    lines = _text(workdir / "metrics.jsonl").split("\n")
    for number, line in enumerate(lines, 1):
        if number == len(lines):  # without its newline: empty, or cut short
            break
        rows.append(_parsed(line, f"{workdir / 'metrics.jsonl'}, line {number}", _METRICS))
    return Record(workdir, config, reference, rows)


def read_config(workdir: Path) -> dict[str, Any]:
    """The config of a language-model run; errors as of `read`."""
    return _json(workdir / "config.json", ("algorithm", "seed"))


def read_reference(path: Path) -> dict[str, Any]:
    """What a run measured of its reference policy before training.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it cannot be read, or lacks a field; names file and field.
    """
    return _json(path, ("samples", "valid", "answers", "optimum", "objective", "collapse"))


def start_summary(reference: dict[str, Any]) -> list[str]:
    """In words: what the reference does, and where the objective leads.

    Args:
      reference: the contents of reference.json.

    Returns:
      Lines to print before training.
    """
    lines, samples = [], reference["samples"]
    if not samples:
        return ["reference: not measured before training"]
    answered = round(reference["valid"] * samples)
    low, high = diversity.interval(answered, samples)
    line = f"reference: {reference['valid']:.1%} of {samples} samples valid ({low:.1%} to {high:.1%})"
    if reference["answers"]:
        measured = _measured("reference", reference["counts"], samples)
        line += f"; {_mix(measured, reference['answers'])}; entropy {measured.entropy_bits:.2f} bits"
    lines.append(line)
    for name, shares in reference["optimum"].items():
        outcome = Outcome(name, np.asarray(shares, np.float64))
        mix = _mix(outcome, reference["answers"])
        lines.append(f"optimum ({name}): valid {outcome.valid:.1%}; {mix}; entropy {outcome.entropy_bits:.2f} bits")
    if not answered:
        lines.append(
            f"WARNING: none of {samples} samples of the reference has an answer, so there may be no reward to "
            "learn from: teach the format by warmup.steps, or choose other policy.weights"
        )
    if reference["collapse"]:
        lines.append(collapse_warning(reference["collapse"]))
    return lines


def collapse_warning(collapse: dict[str, Any]) -> str:
    """One line for a run whose own optimum gives one answer nearly everything, with the cure.

    Args:
      collapse: `answer`, its `share` at the optimum with the interval `low` to `high`, `raise_above` (a beta, or None),
        `method`, `seen` (how many answers the reference gives), `prompts` and `collapsing`.
    """
    where = (
        f" under {collapse['collapsing']} of {collapse['prompts']} prompts, at worst" if collapse["prompts"] > 1 else ""
    )
    interval = "" if collapse["low"] == collapse["high"] else f" [{collapse['low']:.1%}, {collapse['high']:.1%}]"
    cures = []
    if collapse["raise_above"]:
        cures.append(f"raise algorithm.beta above {collapse['raise_above']:.3g}")
    if collapse["method"] == "vanilla" and collapse["seen"] > 1:
        cures.append("set algorithm.method=mara")
    cure = " or ".join(cures) or "no beta helps, for the reference itself gives hardly any other: warm it up on more"
    return (
        f"WARNING: the optimum of these settings is a collapse:{where} {collapse['share']:.1%}{interval} of "
        f'the answers "{collapse["answer"]}"; {cure}'
    )


def final_rows(record: Record) -> list[Outcome]:
    """Reference, vanilla's optimum, the run's own optimum (where computed), and what the run reached."""
    rows = [record.measured_reference, record.optimum("vanilla")]
    rows += [record.own_optimum if record.optimum_of_own == "mara" else None, record.reached]
    return [row for row in rows if row is not None]


def answers_table(record: Record) -> NumberTable:
    """Each final row's answers, with 95 % intervals where measured, entropy, and distance to the optimum."""
    beta = f"{record.config['algorithm']['beta']:g}"
    headers = ["", *(f'"{answer}"' for answer in record.answers), "invalid", "bits", "TV"]
    table = NumberTable.with_headers(*headers, lines=True, title=f"{record.method}, beta {beta}: where completions end")
    for row in final_rows(record):
        cells = [_share(row, a) for a in range(len(row.shares))]
        table.add_row(
            row.name,
            *cells,
            f"{row.entropy_bits:.3f}",
            number_text(distance_to_optimum(row, record.own_optimum), ".3f"),
        )
    kl = record.series("kl/reverse")[-LAST_KL:]
    if len(kl):
        steps, trend = _count(len(kl), "step", "steps"), number_text(diversity.slope(kl), "+.3f")
        mean = number_text(mean_of_finite(kl), ".2f")
        table.caption = (
            f"KL to the reference over the last {steps}: {mean} nats, slope {trend} a step\n"
            "bits: entropy of the valid answers; TV: of their shares to the run's optimum"
        )
    return table


def _measured(name: str, counts: Any, samples: int) -> Outcome:
    counts = [*counts, samples - sum(counts)]
    intervals = [diversity.interval(count, samples) for count in counts]
    return Outcome(name, diversity.shares(counts, samples), intervals, samples)


def distance_to_optimum(row: Outcome, optimum: Outcome | None) -> float:
    """Total variation of the valid answers' shares to the optimum's; nan where that is not known."""
    return math.nan if optimum is None else diversity.total_variation(row.answer_shares, optimum.answer_shares)


def _share(row: Outcome, index: int) -> str:
    if row.intervals is None:
        return f"{row.shares[index]:.3f}"
    low, high = row.intervals[index]
    return f"{row.shares[index]:.3f}\n[dim]{low:.2f}-{high:.2f}[/dim]"


def _mix(outcome: Outcome, answers: list[str]) -> str:
    if not outcome.valid:
        return "no answers"
    mix = zip(answers, outcome.answer_shares, strict=True)
    return ", ".join(f'"{answer}" {share:.1%}' for answer, share in mix) + " of the valid ones"


def mean_of_finite(values: np.ndarray) -> float:
    """The mean of those values that are finite; nan where none is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _words(name: str) -> str:
    """A transform or an objective as a reader has it."""
    return "no transform" if name == "none" else name.replace("mara_", "MARA over ").replace("_", " ")


def number_text(value: float, form: str) -> str:
    """A number in a table; "-" for what is not known."""
    return format(value, form) if math.isfinite(value) else "-"


def _count(number: int, singular: str, plural: str) -> str:
    return singular if number == 1 else f"{number} {plural}"


def _text(path: Path) -> str:
    if not path.is_file():
        if (path.parent / "population.json").exists():
            raise ValueError(f"{path.parent} is a population: evaluate population shows it, its runs are members/NAME")
        raise FileNotFoundError(f"{path} does not exist; name the workdir of a language-model run")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; it was not written by a run") from None


def _json(path: Path, fields: tuple[str, ...]) -> dict[str, Any]:
    return _parsed(_text(path), str(path), fields)


def _parsed(text: str, where: str, fields: tuple[str, ...]) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise ValueError(f"{where} is not JSON; it was damaged, or not written by a run") from None
    missing = [field for field in fields if not isinstance(value, dict) or field not in value]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it was not written by a language-model run")
    return value
