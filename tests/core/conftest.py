import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation():
    """These tests compile many tiny programs and run each once: optimising them costs more than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
