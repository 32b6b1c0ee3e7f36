"""The predict command: where a configuration's optimum is before it is trained, and what MARA would give instead.

With --rollouts: what the completions that a run has stored say about other settings.
"""

import contextlib
import pathlib
import sys
from typing import Any

from absl import flags
from rich.console import Console

from mara_jax import cli, config
from mara_jax.cli import Flag
from mara_jax.core import forecast
from mara_jax.predict import prediction

SOURCES = ("config", "run", "rows", "rollouts")
OBJECTIVE_FLAGS = ("method", "kl", "beta", "threshold")
DEFAULT_SETTINGS = prediction.Settings("vanilla", "reverse", 0.1, 0.8)  # with --rows
COMMAND = cli.Command(
    name="predict",
    purpose="""Samples completions of the reference policy and computes from their rewards which answers the optimum
    keeps, at this beta and around it: will the run collapse, and what would MARA give instead? Give one of --config,
    --run (the samples that a run has saved), --rows (a file with columns ref_logp in nats, which may be empty;
    reward; answer, empty for none; and prompt, an index, where there are several) and --rollouts (the completions of
    a run's steps: its own settings and others, by default a sweep of betas of vanilla RL and MARA).""",
    examples=(
        "python -m mara_jax.predict --config=configs/digits.py",
        "python -m mara_jax.predict --run=runs/nano --beta=0.01 --method=vanilla",
        "python -m mara_jax.predict --rows=samples.csv --json",
        "python -m mara_jax.predict --rollouts=runs/nano --beta=.01,.03,.1",
    ),
    flags=(
        Flag("run", "DIR", "workdir of a run: its configuration, and the samples that measured its reference policy"),
        Flag("rows", "FILE", "a .csv or .jsonl file of samples"),
        Flag("rollouts", "DIR", "workdir of a run: replays the completions that it has stored, under other settings"),
        Flag("samples", "N", "number of samples; reference.samples unless given, or 256", kind=int, least=2),
        Flag("prompt", "I", "which of the prompts, of the task, the rows or the rollouts (of these all unless given)",
             0, int, least=0),
        Flag("method", "METHOD", "not with --config: vanilla, or MARA over answers or strings; with --rollouts "
             "several, as in vanilla,answers", several=True, choices=tuple(prediction.OBJECTIVES)),
        Flag("kl", "KL", "not with --config: the KL's direction; with --rollouts several", several=True,
             choices=("reverse", "forward")),
        Flag("beta", "X", "not with --config: weight of the KL, reward units per nat; with --rollouts several", None,
             float, several=True),
        Flag("threshold", "X", "not with --config: the reward from which on a completion is good; with --rollouts "
             "several", None, float, several=True),
        Flag("resamples", "N", "of the bootstrap", forecast.RESAMPLES, int, least=100),
        Flag("json", "", "print the numbers as one JSON object", False, bool),
        Flag("out", "DIR", "write prediction.json, .png and .svg there, or with --rollouts replay.json, .png and .svg"),
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
    from mara_jax.predict import drawing, replay_drawing

    report = drawing if values.rollouts is None else replay_drawing
    # Only the prediction goes to stdout; what loading and drawing print goes to stderr.
    with contextlib.redirect_stdout(sys.stderr):
        record = replayed(values) if values.rollouts is not None else predicted(values)
        picture = report.write(record, pathlib.Path(values.out)) if values.out else None
    if values.json:
        print(drawing.to_json(record))
        return 0
    console = Console(soft_wrap=True, highlight=False)
    report.show(record, console)
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
            f"give one of --config=FILE.py, --run=WORKDIR, --rows=FILE and --rollouts=WORKDIR, not "
            f"{' and '.join(sources) or 'none'}: {COMMAND.examples[0]}"
        )
    for name in OBJECTIVE_FLAGS:
        if sources == ["config"] and values[name].present:
            raise ValueError(f"--{name} is not for --config: use --config.algorithm.{name}")
        if sources != ["rollouts"] and len(values[name].value or ()) > 1:
            raise ValueError(f"--{name} has one value with --{sources[0]}: several are for --rollouts")
    if sources in (["rows"], ["rollouts"]) and values["samples"].present:
        raise ValueError(f"--samples has no meaning with --{sources[0]}: what is stored there are the samples")
    for beta in values.beta or ():
        if not beta > 0:
            raise ValueError(f"--beta={beta} must be positive: try 0.1")
    return values


def chosen_settings(values: flags.FlagValues) -> dict[str, tuple]:
    """The values of each field of Settings that the flags give."""
    field = {"method": "objective"}
    return {field.get(name, name): tuple(values[name].value or ()) for name in OBJECTIVE_FLAGS if values[name].present}


def replayed(values: flags.FlagValues) -> dict[str, Any]:
    """The record of stored rollouts under the settings that the flags name."""
    from mara_jax.core import method_rules
    from mara_jax.predict import reference_samples, replay, stored_rollouts

    prompt = values.prompt if values["prompt"].present else None
    stored, note = stored_rollouts.read(pathlib.Path(values.rollouts), prompt), []
    if method_rules.moves_threshold(stored.run.algorithm):
        if not values["threshold"].present:
            reference_samples.refuse_moving_threshold(stored.run, "a replay")
        first = values.threshold[0]
        stored = stored._replace(run=reference_samples.at_constant_threshold(stored.run, first))
        note = [f"The run's threshold moved: what is marked as its own is at the constant threshold {first:g}"]
    record = replay.replay(stored, replay.sweep(stored, chosen_settings(values)), resamples=values.resamples)
    return record | {"notes": note + record["notes"]}


def predicted(values: flags.FlagValues) -> dict[str, Any]:
    """The record of a prediction from samples of the reference policy."""
    samples, settings = samples_and_settings(values)
    return prediction.predict(samples, settings, resamples=values.resamples)


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
        if values["threshold"].present:
            run = reference_samples.at_constant_threshold(run, *values.threshold)
        settings = reference_samples.settings_of(run)
    else:
        prompt = values.prompt if values["prompt"].present else None
        samples, settings = reference_samples.read_file(pathlib.Path(values.rows), prompt=prompt), DEFAULT_SETTINGS
    return samples, settings._replace(**{name: value for name, (value,) in chosen_settings(values).items()})
