"""Twenty oracles of PMO, the benchmark of practical molecular optimisation: those that RDKit alone computes.

Sources: GuacaMol (Brown et al. 2019, arXiv 1811.09621), as PMO (Gao et al. 2022, arXiv 2206.12411) has it from TDC. No
oracle keeps state between calls, so that a value does not depend on what was scored before. What the table says is
all there is: `ORACLES[name]` is a `terms.Scoring`, which one may print, take apart or pickle.
"""

from collections.abc import Sequence

from mara_jax.tasks.base import TaskError
from mara_jax.tasks.chemistry.modifiers import Clipped, Gaussian, MaxGaussian, MinGaussian
from mara_jax.tasks.chemistry.terms import Count, Isomer, Matches, Near, Property, Scoring, Similarity, Term, single

ALBUTEROL = "CC(C)(C)NCC(O)c1ccc(O)c(CO)c1"
AMLODIPINE = "CCOC(=O)C1=C(COCCN)NC(C)=C(C(=O)OC)C1c1ccccc1Cl"
CAMPHOR = "CC1(C)C2CCC1(C)C(=O)C2"
CELECOXIB = "Cc1ccc(cc1)-c1cc(nn1-c1ccc(cc1)S(N)(=O)=O)C(F)(F)F"
FEXOFENADINE = "CC(C)(C(=O)O)c1ccc(cc1)C(O)CCCN1CCC(CC1)C(O)(c1ccccc1)c1ccccc1"
HOP_REFERENCE = "CCCOc1cc2ncnc(Nc3ccc4ncsc4c3)c2cc1S(=O)(=O)C(C)(C)C"
MENTHOL = "CC(C)C1CCC(C)CC1O"
MESTRANOL = "COc1ccc2[C@H]3CC[C@@]4(C)[C@@H](CC[C@@]4(O)C#C)[C@@H]3CCc2c1"
OSIMERTINIB = "COc1cc(N(C)CCN(C)C)c(NC(=O)C=C)cc1Nc1nccc(n1)-c1cn(C)c2ccccc12"
PERINDOPRIL = "CCCC(NC(C)C(=O)N1C(CC2CCCCC12)C(=O)O)C(=O)OCC"
RANOLAZINE = "COc1ccccc1OCC(O)CN1CCN(CC(=O)Nc2c(C)cccc2C)CC1"
SILDENAFIL = "CCCc1nn(C)c2c1nc([nH]c2=O)-c1cc(ccc1OCC)S(=O)(=O)N1CCN(C)CC1"
SITAGLIPTIN = "NC(CC(=O)N1CCn2c(nnc2C(F)(F)F)C1)Cc1cc(F)c(F)cc1F"
TADALAFIL = "CN1CC(=O)N2C(Cc3c([nH]c4ccccc34)C2c2ccc3OCOc3c2)C1=O"
THIOTHIXENE = "CN(C)S(=O)(=O)c1ccc2Sc3ccccc3C(=CCCN3CCN(C)CC3)c2c1"
TROGLITAZONE = "Cc1c(C)c2OC(C)(COc3ccc(CC4SC(=O)NC4=O)cc3)CCc2c(C)c1O"
ZALEPLON = "CCN(C(C)=O)c1cccc(c1)-c1ccnc2c(cnn12)C#N"

# The quinazoline of the hop reference with its two attachment points, its benzothiazole, and the chain beside it.
_QUINAZOLINE = "[#7]-c1n[c;h1]nc2[c;h1]c(-[#8])[c;h0][c;h1]c12"
_BENZOTHIAZOLE = "[#7]-c1ccc2ncsc2c1"
_CHAIN = "[#6]-[#6]-[#6]-[#8]-[#6]~[#6]~[#6]~[#6]~[#6]-[#7]-c1ccc2ncsc2c1"
_BIPHENYL_AMIDE = "CN(C=O)Cc1ccc(c2ccccc2)cc1"


def _like(target: str, fingerprint: str = "ecfp4") -> Similarity:
    return Similarity((target,), fingerprint)


