"""What tests and benchmarks share: the error budget, and outputs under guard."""

import contextlib
from types import ModuleType

import torch
from torch import Tensor

GUARD = 1024  # elements on each side; a multiple of 16 bytes in every dtype, which keeps the alignment


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu", stride: tuple[int, ...] | None = None):
    """A tensor poisoned with NaN (integers: the least value) inside a larger buffer of the same, and a function that
    raises AssertionError if anything was written to the buffer on either side."""
    poison = torch.nan if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).min
    extent = 0 if 0 in shape else torch.Size(shape).numel() if stride is None else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    buffer = torch.full((extent + 2 * GUARD,), poison, dtype=dtype, device=device)
    untouched = buffer[:GUARD].clone().view(torch.uint8)
    inside = buffer[GUARD : GUARD + extent]

    def check() -> None:
        for name, side in (("before", buffer[:GUARD]), ("after", buffer[GUARD + extent :])):
            assert torch.equal(side.view(torch.uint8), untouched), f"something was written {name} a tensor of shape {tuple(shape)}"

    return (inside.as_strided(shape, stride, inside.storage_offset()) if stride else inside.view(shape)), check


def guarded_randn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random values with NaN before and after them, which shows in a result if it is read."""
    return guarded(shape, dtype, device)[0].copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale)


class _GuardingTorch:
    """`torch`, except that `empty` and `empty_like` give guarded tensors."""

    def __init__(self):
        self.checks = []

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def _guarded(self, plain: Tensor, device) -> Tensor:
        tensor, check = guarded(tuple(plain.shape), plain.dtype, device, plain.stride())
        self.checks.append(check)
        return tensor

    def empty(self, *size, device=None, **options) -> Tensor:
        return self._guarded(torch.empty(*size, device="meta", **options), device or torch.get_default_device())

    def empty_like(self, x: Tensor, *, device=None, **options) -> Tensor:
        return self._guarded(torch.empty_like(x, device="meta", **options), device or x.device)


@contextlib.contextmanager
def guarded_outputs(*modules: ModuleType):
    """Within the block, what these modules get from torch.empty and torch.empty_like is poisoned and guarded.

    So an element that a kernel forgets is NaN, and a store past an output's end raises AssertionError when the block ends.
    """
    torches = [_GuardingTorch() for _ in modules]
    for module, guarding in zip(modules, torches, strict=True):
        module.torch = guarding
    try:
        yield
    finally:
        for module in modules:
            module.torch = torch
    for guarding in torches:
        assert guarding.checks, "no output was allocated by torch.empty or torch.empty_like"
        for check in guarding.checks:
            check()


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
