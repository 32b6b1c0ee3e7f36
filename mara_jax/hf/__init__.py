"""Hugging Face checkpoints: weights, adapters and tokenizers in, directories that transformers and peft load out."""

from mara_jax.hf.adapter import export_adapter, load_adapter
from mara_jax.hf.export import export
from mara_jax.hf.load import load

__all__ = ["export", "export_adapter", "load", "load_adapter"]
