"""What a prior writes, and how good it is."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from mara_jax.policies.policy import Policy
from mara_jax.prior.batches import TrainingSet
from mara_jax.sampling import rollout
from mara_jax.tasks.chemistry import moses, smiles_file

AT_ONCE = 256  # molecules that are decoded together
_LONGER = 16  # tokens beyond those of the longest molecule of the training set, after which writing is cut off

# What each statistic is, in the order in which they are shown.
MEANINGS = {
    "valid": "RDKit reads them, of all",
    "unique@1k": "different, of the first 1,000 valid ones",
    "unique@10k": "different, of the first 10,000 valid ones",
    "novel": "not in the training set, of the different valid ones",
    "intdiv": "1 - mean similarity of two of them",
    "intdiv2": "1 - mean of a molecule's root mean square similarity",
    "filters": "pass MOSES' filters, of the valid ones",
    "snn": "similarity to the nearest of {}",
    "frag": "cosine of fragment counts to those of {}",
    "scaf": "cosine of scaffold counts to those of {}",
    "logp": "Wasserstein-1 distance of logP to {}",
    "sa": "Wasserstein-1 distance of the SA score to {}",
    "qed": "Wasserstein-1 distance of QED to {}",
    "weight": "Wasserstein-1 distance of the molecular weight to {} (g / mol)",
}


def written(policy: Policy, params: Any, count: int, longest: int, key: jax.Array) -> list[str]:
    """SMILES that a prior writes from BOS on, one after the other a function of (key, number).

    Args:
      longest: tokens of the longest molecule that it was trained on, EOS included.

    Returns:
      [count]; "" stands for one that was cut off before its end.
    """
    texts: list[str] = []
    tokens = min(longest + _LONGER, policy.architecture.max_positions - 1)
    size = min(AT_ONCE, count)
    for first in range(0, count, size):
        completions = rollout.sample(
            policy,
            params,
            [[policy.tokenizer.bos_token_id]],
            key=key,
            group_size=size,
            max_new_tokens=tokens,
            first_sample=first,
        )
        ended = zip(completions.text[0], completions.finished[0].tolist(), strict=True)
        texts += [text if finished else "" for text, finished in ended]
    return texts[:count]


def references(source: str, molecules: TrainingSet) -> Mapping[str, Sequence[str]]:
    """The sets that written molecules are compared with, by name: MOSES' two, or else the molecules held out."""
    if source == "moses":
        sets = {"test": "moses-test", "scaffolds": "moses-scaffolds"}
        return {name: smiles_file.read(of).smiles for name, of in sets.items()}
    return {"held_out": molecules.held_out} if molecules.held_out else {}


def statistics(
    smiles: Sequence[str],
    known: Collection[str],
    reference_sets: Mapping[str, Sequence[str]],
    note: Callable[[str], None],
) -> dict[str, float]:
    """Every statistic of written SMILES, those against a reference set as NAME/SET; filters where molsets is there.

    Args:
      known: canonical SMILES of the training set; note: told what takes its time.
    """
    measured = moses.shares(smiles, known)
    of_written = moses.profile(smiles)
    measured |= moses.diversities(of_written)
    try:
        measured["filters"] = moses.filtered(smiles)
    except FileNotFoundError as error:
        note(f"filters were not applied: {error}")
    if not of_written.fingerprints:
        return measured
    for name, texts in reference_sets.items():
        note(f"comparing with the {len(texts):,} molecules of {name} (some minutes for a hundred thousand)")
        measured |= {
            f"{what}/{name}": value for what, value in moses.distances(of_written, moses.profile(texts)).items()
        }
    return measured
