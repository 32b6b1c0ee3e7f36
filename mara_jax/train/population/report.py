"""What a population leaves: which members there are, how good and how diverse each ended, and which one to take."""

import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from mara_jax.config import LanguageRun
from mara_jax.core import diversity
from mara_jax.measures import fronts
from mara_jax.plot_style import GRID, INK, OWN, QUIET, VANILLA, horizontal_grid, save, style
from mara_jax.train import adapter, held_out, metrics, report, trained
from mara_jax.train import workdir as workdirs
from mara_jax.train.tables import NumberTable

FILE = "population.json"  # in WORKDIR
FOLDER = "members"  # in WORKDIR: a run directory a member
NEAR_BEST = 0.02  # a member this close to the best reward is as good, where the chosen one is the most diverse
COLOURS = (VANILLA, OWN, "#7c3aed", "#4d7c0f", "#be123c", "#1d4ed8", "#854d0e", "#334155")


class Result(NamedTuple):
    """How a member ended: reward (mean), effective (number of answers a prompt), valid (share), kl (nats; None where it
    was not measured), tv (total variation of the answers' shares to its own optimum; None where that is not known)."""

    reward: float
    effective: float
    valid: float
    kl: float | None
    tv: float | None


def write_members(workdir: pathlib.Path, members: Sequence[tuple[str, LanguageRun]]) -> None:
    """Writes population.json: name, folder and settings of each member, until `show_end` adds how they ended."""
    rows = [{"name": name, "workdir": f"{FOLDER}/{name}"} | settings_of(run) for name, run in members]
    workdirs.write_json(workdir / FILE, {"members": rows})


def settings_of(run: LanguageRun) -> dict[str, Any]:
    """What members may differ in."""
    algorithm = run.algorithm
    names = ("method", "anchor", "kl", "beta", "threshold")
    rate = {"learning_rate": run.optimiser.learning_rate, "seed": run.seed}
    return {name: getattr(algorithm, name) for name in names} | rate


def result_of(folder: pathlib.Path) -> Result:
    """How a member ended: on its held-out prompts where it was evaluated, else over its last steps."""
    rows = metrics.read_rows(folder / "metrics.jsonl", metrics.OF_A_STEP)
    last, window = rows[-1], rows[-diversity.WINDOW :]
    kl = [row["kl/reverse"] for row in rows[-report.LAST_KL :] if row["kl/reverse"] is not None]
    tv = last.get("gap/tv_optimum")
    shared = {"kl": float(np.mean(kl)) if kl else None, "tv": tv}
    evaluations = metrics.read_rows(folder / held_out.FILE, held_out.FIELDS)
    if evaluations and evaluations[-1]["step"] == last["step"]:
        row = evaluations[-1]
        return Result(row["reward"], row["answers/effective"], row["valid"], **shared)
    reward, valid = (
        float(np.mean([row[name] for row in window if row[name] is not None]))
        for name in ("reward/mean", "valid/fraction")
    )
    return Result(reward, last["answers/effective"], valid, **shared)


def pareto(results: Sequence[Result]) -> list[int]:
    """Members that no other beats in reward and effective number of answers alike, by falling reward."""
    return fronts.pareto_best([one.reward for one in results], [one.effective for one in results])


def chosen(results: Sequence[Result]) -> int:
    """The most diverse of the members whose reward is within NEAR_BEST of the best."""
    best = max(one.reward for one in results)
    near = [i for i, one in enumerate(results) if one.reward >= best - NEAR_BEST]
    return max(near, key=lambda i: (results[i].effective, results[i].reward))


def show_end(workdir: pathlib.Path, console: Console) -> None:
    """Adds every member's end to population.json, prints them by settings, draws population.png, and copies the policy
    of the chosen member to WORKDIR."""
    known = json.loads((workdir / FILE).read_text())
    members = known["members"]
    results = [result_of(workdir / one["workdir"]) for one in members]
    front, best = pareto(results), chosen(results)
    ends = [one | {"end": result._asdict()} for one, result in zip(members, results, strict=True)]
    names = [members[i]["name"] for i in front]
    workdirs.write_json(workdir / FILE, {"members": ends, "pareto": names, "chosen": members[best]["name"]})
    console.print(table(members, results))
    figure = draw(workdir / "population.png", members, results, front)
    console.print(f"Pareto-best of reward and effective number of answers: {', '.join(names)}", markup=False)
    where = _copy_policy(workdir / members[best]["workdir"], workdir)
    console.print(
        f"chosen: {members[best]['name']}, the most diverse within {NEAR_BEST} of the best reward; its policy: {where}",
        markup=False,
    )
    console.print(f"figure: {figure}   members: {workdir / FILE}", markup=False)


