"""Molecules: parsed SMILES with their fingerprints, properties and scaffold, as RDKit computes them."""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from mara_jax.tasks.base import TaskError

try:
    from rdkit import Chem, DataStructs, RDConfig, rdBase
    from rdkit.Chem import (
        QED,
        Descriptors,
        GraphDescriptors,
        rdFingerprintGenerator,
        rdMolDescriptors,
    )
    from rdkit.Chem.Pharm2D import Generate, Gobbi_Pharm2D
    from rdkit.Chem.Scaffolds import MurckoScaffold
except ImportError as error:
    raise TaskError(f'RDKit is not installed ({error}): pip install "mara_jax[chem]"') from None


silence = rdBase.BlockLogs  # a context in which RDKit prints no warnings


class Molecule:
    """A parsed SMILES, whose fingerprints are computed once each.

    Attributes:
      rdkit: the molecule as RDKit has it.
    """

    def __init__(self, rdkit: Any) -> None:
        self.rdkit = rdkit
        self._fingerprints: dict[str, Any] = {}

    @functools.cached_property
    def canonical(self) -> str:
        """The canonical SMILES, stereochemistry included: equal for equal molecules."""
        return Chem.MolToSmiles(self.rdkit)

    @functools.cached_property
    def scaffold(self) -> str:
        """The canonical SMILES of the Bemis-Murcko scaffold; empty where there is no ring."""
        # Of the canonical SMILES: what RDKit leaves at a cut bond depends on how the molecule was written.
        return Chem.MolToSmiles(MurckoScaffold.GetScaffoldForMol(Chem.MolFromSmiles(self.canonical)))

    def fingerprint(self, kind: str) -> Any:
        """A fingerprint; kinds are the keys of FINGERPRINTS."""
        if kind not in self._fingerprints:
            self._fingerprints[kind] = FINGERPRINTS[kind](self.rdkit)
        return self._fingerprints[kind]

    def property(self, name: str) -> float:
        """A property; names are the keys of PROPERTIES."""
        return float(PROPERTIES[name](self.rdkit))


def parse(smiles: str | None) -> Molecule | None:
    """The molecule of a SMILES; None where it does not parse or is empty."""
    parsed = Chem.MolFromSmiles(smiles) if smiles else None
    return Molecule(parsed) if parsed is not None and parsed.GetNumAtoms() else None


def parse_each(smiles: Sequence[str | None]) -> Iterator[Molecule | None]:
    """As `parse`, for each SMILES in turn."""
    return map(parse, several(smiles))


