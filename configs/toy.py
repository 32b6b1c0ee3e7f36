"""The 100-outcome problems of Figures 2, 4, 5 and 6 through the same core as a language model; a second or two.

Claim (Figure 6): vanilla KL-regularised RL follows the reference's slope over the good outcomes at every beta, MARA
puts equal mass on all fifty. With the paper's Adam settings, and small beta, training stops short of its optimum:
the distance to it is printed beside the distance to uniform.

  python -m mara_jax.main --config=configs/toy.py --workdir=runs/toy
  python -m mara_jax.main --config=configs/toy.py --workdir=runs/toy-vanilla --config.algorithm.method=vanilla
  python -m mara_jax.main --config=configs/toy.py:converged --workdir=runs/toy-converged --config.algorithm.kl=forward

Any method can be trained; one with a baseline of its own needs baseline=auto in place of the paper's none:

  python -m mara_jax.main --config=configs/toy.py --workdir=runs/toy-grpo --config.algorithm.method=grpo \
      --config.algorithm.baseline=auto

`sweep` trains thousands of runs as one program (Figure 2's problem, vanilla and MARA, both KLs, betas by reward gaps by
seeds) and draws the phase diagram: where the good outcomes all survive.

  python -m mara_jax.main --config=configs/toy.py:sweep --workdir=runs/toy-sweep
  python -m mara_jax.main --config=configs/toy.py:sweep --workdir=runs/wide --config.sweep.seeds=64
"""

from mara_jax.config import Algorithm, Sweep, Toy, ToyRun, to_config_dict

# Twenty a factor of 10 ** .1 apart, from .01 to .8; gaps up to .5.
BETAS = tuple(round(0.01 * 10 ** (i / 10), 5) for i in range(20))
GAPS = tuple(round(0.05 * i, 2) for i in range(11))


def get_config(variant: str = ""):
    """The run of a variant: "" (the paper's optimiser settings), "converged" (exact gradients), "sweep" (a study)."""
    algorithm = Algorithm(anchor="string", baseline="none", beta=0.1)
    runs = {
        "": ToyRun(algorithm=algorithm),
        "converged": ToyRun(algorithm=algorithm, steps=4000, toy=Toy(exact=True, learning_rate=5e-2)),
        "sweep": ToyRun(
            algorithm=Algorithm(anchor="string", threshold=0.4),
            toy=Toy(figure=2, learning_rate=2e-2),
            sweep=Sweep(betas=BETAS, gaps=GAPS, seeds=4),
        ),
    }
    if variant not in runs:
        raise ValueError(f"configs/toy.py has no variant {variant!r}: choose '', converged or sweep")
    return to_config_dict(runs[variant])
