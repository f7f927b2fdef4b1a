import pytest

from mogb_diffusion import checks
from mogb_diffusion.errors import InputError


@pytest.mark.parametrize(("value", "low"), [(1, 1), (7, 1), (0, 0), (10**20, 3)])
def test_whole_numbers_are_answered_as_they_are(value, low):
    assert checks.whole_number("count", value, low=low) is value


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None])
def test_others_are_named(value):
    with pytest.raises(InputError, match=rf"^count must be a positive whole number, but got {value!r}\.$"):
        checks.whole_number("count", value)


@pytest.mark.parametrize("value", [-1, False, 0.0])
def test_another_bound_is_said(value):
    with pytest.raises(InputError, match=rf"^threads must be a whole number of at least 0, but got {value!r}\.$"):
        checks.whole_number("threads", value, low=0)
