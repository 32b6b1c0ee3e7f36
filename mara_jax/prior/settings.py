"""What a prior is trained with: frozen, as it is written to WORKDIR/config.json."""

from dataclasses import dataclass, field

from mara_jax.config import Checkpoint
from mara_jax.config.limits import BETA, COUNT, FROM_ZERO, POSITIVE, SHARE
from mara_jax.config.schema import setting

DECAYS = ("cosine", "linear", "none")
DTYPES = ("float32", "bfloat16")
BAD_LINES = ("refuse", "skip")
HEAD_DIM = 32
# Molecules that a search writes may be longer than those of the training set; BOS counts too.
MAX_POSITIONS = 256


@dataclass(frozen=True)
class Settings:
    """A training run of a prior. The defaults are those of the prior that comes with the package."""

    smiles: str = setting("moses", "a .smi or .csv file, .gz or not; or moses, from the package molsets")
    column: str = setting("", "of a .csv file, that holds the SMILES; by default one called smiles, or the only one")
    bad_lines: str = setting(
        "refuse", "lines that are not one molecule: refuse the file, or skip and count them", BAD_LINES
    )
    seed: int = setting(0, "of weights, order of the molecules, randomised SMILES and samples", FROM_ZERO)
    steps: int = setting(15_000, "updates", COUNT)
    batch: int = setting(64, "molecules of an update", COUNT)
    layers: int = setting(3, "of the transformer", COUNT)
    heads: int = setting(6, f"of attention; the transformer is {HEAD_DIM} times as wide", COUNT)
    feed_forward: int = setting(384, "width of the feed-forward", COUNT)
    learning_rate: float = setting(3e-3, "the highest, of Adam", POSITIVE)
    rise: int = setting(100, "updates in which the learning rate rises linearly to the highest", FROM_ZERO)
    decay: str = setting("cosine", "how it falls from there, to a hundredth at the last update", DECAYS)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm; 0: never", BETA)
    randomised: float = setting(0.0, "share of the molecules that are written with a random order of atoms", SHARE)
    longest: int = setting(100, "tokens; molecules with more are left out and counted", COUNT)
    held_out: int = setting(1024, "molecules that are never trained on, whose loss is reported", FROM_ZERO)
    compute_dtype: str = setting("float32", "of the matmuls: bfloat16 on accelerators", DTYPES)
    evaluate_every: int = setting(1000, "updates between evaluations", COUNT)
    samples: int = setting(1000, "molecules written at an evaluation", COUNT)
    final_samples: int = setting(10000, "molecules written at the end; published tables have 30,000", COUNT)
    dtype: str = setting("bfloat16", "of the weights in WORKDIR/model", DTYPES)
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(every=500, keep=2))
