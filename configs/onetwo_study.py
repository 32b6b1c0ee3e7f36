"""The 1-2 task as the papers study it (Figures 7 and 8): many betas, both methods, both KLs and several seeds at once.

Claim: where beta is large enough to act within the run, vanilla runs end at the reference policy's ratio of the answers
and MARA runs at equal shares; below, vanilla runs end beyond their optimum and MARA runs on the way (docs/study.md).
`python -m mara_jax.evaluate population WORKDIR` draws both figures and counts the ends.

  ""     Qwen2.5-3B with adapters: 5 betas x 7 seeds of each method and KL, 140 members, eight at a time; needs an
         accelerator and the weights (a directory, or the hub). Not measured yet.
  smol   SmolLM2-135M-Instruct with adapters: 4 betas of each method, reverse KL, one seed; two CPU cores, an hour.
         From beta .03 on, .59 to .72 bits (vanilla) and .98 to 1.00 (MARA).
  nano   a two-layer model trained from scratch, all weights: 6 betas x 6 seeds of each method, reverse KL, 72 members;
         two CPU cores, 40 CPU minutes. From beta .1 on, .60 bits (vanilla) and 1.00 (MARA).

  python -m mara_jax.main --config=configs/onetwo_study.py:nano --workdir=runs/study
  python -m mara_jax.evaluate population runs/study
"""

import dataclasses
import pathlib
import runpy

from mara_jax.config import LanguageRun, Lora, Population, to_config_dict

ONE_RUN = runpy.run_path(str(pathlib.Path(__file__).with_name("onetwo.py")))
METHODS = ("vanilla", "mara")


def get_config(variant: str = ""):
    """The population of a variant, as a ConfigDict."""
    variants = {"": qwen, "smol": smol, "nano": nano}
    if variant not in variants:
        raise ValueError(f"configs/onetwo_study.py has no variant {variant!r}: choose '', smol or nano")
    return to_config_dict(variants[variant]())


def qwen() -> LanguageRun:
    """The papers' betas and larger ones."""
    axes = Population(
        methods=METHODS, kls=("reverse", "forward"), betas=(0.001, 0.01, 0.02, 0.03, 0.1), seeds=7, at_once=8
    )
    return with_adapters(ONE_RUN["qwen"](), 2e-5, axes)


def smol() -> LanguageRun:
    """Eight members of a real model on a laptop."""
    return with_adapters(ONE_RUN["smol"](), 2e-4, Population(methods=METHODS, betas=(0.01, 0.03, 0.1, 0.3)))


def nano() -> LanguageRun:
    """A whole study in minutes; rollouts, a file a member and step, are not kept."""
    axes = Population(methods=METHODS, betas=(0.001, 0.01, 0.02, 0.03, 0.1, 0.3), seeds=6)
    run = ONE_RUN["nano"]()
    return dataclasses.replace(run, population=axes, rollout=dataclasses.replace(run.rollout, save=False))


def with_adapters(run: LanguageRun, learning_rate: float, axes: Population) -> LanguageRun:
    """The run as a population of adapters beside one frozen model."""
    optimiser = dataclasses.replace(run.optimiser, learning_rate=learning_rate)
    return dataclasses.replace(run, lora=Lora(rank=16, alpha=32.0), optimiser=optimiser, population=axes)
