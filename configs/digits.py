"""Many prompts with open answers: name a digit of a range. Does training keep all digits of each range?

Claim: the demonstrations favour the lowest digit, and vanilla KL-regularised RL keeps that preference; MARA over
answers makes the digits that the reference policy gives under a prompt equally likely.

  ""     a two-layer model trained from scratch by the run itself; two CPU cores, about four minutes.

  python -m mara_jax.main --config=configs/digits.py --workdir=runs/digits
  python -m mara_jax.main --config=configs/digits.py --workdir=runs/digits-vanilla --config.algorithm.method=vanilla
"""

from mara_jax.config import Algorithm, Checkpoint, LanguageRun, Optimiser, Policy, Rollout, Warmup, to_config_dict
from mara_jax.tasks import digits


def get_config(variant: str = ""):
    """The run, as a ConfigDict."""
    if variant:
        raise ValueError(f"configs/digits.py has no variant {variant!r}: leave it out")
    run = LanguageRun(
        steps=80,
        policy=Policy(weights="nano", layers=2, embed=128),
        algorithm=Algorithm(beta=0.1, threshold=0.5),
        task=digits.Config(),
        warmup=Warmup(steps=800, batch=32, learning_rate=3e-3),
        rollout=Rollout(prompts_per_step=16, group_size=8, max_new_tokens=12),
        optimiser=Optimiser(learning_rate=5e-4, decay_steps=80),
        checkpoint=Checkpoint(every=20, keep=2),
        show_samples=2,
    )
    return to_config_dict(run)
