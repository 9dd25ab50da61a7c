"""What tests and benchmarks share: the error budget."""

import torch
from torch import Tensor


def assert_within_budget(got: Tensor, exact: Tensor, eager: Tensor) -> None:
    """Assert that `got` errs at most twice what eager PyTorch errs in the same dtype, plus one rounding step.

    exact: the result in float64. eager: a straightforward computation in got's dtype. NaN is beyond every budget.
    """
    assert got.dtype == eager.dtype and got.shape == exact.shape, (got.dtype, eager.dtype, got.shape, exact.shape)
    if not got.numel():
        return
    step = torch.finfo(got.dtype).eps * exact.abs()
    limit = 2 * (eager.double() - exact).abs().max() + step
    excess = ((got.double() - exact).abs() - limit).max()
    assert excess <= 0, f"beyond the budget by {float(excess)}"
