"""What tests of several folders share: how they compile, and commands as processes."""

import collections
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator

import commands
import jax
import pytest
from jax._src import compiler

from mara_jax.train import memory

FUSION = {"xla_cpu_use_fusion_emitters": False}
CACHE = "JAX_COMPILATION_CACHE_DIR"


def pytest_configure(config):
    """Gives the session one compilation cache: for this process, its workers, and the processes that tests start.

    It begins empty, unless the environment names one that is kept.
    """
    if CACHE not in os.environ:
        os.environ[CACHE] = tempfile.mkdtemp(prefix="mara_jax-compiled-")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(CACHE), ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
    least = float(os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files of few tests come first: theirs take longest, and short ones even out two workers' time at the end."""
    tests_of = collections.Counter(item.path for item in items)
    items.sort(key=lambda item: tests_of[item.path])


@functools.cache
def _known(**options: bool) -> bool:
    """Whether this XLA takes these options: one that it does not know ends a compilation."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return False
    return True


@pytest.fixture
def x64():
    """Float64 where jax has float32 otherwise."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_go():
    """What a module has compiled goes with it: two workers would else keep some 10 GB of programs in memory."""
    yield
    jax.clear_caches()
    memory.give_back()


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Programs that run a few times on little are compiled unoptimised: optimising would cost more than it saves.

    Nor are they fused by XLA's emitters, which take half of the time that is left. A module whose programs compute for
    longer, or that reads what the optimiser made of them, is marked `optimised`. The rest of XLA_FLAGS holds here too.
    """
    if request.node.get_closest_marker("optimised"):
        yield
        return
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
def quick_environment() -> dict[str, str]:
    """The same for processes that tests start."""
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in FUSION.items() if _known(**FUSION))
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}


@pytest.fixture(scope="session")
def command(quick_environment) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Runs a command of this package as `python -m` does; all share an import and what they compile."""
    with commands.forked(quick_environment) as run:
        yield run


@pytest.fixture(scope="session")
def main(command) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the training command with flags."""
    return functools.partial(command, "mara_jax.main")


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """A directory with a random policy of 259 tokens that ends its completions now and then."""
    from mara_jax import hf
    from mara_jax.hf import tokenizer as tokenizers
    from mara_jax.policies import transformer
    from mara_jax.policies.policy import Policy

    tokenizer = tokenizers.nano(["a b c"], 259)
    ends = tokenizers.end_tokens(tokenizer)
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 16, "tie_embeddings": True, "max_positions": 64}
    policy = Policy(transformer.Architecture("qwen2", 259, 16, 1, **shape), tokenizer, ends, ends[0], {}, "random")
    out = tmp_path_factory.mktemp("random") / "model"
    return hf.export(policy, transformer.init(policy.architecture, jax.random.key(0)), out)
