"""Measures of the quality and the diversity of completions: pure functions of counts, rewards, texts and embeddings."""
