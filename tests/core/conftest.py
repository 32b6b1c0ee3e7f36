import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def compile_quickly(quick_compilation):
    """Tests of this folder compile many tiny programs and run each once."""


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