def _copy_policy(member: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """Copies what a member leaves of its policy, in place of what an earlier end has copied."""
    name = next(name for name in (adapter.NAME, trained.MODEL) if (member / name).is_dir())
    shutil.rmtree(workdir / name, ignore_errors=True)
    return pathlib.Path(shutil.copytree(member / name, workdir / name))


def table(members: Sequence[dict[str, Any]], results: Sequence[Result]) -> NumberTable:
    """The members' ends by settings: means over seeds, with sample deviations where there are several."""
    shown = NumberTable.with_headers(
        "members",
        "beta",
        "seeds",
        "reward",
        "effective",
        "valid",
        "KL",
        "TV",
        title="how the members ended",
        lines=True,
    )
    for (label, beta), places in _by_settings(members).items():
        own = [results[i] for i in places]
        cells = [_mean([getattr(one, name) for one in own]) for name in Result._fields]
        shown.add_row(label, f"{beta:g}", str(len(own)), *cells)
    shown.caption = "KL: to the reference, nats; TV: of the answers' shares to the member's own optimum"
    return shown


def _by_settings(members: Sequence[dict[str, Any]]) -> dict[tuple[str, float], list[int]]:
    """Places of the members that differ in their seed alone, by label and beta."""
    places: dict[tuple[str, float], list[int]] = {}
    for place, (label, one) in enumerate(zip(labels(members), members, strict=True)):
        places.setdefault((label, one["beta"]), []).append(place)
    return places


def labels(members: Sequence[dict[str, Any]]) -> list[str]:
    """The method and its KL of each member, in words, with what else members differ in but beta and seed."""
    varied = [name for name in ("threshold", "learning_rate") if len({one[name] for one in members}) > 1]
    return [
        ", ".join([_method(one), *(f"{name.replace('_', ' ')} {one[name]:g}" for name in varied)]) for one in members
    ]


def _method(member: dict[str, Any]) -> str:
    words = f"MARA over {member['anchor']}s" if member["method"] == "mara" else member["method"].replace("_", " ")
    return words if member["kl"] == "reverse" else f"{words}, forward KL"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else ""
    return f"{np.mean(known):.3f}{spread}"


def draw(
    path: pathlib.Path, members: Sequence[dict[str, Any]], results: Sequence[Result], front: Sequence[int]
) -> pathlib.Path:
    """Reward against effective number of answers, a point a member, and the line through those that are Pareto-best."""
    with style():
        figure = Figure(figsize=(7.6, 5.0), dpi=150)
        ax = figure.subplots()
        label_of = labels(members)
        kinds = list(dict.fromkeys(label_of))
        betas = sorted({one["beta"] for one in members})
        for kind, colour in zip(kinds, COLOURS * len(kinds), strict=False):
            own = [i for i, label in enumerate(label_of) if label == kind]
            sizes = [28 + 26 * betas.index(members[i]["beta"]) for i in own]
            x, y = ([getattr(results[i], name) for i in own] for name in ("effective", "reward"))
            ax.scatter(x, y, s=sizes, color=colour, alpha=0.75, linewidths=0, label=kind)
        ordered = sorted(front, key=lambda i: results[i].effective)
        x, y = ([getattr(results[i], name) for i in ordered] for name in ("effective", "reward"))
        ax.plot(x, y, color=INK, linewidth=1.2, zorder=0, label="Pareto-best")
        ax.set_xlabel("effective number of answers")
        ax.set_ylabel("reward")
        sizes = f"larger dots: larger beta ({', '.join(f'{beta:g}' for beta in betas)})" if len(betas) > 1 else ""
        ax.set_title(f"{len(members)} members   {sizes}", loc="left", fontsize=11, color=QUIET)
        ax.grid(axis="x", color=GRID, linewidth=0.8)
        horizontal_grid(ax)
        ax.legend(frameon=False, fontsize=9, labelcolor=QUIET)
        figure.tight_layout()
        return save(figure, path)
