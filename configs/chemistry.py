"""Search among molecules with a budget of oracle calls: REINVENT, with MARA over good SMILES, molecules or scaffolds.

Question: for equally many oracle calls, does MARA find more good molecules, and more different ones? Published, with
docking: yield up by a third on ALL-AMIDE, diversity as before.

  ""       drug-like, easy to make and like a ligand of dopamine's D2 receptor (the score `synth`: likeness stands for
           docking); 10,000 calls; batch, learning rate, sigma (1 / beta) and scaffold filter as the paper's authors
           use them.
  amide    the same with an amide bond that a coupling makes.
  molexp   MolExp: two to four distant targets, of which every one should be reached (task.oracle=molexp:AP, A2A, BACE1,
           EGFR); ten replayed molecules a step, no scaffold filter; learning rate 5e-4, as at 1e-4 hardly anything is
           learnt in 2,000 calls.
  pmo      an oracle of PMO in mol_opt's settings of REINVENT: learning rate, sigma, replay and penalty (its prior is
           trained on ZINC-250k: give such weights).
  quick    500 calls of the first: to see a run from end to end.

All start from policy.weights=chemistry-prior, which comes with the package (docs/chemistry_prior.md).

  python -m mara_jax.main --config=configs/chemistry.py:quick --workdir=runs/molecules
  python -m mara_jax.main --config=configs/chemistry.py:molexp --workdir=runs/molexp --config.task.oracle=molexp:EGFR
  python -m mara_jax.main --config=configs/chemistry.py --workdir=runs/scaffolds \
      --config.algorithm.transform=mara_answers --config.task.answer=scaffold
"""

import dataclasses

from mara_jax.config import Algorithm, Checkpoint, LanguageRun, Optimiser, Policy, Rollout, to_config_dict
from mara_jax.tasks.chemistry import task


def synth() -> LanguageRun:
    """REINVENT with MARA over good SMILES, in the settings of the paper's authors."""
    return LanguageRun(
        steps=2000,  # at most: the run ends with the budget, after 157 steps of new molecules alone
        policy=Policy(weights="chemistry-prior", chat=False),
        algorithm=Algorithm(method="reinvent", transform="mara_strings", beta=1 / 128, threshold=0.85),
        task=task.Config(oracle="synth", budget=10_000, hit=0.85, bucket_size=10),
        rollout=Rollout(group_size=64, max_new_tokens=80, length_buckets=16),  # the longest of MOSES: 55 tokens
        optimiser=Optimiser(learning_rate=1e-4),
        checkpoint=Checkpoint(every=20, keep=2),
    )


def amide() -> LanguageRun:
    """Amides."""
    run = synth()
    return dataclasses.replace(run, task=dataclasses.replace(run.task, oracle="amide"))


def molexp() -> LanguageRun:
    """Distant targets: similarity to the nearest. Good is the best tenth of the eight steps before, from .25 on.

    Of what the prior writes, the best tenth begins at .25 (AP). A fixed threshold would be idle for most of the budget:
    10,000 calls of REINVENT found a best of .45 for AP, which 5,000 calls find with ten replayed molecules a step, as
    the paper's authors have them. A search that repeats itself uses up no calls: it ends after 250 steps, 16,000
    molecules written.
    """
    run = synth()
    return dataclasses.replace(
        run,
        steps=250,
        algorithm=dataclasses.replace(run.algorithm, threshold=0.25, threshold_percentile=90.0),
        task=task.Config(oracle="molexp:AP", budget=10_000, hit=0.5),
        rollout=dataclasses.replace(run.rollout, replay=10),
        optimiser=Optimiser(learning_rate=5e-4),
    )


def pmo() -> LanguageRun:
    """mol_opt's REINVENT; repeats within a batch are kept, and tokens behind the end do not count.

    mol_opt ends a search whose best molecules no longer change, this one ends after 300 steps; its area counts the last
    mean on to the budget either way.
    """
    run = synth()
    return dataclasses.replace(
        run,
        steps=300,
        algorithm=Algorithm(method="reinvent", beta=1 / 500, threshold=0.8, likelihood_penalty=5000.0),
        task=task.Config(oracle="albuterol_similarity", budget=10_000),
        rollout=dataclasses.replace(run.rollout, max_new_tokens=100, replay=24, replay_best=100),
        optimiser=Optimiser(learning_rate=5e-4),
    )


def quick() -> LanguageRun:
    """A few steps of the first; of 2,000 molecules of MOSES 1 in 20 scores .8."""
    run = synth()
    return dataclasses.replace(
        run,
        algorithm=dataclasses.replace(run.algorithm, threshold=0.8),
        task=dataclasses.replace(run.task, budget=500, hit=0.8),
        optimiser=Optimiser(learning_rate=5e-4),
        checkpoint=Checkpoint(every=5, keep=2),
    )


def get_config(variant: str = ""):
    """The run of a variant, as a ConfigDict."""
    variants = {"": synth, "amide": amide, "molexp": molexp, "pmo": pmo, "quick": quick}
    if variant not in variants:
        raise ValueError(f"configs/chemistry.py has no variant {variant!r}: choose '', amide, molexp, pmo or quick")
    return to_config_dict(variants[variant]())
