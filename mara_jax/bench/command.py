"""Measures a training step: tokens a second, FLOPs against the least, against this machine's matmul; nothing is learnt.

python -m mara_jax.bench --model=tiny|small|smol|SHAPE [--prompt=64] [--new=64] [--group=8] [--samples=32]
                         [--dtype=bfloat16] [--remat=layer] [--micro_batches=1]
python -m mara_jax.bench --config=configs/FILE.py[:VARIANT] [--config.section.field=VALUE ...]

--model     tiny (4 layers, 256 wide, 2,048 words) or small (12, 512, 8,192): Qwen2-shaped, random weights; or smol:
            SmolLM2-135M; or a published shape with random weights, its layers scanned: qwen2.5-0.5b, -3b, -7b, -32b.
            Random prompts; completions never end, so that every run does the same work.
--dtype     of the model's matmuls: float32 or bfloat16; of --model, as are --remat (none, elementwise or layer) and
            --micro_batches
--config    the configuration's policy, prompts, sizes and optimiser; completions end where they end
--repeats   timed steps after the one that compiles; medians are printed (5)
--threads   cores of the CPU that may be used (1); 0: all
--json      print one JSON object and nothing else
--out=DIR   also write it to DIR/bench.json
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags
from rich.console import Console

from mara_jax import cli, config, hf
from mara_jax.bench import phases, speed
from mara_jax.hf import shapes
from mara_jax.policies import parameters, transformer
from mara_jax.train import preflight
from mara_jax.train.tables import NumberTable

EXAMPLE = "python -m mara_jax.bench --model=tiny, or --config=configs/onetwo.py:smol"
SHAPE = {"prompt": 64, "new": 64, "group": 8, "samples": 32, "micro_batches": 1}
COMPUTED = {
    "dtype": ("float32", ("float32", "bfloat16")),
    "remat": ("none", parameters.REMAT),
}
SMOL = "smollm2-135m-instruct"


def main(argv: list[str]) -> int:
    """Parses flags, measures, prints; returns the exit status."""
    if "--help" in argv[1:]:
        print(__doc__)
        return 0
    try:
        asked = parse(argv)
        use_threads(asked.threads)
        out = writable(asked.out)
        case, params = wanted(asked)
    except (ValueError, OSError, flags.Error) as error:
        return cli.refused(error)
    record = {"threads": asked.threads or available(), **speed.measure(case, params, asked.repeats)}
    record["load"] = round(os.getloadavg()[0], 2)
    text = json.dumps(record, allow_nan=False)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").write_text(text + "\n")
    if asked.json:
        print(text)
    else:
        show(record, Console(highlight=False))
    return 0


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of this command.

    Raises:
      ValueError: an unknown flag or field, a wrong value, nothing to measure, a group that does not divide.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "FILE.py or FILE.py:VARIANT", flag_values=values, lock_config=True, sys_argv=argv
    )
    flags.DEFINE_enum("model", None, [*phases.SIZES, "smol", *shapes.PUBLISHED], "A model by name.", flag_values=values)
    for name in SHAPE:
        flags.DEFINE_integer(name, None, "Of --model.", lower_bound=1, flag_values=values)
    for name, (_, choices) in COMPUTED.items():
        flags.DEFINE_enum(name, None, choices, "Of --model.", flag_values=values)
    flags.DEFINE_integer("repeats", 5, "Timed steps.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("threads", 1, "Cores; 0: all.", lower_bound=0, flag_values=values)
    flags.DEFINE_bool("json", False, "Print one JSON object and nothing else.", flag_values=values)
    flags.DEFINE_string("out", None, "Folder for bench.json.", flag_values=values)
    cli.read_flags(values, argv)
    if (values["config"].value is None) == (values["model"].value is None):
        raise ValueError(f"give either --model=NAME or --config=FILE.py, as in {EXAMPLE}")
    defaults = SHAPE | {name: usual for name, (usual, _) in COMPUTED.items()}
    given = [name for name in defaults if values[name].value is not None]
    if given and values["model"].value is None:
        raise ValueError(f"--{given[0]} goes with --model; of a configuration set its own field")
    for name, size in defaults.items():
        if name not in given:
            values[name].value = size
    for whole, part in (("samples", "group"), ("group", "micro_batches")):
        counts = int(values[whole].value or 0), int(values[part].value or 1)
        if counts[0] % counts[1]:
            raise ValueError(f"--{whole}={counts[0]} is no multiple of --{part}={counts[1]}: choose one that is")
    return values


def use_threads(count: int) -> None:
    """Keeps the process on so many cores; to be called before jax starts its CPU backend.

    Raises:
      ValueError: more than there are.
    """
    if count > available():
        raise ValueError(f"--threads={count}: this process may use {available()} cores; ask for at most that, or 0")
    if count and hasattr(os, "sched_setaffinity"):
        # jax makes as many threads as the process has cores when its backend starts.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def available() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def writable(out: str | None) -> pathlib.Path | None:
    """The folder to write to, or None.

    Raises:
      ValueError: a path that is a file.
    """
    if out is not None and pathlib.Path(out).exists() and not pathlib.Path(out).is_dir():
        raise ValueError(f"--out={out} is not a folder: choose another")
    return None if out is None else pathlib.Path(out)


def wanted(asked: flags.FlagValues) -> tuple[phases.Case, Any]:
    """The case to measure, and its parameters.

    Raises:
      ValueError: a configuration that cannot run, or is the toy's.
    """
    if asked["config"].value is not None:
        return _configured(asked.config)
    computed = {"compute_dtype": asked.dtype, "remat": asked.remat}
    if asked.model == "smol":
        policy, params = hf.load(SMOL, **computed)
        # No end token: every completion has its full length.
        policy = dataclasses.replace(policy, eos_ids=())
    else:
        policy = phases.random_policy(asked.model, **computed)
        params = transformer.init(policy.architecture, jax.random.key(0))
    prompts = phases.random_prompts(policy.architecture.vocab_size, asked.samples // asked.group, asked.prompt)
    optimiser = config.Optimiser(micro_batches=asked.micro_batches)
    case = phases.Case(asked.model, policy, prompts, asked.group, asked.new, optimiser=optimiser)
    return case, params


def _configured(fields: Any) -> tuple[phases.Case, Any]:
    run = config.resolve(fields)
    if not isinstance(run, config.LanguageRun):
        raise ValueError(
            "the toy has no language model to measure: give a configuration such as configs/onetwo.py:smol"
        )
    preflight.check_threshold(run)
    if run.lora.rank:
        raise ValueError(
            f"lora.rank={run.lora.rank}: bench times the training of all weights, and its least work is that: add "
            "--config.lora.rank=0"
        )
    for name, value, only in (("rollout.slots", run.rollout.slots, 0), ("optimiser.updates", run.optimiser.updates, 1)):
        if value != only:
            raise ValueError(
                f"{name}={value}: bench times all rows drawn at once and one update: add --config.{name}={only}"
            )
    if config.estimator_of(run.algorithm) == "reference_samples":
        raise ValueError(
            "algorithm.estimator=reference_samples makes two rollouts a step, and bench times one: "
            "add --config.algorithm.kl=reverse, or --config.algorithm.estimator=ratio"
        )
    from mara_jax.tasks import onetwo
    from mara_jax.train import loop, reference

    task = onetwo.OneTwo(**dataclasses.asdict(run.task))
    policy, params = reference.load_base(run, task)
    encoded = reference.prompt_tokens(policy, task, run.policy.chat)
    case = phases.Case(
        run.policy.weights,
        policy,
        [encoded[i] for i in loop.prompt_ids(run, len(encoded), 0)],
        run.rollout.group_size,
        run.rollout.max_new_tokens,
        run.rollout.length_buckets,
        run.algorithm,
        run.optimiser,
    )
    return case, params


def show(record: dict[str, Any], console: Console) -> None:
    """Prints a record for people."""
    shape, machine, decode = record["shape"], record["machine"], record["decode"]
    unit = "CPU s" if record["clock"] == "cpu_s" else "s"
    console.print(
        f"[bold]{record['case']}[/bold]: {shape['parameters'] / 1e6:.1f} M parameters; {shape['prompts']} prompts "
        f"({shape['prompt_tokens']} tokens), {shape['samples']} completions in groups of {shape['group']} "
        f"({shape['new_tokens']} tokens)"
    )
    console.print(f"{record['backend']}, {record['threads']} threads; load {record['load']:g}; medians\n")
    table = NumberTable.of("", unit, f"tokens/{unit}", "GFLOP", "of least", f"GFLOP/{unit}", "of matmul")
    for name in phases.NAMES:
        row = record["phases"][name]
        cells = [f"{row['seconds']:.3f}", f"{row['tokens_per_s']:,.0f}", f"{row['flops'] / 1e9:.1f}"]
        cells += [f"x {row['flops_over_least']:.3f}", f"{row['gflops_per_s']:.1f}", f"{row['of_matmul']:.0%}"]
        table.add_row(name, *cells)
    table.add_row("step", f"{record['phases']['step']['seconds']:.3f}")
    console.print(table)
    console.print(
        f"\na plain matmul of the model's shapes: {machine['matmul_gflops_per_s']:.1f} GFLOP/{unit} on a step's tokens,"
        f" {machine['matmul_decode_gflops_per_s']:.1f} on {shape['samples']} rows (for the rollout)"
    )
    if decode["steps"]:
        console.print(
            f"decoding: {decode['steps']} steps of {1000 * decode['seconds_per_step']:.2f} ms reading "
            f"{decode['bytes_per_step'] / 1e6:.1f} MB: {decode['gbytes_per_s']:.1f} GB/{unit}; "
            f"a copy: {machine['copy_gbytes_per_s']:.1f}"
        )
    warm, after = record["compiled"]["warm_up"], record["compiled"]["afterwards"]
    console.print(f"compiled: {warm['programs']} programs in {warm['seconds']:.1f} s, then {after['programs']} more")
    console.print("least: matmuls that the shapes ask for, each prompt once, no padding; matmul: see above")
    console.print(f"peak memory: {record['memory']['peak_mib']:,.0f} MiB, compilation included")
