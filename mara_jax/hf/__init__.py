"""Hugging Face checkpoints: weights and tokenizers in, directories that transformers loads out."""

from mara_jax.hf.export import export
from mara_jax.hf.load import load

__all__ = ["export", "load"]
