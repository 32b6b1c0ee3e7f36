"""Scores of drug-like molecules that are easy to make, in the spirit of the SYNTH and ALL-AMIDE tasks, without docking.

Those tasks multiply a docking score, QED, few hydrogen-bond donors and a route by reactions that are at hand. Here
RDKit's SA score and reaction SMARTS stand for the route, and nothing stands for docking: scores are easier to reach.
"""

from mara_jax.tasks.chemistry.modifiers import ReverseSigmoid, Step
from mara_jax.tasks.chemistry.terms import Matches, Property, Scoring, Term

# What an amine and a carboxylic acid become: an amide outside of rings, its nitrogen not of another amide, carbamate or
# sulfonamide.
AMIDE = "[CX3;!R](=[OX1])([#6])[NX3;!R;!$(N-[!#6;!#1]);!$(N(C=O)C=O)][#6]"

_DRUG_LIKE = (
    Term(Property("donors"), Step(0, 3)),
    Term(Property("weight"), Step(200, 500)),
    Term(Property("qed"), weight=2.0),
    Term(Property("sa"), ReverseSigmoid(2.0, 5.0)),
)

DESIGNS: dict[str, Scoring] = {
    "synth": Scoring(_DRUG_LIKE),
    "amide": Scoring((Term(Matches(AMIDE)), *_DRUG_LIKE)),
}
