"""Operations of the specification whose gradients are written out: autograd's own would be right too, but keeps more and copies more.

On a CPU a training step spends its time in memory: a slice's gradient is a zero-filled tensor of the whole, a norm's passes over its input
eight times, and several adapters put together as a block-diagonal matrix multiply mostly zeros. Here

    y = x W^T + scale * (x A^T) B^T        ds = scale dy B,  dx = dy W + ds A,  dA = ds^T x,  dB = scale dy^T s,  s = x A^T
    y = silu(g) * u                        dg = dy * u * silu'(g),  du = dy * silu(g)
    y = x cos + roll(x) sin                dx = dy cos + roll(dy) roll(sin)
    y = x r w,  r = 1 / sqrt(mean x^2 + eps)   dx = r (dy w - x r^2 mean(x dy w)),  dw = sum over rows of dy x r
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """(..., 1) of x (..., d), float32 or float64."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / int(x.shape[-1])).rsqrt_()


def times_(x: Tensor, y: Tensor) -> Tensor:
    """x y, in x's place. A compiler sees to that itself, and torch 2.11's takes a wrong gradient, silently, of a forward's result written in place."""
    return x * y if torch.compiler.is_compiling() else x.mul_(y)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T (+ b) (+ residual) for x of shape (M, K)."""
    if residual is None:
        return F.linear(x, weight, bias)
    y = torch.addmm(residual, x, weight.t())
    return y if bias is None else y + bias


def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, splits: tuple[int, ...]) -> Tensor:
    """W + scale B A, of each projection."""
    weight = weight.clone()
    for w, a, b in zip(weight.split(splits), lora_a.chunk(len(splits)), lora_b.split(splits), strict=True):
        w.addmm_(b, a, alpha=scale)
    return weight


class AdaptedLinear(torch.autograd.Function):
    """Rows [gate, M) of x (M, K) with an adapter for each of the projections."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, residual: Tensor | None,
        gate: int, scale: float, splits: tuple[int, ...],
    ) -> Tensor:  # fmt: skip
        (m, k), n = x.shape, weight.shape[0]
        # Merged into the weight, in both directions, an adapter costs 2 r N K multiplications and saves M r (N + K). 16 bits would round it away.
        merge = gate == 0 and x.dtype.itemsize >= 4 and m * (n + k) > 2 * n * k
        shrunk = None
        if merge:
            y = matmul(x, merged(weight, lora_a, lora_b, scale, splits), bias, residual)
        else:
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
        merge, on, don = shrunk is None, x[gate:], dy[gate:]
        dx = da = db = None
        if need_b:
            shrunk = F.linear(on, lora_a) if merge else shrunk
            db = torch.empty_like(lora_b)
            for part, s, d in zip(don.split(splits, 1), shrunk.chunk(len(splits), 1), db.split(splits), strict=True):
                torch.mul((s.t() @ part).t(), scale, out=d)  # faster than the product the other way round
        if need_a or need_x and not merge:
            ds = x.new_empty(on.shape[0], lora_a.shape[0])
            for part, d, b in zip(don.split(splits, 1), ds.chunk(len(splits), 1), lora_b.split(splits), strict=True):
                d.addmm_(part, b, beta=0, alpha=scale)
            da = ds.t() @ on if need_a else None
        if need_x:
            dx = dy @ (merged(weight, lora_a, lora_b, scale, splits) if merge else weight)
            if not merge:
                dx[gate:].addmm_(ds, lora_a)
        return (
            dx, dy.t() @ x if need_weight else None, da, db,
            dy.sum(0) if need_bias else None, dy if need_residual else None, None, None, None,
        )  # fmt: skip


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        ctx.save_for_backward(x)
        return times_(F.silu(gate), up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        if torch.compiler.is_compiling():  # it fuses this, and refuses the following
            return torch.cat([torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)], dim=-1)
        dx = torch.empty_like(x)
        dgate, dup = dx.chunk(2, -1)
        torch.mul(dy, up, out=dup)
        torch.ops.aten.silu_backward.grad_input(dup, gate, grad_input=dgate)
        torch.ops.aten.silu.out(gate, out=dup).mul_(dy)
        return dx


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + roll(x) sin, the roll one of half the last dimension."""
    return torch.addcmul(x * cos, x.roll(int(x.shape[-1]) // 2, -1), sin)


class Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, sin.roll(sin.shape[-1] // 2, -1)), None, None


class RMSNorm(torch.autograd.Function):
    """float32 and float64."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        r = reciprocal_rms(x, eps)
        ctx.save_for_backward(x, weight, r)
        return times_(x * r, weight)

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
