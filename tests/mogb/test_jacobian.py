"""The N-sized arithmetic: against exact rational or float64 dense computations."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from mogb.jacobian import CHUNK, Jacobian, all_finite


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 2, 5, 8, 9, 17])
@pytest.mark.parametrize("columns", [1, 7, 70_000, CHUNK // 8 + 1500])
def test_the_gramian_is_that_of_the_numbers_held(dtype, size, columns):
    rows = torch.randn(size, columns, generator=generator(0)).to(dtype)
    exact = rows.double() @ rows.double().mT
    norms = exact.diagonal().sqrt()
    error = (torch.from_numpy(Jacobian.of(rows).gramian()) - exact).abs() / torch.outer(norms, norms)
    assert error.max() < (1e-12 if dtype == torch.float64 else 1e-6)


def test_small_float32_rows_are_multiplied_in_float64():
    rows = torch.randn(5, 10_000, generator=generator(1))
    assert_close(torch.from_numpy(Jacobian.of(rows).gramian()), rows.double() @ rows.double().mT, rtol=1e-13, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_squares_that_leave_the_range_of_float32_are_not_lost(scale):
    rows = torch.randn(3, 60_000, generator=generator(2)) * scale
    assert_close(torch.from_numpy(Jacobian.of(rows).gramian()), rows.double() @ rows.double().mT, rtol=1e-12, atol=0)


def test_nearly_dependent_rows_get_digits_that_float32_would_lose():
    base = torch.randn(1, 200_000, generator=generator(3))
    rows = torch.cat([base, base * (1 + 2**-20), base])
    gramian = torch.from_numpy(Jacobian.of(rows).gramian())
    assert_close(gramian, rows.double() @ rows.double().mT, rtol=1e-12, atol=0)


def test_blocks_add_up_to_the_concatenation():
    blocks = [
        torch.randn(4, 3, 5, generator=generator(4)),
        torch.randn(4, generator=generator(5)),
        torch.randn(4, 2, 1, 2, generator=generator(9)),
    ]
    flat = torch.cat([block.reshape(4, -1) for block in blocks], dim=1).double()
    jacobian = Jacobian.of(blocks)
    weights = np.array([0.5, -1.0, 2.0, 0.25])
    assert len(jacobian) == 4
    assert_close(torch.from_numpy(jacobian.gramian()), flat @ flat.mT)
    direction = jacobian.combine(weights)
    assert [part.shape for part in direction] == [block.shape[1:] for block in blocks]
    together = torch.cat([part.reshape(-1) for part in direction]).double()
    assert_close(together, torch.from_numpy(weights) @ flat, rtol=1e-5, atol=1e-6)
    assert_close(torch.from_numpy(jacobian.products(direction)), flat @ together, rtol=1e-5, atol=1e-5)


def test_weights_too_large_for_half_precision_still_give_a_direction_that_fits():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1e-6]], dtype=torch.float16)
    (direction,) = Jacobian.of(rows).combine(np.array([1.0, 1e6]))
    assert direction.dtype == torch.float16
    assert_close(direction, torch.tensor([1.0, 1e6 * float(rows[1, 1])], dtype=torch.float16))


def test_micro_batches_add():
    first, second = torch.randn(3, 6, generator=generator(6)), torch.randn(3, 6, generator=generator(7))
    total = Jacobian.of(first) + Jacobian.of(second)
    assert_close(total.blocks[0], first + second)


def test_map_applies_a_rule_per_coordinate():
    block = torch.tensor([[[1.0, -2.0], [3.0, 0.0]], [[5.0, 6.0], [-7.0, 8.0]]])
    (result,) = Jacobian.of(block).map(lambda rows: rows.max(dim=0).values)
    assert_close(result, torch.tensor([[5.0, 6.0], [3.0, 8.0]]))


def test_non_contiguous_rows_are_read_right():
    rows = torch.randn(6, 4, 3, generator=generator(8), dtype=torch.float64).permute(1, 2, 0)
    flat = rows.reshape(4, -1)
    assert_close(torch.from_numpy(Jacobian.of(rows).gramian()), flat @ flat.mT)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_row_is_found(bad):
    rows = torch.ones(4, 5)
    rows[2, 3] = bad
    assert Jacobian.of([torch.ones(4, 2), rows]).first_non_finite() == 2
    assert Jacobian.of(torch.ones(4, 2)).first_non_finite() is None
    assert not all_finite([torch.ones(3), rows[2]])


def test_a_sum_that_overflows_is_no_alarm():
    assert all_finite([torch.full((10,), 3e38)])
