"""Measures of a run's diversity, and the tables and figures made from what it wrote."""
