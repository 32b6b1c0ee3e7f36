"""What tests of several folders share."""

import functools
import subprocess
from collections.abc import Callable, Iterator

import commands
import jax
import pytest
from jax._src import compiler

FUSION = {"xla_cpu_use_fusion_emitters": False}


@functools.cache
def _known(**options: bool) -> bool:
    """Whether this XLA takes these options: one that it does not know ends a compilation."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return False
    return True


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs that run a few times on little are compiled unoptimised: optimising would cost more than it saves.

    Nor are they fused by XLA's emitters, which take half of the time that is left. A module asks for it with
    `pytestmark = pytest.mark.usefixtures("quick_compilation")`. Modules that do not, and those that read a compiled
    program or hold two of them to be equal bit for bit should not, compile as users do; so do processes that tests
    start. The rest of XLA_FLAGS holds here too.
    """
    options = compiler.get_compile_options

    def unfused(*args, env_options_overrides=None, **named):
        return options(*args, env_options_overrides={**FUSION, **(env_options_overrides or {})}, **named)

    with pytest.MonkeyPatch.context() as patch:
        if _known(**FUSION):
            patch.setattr(compiler, "get_compile_options", unfused)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory) -> dict[str, str]:
    """The environment of processes that share what they compile."""
    cache = str(tmp_path_factory.mktemp("compiled"))
    return {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


@pytest.fixture(scope="session")
def command(compilation_cache) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Runs a command of this package as `python -m` does; all share an import and what they compile."""
    with commands.forked(compilation_cache) as run:
        yield run
