"""Finished runs: final tables, figures, comparisons."""
