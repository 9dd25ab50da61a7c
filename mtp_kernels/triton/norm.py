"""RMSNorm: y = n * w, n = x r, r = 1 / sqrt(mean(x^2) + eps), over rows of N; with a residual, x is x + residual.

In float16 and bfloat16, x + residual and n are rounded before their next use, as in the specification.

Backward, per row, with g = dy * w and t the gradient that arrives through the sum x + residual:

    dr/dx_i = -r^3 x_i / N
    dx_i    = r g_i - r^3 x_i / N * sum_j g_j x_j  (+ t_i)
            = r (g_i - n_i * mean_j(g_j n_j))      (+ t_i)
    dw_i    = sum over rows of dy_i n_i

dx needs its own row only and r is made again from it, so that the forward saves x alone. dw is a second kernel: each program
sums a fixed block of rows for a block of columns, and the partial sums, as many as the shape says, are added by one more sum.
Nothing is atomic. Adapters leave norm weights frozen and skip it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_kernels.triton import _device
from mtp_kernels.triton._operator import needs_gradient, operator, rows
from mtp_kernels.triton._tiles import cdiv, norm_tiles, norm_weight_tiles


@triton.jit
def _inverse_rms(x, eps, N: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps), each step rounded correctly: an approximate reciprocal would err on the whole row alike."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(x * x, 0), N * 1.0) + eps))


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, x_stride, residual_stride, eps,
    N: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_N)
    dtype = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + m * x_stride + n, mask=n < N, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + m * residual_stride + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(total_ptr + m * N + n, x.to(dtype), mask=n < N)
        x = x.to(dtype).to(tl.float32)
    r = _inverse_rms(x, eps, N)
    weight = tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    normalised = (x * r).to(dtype).to(tl.float32)
    tl.store(y_ptr + m * N + n, (normalised * weight).to(dtype), mask=n < N)


@triton.jit
def rms_norm_dx_kernel(
    dy_ptr, x_ptr, weight_ptr, dtotal_ptr, dx_ptr, r_ptr, dy_stride, x_stride, dtotal_stride, eps,
    N: tl.constexpr, HAS_DTOTAL: tl.constexpr, HAS_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + m * x_stride + n, mask=n < N, other=0.0).to(tl.float32)
    g = tl.load(dy_ptr + m * dy_stride + n, mask=n < N, other=0.0).to(tl.float32)
    g *= tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    r = _inverse_rms(x, eps, N)
    x *= r
    dx = r * (g - x * (tl.sum(g * x, 0) / N))
    if HAS_DTOTAL:
        dx += tl.load(dtotal_ptr + m * dtotal_stride + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(dx_ptr + m * N + n, dx.to(dx_ptr.dtype.element_ty), mask=n < N)
    if HAS_R:
        tl.store(r_ptr + m, r)


@triton.jit
def rms_norm_dweight_kernel(
    dy_ptr, x_ptr, r_ptr, partial_ptr, dy_stride, x_stride, M, N,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial[p] = the sum over rows [p ROWS, (p + 1) ROWS) of dy * x * r."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * ROWS
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        m = (first + start + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        inside = (m < M) & (n < N)[None, :]
        dy = tl.load(dy_ptr + m * dy_stride + n, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + m * x_stride + n, mask=inside, other=0.0).to(tl.float32)
        dweight += dy * (x * tl.load(r_ptr + m, mask=m < M, other=0.0))
    tl.store(partial_ptr + tl.program_id(1) * N + n, tl.sum(dweight, 0), mask=n < N)


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _normalise(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    y, total = _empty(x), None if residual is None else _empty(x)
    if y.numel():
        n, has_residual = x.shape[-1], residual is not None
        x2, weight = rows(x, n), weight.contiguous()
        residual2 = rows(residual, n) if has_residual else None
        block_n, num_warps = norm_tiles(n)
        _device.launch(
            rms_norm_kernel, (x2.shape[0],),
            x_ptr=x2, residual_ptr=residual2, weight_ptr=weight, y_ptr=y, total_ptr=total,
            x_stride=x2.stride(0), residual_stride=residual2.stride(0) if has_residual else 0, eps=eps,
            N=n, HAS_RESIDUAL=has_residual, BLOCK_N=block_n, num_warps=num_warps,
        )  # fmt: skip
    return y, total


@operator(lambda x, weight, eps: _empty(x))
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normalise(x, None, weight, eps)[0]


@operator(lambda x, residual, weight, eps: (_empty(x), _empty(x)))
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _normalise(x, residual, weight, eps)


def _gradients(x: Tensor, with_dweight: bool) -> tuple[Tensor, Tensor]:
    return _empty(x), torch.empty(x.shape[-1] if with_dweight else 0, dtype=x.dtype, device=x.device)


@operator(lambda dy, x, weight, dtotal, eps, with_dweight: _gradients(x, with_dweight))
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, dtotal: Tensor | None, eps: float, with_dweight: bool
) -> tuple[Tensor, Tensor]:
    """dx (or the gradient of x + residual, given that sum's own as dtotal), and dweight, empty if not asked for."""
    dx, dweight = _gradients(x, with_dweight)
    n = x.shape[-1]
    if not x.numel():
        return dx, dweight.zero_()
    dy2, x2, weight = rows(dy, n), rows(x, n), weight.contiguous()
    dtotal2 = None if dtotal is None else rows(dtotal, n)
    m = x2.shape[0]
    r = torch.empty(m, dtype=torch.float32, device=x.device) if with_dweight else None
    block_n, num_warps = norm_tiles(n)
    _device.launch(
        rms_norm_dx_kernel, (m,),
        dy_ptr=dy2, x_ptr=x2, weight_ptr=weight, dtotal_ptr=dtotal2, dx_ptr=dx, r_ptr=r,
        dy_stride=dy2.stride(0), x_stride=x2.stride(0), dtotal_stride=0 if dtotal is None else dtotal2.stride(0), eps=eps,
        N=n, HAS_DTOTAL=dtotal is not None, HAS_R=with_dweight, BLOCK_N=block_n, num_warps=num_warps,
    )  # fmt: skip
    if with_dweight:
        tiles = norm_weight_tiles(m, n)
        partial = torch.empty((cdiv(m, tiles.rows), n), dtype=torch.float32, device=x.device)
        _device.launch(
            rms_norm_dweight_kernel, (cdiv(n, tiles.block_n), partial.shape[0]),
            dy_ptr=dy2, x_ptr=x2, r_ptr=r, partial_ptr=partial, dy_stride=dy2.stride(0), x_stride=x2.stride(0), M=m, N=n,
            ROWS=tiles.rows, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, num_warps=tiles.num_warps,
        )  # fmt: skip
        dweight = partial.sum(0).to(x.dtype)
    return dx, dweight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _rms_norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        needs = ctx.needs_input_grad[1]
        dx, dweight = _rms_norm_backward(dy, *ctx.saved_tensors, None, ctx.eps, needs)
        return dx, dweight if needs else None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total = _add_rms_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.set_materialize_grads(False)  # a model's last norm does not use the sum
        ctx.eps = eps
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dtotal: Tensor | None):
        needs = ctx.needs_input_grad[2]
        if dy is None:
            return dtotal, dtotal, None, None
        dx, dweight = _rms_norm_backward(dy, *ctx.saved_tensors, dtotal, ctx.eps, needs)
        return dx, dx, dweight if needs else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None):
    if residual is None:
        return _RMSNorm.apply(x, weight, eps) if needs_gradient(x, weight) else _rms_norm(x, weight, eps)
    if needs_gradient(x, weight, residual):
        return _AddRMSNorm.apply(x, residual, weight, eps)
    return _add_rms_norm(x, residual, weight, eps)
