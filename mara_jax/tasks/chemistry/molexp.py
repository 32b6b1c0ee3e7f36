"""MolExp: four tasks, each with a few distant target molecules, of which a policy should reach every one.

Source: Thomas et al. 2025 (arXiv 2501.19153). The reward is the largest similarity to any target, so that a policy that
keeps to one of them earns as much as one that finds all; `metrics.molexp_score` is the score of a task, which does not.
"""

from collections.abc import Sequence

from mara_jax.tasks.base import TaskError
from mara_jax.tasks.chemistry.terms import Scoring, Similarity, single

FINGERPRINT = "ecfp4_counts_1024"

TARGETS: dict[str, tuple[str, ...]] = {
    "AP": (
        "CN1CCN(CCCN2c3ccccc3Sc3ccc(Cl)cc32)CC1",
        "CN1CCN2c3c(cccc31)C1CN(CCCC(=O)c3ccc(F)cc3)CCC12",
    ),
    "A2A": (
        "CCCN1c2c([nH]c(n2)c3ccc(cc3)OCC(=O)NCCN)C(=O)N(C1=O)CCC",
        "CC(C)(C)CC(=O)Nc1c(cc(cc1F)C(=O)Nc2nccs2)F",
        "Cc1cc(cc(n1)Cl)c2c(nc(nn2)N)c3ccc(cc3)F",
    ),
    "BACE1": (
        "NC1=NC(c2cccc(-c3cncnc3)c2)(c2ccnc(C(F)F)c2)c2cccc(F)c21",
        "NC1=NC2(c3cc(NC(=O)c4ccc(F)cn4)ccc3F)COCC2CS1",
        "CC#Cc1cncc(-c2ccc3c(c2)C2(N=C(C)C(N)=N2)C2(CCC(OC)CC2)C3)c1",
    ),
    "EGFR": (
        "COc1cc2ncnc(Nc3ccc(F)c(Cl)c3)c2cc1NC(=O)C=CCN1CCCCC1",
        "C=CC(=O)N1CCC(Oc2nc(Nc3ccc(N4CCC(N5CCN(C)CC5)CC4)cc3)c(C(N)=O)nc2CC)C1",
        "Cc1cc(C(=O)Nc2nc3cccc(Cl)c3n2C2CCCCN(C(=O)C=CCN(C)C)C2)ccn1",
        "C=CC(=O)Nc1cc(Nc2nccc(-n3cc(CN(C)C)c(-c4ccccc4)n3)n2)c(OC)cc1N1CCOCC1",
    ),
}


def targets(task: str) -> tuple[str, ...]:
    """The target molecules of a task.

    Raises:
      ValueError: there is no such task.
    """
    if task not in TARGETS:
        raise TaskError(f"MolExp has no task {task!r:.60}; it has {', '.join(TARGETS)}")
    return TARGETS[task]


def scoring(task: str) -> Scoring:
    """The reward of a task: the largest Tanimoto similarity to any target, ECFP4 counts folded to 1,024."""
    return single(Similarity(targets(task), FINGERPRINT))


def score(task: str, smiles: Sequence[str]) -> list[float]:
    """[n] rewards of molecules under a task, 0 where a SMILES does not parse."""
    return scoring(task)(smiles)
