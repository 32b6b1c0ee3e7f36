"""The mode ledger of a run as it left it: a line, a table of the answers furthest below the optimum, a figure."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.markup import escape

from mara_jax.core.modes import SHARE
from mara_jax.plot_style import GRID, OWN, QUIET, horizontal_grid, save, style
from mara_jax.train import mode_ledger
from mara_jax.train.tables import NumberTable

SHOWN = 12  # answers in the table
LOST = "#be123c"
_FIELDS = {"prompt_id", "window", "completions", "answers"}


class Answer(NamedTuple):
    """A good answer of the ledger: number of its prompt, completions in the window there, and its fields."""

    prompt_id: int
    window: int
    fields: dict[str, Any]


def read(workdir: Path) -> list[dict[str, Any]]:
    """The prompts of a ledger; none where the run has written no ledger.

    Raises:
      ValueError: a line that is no prompt's.
    """
    path, prompts = workdir / mode_ledger.FILE, []
    cure = "delete the file, and a resumed run writes it again"
    for number, row in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            prompts.append(json.loads(row))
        except json.JSONDecodeError:
            raise ValueError(f"{path}, line {number} is not JSON: {cure}") from None
        if not isinstance(prompts[-1], dict) or not prompts[-1].keys() >= _FIELDS:
            raise ValueError(f"{path}, line {number} is no prompt's: {cure}")
    return prompts


def answers_of(prompts: list[dict[str, Any]]) -> list[Answer]:
    """The good answers: lost ones first, then by how far the policy is below the optimum, then those without one."""
    answers = [Answer(one["prompt_id"], one["window"], fields) for one in prompts for fields in one["answers"]]
    return sorted(answers, key=lambda one: (not one.fields["lost"], _ratio(one.fields)))


def _ratio(fields: dict[str, Any]) -> float:
    return fields["policy"] / fields["optimum"] if fields["optimum"] else math.inf


def line(prompts: list[dict[str, Any]]) -> str:
    """What the ledger counts, in words."""
    answers = answers_of(prompts)
    lost = sum(one.fields["lost"] for one in answers)
    known = f"good answers: {len(answers)} of {len(prompts)} prompts, {lost} lost"
    if not any(one.fields["optimum"] is not None for one in answers):
        return f"{known} (no mass at the optimum is known, without which none counts as lost)"
    return known


def table(prompts: list[dict[str, Any]]) -> NumberTable:
    """The answers that are furthest below the optimum."""
    answers = answers_of(prompts)
    headers = ("prompt", "good answer", "reference", "policy", "optimum", "first step", "last step", "")
    shown = NumberTable.with_headers(*headers, texts=2, lines=True, title=line(prompts))
    for one in answers[:SHOWN]:
        masses = (f"{fields:.3f}" if fields is not None else "-" for fields in map(one.fields.get, headers[2:5]))
        steps = ("-" if one.fields[name] is None else str(one.fields[name]) for name in ("first_step", "last_step"))
        shown.add_row(
            str(one.prompt_id),
            escape(" ".join(one.fields["answer"].split())),
            *masses,
            *steps,
            "lost" if one.fields["lost"] else "",
        )
    shown.caption = (
        f"masses: shares of the completions; policy: of a prompt's latest, {mode_ledger.WINDOW} of them or more"
    )
    if len(answers) > SHOWN:
        shown.caption += f"\n{len(answers) - SHOWN} more in {mode_ledger.FILE}"
    return shown


def figure(workdir: Path, prompts: list[dict[str, Any]]) -> Path | None:
    """Draws modes.png (and .svg): the policy's mass of each good answer against that at the optimum.

    Returns:
      Its path; None, and nothing is drawn, where no mass at the optimum is known.
    """
    known = [one for one in answers_of(prompts) if one.fields["optimum"]]
    if not known:
        return None
    least = min([one.fields["optimum"] for one in known] + [0.5 / one.window for one in known]) / 2
    with style():
        drawn = Figure(figsize=(6.4, 5.0), dpi=150)
        ax = drawn.subplots()
        for words, lost, colour in (("not lost", False, OWN), ("lost", True, LOST)):
            some = [one for one in known if one.fields["lost"] == lost]
            x = [one.fields["optimum"] for one in some]
            y = [max(one.fields["policy"], 0.5 / one.window) for one in some]
            ax.scatter(x, y, s=26, color=colour, alpha=0.6, linewidths=0, label=f"{len(some)} {words}")
        ax.plot([least, 1], [least, 1], color=QUIET, linewidth=1)
        ax.plot([least, 1], [SHARE * least, SHARE], color=QUIET, linewidth=1, linestyle=":", label="a tenth of it")
        ax.set(xscale="log", yscale="log", xlim=(least, 1.2), ylim=(SHARE * least, 1.2))
        ax.set_xlabel("mass at the run's optimum")
        ax.set_ylabel("mass under the policy (unseen: half a completion)")
        ax.set_title("a dot for each good answer whose optimum is known", loc="left", fontsize=11)
        ax.grid(axis="x", color=GRID, linewidth=0.8)
        horizontal_grid(ax)
        ax.legend(frameon=False, fontsize=9, labelcolor=QUIET, loc="upper left")
        drawn.tight_layout()
        return save(drawn, workdir / "modes.png")
