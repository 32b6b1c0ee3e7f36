"""SMILES as text: their tokens. Needs no RDKit."""

import re

from mara_jax.tasks.base import TaskError

# The field's tokens: an atom in brackets, an atom of the organic subset, a bond, a branch, a ring closure.
# Source: Schwaller et al. 2019 (Molecular Transformer, ACS Cent. Sci. 5, 1572).
TOKEN = r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>|\*|\$|\%[0-9]{2}|[0-9])"
_TOKEN = re.compile(TOKEN)


def tokens(smiles: str) -> list[str]:
    """The tokens of a SMILES.

    Raises:
      ValueError: a part of it is no token.
    """
    parts = _TOKEN.findall(smiles)
    if "".join(parts) != smiles:
        raise TaskError(f"{smiles!r:.80} is no SMILES: no token of one begins with {_untokenised(smiles)!r}")
    return parts


def _untokenised(smiles: str) -> str:
    """The first character that belongs to no token."""
    at = 0
    while match := _TOKEN.match(smiles, at):
        at = match.end()
    return smiles[at]
