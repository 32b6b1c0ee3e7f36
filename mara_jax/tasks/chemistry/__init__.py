"""Molecules as SMILES: oracles that score them, terms to build one's own, budgets of oracle calls, and metrics.

Everything here but `modifiers` and `program` needs RDKit: pip install "mara_jax[chem]".
"""
