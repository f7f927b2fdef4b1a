import jaxtyping
import pytest


@pytest.fixture
def untyped():
    """Switches the shape checks of the tests off, to see the errors that a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
