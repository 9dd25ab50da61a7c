"""Latent consistency's kernel against float64; interpreted where there is no GPU."""

import functools
import sys

import pytest
import torch

pytest.importorskip("triton")

import mtp_kernels.triton  # noqa: E402, F401
from mtp_kernels import latent_consistency, reference  # noqa: E402
from mtp_kernels.testing import assert_within_budget, guarded_outputs, guarded_randn  # noqa: E402

KERNELS = sys.modules["mtp_kernels.triton.latent_consistency"]  # the package's attribute of this name is the function
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
fused = functools.partial(latent_consistency, implementation="triton")


def with_gradient(function, z, target, index, weight, dloss=0.7):
    z = z.detach().requires_grad_()
    loss = function(z, target, index, weight)
    return loss.detach(), torch.autograd.grad(loss * dloss, z)[0]


def by_rows(z, target, index, weight):
    parts = [w * (row - target[i]).pow(2).sum() / len(row) for row, i, w in zip(z, index.tolist(), weight, strict=True)]
    return sum(parts, z.sum() * 0)


def case(m, n, d, dtype, device):
    generator = torch.Generator().manual_seed(m)
    index, weight = torch.randint(n, (m,), generator=generator).to(device), torch.rand(m, generator=generator).to(device)
    weight[2::4] = 0
    return guarded_randn((m, d), dtype, device), guarded_randn((n, d), dtype, device, 1), index, weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n, d", [(1, 1, 1), (5, 3, 24), (7, 2, 70), (3, 4, 1100), (64, 5, 16)])
def test_value_and_gradient(m, n, d, dtype, device):
    z, target, index, weight = case(m, n, d, dtype, device)
    with guarded_outputs(KERNELS):
        got = with_gradient(fused, z, target, index, weight)
    exact = with_gradient(by_rows, z.double(), target.double(), index, weight.double())
    for g, e, r in zip(got, exact, with_gradient(reference.latent_consistency, z, target, index, weight), strict=True):
        assert_within_budget(g, e, r)
    assert got[0].dtype == torch.float32 and got[0].shape == () and not got[1][weight == 0].any()
    assert torch.equal(got[0], fused(z, target, index, weight)) and torch.equal(got[0], with_gradient(fused, z, target, index, weight)[0])


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_a_row_of_weight_0_may_be_anything_finite(implementation, device):
    z, target, index, weight = case(6, 4, 8, torch.float32, device)
    function = functools.partial(latent_consistency, implementation=implementation)
    wanted = with_gradient(function, z, target, index, weight)
    z[weight == 0] = torch.finfo(torch.float32).max
    assert (weight == 0).any() and all(map(torch.equal, with_gradient(function, z, target, index, weight), wanted))


def test_no_rows(device):
    z, target, index, weight = case(0, 4, 8, torch.float16, device)
    loss, dz = with_gradient(fused, z, target, index, weight)
    assert loss == 0 and dz.shape == (0, 8)


def test_constants(device):
    z, target, index, weight = case(5, 4, 8, torch.float32, device)
    target.requires_grad_(), weight.requires_grad_()
    assert not fused(z, target, index, weight).requires_grad
    z.requires_grad_()
    assert torch.autograd.grad(fused(z, target, index, weight), [z, target, weight], allow_unused=True)[1:] == (None, None)


def test_strides(device):
    z, target, index, weight = case(6, 4, 10, torch.float32, device)
    wanted = with_gradient(fused, z, target, index, weight)
    for view in (lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]], lambda x: x.repeat_interleave(2, -1)[..., ::2]):
        got = with_gradient(fused, view(z), view(target), view(index), view(weight))
        assert all(map(torch.equal, got, wanted))


def test_operators(device):
    arguments, dloss = case(5, 4, 8, torch.float32, device), torch.tensor(0.3, device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mtp_kernels.latent_consistency.default, arguments, test_utils=checks)
    torch.library.opcheck(torch.ops.mtp_kernels.latent_consistency_backward.default, (dloss, *arguments), test_utils=checks)
    compiled = torch.compile(lambda *args: fused(*args), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, with_gradient(compiled, *arguments), with_gradient(fused, *arguments)))
