"""What tests of several folders share."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """Programs that run a few times on little are compiled unoptimised: optimising would cost more than it saves.

    A module asks for it with `pytestmark = pytest.mark.usefixtures("quick_compilation")`.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
