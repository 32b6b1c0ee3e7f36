"""Scores out of terms: a measure of a molecule, a modifier that makes it a score from 0 to 1, a weight; and a mean.

Scoring((Term(Property("qed")), Term(Property("weight"), Step(200, 500)), Term(Matches("[N+]", wanted=False))))
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mara_jax.tasks.base import TaskError
from mara_jax.tasks.chemistry import molecules
from mara_jax.tasks.chemistry.modifiers import MEANS, Gaussian, Modifier, geometric_mean, unchanged
from mara_jax.tasks.chemistry.molecules import FINGERPRINTS, PROPERTIES, Molecule

Measure = Callable[[Molecule], float]


@dataclass(frozen=True)
class Property:
    """A property of a molecule; names are the keys of `molecules.PROPERTIES`."""

    name: str

    def __post_init__(self) -> None:
        _check("property", self.name, PROPERTIES)

    def __call__(self, molecule: Molecule) -> float:
        return molecule.property(self.name)


@dataclass(frozen=True)
class Count:
    """How many atoms of an element a molecule has."""

    element: str

    def __post_init__(self) -> None:
        _check_element(self.element)

    def __call__(self, molecule: Molecule) -> float:
        return molecules.count(molecule.rdkit, self.element)


@dataclass(frozen=True)
class Similarity:
    """The largest Tanimoto similarity to any of these SMILES; fingerprints are the keys of `molecules.FINGERPRINTS`."""

    targets: tuple[str, ...]
    fingerprint: str = "ecfp4"

    def __post_init__(self) -> None:
        _check("fingerprint", self.fingerprint, FINGERPRINTS)
        if isinstance(self.targets, str) or not self.targets:
            raise TaskError(f"targets={self.targets!r:.60}: give a tuple of SMILES, as in ('CCO',)")
        for target in self.targets:
            molecules.known(target)

    def __call__(self, molecule: Molecule) -> float:
        targets = _fingerprints(self.targets, self.fingerprint)
        return max(molecules.similarities(molecule.fingerprint(self.fingerprint), targets))


@dataclass(frozen=True)
class Matches:
    """1 where a molecule has a substructure (SMARTS), else 0; the reverse where it is not `wanted`."""

    smarts: str
    wanted: bool = True

    def __post_init__(self) -> None:
        molecules.pattern(self.smarts)

    def __call__(self, molecule: Molecule) -> float:
        return float(molecule.rdkit.HasSubstructMatch(molecules.pattern(self.smarts)) == self.wanted)


@dataclass(frozen=True)
class HasScaffold:
    """1 where a molecule has the Bemis-Murcko scaffold of this SMILES, else 0; the reverse where it is not `wanted`."""

    smiles: str
    wanted: bool = True

    def __post_init__(self) -> None:
        molecules.known(self.smiles)

    def __call__(self, molecule: Molecule) -> float:
        return float((molecule.scaffold == molecules.known(self.smiles).scaffold) == self.wanted)


@dataclass(frozen=True)
class Near:
    """A Gaussian around the value that a property has for another molecule."""

    smiles: str
    name: str
    sd: float

    def __post_init__(self) -> None:
        _check("property", self.name, PROPERTIES)
        molecules.known(self.smiles)

    def __call__(self, molecule: Molecule) -> float:
        return Gaussian(_value(self.smiles, self.name), self.sd)(molecule.property(self.name))


@dataclass(frozen=True)
class Isomer:
    """How near a molecule is to a formula such as "C7H8N2O2": the geometric mean of Gaussians.

    One of standard deviation 1 for each element's count, and one of standard deviation 2 for the number of all atoms,
    hydrogens among them.
    """

    formula: str

    def __post_init__(self) -> None:
        for element, _ in _elements(self.formula):
            _check_element(element)

    def __call__(self, molecule: Molecule) -> float:
        wanted = _elements(self.formula)
        scores = [Gaussian(number, 1.0)(molecules.count(molecule.rdkit, one)) for one, number in wanted]
        scores.append(Gaussian(sum(number for _, number in wanted), 2.0)(molecules.atoms(molecule.rdkit)))
        return geometric_mean(scores, [1.0] * len(scores))


@dataclass(frozen=True)
class Term:
    """A measure of a molecule as a score from 0 to 1, with its weight in the mean."""

    measure: Measure
    modifier: Modifier = unchanged
    weight: float = 1.0

    def __call__(self, molecule: Molecule) -> float:
        return self.modifier(self.measure(molecule))


@dataclass(frozen=True)
class Scoring:
    """A weighted mean of terms, "geometric" or "arithmetic": a function of SMILES.

    In a geometric mean a term that is 0 decides, so that the terms behind it are not computed: cheap ones go first.
    """

    terms: tuple[Term, ...]
    mean: str = "geometric"

    def __post_init__(self) -> None:
        _check("mean", self.mean, MEANS)
        if not self.terms or not all(term.weight > 0 for term in self.terms):
            raise TaskError(f"terms={self.terms!r:.80}: give at least one, each with a weight above 0")

    def __call__(self, smiles: Sequence[str]) -> list[float]:
        """[n] scores of n SMILES, 0 where one does not parse."""
        with molecules.silence():
            return [self._score_or_0(one) for one in molecules.several(smiles)]

    def _score_or_0(self, smiles: str | None) -> float:
        # A function of its own, so that a molecule's memory is free before the next is parsed: a tenth of the time.
        molecule = molecules.parse(smiles)
        return 0.0 if molecule is None else self.score(molecule)

    def score(self, molecule: Molecule) -> float:
        """The score of a molecule."""
        if len(self.terms) == 1:
            return self.terms[0](molecule)
        scores = []
        for term in self.terms:
            scores.append(term(molecule))
            if scores[-1] <= 0 and self.mean == "geometric":
                return 0.0
        return MEANS[self.mean](scores, [term.weight for term in self.terms])


def single(measure: Measure, modifier: Modifier = unchanged) -> Scoring:
    """The score that has one term."""
    return Scoring((Term(measure, modifier),), "arithmetic")


@functools.lru_cache(maxsize=4096)
def _fingerprints(smiles: tuple[str, ...], kind: str) -> list[Any]:
    return [molecules.known(one).fingerprint(kind) for one in smiles]


@functools.lru_cache(maxsize=4096)
def _value(smiles: str, name: str) -> float:
    return molecules.known(smiles).property(name)


@functools.lru_cache(maxsize=4096)
def _elements(formula: str) -> tuple[tuple[str, int], ...]:
    """The elements of a formula with their counts."""
    if not re.fullmatch(r"(?:[A-Z][a-z]?\d*)+", formula):
        raise TaskError(f"formula={formula!r:.60}: write elements with their counts, as in C7H8N2O2")
    return tuple((element, int(number or 1)) for element, number in re.findall(r"([A-Z][a-z]?)(\d*)", formula))


def _check_element(symbol: str) -> None:
    if symbol not in molecules.ELEMENTS:
        raise TaskError(f"element={symbol!r:.60}: give a symbol from H to Lr, as in F or Cl")


def _check(kind: str, name: str, names: object) -> None:
    assert isinstance(names, dict)
    if name not in names:
        raise TaskError(f"there is no {kind} {name!r:.60}; there are {', '.join(names)}")
