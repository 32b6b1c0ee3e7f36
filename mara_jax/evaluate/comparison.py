"""Several finished runs side by side, for a terminal or as markdown."""

import json
import math
import os
from dataclasses import dataclass

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
# heading -> the metric whose last value it is, and how that is printed: of runs that search
_FOUND = {
    "calls": ("task/oracle_calls", ",.0f"),
    "hits": ("task/hits", ",.0f"),
    "circles": ("task/circles", ",.0f"),
    "best ten": ("task/top10", ".3f"),
}
_FORMS = _COLUMNS | {heading: form for heading, (_, form) in _FOUND.items()}
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
_NOTE_FOUND = "oracle calls, hits, circles of hits and the mean of the ten best scores: at the last step"


def compare(workdirs: list[str] | list[os.PathLike]) -> Comparison:
    """Compares runs: the answers of their last batches, their KL and its slope, and the distance to the optimum.

    Valid share and entropy are pooled over the last 8 batches; KL and length are means over the last 10 steps
    and the slope is fitted to them; the distance is the total variation of the valid answers' shares. Runs whose
    configs differ in nothing but the seed, in what a resumed run may change or in how the same numbers are computed are
    averaged, each seed once; so are a run that produced its reference policy and those that start from it. Of searches
    calls, hits, circles and the best ten follow. A column in which no run has a number is left out.

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
    numbers = [_figures(record) for record in records]
    columns = [heading for heading in _FORMS if any(math.isfinite(one[heading]) for one in numbers)]
    rows, groups = [], {}
    for record, figures in zip(records, numbers, strict=True):
        texts = [_text(heading, figures[heading]) for heading in columns]
        rows.append([record.workdir.name, *_method(record), str(record.config["seed"]), *texts])
        # The same run named twice, or run twice, counts once: each seed is one sample.
        groups.setdefault(_setting(record, named), {}).setdefault(record.config["seed"], (record, figures))
    for group in groups.values():
        if len(group) > 1:
            record = next(record for record, _ in group.values())
            seeds = ", ".join(str(seed) for seed in sorted(group)) if len(group) <= 3 else ""
            texts = [_spread(heading, [figures[heading] for _, figures in group.values()]) for heading in columns]
            rows.append([f"mean of {len(group)}", *_method(record), seeds, *texts])
    note = f"{_NOTE}; {_NOTE_FOUND}" if set(columns) & set(_FOUND) else _NOTE
    return Comparison(["run", "method", "beta", "seed", *columns], rows, note)


def _method(record: report.Record) -> tuple[str, str]:
    return record.method, f"{record.config['algorithm']['beta']:g}"


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


def _figures(record: report.Record) -> dict[str, float]:
    """One run's numbers by heading; nan for what it does not have."""
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
    found = [record.rows[-1].get(key, math.nan) for key, _ in _FOUND.values()]
    return dict(zip(_FORMS, [valid, bits, *means, distance, *found], strict=True))


def _text(heading: str, value: float) -> str:
    return report.number_text(value, _FORMS[heading])


def _spread(heading: str, values: list[float]) -> str:
    """The mean of several runs, and their sample deviation where they differ."""
    middle, width = _text(heading, float(np.mean(values))), float(np.std(values, ddof=1))
    return f"{middle} ± {report.number_text(width, _FORMS[heading].strip('+'))}" if width > 0 else middle
