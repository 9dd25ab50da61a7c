"""Operations of the specification whose gradients are written out: autograd's own would be right too, but keeps more and copies more.

On a CPU a training step spends its time in memory: a slice's gradient is a zero-filled tensor of the whole, a norm's passes over its input
eight times, and several adapters put together as a block-diagonal matrix multiply mostly zeros. Here

    y = x W^T + scale * (x A^T) B^T        ds = scale dy B,  dx = dy W + ds A,  dA = ds^T x,  dB = scale dy^T s,  s = x A^T
    y = silu(g) * u                        dg = dy * u * silu'(g),  du = dy * silu(g)
    y = x r w,  r = 1 / sqrt(mean x^2 + eps)   dx = r (dy w - x r^2 mean(x dy w)),  dw = sum over rows of dy x r

SwiGLU's and RMSNorm's forward return nothing written in place: torch.compile of torch 2.11 then computes a wrong gradient, silently.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """(..., 1) of x (..., d), float32 or float64."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(int(x.shape[-1])).add_(eps).rsqrt_()


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T (+ b) (+ residual) for x of shape (M, K); see `reference` for the row that is doubled."""
    single = x.shape[0] == 1 and x.device.type == "cpu"
    if single:  # one row would take a matrix-vector routine, which sums in another order
        x = x.expand(2, -1)
    if residual is None:
        y = F.linear(x, weight, bias)
    else:
        y = torch.addmm(residual, x, weight.t())  # a single residual row broadcasts
        y = y if bias is None else y + bias
    return y[:1] if single else y


class AdaptedLinear(torch.autograd.Function):
    """Rows [gate, M) of x (M, K) with an adapter for each of the projections."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, residual: Tensor | None,
        gate: int, scale: float, splits: tuple[int, ...],
    ) -> Tensor:  # fmt: skip
        y = matmul(x, weight, bias, residual)
        shrunk = F.linear(x[gate:], lora_a)
        for part, s, b in zip(y[gate:].split(splits, 1), shrunk.chunk(len(splits), 1), lora_b.split(splits), strict=True):
            part.addmm_(s, b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, lora_a, lora_b, shrunk)
        ctx.options = gate, scale, splits
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, lora_a, lora_b, shrunk = ctx.saved_tensors
        gate, scale, splits = ctx.options
        need_x, need_weight, need_a, need_b, need_bias, need_residual = ctx.needs_input_grad[:6]
        ds, db = torch.empty_like(shrunk), torch.empty_like(lora_b)
        parts = (dy[gate:].split(splits, 1), ds.chunk(len(splits), 1), shrunk.chunk(len(splits), 1), lora_b.split(splits), db.split(splits))
        for dpart, dpart_s, s, b, dpart_b in zip(*parts, strict=True):
            dpart_s.addmm_(dpart, b, beta=0, alpha=scale)
            if need_b:
                dpart_b.addmm_(dpart.t(), s, beta=0, alpha=scale)
        dx = None
        if need_x:
            dx = dy @ weight
            dx[gate:].addmm_(ds, lora_a)
        return (
            dx, dy.t() @ x if need_weight else None, ds.t() @ x[gate:] if need_a else None, db if need_b else None,
            dy.sum(0) if need_bias else None, dy if need_residual else None, None, None, None,
        )  # fmt: skip


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        ctx.save_for_backward(x)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        return torch.cat([torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)], dim=-1)


class RMSNorm(torch.autograd.Function):
    """float32 and float64."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = reciprocal_rms(x, eps)
        ctx.save_for_backward(x, weight, r)
        return x * r * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, r = ctx.saved_tensors
        d = x.shape[-1]
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * x).mul_(r).reshape(-1, d).sum(0)
        if ctx.needs_input_grad[0]:
            dx = dy * weight
            mean = torch.linalg.vecdot(dx, x).unsqueeze(-1).div_(d).mul_(r).mul_(r)
            dx = dx.addcmul_(x, mean, value=-1).mul_(r)
        return dx, dweight, None
