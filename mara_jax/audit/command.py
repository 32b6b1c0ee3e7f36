"""The audit command: what a configuration, or a setting that other frameworks ship, really optimises."""

import json
from typing import Any

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.markup import escape

from mara_jax import cli, config, tasks
from mara_jax.audit import computation, published, rivals_table, verdict
from mara_jax.audit.verdict import REACHED
from mara_jax.cli import Flag
from mara_jax.core import method_rules, methods
from mara_jax.train import preflight, reference
from mara_jax.train.tables import NumberTable

COMMAND = cli.Command(
    name="audit",
    purpose="""Compares the expected gradient of a configuration, or of a setting that other frameworks ship, with the
    exact gradients of E[R] - beta KL on a policy small enough to enumerate, follows it to where it ends, and says in
    one sentence what it optimises. Nothing is trained.""",
    examples=(
        "python -m mara_jax.audit --config=configs/digits.py",
        "python -m mara_jax.audit --as=grpo",
        "python -m mara_jax.audit --as=k3_in_loss --level=sequence --json",
    ),
    flags=(
        Flag("as", "NAME", "a method, an estimator or what frameworks ship, by name; --config, if given, gives beta, "
             "threshold, direction and, where the name leaves them open, MARA and baseline",
             choices=published.NAMES),
        Flag("level", "LEVEL", "log-ratios of whole strings or of tokens, for the estimators among the names",
             choices=config.LEVELS),
        Flag("group", "N", "strings a group", default=2, kind=int, least=1, most=4),
        Flag("json", "", "print one JSON object and nothing else", default=False, kind=bool),
        Flag("rivals", "", "print where other methods end (docs/methods.md), each alone and with MARA; it "
             "takes half a minute", default=False, kind=bool),
    ),
    configs=(config.LanguageRun, config.ToyRun),
)  # fmt: skip
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
    "own": "this method's, in closed form",
    "crossed": "the other KL beside this reward",
}


def main(argv: list[str]) -> int:
    """Audits and prints; returns the exit status."""
    return cli.run(COMMAND, audit, argv)


