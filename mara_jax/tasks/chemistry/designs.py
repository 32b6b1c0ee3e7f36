"""Scores of drug-like molecules that are easy to make, in the spirit of the SYNTH and ALL-AMIDE tasks, without docking.

Those tasks multiply a docking score, QED, few hydrogen-bond donors and a route by reactions that are at hand. Here
likeness to a known ligand stands for docking, RDKit's SA score and reaction SMARTS for the route. Among 2,000 molecules
of MOSES 1 in 180 scores .85 or more, for amides as many.
"""

from mara_jax.tasks.chemistry.modifiers import Clipped, ReverseSigmoid, Step
from mara_jax.tasks.chemistry.terms import Matches, Property, Scoring, Similarity, Term

# What an amine and a carboxylic acid become: an amide outside of rings, its nitrogen not of another amide, carbamate or
# sulfonamide.
AMIDE = "[CX3;!R](=[OX1])([#6])[NX3;!R;!$(N-[!#6;!#1]);!$(N(C=O)C=O)][#6]"

# Ligands of the dopamine D2 receptor, of several kinds, so that different molecules are good.
LIGANDS = {
    "haloperidol": "OC1(CCN(CCCC(=O)c2ccc(F)cc2)CC1)c1ccc(Cl)cc1",
    "risperidone": "Cc1nc2n(c(=O)c1CCN1CCC(CC1)c1noc3cc(F)ccc13)CCCC2",
    "aripiprazole": "O=C1CCc2ccc(OCCCCN3CCN(CC3)c3cccc(Cl)c3Cl)cc2N1",
    "clozapine": "CN1CCN(CC1)C1=Nc2cc(Cl)ccc2Nc2ccccc12",
    "raclopride": "CCN1CCCC1CNC(=O)c1c(O)c(Cl)cc(Cl)c1OC",
    "domperidone": "O=c1[nH]c2ccccc2n1CCCN1CCC(CC1)n1c(=O)[nH]c2cc(Cl)ccc12",
    "eticlopride": "CCc1cc(Cl)c(O)c(C(=O)NCC2CCCN2CC)c1OC",
}

_WANTED = (
    Term(Similarity(tuple(LIGANDS.values()), "fcfp4"), Clipped(0.6), weight=4.0),
    Term(Property("donors"), Step(0, 3)),
    Term(Property("weight"), Step(200, 500)),
    Term(Property("qed"), weight=2.0),
    Term(Property("sa"), ReverseSigmoid(2.0, 5.0)),
)

DESIGNS: dict[str, Scoring] = {
    "synth": Scoring(_WANTED),
    "amide": Scoring((Term(Matches(AMIDE)), *_WANTED)),
}
