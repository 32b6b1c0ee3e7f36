"""Throughput of the oracles: `oracles.score` beside the RDKit functions that an oracle needs, called in a plain loop.

  python benchmarks/oracle_throughput.py --count=2000

Prints one JSON object an oracle: molecules per second of processor time of both, and `ratio`, the plain loop's time
over ours (.87 is an overhead of 15 %). The molecules are the first of MOSES's training set, from PyPI's package
`molsets` (MIT), which pip downloads into a temporary folder; --smiles=FILE reads a file with one SMILES a line instead.
The two sides take turns, and every value of both is compared.
"""

import argparse
import csv
import gzip
import io
import itertools
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable

from rdkit import Chem, DataStructs
from rdkit.Chem import QED, rdFingerprintGenerator, rdMolDescriptors

from mara_jax.tasks.chemistry import oracles

ROUNDS, BLOCK = 3, 50
ECFP4 = rdFingerprintGenerator.GetMorganGenerator(radius=2)
ECFP6 = rdFingerprintGenerator.GetMorganGenerator(radius=3)
FCFP4 = rdFingerprintGenerator.GetMorganGenerator(
    radius=2, atomInvariantsGenerator=rdFingerprintGenerator.GetMorganFeatureAtomInvGen()
)


def molsets(count: int) -> list[str]:
    """The first SMILES of MOSES's training set."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "-d", folder]
        subprocess.run([*command, "molsets"], check=True)
        (wheel,) = pathlib.Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("train.csv.gz")]
            with archive.open(name) as packed, gzip.open(packed) as file:
                rows = csv.DictReader(io.TextIOWrapper(file))
                return [row["SMILES"] for row in itertools.islice(rows, count)]


def plain(name: str) -> Callable[[str], float]:
    """An oracle as one would write it out, its target's fingerprint computed beforehand."""

    def target(smiles: str, generator):
        return generator.GetSparseCountFingerprint(Chem.MolFromSmiles(smiles))

    def like(generator, fingerprint, mol) -> float:
        return DataStructs.TanimotoSimilarity(fingerprint, generator.GetSparseCountFingerprint(mol))

    celecoxib, albuterol = target(oracles.CELECOXIB, ECFP4), target(oracles.ALBUTEROL, FCFP4)
    camphor, menthol = target(oracles.CAMPHOR, ECFP4), target(oracles.MENTHOL, ECFP4)
    features, circular = target(oracles.OSIMERTINIB, FCFP4), target(oracles.OSIMERTINIB, ECFP6)

    def median1(mol) -> float:
        fingerprint = ECFP4.GetSparseCountFingerprint(mol)
        similarities = DataStructs.BulkTanimotoSimilarity(fingerprint, [camphor, menthol])
        return math.sqrt(similarities[0] * similarities[1])

    def osimertinib(mol) -> float:
        tpsa, logp = rdMolDescriptors.CalcTPSA(mol), rdMolDescriptors.CalcCrippenDescriptors(mol)[0]
        scores = (
            min(like(FCFP4, features, mol) / 0.8, 1),
            math.exp(-(max(like(ECFP6, circular, mol) - 0.85, 0) ** 2) / 0.02),
            math.exp(-(min(tpsa - 100, 0) ** 2) / 200),
            math.exp(-(max(logp - 1, 0) ** 2) / 2),
        )
        return math.prod(scores) ** 0.25

    functions = {
        "celecoxib_rediscovery": lambda mol: like(ECFP4, celecoxib, mol),
        "albuterol_similarity": lambda mol: min(like(FCFP4, albuterol, mol) / 0.75, 1),
        "median1": median1,
        "osimertinib_mpo": osimertinib,
        "qed": QED.qed,
    }
    return lambda smiles: functions[name](Chem.MolFromSmiles(smiles))


def compare(name: str, smiles: list[str]) -> dict[str, float | str | int]:
    """Processor time of both sides: the sum over blocks of molecules of each block's quickest round.

    Other work on the machine lengthens some rounds of a block, and hardly ever all of them.
    """
    written_out = plain(name)
    ours = theirs = 0.0
    for start in range(0, len(smiles), BLOCK):
        block = smiles[start : start + BLOCK]
        rounds = []
        for _ in range(ROUNDS):
            began = time.process_time()
            values = oracles.score(name, block)
            middle = time.process_time()
            expected = [written_out(one) for one in block]
            rounds.append((middle - began, time.process_time() - middle))
        assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(values, expected, strict=True)), name
        ours += min(own for own, _ in rounds)
        theirs += min(other for _, other in rounds)
    return {
        "benchmark": "oracle_throughput",
        **{"oracle": name, "molecules": len(smiles), "rounds": ROUNDS},
        "ours_per_second": round(len(smiles) / ours),
        "plain_per_second": round(len(smiles) / theirs),
        "ratio": round(theirs / ours, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="molecules")
    parser.add_argument("--smiles", default="", help="a file with one SMILES a line, in place of molsets")
    options = parser.parse_args()
    smiles = pathlib.Path(options.smiles).read_text().split("\n") if options.smiles else molsets(options.count)
    smiles = [one for one in smiles if one][: options.count]
    for name in ("celecoxib_rediscovery", "albuterol_similarity", "median1", "osimertinib_mpo", "qed"):
        print(json.dumps(compare(name, smiles)), flush=True)


if __name__ == "__main__":
    main()
