"""Activation checkpointing: what a layer saves for the backward pass, and what that computes again."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from mara_jax.policies.ops.attention import SAVED
from mara_jax.policies.ops.select import select
from mara_jax.policies.parameters import Architecture


def uses_checkpoints(arch: Architecture) -> bool:
    """Whether layers go through `jax.checkpoint`: always, but with remat "none" where the gradients of the operations
    recompute what is elementwise by themselves (on a CPU, where `jax.checkpoint` saves no memory outside of scans)."""
    return arch.remat != "none" or not select(arch).recomputes


def checkpoint_policy(arch: Architecture) -> Callable[..., bool] | None:
    """What the backward pass finds saved, by `Architecture.remat`.

    "none": the products of kernels and what attention's gradient needs; norms, rotary embedding and SwiGLU cost less
    than they take. "elementwise": the products alone. "layer": only the layer's input.
    """
    products: Any = functools.partial(_is_kernels_product, arch)
    attention = jax.checkpoint_policies.save_only_these_names(SAVED)
    products_and_attention = jax.checkpoint_policies.save_from_both_policies(products, attention)
    return {"none": products_and_attention, "elementwise": products, "layer": None}[arch.remat]


def _is_kernels_product(arch: Architecture, prim: Any, *avals: Any, **params: Any) -> bool:
    """Whether a result is a kernel's product; of an adapter's two only the thin one between its factors is."""
    if not jax.checkpoint_policies.dots_with_no_batch_dims_saveable(prim, *avals, **params):
        return False
    (contracted, _), _ = params["dimension_numbers"]
    return arch.lora is None or avals[0].shape[contracted[0]] != arch.lora.rank