def randomised(smiles: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Each molecule written with another order of its atoms, which its seed alone draws.

    Args:
      smiles: [n]; seeds: [n], from 0 to 2**31 - 2.

    Raises:
      ValueError: a SMILES does not parse.
    """
    written = []
    with silence():
        for text, seed in zip(smiles, seeds, strict=True):
            molecule = parse(text)
            if molecule is None:
                raise TaskError(f"{text!r:.80} is no SMILES that RDKit can read: it cannot be written in another way")
            written += Chem.MolToRandomSmilesVect(molecule.rdkit, 1, randomSeed=int(seed) + 1)
    return written


def canonical_of(smiles: Sequence[str]) -> set[str]:
    """The canonical SMILES of those that parse."""
    with silence():
        return {molecule.canonical for molecule in parse_each(smiles) if molecule is not None}


def cut_at_brics_bonds(mol: Any) -> Any:
    """An RDKit molecule in fragments, cut where BRICS allows."""
    return Chem.FragmentOnBRICSBonds(mol)  # pyright: ignore[reportAttributeAccessIssue]


@functools.lru_cache(maxsize=65536)
def rings(smiles: str) -> int:
    """How many rings a molecule has; 0 for a SMILES that is empty or does not parse."""
    molecule = parse(smiles)
    return molecule.rdkit.GetRingInfo().NumRings() if molecule else 0


def several(smiles: Sequence[str | None]) -> Sequence[str | None]:
    """The SMILES as they are.

    Raises:
      ValueError: it is one text, whose letters would be taken for SMILES.
    """
    if isinstance(smiles, str):
        raise TaskError(f"one SMILES was given where a list is wanted: write [{smiles!r:.60}]")
    return smiles


@functools.lru_cache(maxsize=4096)
def known(smiles: str) -> Molecule:
    """The molecule of a SMILES that somebody wrote into a score, kept with its fingerprints.

    Raises:
      ValueError: it does not parse.
    """
    with silence():
        molecule = parse(smiles)
    if molecule is None:
        raise TaskError(f"{smiles!r:.80} is no SMILES that RDKit can read: it is the target of a score")
    return molecule


@functools.lru_cache(maxsize=4096)
def pattern(smarts: str) -> Any:
    """The query of a SMARTS.

    Raises:
      ValueError: it does not parse.
    """
    with silence():
        query = Chem.MolFromSmarts(smarts) if smarts else None
    if query is None:
        raise TaskError(f"{smarts!r:.80} is no SMARTS that RDKit can read: it is the pattern of a score")
    return query


def similarities(fingerprint: Any, others: Sequence[Any]) -> list[float]:
    """[n] Tanimoto similarities of a fingerprint to others of its kind."""
    return DataStructs.BulkTanimotoSimilarity(fingerprint, others)


# ---- fingerprints ---------------------------------------------------------------------------------------------------

_ECFP4 = rdFingerprintGenerator.GetMorganGenerator(radius=2)
_ECFP6 = rdFingerprintGenerator.GetMorganGenerator(radius=3)
_FCFP4 = rdFingerprintGenerator.GetMorganGenerator(
    radius=2, atomInvariantsGenerator=rdFingerprintGenerator.GetMorganFeatureAtomInvGen()
)
_ATOM_PAIRS = rdFingerprintGenerator.GetAtomPairGenerator(maxDistance=10)
_FOLDED = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)

# Unfolded counts, unless the name says otherwise: PMO's, GuacaMol's; MolExp's; and that of diversities.
FINGERPRINTS: dict[str, Callable[[Any], Any]] = {
    "ecfp4": _ECFP4.GetSparseCountFingerprint,
    "ecfp6": _ECFP6.GetSparseCountFingerprint,
    "fcfp4": _FCFP4.GetSparseCountFingerprint,
    "atom_pairs": _ATOM_PAIRS.GetSparseCountFingerprint,
    "pharmacophores": lambda mol: Generate.Gen2DFingerprint(mol, Gobbi_Pharm2D.factory),  # bits
    "ecfp4_counts_1024": _FOLDED.GetCountFingerprint,
    "ecfp4_bits_1024": _FOLDED.GetFingerprint,
}


# ---- properties -----------------------------------------------------------------------------------------------------


@functools.cache
def _synthetic_accessibility() -> ModuleType:
    """RDKit's own module of the score of Ertl and Schuffenhauer (2009)."""
    path = os.path.join(RDConfig.RDContribDir, "SA_Score", "sascorer.py")
    spec = importlib.util.spec_from_file_location("sascorer", path) if os.path.exists(path) else None
    if spec is None or spec.loader is None:
        raise TaskError(f"this RDKit comes without its SA score ({path}): install it from PyPI, pip install rdkit")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PROPERTIES: dict[str, Callable[[Any], float]] = {
    "qed": QED.qed,  # drug-likeness, 0 to 1
    "sa": lambda mol: _synthetic_accessibility().calculateScore(mol),  # 1 (easy to make) to 10
    "logp": lambda mol: rdMolDescriptors.CalcCrippenDescriptors(mol)[0],
    "tpsa": rdMolDescriptors.CalcTPSA,  # square angstroms
    "weight": Descriptors.MolWt,  # g / mol  # pyright: ignore[reportAttributeAccessIssue]
    "bertz": GraphDescriptors.BertzCT,  # complexity
    "heavy_atoms": lambda mol: mol.GetNumHeavyAtoms(),
    "donors": rdMolDescriptors.CalcNumHBD,
    "acceptors": rdMolDescriptors.CalcNumHBA,
    "rotatable": rdMolDescriptors.CalcNumRotatableBonds,
    "rings": rdMolDescriptors.CalcNumRings,
    "aromatic_rings": rdMolDescriptors.CalcNumAromaticRings,
}


# Symbols up to lawrencium: those behind it are in no molecule of a search, and "Fl" is a slip for fluorine's "F".
ELEMENTS = frozenset(Chem.GetPeriodicTable().GetElementSymbol(number) for number in range(1, 104))


def count(mol: Any, element: str) -> int:
    """How many atoms of an element an RDKit molecule has, hydrogens that are not written among them."""
    atoms = list(mol.GetAtoms())
    written = sum(atom.GetSymbol() == element for atom in atoms)
    return written + (sum(atom.GetTotalNumHs() for atom in atoms) if element == "H" else 0)


def atoms(mol: Any) -> int:
    """How many atoms an RDKit molecule has, hydrogens that are not written among them."""
    return mol.GetNumAtoms() + sum(atom.GetTotalNumHs() for atom in mol.GetAtoms())
