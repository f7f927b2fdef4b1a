"""What all tests share."""

import pathlib
import sys
import warnings

import jaxtyping
import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent / "mogb"))  # helper modules, whatever pytest's import mode

torch.set_num_threads(1)


@pytest.fixture
def unchecked():
    """Calls as users make them: without the type checks of the test suite, so that the project's own checks speak."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def no_warnings():
    """Turns numpy's silent-in-C warnings into errors, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
