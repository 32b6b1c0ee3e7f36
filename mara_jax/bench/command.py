"""The bench command: a training step in tokens a second, in FLOPs against the least, against this machine's matmul."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
from absl import flags
from rich.console import Console

from mara_jax import cli, config, hf, tasks
from mara_jax.bench import phases, scores, speed
from mara_jax.cli import Flag
from mara_jax.hf import shapes
from mara_jax.policies import transformer
from mara_jax.train import preflight, reference
from mara_jax.train.prompts import EncodedPrompts, ids_of_step
from mara_jax.train.setup import Setup
from mara_jax.train.tables import NumberTable

SMOL = "smollm2-135m-instruct"
# What --model's prompts, batch and policy are; a configuration has fields for the same.
OF_MODEL = (
    Flag("prompt", "N", "tokens of a prompt", 64, int, least=1),
    Flag("new", "N", "tokens of a completion", 64, int, least=1),
    Flag("group", "N", "completions per prompt", 8, int, least=1),
    Flag("samples", "N", "completions in all", 32, int, least=1),
    Flag("micro_batches", "N", "parts of the batch in the update", 1, int, least=1),
    Flag("dtype", "DTYPE", "of the matmuls", "float32", choices=("float32", "bfloat16")),
    Flag("remat", "WHAT", "activation checkpointing: what the backward pass recomputes", "none", choices=config.REMATS),
)
COMMAND = cli.Command(
    name="bench",
    purpose="""Times the rollout, the reference log-probs and the update of a training step, and sets them against the
    FLOPs that they need at least and against a plain matmul on the same machine. Nothing is learnt: rewards are random,
    and a reward model of the configuration is timed by itself. With --model, prompts are random and completions never
    end, so that every run does the same work; with --config they end where they end.""",
    examples=(
        "python -m mara_jax.bench --model=tiny",
        "python -m mara_jax.bench --config=configs/digits.py",
    ),
    flags=(
        Flag("model", "NAME", "tiny (4 layers, 256 wide, 2,048 words) or small (12, 512, 8,192): Qwen2-shaped with "
             "random weights; smol: SmolLM2-135M; or a published shape with random weights, its layers scanned",
             choices=(*phases.SIZES, "smol", *shapes.PUBLISHED)),
        *(dataclasses.replace(flag, meaning=f"with --model: {flag.meaning}") for flag in OF_MODEL),
        Flag("repeats", "N", "timed steps after the one that compiles; medians are printed", 5, int, least=1),
        Flag("threads", "N", "cores of the CPU that may be used; 0: all", 1, int, least=0),
        Flag("json", "", "print one JSON object and nothing else", False, bool),
        Flag("out", "DIR", "also write the object to DIR/bench.json"),
    ),
    configs=(config.LanguageRun,),
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Measures and prints; returns the exit status."""
    return cli.run(COMMAND, bench, argv)


def bench(argv: list[str]) -> int:
    """Measures what the command line asks for.

    Raises:
      ValueError, OSError: one line.
    """
    values = parse(argv)
    use_threads(values.threads)
    out = writable(values.out)
    name, setup, asked = case_of(values)
    record = {"threads": values.threads or available(), **speed.measure(name, setup, values.repeats)}
    if asked is not None:
        record["reward_model"] = scores.measure(asked, setup, values.repeats)
    record["load"] = round(os.getloadavg()[0], 2)
    text = json.dumps(record, allow_nan=False)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").write_text(text + "\n")
    if values.json:
        print(text)
    else:
        show(record, Console(highlight=False))
    return 0


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of this command.

    Raises:
      ValueError: an unknown flag or field, a wrong value, nothing to measure, a group that does not divide.
    """
    values = cli.parse(COMMAND, argv)
    if (values.config is None) == (values.model is None):
        raise ValueError(f"give either --model=NAME or --config=FILE.py, as in {' or '.join(COMMAND.examples)}")
    if values.model is None:
        for flag in OF_MODEL:
            if values[flag.name].present:
                raise ValueError(f"--{flag.name} goes with --model; of a configuration set its own field")
    for whole, part in (("samples", "group"), ("group", "micro_batches")):
        count, divisor = int(values[whole].value or 0), int(values[part].value or 1)
        if count % divisor:
            raise ValueError(f"--{whole}={count} is no multiple of --{part}={divisor}: choose one that is")
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


def case_of(values: flags.FlagValues) -> tuple[str, Setup, scores.Asked | None]:
    """The case to measure: its name; its policy, prompts and sizes; the reward model of its task, if it names one.

    Raises:
      ValueError: a configuration that cannot run, or is the toy's.
    """
    if values.config is not None:
        return _configured(values.config)
    computed = {"compute_dtype": values.dtype, "remat": values.remat}
    if values.model == "smol":
        policy, params = hf.load(SMOL, **computed)
        # No end token: every completion has its full length.
        policy = dataclasses.replace(policy, eos_ids=())
    else:
        policy = phases.random_policy(values.model, **computed)
        params = transformer.init(policy.architecture, jax.random.key(0))
    prompts = phases.random_prompts(policy.architecture.vocab_size, values.samples // values.group, values.prompt)
    optimiser = config.Optimiser(micro_batches=values.micro_batches)
    run = phases.run_of(len(prompts), values.group, values.new, optimiser=optimiser)
    return values.model, phases.setup_of(run, policy, params, prompts), None


def _configured(fields: Any) -> tuple[str, Setup, scores.Asked | None]:
    run = config.resolve(fields)
    if not isinstance(run, config.LanguageRun):
        raise ValueError("the toy has no language model to measure: give a configuration such as configs/digits.py")
    task = tasks.make(run)
    preflight.check_task(run, task)
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
    policy, params = reference.load_base(run, task)
    encoded = EncodedPrompts(run, policy, task)
    ids = [int(number) for number in ids_of_step(run, len(encoded), 0)]
    asked = task.learned_reward and scores.Asked(task.learned_reward, [task.prompt(number) for number in ids])
    return run.policy.weights, phases.setup_of(run, policy, params, [encoded[number] for number in ids]), asked


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
    table = NumberTable.with_headers("", unit, f"tokens/{unit}", "GFLOP", "of least", f"GFLOP/{unit}", "of matmul")
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
    if "reward_model" in record:
        row = record["reward_model"]
        console.print(
            f"reward model, not part of the step: {row['seconds']:.3f} {unit} for {row['completions']} different "
            f"completions ({row['tokens']} tokens), {row['gflops_per_s']:.1f} GFLOP/{unit}, x "
            f"{row['flops'] / row['flops_least']:.2f} of the least"
        )
    warm, after = record["compiled"]["warm_up"], record["compiled"]["afterwards"]
    console.print(f"compiled: {warm['programs']} programs in {warm['seconds']:.1f} s, then {after['programs']} more")
    console.print("least: matmuls that the shapes ask for, each prompt once, no padding; matmul: see above")
    console.print(f"peak memory: {record['memory']['peak_mib']:,.0f} MiB, compilation included")
