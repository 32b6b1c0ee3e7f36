"""Several models measured on the same prompts: which differ beyond their intervals, and which are Pareto-best."""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mara_jax.evaluate.comparison import Comparison
from mara_jax.measures import bootstrap, fronts
from mara_jax.train.evaluation import Group

FILE = "evaluation.json"
QUALITY, DIVERSITY, WITHOUT_ANSWERS = "reward", "answers/effective", "ngrams/ead"
_PART = re.compile(r"model|adapter|(checkpoints-)?\d+")  # the end of a path, which says nothing of what it is
# Settings that must be equal, with the flag that makes them so.
SAME = tuple("samples reward reward_model answer threshold max_new_tokens equivalence similarity embedder".split())


class Model(NamedTuple):
    """An evaluated model: its name, the folder and the contents of its evaluation.json, and its completions where they
    are at hand."""

    name: str
    folder: str
    result: dict[str, Any]
    groups: Sequence[Group] | None = None


class Difference(NamedTuple):
    """A measure of `model` minus that of `base`, and its paired bootstrap interval over the prompts."""

    measure: str
    model: str
    base: str
    value: float
    low: float
    high: float

    @property
    def exceeds(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def names_of(paths: Sequence[str]) -> list[str]:
    """A short name of each path, which no other has: its last parts, as many as it takes.

    Raises:
      ValueError: a path is there twice.
    """
    twice = next((path for place, path in enumerate(paths) if path in paths[:place]), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice: name each model once")
    parts = [re.sub(r"[^\w.@=-]+", "/", path).strip("/").split("/") for path in paths]
    counts = [1] * len(parts)  # of the last parts that make a name
    for _ in range(max(map(len, parts))):
        names = ["-".join(one[-count:]) for one, count in zip(parts, counts, strict=True)]
        unclear = [name in names[:i] + names[i + 1 :] or bool(_PART.fullmatch(name)) for i, name in enumerate(names)]
        if not any(unclear):
            return names
        counts = [count + more for count, more in zip(counts, unclear, strict=True)]
    return [f"{number}-{'-'.join(one)}" for number, one in enumerate(parts, 1)]


def read(folders: Sequence[str]) -> list[Model]:
    """The evaluations that `evaluate run` has written into these folders; one of several models stands for all of them.

    Raises:
      FileNotFoundError, ValueError: one line; a folder without an evaluation, or one that cannot be read.
    """
    paths: list[pathlib.Path] = []
    for folder in map(pathlib.Path, folders):
        several = _read(folder).get("models")
        paths += [folder] if several is None else [folder / one["folder"] for one in several]
    names = names_of([str(path) for path in paths])
    return [
        Model(name, str(path.absolute()), _checked(path, _read(path))) for name, path in zip(names, paths, strict=True)
    ]


def _read(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name folders that evaluate run has written (--out)")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is not JSON: run evaluate run again") from None
    return result if isinstance(result, dict) else {}


def _checked(folder: pathlib.Path, result: dict[str, Any]) -> dict[str, Any]:
    lacking = [name for name in ("settings", "metrics", "prompts", "intervals") if name not in result]
    if lacking:
        raise ValueError(f"{folder / FILE} lacks {lacking[0]!r}: it was not written by evaluate run")
    return result


def check_comparable(models: Sequence[Model]) -> None:
    """Refuses evaluations of which a difference would not be one of models.

    Raises:
      ValueError: one line; other prompts, reward, answers, or numbers of samples, or fewer than two prompts or models.
    """
    first = models[0]
    if len(models) < 2:
        raise ValueError(f"1 evaluation, {first.name}: name at least two to compare")
    for other in models[1:]:
        for name in SAME:
            if not all(name in one.result["settings"] for one in (first, other)):
                continue  # of an evaluation that was made before there was such a setting
            own, its = (one.result["settings"][name] or "none" for one in (first, other))
            if own != its:
                raise ValueError(f"{first.name} has --{name}={own}, {other.name} {its}: measure both with the same one")
        texts = [[row["prompt"] for row in one.result["prompts"]] for one in (first, other)]
        if texts[0] != texts[1]:
            place = next((i for i, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1]), None)
            where = f"{len(texts[0])} and {len(texts[1])} of them" if place is None else f"number {place} differs"
            raise ValueError(f"{first.name} and {other.name} have other prompts ({where}): measure both on one file")
    if len(first.result["prompts"]) < 2:
        raise ValueError("1 prompt: differences are resampled over prompts, of which there must be two")


def differences(models: Sequence[Model]) -> list[Difference]:
    """Every measure of each model minus the first one's; errors as of `check_comparable`."""
    check_comparable(models)
    base, rows = models[0], []
    for other in models[1:]:
        for measure in base.result["metrics"]:
            if measure not in other.result["metrics"]:
                continue
            its, own = ([row[measure] for row in one.result["prompts"]] for one in (other, base))
            value, low, high, _ = bootstrap.difference(its, own)
            rows.append(Difference(measure, other.name, base.name, value, low, high))
    return rows


def compared(models: Sequence[Model], rows: Sequence[Difference]) -> Comparison:
    """The first model's measures, and the others' differences from it, for a terminal or as markdown."""
    base, others = models[0], [one.name for one in models[1:]]
    by_place = {(row.measure, row.model): row for row in rows}
    cells = []
    for measure, value in base.result["metrics"].items():
        of_others = [by_place.get((measure, name)) for name in others]
        cells.append([measure, f"{value:.3f}", *("-" if row is None else _words(row) for row in of_others)])
    count = len(base.result["prompts"])
    note = (
        f"* differs beyond its interval: 0 is outside the 95 % interval of a paired bootstrap over {count} prompts, as "
        "by chance one difference in twenty does"
    )
    return Comparison(["measure", base.name, *(f"{name} - {base.name}" for name in others)], cells, note, texts=1)


def _words(row: Difference) -> str:
    return f"{row.value:+.3f} ({row.low:+.3f} to {row.high:+.3f})" + (" *" if row.exceeds else "  ")


def verdicts(models: Sequence[Model], rows: Sequence[Difference]) -> list[str]:
    """A line for each model but the first: in which measures it differs from the first beyond the interval."""
    lines = []
    for other in models[1:]:
        own = [row for row in rows if row.model == other.name]
        beyond = [f"{row.measure} {row.value:+.3f}" for row in own if row.exceeds]
        words = f"differs beyond the interval in {len(beyond)} of {len(own)} measures: {', '.join(beyond)}"
        none = f"differs from it in none of {len(own)} measures beyond the interval"
        lines.append(f"{other.name} against {models[0].name}: {words if beyond else none}")
    return lines


def diversity_of(models: Sequence[Model]) -> str:
    """The measure of diversity that they are drawn by: effective answers, or of models without any, n-grams."""
    answered = any(one.result["metrics"][DIVERSITY] > 0 for one in models)
    return DIVERSITY if answered else WITHOUT_ANSWERS


def front(models: Sequence[Model]) -> list[str]:
    """The names of the models that no other beats in reward and diversity alike, by falling reward."""
    metrics, diversity = [one.result["metrics"] for one in models], diversity_of(models)
    return [models[i].name for i in fronts.pareto_best(*([m[name] for m in metrics] for name in (QUALITY, diversity)))]


def as_result(models: Sequence[Model], rows: Sequence[Difference]) -> dict[str, Any]:
    """What the evaluation.json of several models holds."""
    return {
        "settings": {name: models[0].result["settings"].get(name) for name in ("prompts", *SAME)},
        "models": [
            {"name": one.name, "folder": one.folder, "weights": one.result["settings"]["weights"]}
            | {name: one.result[name] for name in ("metrics", "intervals")}
            for one in models
        ],
        "pareto": {"quality": QUALITY, "diversity": diversity_of(models), "best": front(models)},
        "differences": [row._asdict() | {"exceeds": row.exceeds} for row in rows],
    }
