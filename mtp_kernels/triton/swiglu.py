"""SwiGLU: y = silu(g) * u for x = [g, u], silu(g) = g s, s = 1 / (1 + exp(-g)).

Backward, with ds/dg = s (1 - s):

    dg = dy * u * (s + g s (1 - s)) = dy * u * s * (1 + g (1 - s))
    du = dy * g s

Computed in float32; y's silu(g) is rounded before the product, as by the two operations one after the other and by `gated_lora_swiglu`,
the gradients once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_kernels.triton import _device
from mtp_kernels.triton._operator import needs_gradient, operator, rows
from mtp_kernels.triton._tiles import cdiv, elementwise_tiles


@triton.jit
def swiglu_kernel(x_ptr, y_ptr, x_stride, F, BLOCK_F: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = f < F
    g = tl.load(x_ptr + m * x_stride + f, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + m * x_stride + F + f, mask=inside, other=0.0).to(tl.float32)
    dtype = y_ptr.dtype.element_ty
    tl.store(y_ptr + m * F + f, ((g / (1 + tl.exp(-g))).to(dtype).to(tl.float32) * u).to(dtype), mask=inside)


@triton.jit
def swiglu_backward_kernel(dy_ptr, x_ptr, dx_ptr, dy_stride, x_stride, F, BLOCK_F: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = f < F
    dy = tl.load(dy_ptr + m * dy_stride + f, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(x_ptr + m * x_stride + f, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(x_ptr + m * x_stride + F + f, mask=inside, other=0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-g))
    rest = 1 / (1 + tl.exp(g))  # 1 - s, which would lose its digits where s is close to 1
    dg, du = dy * u * s * (1 + g * rest), dy * g * s
    tl.store(dx_ptr + m * (2 * F) + f, dg.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + m * (2 * F) + F + f, du.to(dx_ptr.dtype.element_ty), mask=inside)


def _output(x: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


@operator(_output)
def _swiglu(x: Tensor) -> Tensor:
    y = _output(x)
    if y.numel():
        x2, f = rows(x, x.shape[-1]), y.shape[-1]
        block, num_warps = elementwise_tiles(f)
        _device.launch(
            swiglu_kernel, (x2.shape[0], cdiv(f, block)), x_ptr=x2, y_ptr=y, x_stride=x2.stride(0), F=f, BLOCK_F=block, num_warps=num_warps
        )
    return y


@operator(lambda dy, x: torch.empty(x.shape, dtype=x.dtype, device=x.device))
def _swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        f = dy.shape[-1]
        dy2, x2 = rows(dy, f), rows(x, 2 * f)
        block, num_warps = elementwise_tiles(f)
        _device.launch(
            swiglu_backward_kernel, (x2.shape[0], cdiv(f, block)),
            dy_ptr=dy2, x_ptr=x2, dx_ptr=dx, dy_stride=dy2.stride(0), x_stride=x2.stride(0), F=f, BLOCK_F=block, num_warps=num_warps,
        )  # fmt: skip
    return dx


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _swiglu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        return _swiglu_backward(dy, *ctx.saved_tensors)


def swiglu(x: Tensor) -> Tensor:
    return _SwiGLU.apply(x) if needs_gradient(x) else _swiglu(x)