def audit(argv: list[str]) -> int:
    """Audits what the command line asks for.

    Raises:
      ValueError: one line.
    """
    values = parse(argv)
    if values.rivals:
        print(rivals_table.markdown(rivals_table.endings()))
        return 0
    record = record_of(values)
    if values.json:
        print(json.dumps(record, allow_nan=False))
    else:
        show(record, Console(highlight=False))
    return 0


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of this command.

    Raises:
      ValueError: an unknown flag or field, a wrong value, or nothing to audit.
    """
    values = cli.parse(COMMAND, argv)
    if values["rivals"].value:
        beside = [f"--{name}" for name in ("config", "as", "level", "json") if values[name].present]
        if beside:
            raise ValueError(f"{beside[0]} has no meaning with --rivals, which prints one table: leave it out")
        return values
    if values["config"].value is None and values["as"].value is None:
        raise ValueError(f"nothing to audit: give --config=FILE.py or --as=NAME, as in {COMMAND.examples[0]}")
    if values["level"].value and not values["as"].value:
        raise ValueError("--level goes with --as=NAME; of a configuration set --config.algorithm.level")
    return values


def record_of(values: flags.FlagValues) -> dict[str, Any]:
    """The audit that the flags ask for.

    Raises:
      ValueError: a config that means nothing, or a setting that is not known.
    """
    name, level = values["as"].value, values["level"].value
    run: config.Run | None = None
    if values["config"].value is not None:
        run = config.build(values["config"].value)
        _refuse_moving_threshold(run)
    one_token, refused, notes = isinstance(run, config.ToyRun), "", []
    if name is not None:
        base = run.algorithm if run else config.Algorithm(method="vanilla", anchor="string")
        setting = published.setting(name, base, level)
    else:
        assert run is not None
        setting = published.configured(config_flags.get_config_filename(values["config"]), run.algorithm)
        refused = refusal(run)
        if isinstance(run, config.LanguageRun):
            notes = reference.left_out(run, getattr(run.task, "truncated", "") == "mask")
    return {"left_out": notes} | computation.audit(setting, one_token=one_token, group=values.group, refused=refused)


def _refuse_moving_threshold(run: config.Run) -> None:
    if method_rules.moves_threshold(run.algorithm):
        raise ValueError(
            f"algorithm.threshold_percentile={run.algorithm.threshold_percentile:g} moves the threshold with the "
            "policy, and an audit is of one objective, at a constant one: add "
            "--config.algorithm.threshold_percentile=0 (each step is that of the objective at its own threshold: "
            "docs/moving_thresholds.md)"
        )


def refusal(run: config.Run) -> str:
    """Why training refuses the run, or nothing."""
    try:
        config.check(run)
        if isinstance(run, config.LanguageRun):
            preflight.check_task(run, tasks.make(run))
    except ValueError as error:
        return str(error)
    return ""


def show(record: dict[str, Any], console: Console) -> None:
    """Prints a record for people: the sentence, short tables, and how it was computed."""
    algorithm, counted = record["algorithm"], record["enumerated"]
    anchor = methods.TRANSFORMS[algorithm["transform"]].anchor
    plain = "vanilla" if algorithm["objective"] == "policy_gradient" else "rewards as they are"
    other = plain if algorithm["transform"] == "none" else algorithm["transform"].replace("_", " ")
    method = f"MARA over {anchor}s ({algorithm['kl']})" if anchor else other
    console.print(f"[bold]{escape(record['name'])}[/bold]: {record['form']}")
    console.print(f"{method}, beta {algorithm['beta']:g}, threshold {algorithm['threshold']:g}")
    console.print(f"\n[bold]Verdict: {escape(record['verdict'])}.[/bold]\n")
    for note in record["left_out"]:
        console.print(f"But {note}.\n", markup=False)
    if rule := record["rule"]:
        console.print(f"At {rule['level']} level, as here: {rule['sentence']}.")
        if rule["other_sentence"] != rule["sentence"]:
            console.print(f"At {rule['other_level']} level: {rule['other_sentence']}.")
        console.print()
    if record["refused"]:
        console.print(f"Training refuses this configuration: {escape(record['refused'])}.\n")
    tables = [_gradients(record), _endings(record), _outcomes(record["five_outcomes"])]
    tables += [_stale(record["stale"])] if record["stale"] else []
    tables += [_anchors(record["anchor_in_group"])] if record["anchor_in_group"] else []
    for table in tables:
        # A table's own title is broken at the table's width; a line of its own is not.
        console.print(table.title)
        table.title = None
        console.print(table)
    console.print(
        f"\nComputed from all {counted['strings']} strings of a small policy, at {counted['policies']} policies, "
        f"over every group of {counted['group']}, in float64."
    )


def _gradients(record: dict[str, Any]) -> NumberTable:
    title = "Expected gradient against the exact one: cosine, and how far off (three policies)"
    table = NumberTable.with_headers("", "KL alone", "off by", "E\\[R] - beta KL", "off by", title=title)
    for name, words in _ROWS.items():
        cells = []
        for part in ("kl", "objective"):
            comparison = record["gradients"][part][name]
            cosine = comparison["cosine"]
            cells += ["-" if cosine is None else f"{cosine:.4f}", verdict.percent(comparison)]
        table.add_row(f" {words}", *cells)
    return table


def _endings(record: dict[str, Any]) -> NumberTable:
    end = record["stationary"]
    note = {"settled": "", "runs_away": " (it has no end; where it was left)", "unsettled": " (not settled)"}
    title = f"\nTotal variation between where it ends{note[end['kind']]} and the optimum of"
    table = NumberTable.with_headers("", "", "", title=title)
    for name, distance in end["total_variation"].items():
        table.add_row(f" {_FORMS[name]}", f"{distance:.4f}", "<-" if distance < REACHED else "")
    return table


def _outcomes(five: dict[str, Any]) -> NumberTable:
    table = NumberTable.with_headers(
        *[""] * (1 + len(five["reward"])), title="\nOn five outcomes of one token it ends at"
    )
    table.add_row(" reward", *(f"{r:g}" for r in five["reward"]))
    for name, words in (("reference", "reference"), ("vanilla", "without MARA"), ("mara", "with MARA over strings")):
        if name not in five:
            continue
        kind = five.get(f"{name}_kind", "settled")
        note = "" if kind == "settled" else f" ({kind.replace('_', ' ')})"
        table.add_row(f" {words}{note}", *(f"{p:.4f}" for p in five[name]))
    return table


def _stale(rows: list[dict[str, Any]]) -> NumberTable:
    """Gradients on strings that the present policy did not draw."""
    title = "\nExpected gradient of E\\[R] - beta KL on strings drawn elsewhere, against the present policy's"
    table = NumberTable.with_headers(" what lies between", "nats", "effective strings", "cosine", "off by", title=title)
    words = {"updates": "earlier updates", "sampler": "the sampler's own numbers"}
    for row in rows:
        cells = f"{row['nats']:.2g}", f"{row['effective_share']:.0%}", f"{row['cosine']:.4f}", verdict.percent(row)
        table.add_row(f" {words[row['between']]}", *cells)
    return table


def _anchors(rows: list[dict[str, Any]]) -> NumberTable:
    """What is lost by Algorithm 1's anchor, which is the best of the group and not of all good strings."""
    table = NumberTable.with_headers("", "", "", "", title="\nMARA's anchor taken from the group")
    for row in rows:
        gradient, distance = f"{row['gradient_error']:.1%}", f"{row['total_variation']:.4f}"
        table.add_row(f" of {row['group']}: gradient off by", gradient, "ends away by", distance)
    return table
