"""The 100-outcome problems of Figures 2, 4, 5 and 6 through the same core as a language model; a second or two.

Claim (Figure 6): vanilla KL-regularised RL follows the reference's slope over the good outcomes at every beta, MARA
puts equal mass on all fifty. With the paper's Adam settings, and small beta, training stops short of its optimum:
the distance to it is printed beside the distance to uniform.

  python -m mara_jax.main --config=configs/toy.py --workdir=runs/toy
  python -m mara_jax.main --config=configs/toy.py --workdir=runs/toy-vanilla --config.algorithm.method=vanilla
  python -m mara_jax.main --config=configs/toy.py:converged --workdir=runs/toy-converged --config.algorithm.kl=forward
"""

from mara_jax.config import Algorithm, Toy, ToyRun, to_config_dict


def get_config(variant: str = ""):
    """The run of a variant: "" (the paper's optimiser settings) or "converged" (exact gradients, to the optimum)."""
    algorithm = Algorithm(anchor="string", baseline="none", beta=0.1)
    runs = {
        "": ToyRun(algorithm=algorithm),
        "converged": ToyRun(algorithm=algorithm, steps=4000, toy=Toy(exact=True, learning_rate=5e-2)),
    }
    if variant not in runs:
        raise ValueError(f"configs/toy.py has no variant {variant!r}: choose '' or converged")
    return to_config_dict(runs[variant])
