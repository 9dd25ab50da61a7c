"""SwiGLU's kernels against float64; interpreted where there is no GPU."""

import sys

import pytest
import torch

pytest.importorskip("triton")

import mtp_kernels.triton  # noqa: E402, F401
from mtp_kernels import reference, swiglu  # noqa: E402
from mtp_kernels.testing import assert_within_budget, guarded_outputs, guarded_randn  # noqa: E402

KERNELS = sys.modules["mtp_kernels.triton.swiglu"]  # the package's attribute of this name is the function
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(2,), (1, 6), (3, 70), (2, 3, 256), (2, 2100)]


def with_gradient(function, x, dy):
    x = x.detach().requires_grad_()
    y = function(x)
    return y, torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradient(shape, dtype, device):
    x = guarded_randn(shape, dtype, device, 0, 4.0)
    dy = guarded_randn((*shape[:-1], shape[-1] // 2), dtype, device, 1)
    with guarded_outputs(KERNELS):
        got = with_gradient(lambda x: swiglu(x, implementation="triton"), x, dy)
    exact = with_gradient(reference.swiglu, x.double(), dy.double())
    eager = with_gradient(reference.swiglu, x, dy)
    for g, e, r in zip(got, exact, eager, strict=True):
        assert_within_budget(g.detach(), e.detach(), r.detach())
    assert torch.equal(got[0].detach(), swiglu(x, implementation="triton"))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
def test_nothing(shape, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    y = swiglu(x, implementation="triton")
    y.sum().backward()
    assert y.shape == (*shape[:-1], shape[-1] // 2) and x.grad.shape == shape


def test_large_arguments(device):
    x = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4, 2.0, 2.0, 2.0, 2.0, 2.0]], device=device)
    got = with_gradient(lambda x: swiglu(x, implementation="triton"), x, torch.ones(1, 5, device=device))
    for g, e in zip(got, with_gradient(reference.swiglu, x.double(), torch.ones(1, 5, device=device)), strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("view", [lambda x: x[1:3, :, 4:24], lambda x: x.transpose(0, 1), lambda x: x[..., ::2], lambda x: x[:1].expand(3, -1, -1)])
def test_strides(view, device):
    x = view(torch.randn(4, 5, 32, device=device))
    f = x.shape[-1] // 2
    for dy in (torch.randn((), device=device).expand(*x.shape[:-1], f), torch.randn(*x.shape[:-1], f + 3, device=device)[..., 3:]):
        got = with_gradient(lambda x: swiglu(x, implementation="triton"), x, dy)
        wanted = with_gradient(lambda x: swiglu(x, implementation="triton"), x.contiguous(), dy.contiguous())
        assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_independent(dtype, device):
    x, dy = torch.randn(5, 66, device=device).to(dtype), torch.randn(5, 33, device=device).to(dtype)
    got = with_gradient(lambda x: swiglu(x, implementation="triton"), x, dy)
    for rows in (slice(0, 1), slice(2, 5)):
        alone = with_gradient(lambda x: swiglu(x, implementation="triton"), x[rows], dy[rows])
        assert all(torch.equal(a, g[rows]) for a, g in zip(alone, got, strict=True))


def test_operators(device):
    x, dy = torch.randn(2, 3, 8, device=device), torch.randn(2, 3, 4, device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mtp_kernels.swiglu.default, (x,), test_utils=checks)
    torch.library.opcheck(torch.ops.mtp_kernels.swiglu_backward.default, (dy, x), test_utils=checks)
    compiled = torch.compile(lambda x: swiglu(x * 2, implementation="triton"), fullgraph=True, backend="aot_eager")
    got, wanted = (with_gradient(f, x, dy) for f in (compiled, lambda x: swiglu(x * 2, implementation="triton")))
    assert all(map(torch.equal, got, wanted))
