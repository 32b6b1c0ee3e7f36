"""How XLA compiles for a CPU: what has to be said before jax starts its backend."""

import importlib.metadata
import importlib.util
import os

# Matmuls by the YNN library, jaxlib 0.10's choice, take a third more time than XLA's own: 1.9 s against 2.6 for a
# training step of bench's `tiny` on one thread (Xeon with AVX-512). On two threads YNN is the faster one for the layers
# of SmolLM2-135M, by 10 to 20 % in single matmuls.
FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# Packages that bring another backend, which might not know the flag and would refuse to start.
ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")


def use_own_matmuls() -> None:
    """Turns YNN off in this process, where nothing but the CPU is installed and XLA_FLAGS do not name it."""
    if FLAG in os.environ.get("XLA_FLAGS", "") or any(map(importlib.util.find_spec, ACCELERATORS)):
        return
    # XLA ends a process that names a flag it does not know.
    if importlib.metadata.version("jaxlib").split(".")[:2] == ["0", "10"]:
        # In front: XLA reads no flag that stands behind a word without dashes.
        os.environ["XLA_FLAGS"] = f"{FLAG}= {os.environ.get('XLA_FLAGS', '')}".strip()
