"""Plans a run for devices that need not be there: memory, fit, largest batch, work, exchanges, mesh; nothing is run.

python -m mara_jax.plan --config=configs/FILE.py[:VARIANT] --topology=v5e:4x4 [--config.section.field=VALUE ...]

--topology       v5e:4x4, v5p:4x4x4, v6e:4x4 (TPU chips), h100:8 (GPUs of one node) or cpu:8 (simulated devices)
--shape          the policy has the shape of qwen2.5-0.5b, -3b, -7b or -32b, whatever policy.weights says
--prompt_tokens  of the longest prompt; from the tokenizer unless told, or the prompt's bytes where there is none
--suggested      plan for the mesh that plan suggests instead of the config's
--largest        also find the largest batch that fits, in groups: compiles several batches more
--json           print one JSON object and nothing else
"""

import dataclasses
import json
from typing import Any

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from mara_jax import cli, config
from mara_jax.train.tables import NumberTable

EXAMPLE = "python -m mara_jax.plan --config=configs/onetwo.py:nano --topology=cpu:8"


def main(argv: list[str]) -> int:
    """Parses flags, plans, prints; returns the exit status: 0 also where a run does not fit."""
    if "--help" in argv[1:]:
        print(__doc__)
        return 0
    try:
        asked = parse(argv)
        from mara_jax.plan import planning  # imports what jax needs, once its devices are known

        record = planning.plan(*wanted(asked))
    except (ValueError, OSError, flags.Error) as error:
        return cli.refused(error)
    print(json.dumps(record, allow_nan=False)) if asked.json else show(record, Console(highlight=False))
    return 0


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of this command.

    Raises:
      ValueError: an unknown flag or field, a wrong value, no configuration or no topology.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "FILE.py or FILE.py:VARIANT", flag_values=values, lock_config=True, sys_argv=argv
    )
    flags.DEFINE_string("topology", None, "KIND:SIZE.", flag_values=values)
    flags.DEFINE_string("shape", None, "A published model's.", flag_values=values)
    flags.DEFINE_integer("prompt_tokens", None, "Of the longest prompt.", lower_bound=1, flag_values=values)
    for name in ("suggested", "largest", "json"):
        flags.DEFINE_bool(name, False, "See the top of this file.", flag_values=values)
    cli.read_flags(values, argv)
    for name in ("config", "topology"):
        if values[name].value is None:
            raise ValueError(f"--{name} is missing: {EXAMPLE}")
    return values


def wanted(asked: flags.FlagValues) -> tuple[Any, ...]:
    """The run, the topology and the choices that `planning.plan` takes.

    Raises:
      ValueError: a configuration that cannot run or is the toy's, an unknown topology or shape, a missing compiler.
    """
    from mara_jax.hf import shapes
    from mara_jax.plan import chips

    topology = chips.parse(asked.topology)
    run = config.resolve(asked.config)
    if not isinstance(run, config.LanguageRun):
        raise ValueError("the toy needs no plan: give a language model's configuration, as in configs/onetwo.py:smol")
    if asked.shape is not None:
        if asked.shape not in shapes.PUBLISHED:
            raise ValueError(f"--shape={asked.shape!r} is not known: choose one of {', '.join(shapes.PUBLISHED)}")
        run = dataclasses.replace(run, policy=dataclasses.replace(run.policy, weights=asked.shape))
    chips.simulate(topology)
    return run, topology, asked.prompt_tokens, asked.suggested, asked.largest


def show(record: dict[str, Any], console: Console) -> None:
    """Prints a record for people."""
    chip, shape, mesh = record["chip"], record["shape"], record["mesh"]
    console.print(
        f"[bold]{record['policy']}[/bold]: {shape['parameters'] / 1e6:,.1f} M parameters in {record['dtype']}, remat "
        f"{record['remat']}; {shape['prompts']} groups of {shape['group']} completions ({shape['new_tokens']} tokens "
        f"after {shape['prompt_tokens']})"
    )
    console.print(
        f"{record['topology']}: {record['devices']} x {chip['name']} with {_gib(chip['memory'])} each; mesh "
        f"data={mesh['data']} fsdp={mesh['fsdp']} tensor={mesh['tensor']}\n"
    )
    _show_memory(record, console)
    _show_work(record, console)
    _show_exchanges(record, console)
    console.print(f"\n{record['verdict']}", soft_wrap=True)


def _show_memory(record: dict[str, Any], console: Console) -> None:
    phases = record["phases"]
    most = max(row["memory"]["total"] for row in phases.values())
    unit, size = ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)
    names = list(next(iter(phases.values()))["memory"])
    table = _table(console, f"Memory of one device, {unit}", *names)
    for phase, row in phases.items():
        table.add_row(phase, *(f"{row['memory'][name] / size:.2f}" for name in names))
    console.print(table)
    for phase, row in phases.items():
        if row["told"] != "compiled":
            console.print(f"  {phase}: {row['told']}")


def _table(console: Console, title: str, *headers: str) -> NumberTable:
    console.print(f"[italic]{title}[/italic]")
    return NumberTable.of("", *headers)


def _show_work(record: dict[str, Any], console: Console) -> None:
    headers = "TFLOP", "GB moved, at least", "GB sent", "floor", "bound by"
    table = _table(console, "\nWork of one device", *headers)
    for phase, row in record["phases"].items():
        cells = [f"{row['flops'] / 1e12:,.4g}", f"{row['bytes_least'] / 1e9:,.4g}", f"{row['sent'] / 1e9:,.4g}"]
        floor = row["floor_s"]
        bound = max(floor, key=floor.__getitem__) if floor else "-"
        table.add_row(phase, *cells, f"{floor[bound]:.3g} s" if floor else "-", bound)
    console.print(table)


def _show_exchanges(record: dict[str, Any], console: Console) -> None:
    if not any(row["collectives"] for row in record["phases"].values()):
        return
    headers = "devices", "times", "MB each", "GB sent"
    table = _table(console, "\nCollectives, the heaviest of each phase", *headers)
    for phase, row in record["phases"].items():
        for one in row["collectives"][:4]:
            name = f"{phase} {one['kind']}{' in a loop' if one['looped'] else ''}"
            table.add_row(
                name, str(one["group"]), f"{one['count']:,}", f"{one['bytes'] / 1e6:,.3f}", f"{one['sent'] / 1e9:,.4g}"
            )
    console.print(table)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.2f} MiB"
