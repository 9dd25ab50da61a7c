"""The rotary embedding's kernel against float64; interpreted where there is no GPU."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from mtp_kernels import reference, rotary_embedding, rotary_frequencies, rotary_tables  # noqa: E402
from mtp_kernels.testing import assert_within_budget, guarded_outputs, guarded_randn  # noqa: E402
from mtp_kernels.triton import rotary as kernels  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


fused = functools.partial(rotary_embedding, implementation="triton")


def with_gradient(function, x, cos, sin, dy, *norm):
    x = x.detach().requires_grad_()
    y = function(x, cos, sin, *norm)
    return y, torch.autograd.grad(y, x, dy)[0]


def exactly(x, cos, sin, norm=None, eps=0.0):
    """In float64, of which the specification's norm knows nothing."""
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm
    return reference.rotary_embedding(x, cos, sin)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 2), (3, 5, 16), (2, 2, 3, 64), (3, 40, 80), (2, 12, 96), (2, 33, 128)])
def test_values_and_gradient(shape, dtype, normed, device):
    x, dy = (guarded_randn(shape, dtype, device, seed) for seed in (0, 1))
    cos, sin = (guarded_randn((*shape[:-2], shape[-1]), dtype, device, seed) for seed in (2, 3))  # any tables, not only cosines
    norm = (guarded_randn(shape[-2:], dtype, device, 4), 0.25) if normed else ()
    with guarded_outputs(kernels):
        got = with_gradient(fused, x, cos, sin, dy, *norm)
    exact = with_gradient(exactly, *(y.double() if isinstance(y, torch.Tensor) else y for y in (x, cos, sin, dy, *norm)))
    eager = with_gradient(reference.rotary_embedding, x, cos, sin, dy, *norm)
    for g, e, r in zip(got, exact, eager, strict=True):
        assert_within_budget(g.detach(), e.detach(), r.detach())
    assert torch.equal(got[0].detach(), fused(x, cos, sin, *norm))


def test_backward_is_the_rotation_back(device):
    tables = rotary_tables(torch.tensor([0, 7, 1000], device=device), rotary_frequencies(64).to(device))
    x = torch.randn(3, 4, 64, device=device, requires_grad=True)
    y = fused(x, *tables)
    (back,) = torch.autograd.grad(y, x, y.detach())
    torch.testing.assert_close(back, x.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 16), (3, 0, 16), (2, 0, 4, 16)])
def test_nothing(shape, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    tables = torch.zeros((*shape[:-2], 16), device=device)
    y = fused(x, tables, tables)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize(
    "view, copied",
    [
        (lambda x: x[:, :, 1:4], False),  # a slice of a fused projection
        (lambda x: x[:, 1:2], False),
        (lambda x: x.transpose(0, 1), True),
        (lambda x: x[:, :, 2], False),
        (lambda x: x[..., ::2], True),
        (lambda x: x.flatten(-2).unflatten(-1, (4, 24))[..., 8:], False),
    ],
)
def test_strides(view, copied, device, monkeypatch):
    x = view(torch.randn(4, 3, 6, 16, device=device))
    cos, sin = (torch.randn(x.shape[0], *[1] * (x.ndim - 3), x.shape[-1], device=device).expand(*x.shape[:-2], -1) for _ in range(2))
    dy = torch.randn(*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 4, device=device)[..., 1:, 4:]
    taken, launch = [], kernels._device.launch
    monkeypatch.setattr(kernels._device, "launch", lambda *a, **options: (taken.append(options["x_ptr"]), launch(*a, **options)))
    got = with_gradient(fused, x, cos, sin, dy)
    assert (taken[0].data_ptr() != x.data_ptr()) == copied
    wanted = with_gradient(fused, x.contiguous(), cos.contiguous(), sin.contiguous(), dy.contiguous())
    assert all(map(torch.equal, got, wanted))
    norm = torch.randn(x.shape[-1], x.shape[-2], device=device).t()
    got = with_gradient(fused, x, cos, sin, dy, norm)
    wanted = with_gradient(fused, x.contiguous(), cos.contiguous(), sin.contiguous(), dy.contiguous(), norm.contiguous())
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_independent(dtype, normed, device):
    x, dy = (torch.randn(5, 3, 80, device=device).to(dtype) for _ in range(2))
    cos, sin = (torch.randn(5, 80, device=device).to(dtype) for _ in range(2))
    norm = (torch.randn(3, 80, device=device).to(dtype),) if normed else ()
    got = with_gradient(fused, x, cos, sin, dy, *norm)
    for rows in (slice(0, 1), slice(2, 5)):
        alone = with_gradient(fused, x[rows], cos[rows], sin[rows], dy[rows], *norm)
        assert all(torch.equal(a, g[rows]) for a, g in zip(alone, got, strict=True))


def test_operators(device):
    x, dy = (torch.randn(2, 3, 4, 8, device=device) for _ in range(2))
    cos, sin = (torch.randn(2, 3, 8, device=device) for _ in range(2))
    norm, checks = torch.randn(4, 8, device=device), ("test_schema", "test_faketensor")
    for arguments in ((x[:, :, 1:], cos, sin, None, 1e-6, None, True), (x, cos, sin, norm, 1e-6, dy, True)):
        torch.library.opcheck(torch.ops.mtp_kernels.rotary_embedding.default, arguments, test_utils=checks)
    compiled = torch.compile(lambda *arguments: fused(*arguments), fullgraph=True, backend="aot_eager")
    for arguments in ((), (norm, 0.5)):
        got, wanted = (with_gradient(f, x, cos, sin, dy, *arguments) for f in (compiled, fused))
        assert all(map(torch.equal, got, wanted))
