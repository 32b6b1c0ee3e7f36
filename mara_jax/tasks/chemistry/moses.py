"""How well written molecules resemble a set of others: the statistics of MOSES that RDKit alone computes.

Not here: FCD, the distance between activations of ChemNet, whose weights are not to be had without a download.
Source: Polykovskiy et al. 2020 (arXiv 1811.12823) and the package molsets 0.3.1, whose definitions these are.
"""

import collections
import csv
import functools
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from mara_jax.tasks.base import TaskError
from mara_jax.tasks.chemistry import molecules, smiles_file
from mara_jax.tasks.chemistry.metrics import DIVERSITY_FINGERPRINT
from mara_jax.tasks.chemistry.molecules import Chem, Molecule

PROPERTIES = ("logp", "sa", "qed", "weight")
_ATOMS = {"C", "N", "S", "O", "F", "Cl", "Br", "H"}
_LARGEST_RING = 7

# Means over three trainings, 30,000 molecules each, as the benchmark's authors publish them (README of molsets).
_COLUMNS = """valid unique@1k unique@10k snn/test snn/scaffolds frag/test frag/scaffolds scaf/test scaf/scaffolds intdiv
    intdiv2 filters novel""".split()
_ROWS = {
    "training set": "1 1 1 .6419 .5859 1 .9986 .9907 0 .8567 .8508 1 1",
    "CharRNN": ".9748 1 .9994 .6015 .5649 .9998 .9983 .9242 .1101 .8562 .8503 .9943 .8419",
    "VAE": ".9767 1 .9984 .6257 .5783 .9994 .9984 .9386 .0588 .8558 .8498 .997 .6949",
    "AAE": ".9368 1 .9973 .6081 .5677 .991 .9905 .9022 .0789 .8557 .8499 .996 .7931",
    "LatentGAN": ".8966 1 .9968 .5371 .5132 .9986 .9972 .8867 .1072 .8565 .8505 .9735 .9498",
    "JTN-VAE": "1 1 .9996 .5477 .5194 .9965 .9947 .8964 .1009 .8551 .8493 .976 .9143",
}
PUBLISHED: dict[str, dict[str, float]] = {
    name: dict(zip(_COLUMNS, map(float, numbers.split()), strict=True)) for name, numbers in _ROWS.items()
}


class Profile(NamedTuple):
    """What a set of molecules is like.

    fingerprints: of each molecule (ECFP4, 1,024 bits); fragments: how often each BRICS fragment comes; scaffolds: how
    often each Bemis-Murcko scaffold of two or more rings comes; properties: [n] of each of PROPERTIES.
    """

    fingerprints: list[Any]
    fragments: collections.Counter[str]
    scaffolds: collections.Counter[str]
    properties: Mapping[str, np.ndarray]


