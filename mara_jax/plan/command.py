"""The plan command: memory, fit, largest batch, work and collectives of a run on devices that need not be there."""

import dataclasses
import json
from typing import Any

from absl import flags
from rich.console import Console

from mara_jax import cli, config
from mara_jax.cli import Flag
from mara_jax.train.tables import NumberTable

COMMAND = cli.Command(
    name="plan",
    purpose="""Compiles the programs of a run for a topology of devices, which need not be there, and reads off them how
    much memory a device needs, whether the run fits, what each device computes, moves and sends, and which mesh would
    do better. Nothing is run.""",
    examples=(
        "python -m mara_jax.plan --config=configs/digits.py --topology=cpu:8",
        "python -m mara_jax.plan --config=configs/digits.py --topology=v5e:4x4",
    ),
    flags=(
        Flag("topology", "KIND:SIZE", "v5e:4x4, v5p:4x4x4, v6e:4x4 (TPU chips), h100:8 (GPUs of one node) or cpu:8 "
             "(simulated devices)"),
        Flag("shape", "NAME", "of the policy, as qwen2.5-0.5b, -3b, -7b, -32b or qwen3-1.7b, whatever policy.weights "
             "says"),
        Flag("prompt_tokens", "N", "of the longest prompt; counted by the tokenizer, or the prompt's bytes where there "
             "is none, unless given", kind=int, least=1),
        Flag("suggested", "", "plan for the mesh that plan suggests instead of the configuration's", False, bool),
        Flag("largest", "", "also find the largest batch that fits, in groups: compiles several more", False, bool),
        Flag("json", "", "print one JSON object and nothing else", False, bool),
    ),
    configs=(config.LanguageRun,),
    required=("config", "topology"),
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Plans and prints; returns the exit status: 0 also where a run does not fit."""
    return cli.run(COMMAND, plan, argv)


def plan(argv: list[str]) -> int:
    """Plans what the command line asks for.

    Raises:
      ValueError, OSError: one line.
    """
    values = parse(argv)
    from mara_jax.plan import planning  # imports what jax needs, once its devices are known

    record = planning.plan(*arguments(values))
    if values.json:
        print(json.dumps(record, allow_nan=False))
    else:
        show(record, Console(highlight=False))
    return 0


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of this command; errors as of `cli.parse`."""
    return cli.parse(COMMAND, argv)


def arguments(values: flags.FlagValues) -> tuple[Any, ...]:
    """The run, the topology and the choices that `planning.plan` takes.

    Raises:
      ValueError: a configuration that cannot run or is the toy's, an unknown topology or shape, a missing compiler.
    """
    from mara_jax.hf import shapes
    from mara_jax.plan import chips

    topology = chips.parse(values.topology)
    run = config.resolve(values.config)
    if not isinstance(run, config.LanguageRun):
        raise ValueError("the toy needs no plan: give a language model's configuration, as in configs/digits.py")
    if values.shape is not None:
        if values.shape not in shapes.PUBLISHED:
            raise ValueError(f"--shape={values.shape!r} is not known: choose one of {', '.join(shapes.PUBLISHED)}")
        run = dataclasses.replace(run, policy=dataclasses.replace(run.policy, weights=values.shape))
    if config.is_population(run) and (values.suggested or values.largest):
        raise ValueError("--suggested and --largest are for single runs: a population's members lie on one device each")
    chips.simulate(topology)
    return run, topology, values.prompt_tokens, values.suggested, values.largest


def show(record: dict[str, Any], console: Console) -> None:
    """Prints a record for people."""
    chip, shape, mesh = record["chip"], record["shape"], record["mesh"]
    members = f"{shape['members']} members side by side, each " if shape["members"] else ""
    console.print(
        f"[bold]{record['policy']}[/bold]: {shape['parameters'] / 1e6:,.1f} M parameters in {record['dtype']}, remat "
        f"{record['remat']}; {members}{shape['prompts']} groups of {shape['group']} completions "
        f"({shape['new_tokens']} tokens after {shape['prompt_tokens']})"
    )
    scoring = record["reward_model"]
    if scoring is not None:
        console.print(
            f"scored by {scoring['where']}: {scoring['parameters'] / 1e6:,.1f} M parameters in {scoring['dtype']}, in "
            f"{record['phases']['scores']['calls']} calls a step",
            markup=False,
        )
    console.print(
        f"{record['topology']}: {record['devices']} x {chip['name']} with {_gib(chip['memory'])} each; mesh "
        f"data={mesh['data']} fsdp={mesh['fsdp']} tensor={mesh['tensor']}\n"
    )
    _show_memory(record, console)
    _show_work(record, console)
    _show_collectives(record, console)
    console.print(f"\n{record['verdict']}", soft_wrap=True)


def _show_memory(record: dict[str, Any], console: Console) -> None:
    phases = record["phases"]
    most = max(row["memory"]["total"] for row in phases.values())
    unit, size = ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)
    names = [name for name in next(iter(phases.values()))["memory"] if name != "reward_model" or record["reward_model"]]
    table = _table(console, f"Memory of one device, {unit}", *(name.replace("_", " ") for name in names))
    for phase, row in phases.items():
        table.add_row(phase, *(f"{row['memory'][name] / size:.2f}" for name in names))
    console.print(table)
    for phase, row in phases.items():
        if row["told"] != "compiled":
            console.print(f"  {phase}: {row['told']}")


def _table(console: Console, title: str, *headers: str) -> NumberTable:
    console.print(f"[italic]{title}[/italic]")
    return NumberTable.with_headers("", *headers)


def _show_work(record: dict[str, Any], console: Console) -> None:
    headers = "TFLOP", "GB moved, at least", "GB sent", "floor", "bound by"
    table = _table(console, "\nWork of one device", *headers)
    for phase, row in record["phases"].items():
        cells = [f"{row['flops'] / 1e12:,.4g}", f"{row['bytes_least'] / 1e9:,.4g}", f"{row['sent'] / 1e9:,.4g}"]
        floor = row["floor_s"]
        bound = max(floor, key=floor.__getitem__) if floor else "-"
        table.add_row(phase, *cells, f"{floor[bound]:.3g} s" if floor else "-", bound)
    console.print(table)


def _show_collectives(record: dict[str, Any], console: Console) -> None:
    if not any(row["collectives"] for row in record["phases"].values()):
        return
    headers = "devices", "times", "MB each", "GB sent"
    table = _table(console, "\nCollectives, the heaviest of each phase", *headers)
    for phase, row in record["phases"].items():
        for collective in row["collectives"][:4]:
            numbers = (
                f"{collective['count']:,}",
                f"{collective['bytes'] / 1e6:,.3f}",
                f"{collective['sent'] / 1e9:,.4g}",
            )
            name = f"{phase} {collective['kind']}{' in a loop' if collective['looped'] else ''}"
            table.add_row(name, str(collective["group"]), *numbers)
    console.print(table)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.2f} MiB"
