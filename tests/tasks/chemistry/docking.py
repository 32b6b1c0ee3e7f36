"""An oracle of one's own: AutoDock Vina's affinity for a receptor. Reads SMILES, writes a number for each, a line each.

  program:python docking.py RECEPTOR.pdbqt X,Y,Z,SIZE

Docks in a cube of SIZE ångström around X, Y, Z. The number is -affinity / 10 (kcal/mol), not below 0; 0 for a molecule
that RDKit finds no three-dimensional shape for. Needs `vina` (Debian: autodock-vina), RDKit, meeko and gemmi.
"""

import pathlib
import re
import subprocess
import sys
import tempfile

from meeko import MoleculePreparation, PDBQTWriterLegacy
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers


def shaped(smiles: str) -> Chem.Mol | None:
    """The molecule with hydrogens, in a shape of low energy."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if rdDistGeom.EmbedMolecule(molecule, randomSeed=1):
        return None
    rdForceFieldHelpers.MMFFOptimizeMolecule(molecule, maxIters=2000)
    return molecule


def pdbqt(molecule: Chem.Mol) -> str:
    """Atoms, their types and the bonds that turn, as Vina reads them."""
    text, done, error = PDBQTWriterLegacy.write_string(MoleculePreparation()(molecule)[0])
    if not done:
        raise ValueError(error)
    return text


def receptor(molecule: Chem.Mol) -> str:
    """The same as a receptor, whose atoms stay where they are."""
    return "".join(f"{line}\n" for line in pdbqt(molecule).splitlines() if line.startswith("ATOM"))


def box(where: str) -> list[str]:
    """Vina's flags for X,Y,Z,SIZE."""
    *centre, size = where.split(",")
    return [f"--center_{axis}={at}" for axis, at in zip("xyz", centre, strict=True)] + [
        f"--size_{a}={size}" for a in "xyz"
    ]


def affinity(ligand: str, receptor_file: str, where: str, pose: pathlib.Path) -> float:
    """kcal/mol of the best pose, which is left in a file."""
    given = pose.with_name("ligand.pdbqt")
    given.write_text(ligand)
    files = [f"--receptor={receptor_file}", f"--ligand={given}", f"--out={pose}"]
    settings = ["--cpu=1", "--seed=1", "--exhaustiveness=2", "--num_modes=1"]
    subprocess.run(["vina", *files, *box(where), *settings], check=True, stdout=subprocess.DEVNULL)
    found = re.search(r"VINA RESULT: +(\S+)", pose.read_text())
    assert found is not None
    return float(found[1])


def main() -> None:
    receptor_file, where = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        for smiles in sys.stdin.read().split():
            molecule = shaped(smiles)
            pose = pathlib.Path(folder, "pose.pdbqt")
            print(0.0 if molecule is None else max(0.0, -affinity(pdbqt(molecule), receptor_file, where, pose) / 10))


if __name__ == "__main__":
    main()
