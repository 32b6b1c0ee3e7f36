"""Several finished runs side by side, for a terminal or as markdown."""

import json
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from mara_jax.core import diversity
from mara_jax.train import report
from mara_jax.train.tables import NumberTable
from mara_jax.train.workdir import RESUMABLE


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Attributes:
      header: names of the columns.
      rows: texts, one row a run, then one for each setting that several seeds share (mean ± sample deviation).
      note: what the columns mean.
      texts: how many columns, from the left, hold texts and no numbers.
    """

    header: list[str]
    rows: list[list[str]]
    note: str
    texts: int = 2

    @property
    def table(self) -> NumberTable:
        """For a terminal: `rich.print`."""
        table = NumberTable.with_headers(*self.header, texts=self.texts, lines=True)
        table.caption = self.note
        for row in self.rows:
            table.add_row(*(cell.replace(" ± ", "\n± ") for cell in row))
        return table

    @property
    def markdown(self) -> str:
        """For a document."""
        rule = ["---"] * self.texts + ["---:"] * (len(self.header) - self.texts)
        lines = ["| " + " | ".join(cells) + " |" for cells in [self.header, rule, *self.rows]]
        return "\n".join([*lines, "", self.note])


# heading -> how it is printed
_COLUMNS = {"valid": ".3f", "bits": ".3f", "KL": ".2f", "slope": "+.3f", "length": ".1f", "TV": ".3f"}
_FREE = ("seed", "evaluation", *RESUMABLE)  # fields in which runs that are averaged may differ
# Fields that change how the numbers are computed, but not the numbers.
_COMPUTED = {
    "policy": ("scan_layers", "remat"),
    "rollout": ("length_buckets",),
    "optimiser": ("micro_batches",),
}
_NOTE = (
    f"valid, bits (entropy of a prompt's answers): last {diversity.WINDOW} batches pooled; KL to the "
    f"reference (nats a completion), its slope (a step), length (tokens): last {report.LAST_KL} steps; "
    "TV: total variation of the valid answers' shares to the run's own optimum"
)


def compare(workdirs: list[str] | list[os.PathLike]) -> Comparison:
    """Compares runs: the answers of their last batches, their KL and its slope, and the distance to the optimum.

    Valid share and entropy are pooled over the last 8 batches; KL and length are means over the last 10 steps
    and the slope is fitted to them; the distance is the total variation of the valid answers' shares. Runs whose
    configs differ in nothing but the seed, in what a resumed run may change or in how the same numbers are computed are
    averaged, each seed once; so are a run that produced its reference policy and those that start from it.

    Args:
      workdirs: folders of runs.

    Returns:
      A comparison, for a terminal or as markdown.

    Raises:
      ValueError: no workdir, or a workdir without a finished step.
    """
    if not workdirs:
        raise ValueError("0 runs to compare; name at least one workdir")
    records = [report.read(workdir) for workdir in workdirs]
    named = {_weights(record) for record in records} - {""}
    rows, groups = [], {}
    for record in records:
        numbers, beta = _figures(record), f"{record.config['algorithm']['beta']:g}"
        rows.append([record.workdir.name, record.method, beta, str(record.config["seed"]), *_texts(numbers)])
        # The same run named twice, or run twice, counts once: each seed is one sample.
        groups.setdefault(_setting(record, named), {}).setdefault(record.config["seed"], (record, numbers))
    for group in groups.values():
        if len(group) > 1:
            members = [numbers for _, numbers in group.values()]
            record = next(record for record, _ in group.values())
            method, beta = record.method, f"{record.config['algorithm']['beta']:g}"
            mean, deviation = np.mean(members, axis=0), np.std(members, axis=0, ddof=1)
            spread = [
                f"{middle} ± {report.number_text(width, form.strip('+'))}" if width > 0 else middle
                for middle, width, form in zip(_texts(mean), deviation, _COLUMNS.values(), strict=True)
            ]
            seeds = ", ".join(str(seed) for seed in sorted(group)) if len(group) <= 3 else ""
            rows.append([f"mean of {len(members)}", method, beta, seeds, *spread])
    return Comparison(["run", "method", "beta", "seed", *_COLUMNS], rows, _NOTE)


def _setting(record: report.Record, named: set[str]) -> str:
    """What runs that are averaged have in common: the config without the seed, what a resumption may change, and how
    the numbers are computed.

    A reference policy is identified by its path: in the workdir of the run that produced it, if another run names that
    path (`named`).
    """
    same = {name: value for name, value in record.config.items() if name not in _FREE}
    for section, fields in _COMPUTED.items():
        same[section] = {name: value for name, value in same.get(section, {}).items() if name not in fields}
    own, weights = os.path.realpath(record.workdir / "reference"), _weights(record)
    if own in named or weights in named:
        same["policy"] |= {"weights": own if own in named else weights}
        same.pop("warmup", None)
    return json.dumps(same, sort_keys=True)


def _weights(record: report.Record) -> str:
    """Where a run's weights lie on this machine; "" for those that have a name."""
    weights = record.config.get("policy", {}).get("weights", "")
    return os.path.realpath(weights) if os.path.exists(weights) else ""


def _figures(record: report.Record) -> list[float]:
    """One run's numbers in the order of `_COLUMNS`."""
    if not record.rows:
        raise ValueError(f"{record.workdir} holds no finished step; train it first")
    kl, length = record.series("kl/reverse")[-report.LAST_KL :], record.series("length/mean")[-report.LAST_KL :]
    reached = record.reached
    if reached is None:  # answers that are not known beforehand
        valid = record.series("valid/fraction")[-diversity.WINDOW :].mean()
        bits, distance = record.series("answers/entropy_bits")[-1], math.nan
    else:
        valid, bits = reached.valid, reached.entropy_bits
        distance = report.distance_to_optimum(reached, record.own_optimum)
    means = report.mean_of_finite(kl), diversity.slope(kl), report.mean_of_finite(length)
    return [valid, bits, *means, distance]


def _texts(numbers: Any) -> list[str]:
    return [report.number_text(value, form) for value, form in zip(numbers, _COLUMNS.values(), strict=True)]
