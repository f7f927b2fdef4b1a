"""Options of the wrong type: the error names the option, the value and what is allowed."""

import numpy as np
import pytest
import torch

import mogb

pytestmark = pytest.mark.usefixtures("unchecked")

WRONG = [
    ("cagrad", {"c": "x"}, "c must be a number, but got 'x'"),
    ("cagrad", {"c": None}, "c must be a number, but got None"),
    ("cagrad", {"c": True}, "c must be a number, but got True"),
    ("mgda", {"ignore_zero": "yes"}, "ignore_zero must be True or False, but got 'yes'"),
    ("mgda", {"ignore_zero": 1}, "ignore_zero must be True or False, but got 1"),
    ("marble", {"decay": [1]}, r"decay must be a number, but got \[1\]"),
    ("pcgrad", {"seed": 1.5}, "seed must be a whole number, but got 1.5"),
    ("rlw", {"seed": None}, "seed must be a whole number, but got None"),
    ("nash_mtl", {"max_norm": "1"}, "max_norm must be a number, but got '1'"),
    ("weighted_sum", {"weights": "abc"}, "weights must be a sequence of numbers or None, but got 'abc'"),
    ("weighted_sum", {"weights": 3}, "weights must be a sequence of numbers or None, but got 3"),
    ("upgrad", {"preference": ["a", "b"]}, "preference must be a sequence of numbers or None"),
    ("graddrop", {"leak": "x"}, "leak must be a number or a sequence of numbers, but got 'x'"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_a_value_of_the_wrong_type_is_named(name, options, message):
    with pytest.raises(TypeError, match=message):
        mogb.make(name, **options)


RIGHT = [
    ("cagrad", {"c": np.float32(0.5)}),
    ("cagrad", {"c": 1}),
    ("pcgrad", {"seed": np.int64(3)}),
    ("weighted_sum", {"weights": [1, 2.0]}),
    ("weighted_sum", {"weights": torch.tensor([1.0, 2.0])}),
    ("weighted_sum", {"weights": np.array([1.0, 2.0])}),
    ("upgrad", {"preference": (np.float64(0.5), 1)}),
    ("upgrad", {"preference": None}),
]


@pytest.mark.parametrize(("name", "options"), RIGHT)
def test_numbers_of_any_library_are_numbers(name, options):
    assert torch.isfinite(mogb.make(name, **options)(torch.eye(2))).all()


def test_a_damaged_state_changes_nothing():
    method = mogb.make("marble")
    method(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    before = method.state_dict()
    damaged = dict(before)
    key = next(key for key, value in damaged.items() if isinstance(value, torch.Tensor))
    damaged[key] = "rubbish"
    with pytest.raises(ValueError, match=r"damaged.*load another copy"):
        method.load_state_dict(damaged)
    after = method.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(torch.as_tensor(after[k]), torch.as_tensor(before[k])) for k in before)
