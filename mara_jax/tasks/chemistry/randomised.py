"""Other SMILES of a molecule: the same atoms written in another order."""

import hashlib

from mara_jax.tasks.base import TaskError
from mara_jax.tasks.chemistry import molecules

_TRIES = 4  # drawn for each that is wanted, as some come more than once


def randomised_smiles(smiles: str, count: int, seed: int) -> list[str]:
    """Different SMILES of a molecule, as many as `count` where it has so many; a function of molecule and seed.

    Args:
      smiles: any SMILES of it; the result is the same for each.
      count: how many are wanted; seed: of the order of atoms.

    Raises:
      ValueError: it does not parse.
    """
    from rdkit import Chem  # `molecules` says what to install where it is missing

    with molecules.silence():
        molecule = molecules.parse(smiles)
        if molecule is None:
            raise TaskError(f"{smiles!r:.80} is no SMILES that RDKit can read: it cannot be written in another way")
        # From the canonical SMILES, as the order of atoms in `smiles` is that of the molecule which is randomised.
        mol = Chem.MolFromSmiles(molecule.canonical)
    digest = hashlib.blake2b(f"{seed} {molecule.canonical}".encode(), digest_size=4).digest()
    number = int.from_bytes(digest, "big") % (2**31 - 1) + 1  # RDKit takes 0 and below for no seed
    drawn = Chem.MolToRandomSmilesVect(mol, _TRIES * count, randomSeed=number) if count else []
    return list(dict.fromkeys(drawn))[:count]
