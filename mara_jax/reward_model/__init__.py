"""Trains a reward model from pairs of completions, of which one was preferred."""
