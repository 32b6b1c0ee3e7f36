"""The predict command: where a configuration's optimum is before it is trained, and what MARA would give instead."""

import contextlib
import math
import os
import pathlib
import sys

from absl import flags, logging
from rich.console import Console

from mara_jax import cli, config
from mara_jax.cli import Flag
from mara_jax.core import forecast
from mara_jax.predict import prediction

SOURCES = ("config", "run", "rows")
OBJECTIVE_FLAGS = ("method", "kl", "beta", "threshold")
DEFAULT_SETTINGS = prediction.Settings("vanilla", "reverse", 0.1, 0.8)  # with --rows
COMMAND = cli.Command(
    name="predict",
    purpose="""Samples completions of the reference policy and computes from their rewards which answers the optimum
    keeps, at this beta and around it: will the run collapse, and what would MARA give instead? Give one of --config,
    --run (the samples that a run has saved) and --rows (a file with columns ref_logp in nats, which may be empty;
    reward; answer, empty for none; and prompt, an index, where there are several).""",
    examples=(
        "python -m mara_jax.predict --config=configs/digits.py",
        "python -m mara_jax.predict --run=runs/nano --beta=0.01 --method=vanilla",
        "python -m mara_jax.predict --rows=samples.csv --json",
    ),
    flags=(
        Flag("run", "DIR", "workdir of a run: its configuration, and the samples that measured its reference policy"),
        Flag("rows", "FILE", "a .csv or .jsonl file of samples"),
        Flag("samples", "N", "number of samples; reference.samples unless given, or 256", kind=int, least=2),
        Flag("prompt", "I", "which of the prompts, of the task or of the rows", 0, int, least=0),
        Flag("method", "METHOD", "with --run or --rows: vanilla, or MARA over answers or strings",
             choices=tuple(prediction.OBJECTIVES)),
        Flag("kl", "KL", "with --run or --rows: the KL's direction", choices=("reverse", "forward")),
        Flag("beta", "X", "with --run or --rows: weight of the KL, reward units per nat", kind=float),
        Flag("threshold", "X", "with --run or --rows: the reward from which on a completion is good", kind=float),
        Flag("resamples", "N", "of the bootstrap", forecast.RESAMPLES, int, least=100),
        Flag("json", "", "print the numbers as one JSON object", False, bool),
        Flag("out", "DIR", "write prediction.json, prediction.png and prediction.svg there"),
    ),
    configs=(config.LanguageRun, config.ToyRun),
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Predicts and prints; returns the exit status."""
    return cli.run(COMMAND, predict, argv)


def predict(argv: list[str]) -> int:
    """Predicts what the command line asks for.

    Raises:
      ValueError, OSError: one line.
    """
    values = parse(argv)
    from mara_jax.predict import drawing

    logging.set_verbosity(logging.ERROR)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Only the prediction goes to stdout; what loading and drawing print goes to stderr.
    with contextlib.redirect_stdout(sys.stderr):
        samples, settings = samples_and_settings(values)
        record = prediction.predict(samples, settings, resamples=values.resamples)
        picture = drawing.write(record, pathlib.Path(values.out)) if values.out else None
    if values.json:
        print(drawing.to_json(record))
        return 0
    console = Console(soft_wrap=True, highlight=False)
    drawing.show(record, console)
    console.print(f"picture: {picture}" if picture else "--out=DIR writes the picture and all numbers", markup=False)
    return 0


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of this command.

    Raises:
      ValueError: a flag is missing, unknown, out of its range, or of no use beside the others.
    """
    values = cli.parse(COMMAND, argv)
    sources = [name for name in SOURCES if values[name].present]
    if len(sources) != 1:
        raise ValueError(
            f"give one of --config=FILE.py, --run=WORKDIR and --rows=FILE, not {' and '.join(sources) or 'none'}: "
            f"{COMMAND.examples[0]}"
        )
    for name in OBJECTIVE_FLAGS:
        if sources == ["config"] and values[name].present:
            raise ValueError(f"--{name} is for --run and --rows: with --config use --config.algorithm.{name}")
    if sources == ["rows"] and values["samples"].present:
        raise ValueError("--samples has no meaning with --rows: the file's rows are the samples")
    if values.beta is not None and not 0 < values.beta < math.inf:
        raise ValueError(f"--beta={values.beta} must be positive: try 0.1")
    if values.threshold is not None and not math.isfinite(values.threshold):
        raise ValueError(f"--threshold={values.threshold} must be a finite reward: try 0.8")
    return values


def samples_and_settings(values: flags.FlagValues) -> tuple[prediction.ReferenceSamples, prediction.Settings]:
    """The samples and the objective that the flags name."""
    from mara_jax.predict import reference_samples

    if values.config is not None:
        run = config.resolve(values.config)
        if isinstance(run, config.ToyRun):
            return reference_samples.from_toy(run), reference_samples.settings_of(run)
        return reference_samples.from_config(run, values.samples, values.prompt), reference_samples.settings_of(run)
    if values.run is not None:
        samples, run = reference_samples.from_run(pathlib.Path(values.run), values.samples, values.prompt)
        settings = reference_samples.settings_of(run)
    else:
        prompt = values.prompt if values["prompt"].present else None
        samples, settings = reference_samples.read_file(pathlib.Path(values.rows), prompt=prompt), DEFAULT_SETTINGS
    chosen = {name: values[name].value for name in OBJECTIVE_FLAGS if values[name].present}
    if "method" in chosen:
        chosen["objective"] = chosen.pop("method")
    return samples, settings._replace(**chosen)
