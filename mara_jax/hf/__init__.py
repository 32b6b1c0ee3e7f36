"""Hugging Face checkpoints: weights, adapters and tokenizers in, directories that transformers and peft load out."""

from mara_jax.hf.adapter import export_adapter, load_adapter
from mara_jax.hf.export import export
from mara_jax.hf.load import files_of, load, locate, pinned

__all__ = ["export", "export_adapter", "files_of", "load", "load_adapter", "locate", "pinned"]
