"""The prior command: a chemical language model trained on SMILES."""

import dataclasses
import pathlib
from typing import Any

from absl import flags

from mara_jax import cli
from mara_jax.cli import Flag
from mara_jax.config.limits import Limit
from mara_jax.prior.settings import Settings

_VALUES = {bool: "", int: "N", float: "X", str: "NAME"}
# --checkpoint_every stands for the section `checkpoint` of the settings.
_FIELDS = {field.name: field for field in dataclasses.fields(Settings) if field.name != "checkpoint"}


def _flag(field: dataclasses.Field) -> Flag:
    """The flag of a setting, with its meaning and default."""
    allowed, kind = field.metadata["allowed"], type(field.default)
    meaning, choices = field.metadata["meaning"], allowed or ()
    if isinstance(allowed, Limit):
        meaning, choices = f"{meaning}; {allowed.words}", ()
    return Flag(
        field.name, _VALUES[kind], meaning, field.default if field.default != "" else None, kind, choices=choices
    )


COMMAND = cli.Command(
    name="prior",
    purpose="""Trains a small transformer to write molecules as SMILES, with the field's tokenizer, from a file or from
    MOSES' 1.6 million molecules (pip install --no-deps molsets==0.3.1). Measures validity, uniqueness and novelty as it
    goes, and at the end how the molecules resemble others. What it leaves in WORKDIR/model is a Hugging Face model,
    which policy.weights may name. The same command goes on with a run that has ended early.""",
    examples=(
        "python -m mara_jax.prior --workdir=runs/prior",
        "python -m mara_jax.prior --smiles=own.csv --steps=2000 --workdir=runs/own",
    ),
    flags=(
        Flag("workdir", "DIR", "where the run is kept, and gone on with"),
        *(_flag(field) for field in _FIELDS.values()),
        Flag("checkpoint_every", "N", "updates between checkpoints", 500, int, least=1),
    ),
    required=("workdir",),
    interrupted="the same command goes on after the newest checkpoint",
)


def main(argv: list[str]) -> int:
    """Trains; returns the exit status."""
    return cli.run(COMMAND, train, argv)


def train(argv: list[str]) -> int:
    """Trains what the command line asks for.

    Raises:
      ValueError, OSError: one line.
    """
    values = parse(argv)
    settings, workdir = settings_of(values), pathlib.Path(values.workdir)
    from mara_jax.prior import loop
    from mara_jax.train import disk, lock
    from mara_jax.train import workdir as run_directory

    run_directory.check_place(workdir)
    with disk.one_line(workdir), lock.held(workdir):
        loop.run(settings, workdir)
    return 0


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of this command; errors as of `cli.parse`."""
    values = cli.parse(COMMAND, argv)
    settings_of(values)
    return values


def settings_of(values: Any) -> Settings:
    """The settings that flags ask for.

    Raises:
      ValueError: one is out of its range.
    """
    chosen = {name: getattr(values, name) for name in _FIELDS if getattr(values, name) is not None}
    for name, value in chosen.items():
        allowed = _FIELDS[name].metadata["allowed"]
        if isinstance(allowed, Limit) and not allowed.holds(value):
            raise ValueError(f"--{name}={value} must be {allowed.words}")
    settings = Settings(**chosen)
    return dataclasses.replace(
        settings, checkpoint=dataclasses.replace(settings.checkpoint, every=values.checkpoint_every)
    )
