"""Which form of each operation a program uses: the plain one, the CPU's or a kernel."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mara_jax.parallel import sharding
from mara_jax.policies.ops import cpu, pallas
from mara_jax.policies.ops.attention import attention
from mara_jax.policies.ops.matmul import matmul, matmul_transposed
from mara_jax.policies.ops.swiglu import swiglu_matmul
from mara_jax.policies.parameters import Architecture


class Operations(NamedTuple):
    """One form of each operation that has several; see the functions of the same names.

    matmul_few_rows: `matmul_transposed` for the few rows of a decoding step; decoding_kernel: a kernel [d, f] as
    `matmul` takes it fastest for such rows; cached_attention: `attention` over a KV cache, never differentiated;
    stored: its argument, which the compiler is to compute only once; recomputes: whether the gradients of these
    operations recompute what is elementwise, so that layers need no `jax.checkpoint` where nothing else is recomputed.

    The plain SwiGLU goes through `jax.checkpoint`: it then saves gate and up, not the three arrays made of them.
    """

    matmul: Callable[[jax.Array, Any], jax.Array] = matmul
    matmul_few_rows: Callable[..., jax.Array] = matmul_transposed
    swiglu_matmul: Callable[[jax.Array, jax.Array, Any], jax.Array] = jax.checkpoint(swiglu_matmul)
    attention: Callable[..., jax.Array] = attention
    cached_attention: Callable[..., jax.Array] = attention
    decoding_kernel: Callable[[jax.Array], Any] = lambda kernel_df: kernel_df
    stored: Callable[[jax.Array], jax.Array] = lambda x: x
    recomputes: bool = False


def _matmul_on_cpu(x: jax.Array, kernel: jax.Array | cpu.TransposedKernel) -> jax.Array:
    if isinstance(kernel, cpu.TransposedKernel):
        return cpu.matmul_transposed(x, kernel.kernel_oi)
    return cpu.matmul(x, kernel)


def _swiglu_matmul_on_cpu(gate: jax.Array, up: jax.Array, kernel: jax.Array | cpu.TransposedKernel) -> jax.Array:
    if isinstance(kernel, cpu.TransposedKernel):
        return cpu.matmul_transposed(jax.nn.silu(gate) * up, kernel.kernel_oi)
    return cpu.swiglu_matmul(gate, up, kernel)


ON_CPU = Operations(
    matmul=_matmul_on_cpu,
    matmul_few_rows=cpu.matmul_transposed,
    swiglu_matmul=_swiglu_matmul_on_cpu,
    attention=cpu.attention,
    decoding_kernel=lambda kernel_df: cpu.TransposedKernel(jnp.swapaxes(kernel_df, 0, 1)),
    stored=cpu.stored,
    recomputes=True,
)


def select(arch: Architecture) -> Operations:
    """The operations for an architecture in the layout in use."""
    operations = ON_CPU if on_one_cpu() else Operations()
    return operations._replace(attention=pallas.attention) if uses_kernels(arch) else operations


def on_one_cpu() -> bool:
    """Whether programs are for a CPU without a mesh."""
    return sharding.platform() == "cpu" and sharding.current() is None


def uses_kernels(arch: Architecture) -> bool:
    """Whether attention without a cache is left to kernels: on a GPU or TPU, in bfloat16, for heads that suit them."""
    if arch.attention != "auto":
        return arch.attention == "kernels"
    return sharding.platform() != "cpu" and arch.compute_dtype == "bfloat16" and arch.head_dim in (64, 128, 256)