def shares(smiles: Sequence[str], known: Collection[str]) -> dict[str, float]:
    """Shares of written SMILES that are good for something, under MOSES' names; NaN where there is none to count.

    Args:
      smiles: as they were written; known: canonical SMILES that the writer was trained on.

    Returns:
      valid: of all; unique@1k and @10k: different molecules among the first so many valid ones; novel: of the different
      valid molecules.
    """
    canonical = [molecule.canonical for molecule in _parsed(smiles)]
    different = {*canonical}
    return {
        "valid": _share(len(canonical), len(smiles)),
        "unique@1k": _share(len({*canonical[:1000]}), len(canonical[:1000])),
        "unique@10k": _share(len({*canonical[:10_000]}), len(canonical[:10_000])),
        "novel": _share(sum(one not in known for one in different), len(different)),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def profile(smiles: Iterable[str]) -> Profile:
    """The profile of SMILES, of which those that do not parse are left out; some two milliseconds a molecule."""
    fingerprints, fragments, scaffolds = [], collections.Counter(), collections.Counter()
    numbers = collections.defaultdict(list)
    with molecules.silence():
        for molecule in _parsed(smiles):
            fingerprints.append(molecule.fingerprint(DIVERSITY_FINGERPRINT))
            fragments.update(Chem.MolToSmiles(molecules.cut_at_brics_bonds(molecule.rdkit)).split("."))
            if molecules.rings(molecule.scaffold) >= 2:
                scaffolds[molecule.scaffold] += 1
            for name in PROPERTIES:
                numbers[name].append(molecule.property(name))
    return Profile(fingerprints, fragments, scaffolds, {name: np.array(numbers[name]) for name in PROPERTIES})


def distances(written: Profile, reference: Profile) -> dict[str, float]:
    """How near written molecules are to a reference set, under MOSES' names.

    Returns:
      snn: mean over written molecules of the similarity to the nearest of the reference; frag, scaf: cosine between the
      counts of fragments, of scaffolds; and of each property the Wasserstein-1 distance, in its unit.

    Raises:
      ValueError: one of them is empty.
    """
    if not written.fingerprints or not reference.fingerprints:
        raise TaskError("no molecule to compare: neither set may be empty")
    nearest = [max(molecules.similarities(one, reference.fingerprints)) for one in written.fingerprints]
    moved = {
        name: float(stats.wasserstein_distance(written.properties[name], reference.properties[name]))
        for name in PROPERTIES
    }
    return {
        "snn": float(np.mean(nearest)),
        "frag": cosine(written.fragments, reference.fragments),
        "scaf": cosine(written.scaffolds, reference.scaffolds),
    } | moved


def cosine(counts: Mapping[str, int], others: Mapping[str, int]) -> float:
    """The cosine between two tables of counts; NaN where one is empty."""
    product = sum(count * others.get(name, 0) for name, count in counts.items())
    norms = [math.sqrt(sum(count * count for count in table.values())) for table in (counts, others)]
    return product / (norms[0] * norms[1]) if all(norms) else math.nan


def diversities(written: Profile) -> dict[str, float]:
    """MOSES' IntDiv, 1 less the mean of all n * n similarities; and IntDiv2, with each molecule's root mean square.

    As molsets does, roots are taken before the mean over molecules.
    """
    count = len(written.fingerprints)
    if not count:
        return {"intdiv": math.nan, "intdiv2": math.nan}
    total, squares = float(count), np.ones(count)  # each with itself
    for row, one in enumerate(written.fingerprints):
        similar = np.array(molecules.similarities(one, written.fingerprints[:row]))
        total += 2 * float(similar.sum())
        squares[:row] += similar**2
        squares[row] += (similar**2).sum()
    return {"intdiv": 1 - total / count**2, "intdiv2": 1 - float(np.sqrt(squares / count).mean())}


def passes_filters(molecule: Molecule) -> bool:
    """Whether a molecule passes MOSES' filters: its atoms, no charge, rings of up to seven atoms, MCF and PAINS.

    Raises:
      FileNotFoundError: the package molsets, which holds the patterns, is not installed.
    """
    mol = molecule.rdkit
    if any(len(ring) > _LARGEST_RING for ring in mol.GetRingInfo().AtomRings()):
        return False
    if any(atom.GetFormalCharge() or atom.GetSymbol() not in _ATOMS for atom in mol.GetAtoms()):
        return False
    with_hydrogens = Chem.AddHs(mol)
    return not any(with_hydrogens.HasSubstructMatch(query) for query in _alerts())


def filtered(smiles: Iterable[str]) -> float:
    """The share of molecules that pass MOSES' filters, of those that parse; errors as of `passes_filters`."""
    passed = [passes_filters(molecule) for molecule in _parsed(smiles)]
    return _share(sum(passed), len(passed))


@functools.cache
def _alerts() -> list[Any]:
    """The patterns of unwanted groups that come with molsets: 22 MCF and 480 PAINS."""
    folder = smiles_file.moses_folder() / "metrics"
    with (folder / "mcf.csv").open(newline="") as medicinal, (folder / "wehi_pains.csv").open(newline="") as pains:
        named = csv.DictReader(medicinal)
        patterns = itertools.chain((row["smarts"] for row in named), (row[0] for row in csv.reader(pains)))
        return [molecules.pattern(text.strip()) for text in patterns]


def _parsed(smiles: Iterable[str]) -> Iterable[Molecule]:
    with molecules.silence():
        for text in smiles:
            molecule = molecules.parse(text)
            if molecule is not None:
                yield molecule
