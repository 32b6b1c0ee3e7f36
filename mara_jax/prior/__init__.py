"""The prior command: trains a chemical language model on SMILES, and measures the molecules that it writes."""
