"""Says what a configuration, or a setting that other frameworks ship, really optimises; nothing is trained.

python -m mara_jax.audit --config=configs/FILE.py[:VARIANT] [--config.section.field=VALUE ...]
python -m mara_jax.audit --as=NAME [--level=sequence|token] [--config=...]
"""

import json
import sys
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from mara_jax import config
from mara_jax import main as training
from mara_jax.lab import published, verdict

EXAMPLE = "python -m mara_jax.audit --config=configs/onetwo.py:nano, or --as=grpo"
_ROWS = {
    "reverse_sequence": "reverse KL of whole strings",
    "forward_sequence": "forward KL of whole strings",
    "reverse_token": "reverse KL token by token",
    "forward_token": "forward KL token by token",
}
_FORMS = {
    "reverse": "reverse KL",
    "forward": "forward KL",
    "reverse_mara_string": "reverse KL, MARA over strings",
    "forward_mara_string": "forward KL, MARA over strings",
    "reverse_mara_answer": "reverse KL, MARA over answers",
    "forward_mara_answer": "forward KL, MARA over answers",
    "crossed": "this reward beside the other KL",
}


def main(argv: list[str]) -> int:
    """Parses flags, audits, prints; returns the exit status."""
    try:
        asked = parse(argv)
        record = audited(asked)
    except (ValueError, OSError, flags.Error) as error:
        print(f"mara_jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if asked.json:
        print(json.dumps(record))
    else:
        show(record, Console(highlight=False))
    return 0


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of this command.

    Raises:
      ValueError: an unknown flag or field, a wrong value, or nothing to audit.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "FILE.py or FILE.py:VARIANT", flag_values=values, lock_config=True, sys_argv=argv
    )
    flags.DEFINE_string("as", None, "A setting by name instead of the configuration's.", flag_values=values)
    flags.DEFINE_enum("level", None, ["sequence", "token"], "Log-ratios of --as.", flag_values=values)
    flags.DEFINE_integer("group", 2, "Strings a group.", lower_bound=1, upper_bound=4, flag_values=values)
    flags.DEFINE_bool("json", False, "Print one JSON object and nothing else.", flag_values=values)
    training.read_flags(values, argv)
    if values["config"].value is None and values["as"].value is None:
        raise ValueError(f"nothing to audit: give --config=FILE.py or --as=NAME, as in {EXAMPLE}")
    if values["level"].value and not values["as"].value:
        raise ValueError("--level goes with --as=NAME; of a configuration set --config.algorithm.level")
    return values


def audited(asked: flags.FlagValues) -> dict[str, Any]:
    """The record of what was asked for.

    Raises:
      ValueError: a config that means nothing, or a setting that is not known.
    """
    name, level = asked["as"].value, asked["level"].value
    run: config.Run | None = None
    if asked["config"].value is not None:
        run = config.build(asked["config"].value)
    one_token, refused = isinstance(run, config.ToyRun), ""
    if name is not None:
        base = run.algorithm if run else config.Algorithm(method="vanilla", anchor="string")
        setting = published.setting(name, base, level)
    else:
        assert run is not None
        setting = published.configured(config_flags.get_config_filename(asked["config"]), run.algorithm)
        refused = refusal(run)
    return verdict.audited(setting, one_token=one_token, group=int(asked["group"].value or 0), refused=refused)


def refusal(run: config.Run) -> str:
    """Why training refuses the run, or nothing."""
    try:
        config.check(run)
    except ValueError as error:
        return str(error)
    return ""


def show(record: dict[str, Any], console: Console) -> None:
    """Prints a record for people: the sentence, three short tables, and how it was computed."""
    algorithm, counted = record["algorithm"], record["enumerated"]
    console.print(f"[bold]{record['name']}[/bold]: {record['form']}")
    method = "vanilla" if algorithm["method"] == "vanilla" else f"MARA over {algorithm['anchor']}s ({algorithm['kl']})"
    console.print(f"{method}, beta {algorithm['beta']:g}, threshold {algorithm['threshold']:g}")
    console.print(f"\n[bold]Optimises {record['verdict']}.[/bold]\n")
    if record["rule"]:
        console.print(f"{record['rule']['level']} level: {record['rule']['sentence']}.")
        console.print(f"{record['rule']['other_level']} level: {record['rule']['other_sentence']}.\n")
    if record["refused"]:
        console.print(f"Training refuses this configuration: {record['refused']}\n")
    console.print(_gradients(record))
    console.print(_endings(record))
    console.print(_outcomes(record["five_outcomes"]))
    for row in record["anchor_in_group"]:
        console.print(
            f"MARA's anchor taken from groups of {row['group']}: gradient off by {row['gradient_error']:.1%}, "
            f"end {row['total_variation']:.4f} away"
        )
    console.print(
        f"{counted['strings']} strings, {counted['policies']} policies, every group of {counted['group']}, float64"
    )


def _gradients(record: dict[str, Any]) -> Table:
    table = Table(title="Expected gradient against that of", title_justify="left")
    for title in ("", "KL alone: cosine", "off by", "E\\[R] - beta KL: cosine", "off by"):
        table.add_column(title, justify="left" if not title else "right")
    for name, words in _ROWS.items():
        cells = []
        for part in ("kl", "objective"):
            found = record["gradients"][part][name]
            cells += ["-" if found["cosine"] is None else f"{found['cosine']:.4f}", verdict.percent(found)]
        table.add_row(words, *cells)
    return table


def _endings(record: dict[str, Any]) -> Table:
    end = record["stationary"]
    title = {
        "settled": "Where training from the reference ends: total variation to the optimum of",
        "runs_away": "It does not end; where it was left: total variation to the optimum of",
        "unsettled": "Not settled within the search; where it stands: total variation to the optimum of",
    }[end["kind"]]
    table = Table(title=title, title_justify="left", show_header=False)
    vanilla = record["algorithm"]["method"] == "vanilla"
    for name, distance in end["total_variation"].items():
        if not vanilla or "mara" not in name:
            table.add_row(_FORMS[name], f"{distance:.4f}", "<-" if name == end["nearest"] else "")
    return table


def _outcomes(five: dict[str, Any]) -> Table:
    table = Table(title="On five outcomes it ends at", title_justify="left", show_header=False)
    table.add_row("reward", *(f"{r:g}" for r in five["reward"]))
    for name, words in (("reference", "reference"), ("vanilla", "without MARA"), ("mara", "with MARA over strings")):
        note = (
            "" if five.get(f"{name}_kind", "settled") == "settled" else f" ({five[name + '_kind'].replace('_', ' ')})"
        )
        table.add_row(words + note, *(f"{p:.4f}" for p in five[name]))
    return table


if __name__ == "__main__":
    # Tiny sums in float64: an accelerator would be slower, not every one has float64, and compiling takes longest.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_disable_most_optimizations", True)
    sys.exit(main(sys.argv))
