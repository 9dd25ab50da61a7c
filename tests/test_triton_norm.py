"""RMSNorm's kernels against float64; interpreted where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from mtp_kernels import reference, rms_norm  # noqa: E402
from mtp_kernels.testing import assert_within_budget, guarded_outputs, guarded_randn  # noqa: E402
from mtp_kernels.triton import norm as kernels  # noqa: E402
from mtp_kernels.triton._tiles import NormWeightTiles  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-3


def fused(x, weight, eps=EPS, residual=None):
    return rms_norm(x, weight, eps, residual, implementation="triton")


def with_gradients(function, tensors, upstream, frozen=False):
    """(y, x + residual if there is one, gradients of x, residual, weight). tensors: weight, x, and perhaps residual."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    if frozen:
        leaves[0].requires_grad_(False)
    y = function(leaves[1], leaves[0], EPS, *leaves[2:])
    outputs = list(y) if isinstance(y, tuple) else [y]
    wanted = leaves[frozen:]
    return [*outputs, *torch.autograd.grad(outputs, wanted, upstream[: len(outputs)])]


def formula(x, weight, eps, residual=None):
    x = x if residual is None else x + residual
    y = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
    return y if residual is None else (y, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(70,), (6, 40), (2, 3, 128), (2, 1100)])
def test_values_and_gradients(shape, residual, dtype, device):
    weight, *tensors = (guarded_randn(s, dtype, device, seed, 2.0) for seed, s in enumerate([shape[-1:], *[shape] * (1 + residual)]))
    upstream = [guarded_randn(shape, dtype, device, seed) for seed in (7, 8)]
    tensors = [weight, *tensors]
    with guarded_outputs(kernels):
        got = with_gradients(fused, tensors, upstream)
    exact = with_gradients(formula, [t.double() for t in tensors], [t.double() for t in upstream])
    eager = with_gradients(reference.rms_norm, tensors, upstream)
    for g, e, r in zip(got, exact, eager, strict=True):
        assert_within_budget(g.detach(), e.detach(), r.detach())
    if residual:
        assert torch.equal(got[1], tensors[1] + tensors[2])
        assert torch.equal(got[0], fused(got[1], weight))  # of the rounded sum
    plain = fused(tensors[1], weight, EPS, *tensors[2:])
    assert torch.equal(got[0], plain[0] if residual else plain)
    frozen = with_gradients(fused, tensors, upstream, frozen=True)
    assert all(map(torch.equal, frozen, [*got[: 1 + residual], *got[2 + residual :]]))


def test_a_long_row(device):
    x, dy, weight = (guarded_randn(shape, torch.bfloat16, device, seed) for seed, shape in enumerate([(2, 16384), (2, 16384), (16384,)]))
    got = with_gradients(fused, [weight, x], [dy], frozen=True)
    exact = with_gradients(formula, [weight.double(), x.double()], [dy.double()], frozen=True)
    for g, e, r in zip(got, exact, with_gradients(reference.rms_norm, [weight, x], [dy], frozen=True), strict=True):
        assert_within_budget(g.detach(), e.detach(), r.detach())


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_half_precision_rounds_before_the_weight(dtype, device):
    """Bit for bit what transformers' Llama computes, except where the mean's last bit decides a rounding."""
    x, weight = guarded_randn((4, 256), dtype, device), guarded_randn((256,), dtype, device, 1)
    n = (x.double() / (x.double().pow(2).mean(-1, keepdim=True) + EPS).sqrt()).to(dtype)
    assert (fused(x, weight) == n * weight).float().mean() > 0.99
    assert (fused(x, weight) == (n.double() * weight.double()).to(dtype)).float().mean() > 0.99


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0)])
@pytest.mark.parametrize("residual", [False, True])
def test_nothing(shape, residual, device):
    x, weight = torch.zeros(shape, device=device), torch.ones(shape[-1], device=device)
    tensors = [weight, x, x] if residual else [weight, x]
    *outputs, dweight, dx = with_gradients(fused, tensors, [x, x])[: 3 + residual]
    assert all(y.shape == shape for y in outputs) and dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))


def launched(monkeypatch):
    names, launch = [], kernels._device.launch

    def record(kernel, *args, **options):
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **options)

    monkeypatch.setattr(kernels._device, "launch", record)
    return names