ORACLES: dict[str, Scoring] = {
    "albuterol_similarity": single(_like(ALBUTEROL, "fcfp4"), Clipped(0.75)),
    "amlodipine_mpo": Scoring((Term(_like(AMLODIPINE)), Term(Property("rings"), Gaussian(3, 0.5)))),
    "celecoxib_rediscovery": single(_like(CELECOXIB)),
    "fexofenadine_mpo": Scoring((
        Term(_like(FEXOFENADINE, "atom_pairs"), Clipped(0.8)),
        Term(Property("tpsa"), MaxGaussian(90, 10)),
        Term(Property("logp"), MinGaussian(4, 1)),
    )),
    "isomers_c7h8n2o2": single(Isomer("C7H8N2O2")),
    "isomers_c9h10n2o2pf2cl": single(Isomer("C9H10N2O2PF2Cl")),
    "median1": Scoring((Term(_like(CAMPHOR)), Term(_like(MENTHOL)))),
    "median2": Scoring((Term(_like(TADALAFIL, "ecfp6")), Term(_like(SILDENAFIL, "ecfp6")))),
    "mestranol_similarity": single(_like(MESTRANOL, "atom_pairs"), Clipped(0.75)),
    "osimertinib_mpo": Scoring((
        Term(_like(OSIMERTINIB, "fcfp4"), Clipped(0.8)),
        Term(_like(OSIMERTINIB, "ecfp6"), MinGaussian(0.85, 0.1)),
        Term(Property("tpsa"), MaxGaussian(100, 10)),
        Term(Property("logp"), MinGaussian(1, 1)),
    )),
    "perindopril_mpo": Scoring((Term(_like(PERINDOPRIL)), Term(Property("aromatic_rings"), Gaussian(2, 0.5)))),
    "qed": single(Property("qed")),
    "ranolazine_mpo": Scoring((
        Term(_like(RANOLAZINE, "atom_pairs"), Clipped(0.7)),
        Term(Property("logp"), MaxGaussian(7, 1)),
        Term(Property("tpsa"), MaxGaussian(95, 20)),
        Term(Count("F"), Gaussian(1, 1)),
    )),
    "sitagliptin_mpo": Scoring((
        Term(_like(SITAGLIPTIN), Gaussian(0, 0.1)),
        Term(Near(SITAGLIPTIN, "logp", 0.2)),
        Term(Near(SITAGLIPTIN, "tpsa", 5)),
        Term(Isomer("C16H15F6N5O")),
    )),
    "thiothixene_rediscovery": single(_like(THIOTHIXENE)),
    "troglitazone_rediscovery": single(_like(TROGLITAZONE)),
    "valsartan_smarts": Scoring((
        Term(Matches(_BIPHENYL_AMIDE)),
        Term(Near(SITAGLIPTIN, "logp", 0.2)),
        Term(Near(SITAGLIPTIN, "tpsa", 5)),
        Term(Near(SITAGLIPTIN, "bertz", 30)),
    )),
    "zaleplon_mpo": Scoring((Term(_like(ZALEPLON)), Term(Isomer("C19H17N3O2")))),
    "deco_hop": Scoring((
        Term(_like(HOP_REFERENCE, "pharmacophores"), Clipped(0.85)),
        Term(Matches("CS([#6])(=O)=O", wanted=False)),
        Term(Matches(_BENZOTHIAZOLE, wanted=False)),
        Term(Matches(_QUINAZOLINE)),
    ), "arithmetic"),
    "scaffold_hop": Scoring((
        Term(_like(HOP_REFERENCE, "pharmacophores"), Clipped(0.75)),
        Term(Matches(_CHAIN)),
        Term(Matches(_QUINAZOLINE, wanted=False)),
    ), "arithmetic"),
}  # fmt: skip


def score(name: str, smiles: Sequence[str]) -> list[float]:
    """Scores of molecules under an oracle.

    Args:
      name: a key of ORACLES; smiles: [n].

    Returns:
      [n] scores from 0 to 1; 0 where a SMILES does not parse.

    Raises:
      ValueError: there is no such oracle.
    """
    if name not in ORACLES:
        raise TaskError(f"there is no oracle {name!r:.60}; there are {', '.join(ORACLES)}")
    return ORACLES[name](smiles)
