"""The reward_model command: a reward model trained from pairs of completions."""

import pathlib
import sys

from absl import flags
from rich.console import Console

from mara_jax import cli
from mara_jax.cli import Flag
from mara_jax.config.schema import COMPUTE_DTYPES, REMATS

_MANY = (1 << 31) - 1  # what an array of 32-bit integers holds
COMMAND = cli.Command(
    name="reward_model",
    purpose="""Trains a reward model, a transformer that gives a completion one number, by the pairwise loss of Bradley
    and Terry, -log sigmoid(score of the chosen completion - score of the rejected one), and says how many pairs it gets
    right of prompts that it has not seen, beside what length alone gets right. A run that is there already is resumed
    from its last checkpoint.""",
    examples=(
        "python -m mara_jax.reward_model --pairs=pairs.jsonl --workdir=runs/reward",
        "python -m mara_jax.reward_model --prompts=own.jsonl --workdir=runs/reward",
    ),
    flags=(
        Flag("workdir", "DIR", "where the run writes, or is resumed"),
        Flag("pairs", "FILE", "rows with prompt, chosen, rejected: .jsonl, .csv, .parquet, or a saved dataset"),
        Flag("prompts", "FILE", "files of prompts with answers or completions, of which pairs are made", several=True),
        Flag("weights", "DIR_OR_NAME", "of the model at its beginning: as policy.weights, or a reward model", "nano"),
        Flag("held_out", "SHARE", "of the prompts, for measurement", 0.2, float, least=0, most=1),
        Flag("steps", "N", "of training", 300, int, least=1, most=_MANY),
        Flag("batch", "N", "pairs a step", 32, int, least=1, most=1 << 20),
        Flag("learning_rate", "R", "of Adam; by default 1e-3 for nano, else 1e-5", None, float, least=1e-12, most=1),
        Flag("warmup_steps", "N", "of linear increase of the learning rate", 10, int, least=0, most=_MANY),
        Flag("every", "N", "steps between measurements, each with a checkpoint", 50, int, least=1, most=_MANY),
        Flag("seed", "N", "of all randomness", 0, int, least=0, most=_MANY),
        Flag("layers", "N", "depth of nano", 2, int, least=1, most=1024),
        Flag("embed", "N", "width of nano", 128, int, least=32, most=1 << 16),
        Flag("compute_dtype", "DTYPE", "of the matmuls: bfloat16 on accelerators", "float32", choices=COMPUTE_DTYPES),
        Flag("remat", "WHAT", "what the backward pass recomputes", "none", choices=REMATS),
        Flag("scan_layers", "", "one compiled layer, which compiles fast on accelerators", False, bool),
        Flag("fsdp", "N", "devices that share parameters, and rows of a batch", 1, int, least=1, most=1 << 20),
        Flag("tensor", "N", "devices that share heads and feed-forward", 1, int, least=1, most=1 << 20),
    ),
    required=("workdir",),
    interrupted="the same command resumes from the last checkpoint, or begins again if there is none yet",
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
    from mara_jax import config
    from mara_jax.reward_model import training
    from mara_jax.train import preflight

    rate = values.learning_rate or (1e-3 if values.weights == "nano" else 1e-5)
    names = ("weights", "compute_dtype", "remat", "scan_layers", "layers", "embed")
    settings = training.Settings(
        pairs=values.pairs or "",
        prompts=tuple(values.prompts or ()),
        held_out=values.held_out,
        steps=values.steps,
        seed=values.seed,
        batch=values.batch,
        policy=config.Policy(**{name: values[name].value for name in names}),  # pyright: ignore[reportArgumentType]
        optimiser=config.Optimiser(learning_rate=rate, warmup_steps=values.warmup_steps, max_grad_norm=1.0),
        checkpoint=config.Checkpoint(every=values.every),
        mesh=config.Mesh(fsdp=values.fsdp, tensor=values.tensor),
    )
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
    with preflight.too_large():
        training.run(settings, pathlib.Path(values.workdir), console)
    return 0


def parse(argv: list[str]) -> flags.FlagValues:
    """The flags of this command.

    Raises:
      ValueError: an unknown flag, a wrong value, or not exactly one of --pairs and --prompts.
    """
    values = cli.parse(COMMAND, argv)
    if (values.pairs is None) == (values.prompts is None):
        raise ValueError(f"give one of --pairs and --prompts, as in {COMMAND.examples[0]}")
    return values