def test_a_frozen_weight_costs_nothing(device, monkeypatch):
    names = launched(monkeypatch)
    weight, x = torch.ones(8, device=device), torch.randn(2, 8, device=device, requires_grad=True)
    fused(x, weight).sum().backward()
    assert names == ["rms_norm_kernel", "rms_norm_dx_kernel"]


def test_only_one_of_the_pair_is_used(device):
    x, r = (torch.randn(2, 8, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(8, device=device, requires_grad=True)
    for index in (0, 1):
        got = torch.autograd.grad(fused(x, weight, EPS, r)[index].sum(), [x, r, weight], allow_unused=True)
        exact = torch.autograd.grad(formula(x, weight, EPS, r)[index].sum(), [x, r, weight], allow_unused=True)
        for g, e in zip(got, exact, strict=True):
            assert (g is None) == (e is None)
            assert g is None or torch.allclose(g, e, atol=1e-5)


@pytest.mark.parametrize("view", [lambda x: x[1:3, :, 4:24], lambda x: x.transpose(0, 1), lambda x: x[..., ::2], lambda x: x[:1].expand(3, -1, -1)])
def test_strides(view, device):
    x, residual = (view(torch.randn(4, 5, 32, device=device)) for _ in range(2))
    weight = torch.randn(2 * x.shape[-1], device=device)[::2]
    wide = [torch.randn(*x.shape[:-1], x.shape[-1] + extra, device=device)[..., extra:] for extra in (3, 16)]
    for upstream in (wide, [torch.randn((), device=device).expand(x.shape) for _ in range(2)]):
        got = with_gradients(fused, [weight, x, residual], upstream)
        contiguous = with_gradients(fused, [t.contiguous() for t in (weight, x, residual)], [t.contiguous() for t in upstream])
        assert all(map(torch.equal, got, contiguous))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_independent(dtype, device):
    x, residual, dy, dtotal = (torch.randn(5, 300, device=device).to(dtype) for _ in range(4))
    weight = torch.randn(300, device=device).to(dtype)
    got = with_gradients(fused, [weight, x, residual], [dy, dtotal], frozen=True)
    for rows in (slice(0, 1), slice(2, 5)):
        alone = with_gradients(fused, [weight, x[rows], residual[rows]], [dy[rows], dtotal[rows]], frozen=True)
        assert all(torch.equal(a, g[rows]) for a, g in zip(alone, got, strict=True))


@pytest.mark.parametrize("m, n", [(1, 1), (33, 130), (40000, 4096), (1, 100000), (2**20, 64)])
def test_every_row_of_a_weight_gradient_has_one_program(m, n):
    tiles = kernels.norm_weight_tiles(m, n)
    programs = kernels.cdiv(m, tiles.rows)
    assert tiles.rows % tiles.block_m == 0 and (programs - 1) * tiles.rows < m <= programs * tiles.rows
    assert programs * kernels.cdiv(n, tiles.block_n) <= max(512, kernels.cdiv(n, tiles.block_n))


@pytest.mark.parametrize("rows, programs", [(8, 3), (16, 2), (32, 1)])
def test_several_partial_sums(rows, programs, device, monkeypatch):
    x, weight, dy = torch.randn(20, 6, device=device), torch.randn(6, device=device), torch.randn(20, 6, device=device)
    tensors = [weight, x]
    monkeypatch.setattr(kernels, "norm_weight_tiles", lambda m, n: NormWeightTiles(rows, 8, 4, 4))
    assert kernels.cdiv(20, rows) == programs
    first, second = (with_gradients(fused, tensors, [dy])[1] for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, with_gradients(formula, tensors, [dy])[1], rtol=1e-5, atol=1e-5)


def test_operators(device):
    x, residual, dy, dtotal = (torch.randn(2, 3, 8, device=device) for _ in range(4))
    weight, ops = torch.randn(8, device=device), torch.ops.mtp_kernels
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.rms_norm.default, (x, weight, EPS), test_utils=checks)
    torch.library.opcheck(ops.add_rms_norm.default, (x, residual, weight, EPS), test_utils=checks)
    torch.library.opcheck(ops.rms_norm_backward.default, (dy, x, weight, dtotal, EPS, True), test_utils=checks)
    torch.library.opcheck(ops.rms_norm_backward.default, (dy, x, weight, None, EPS, False), test_utils=checks)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for frozen in (False, True):
        got, wanted = (with_gradients(f, [weight, x, residual], [dy, dtotal], frozen) for f in (compiled, fused))
        assert all(map(torch.equal, got, wanted))
