"""Rotary position embedding: y = x cos + swap(x) sin, per head; in halves, with c = cos and s = sin of the tables,

    y1 = x1 c1 + x2 s1        y2 = x2 c2 + x1 s2        (s1 = -sin a, s2 = sin a)

Backward: the transpose, which exchanges s1 and s2, that is, the rotation by -a:

    dx1 = dy1 c1 + dy2 s2     dx2 = dy2 c2 + dy1 s1

Computed in float32 and rounded once. The tables get no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_kernels.triton import _device
from mtp_kernels.triton._operator import needs_gradient, operator, rows
from mtp_kernels.triton._tiles import cdiv, rotary_tiles


@triton.jit
def rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr,
    x_stride_m, x_stride_h, cos_stride, sin_stride,
    H, HALF: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    d = tl.arange(0, BLOCK_D)
    c1 = tl.load(cos_ptr + m * cos_stride + d, mask=d < HALF, other=0.0).to(tl.float32)
    c2 = tl.load(cos_ptr + m * cos_stride + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)
    s1 = tl.load(sin_ptr + m * sin_stride + (HALF if BACKWARD else 0) + d, mask=d < HALF, other=0.0).to(tl.float32)
    s2 = tl.load(sin_ptr + m * sin_stride + (0 if BACKWARD else HALF) + d, mask=d < HALF, other=0.0).to(tl.float32)
    inside = (h < H) & (d < HALF)[None, :]
    x_ptrs = x_ptr + m * x_stride_m + h * x_stride_h + d
    x1 = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_H, BLOCK_D)
    x2 = tl.load(x_ptrs + HALF, mask=inside, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + (m * H + h) * (2 * HALF) + d
    tl.store(y_ptrs, (x1 * c1 + x2 * s1).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptrs + HALF, (x2 * c2 + x1 * s2).to(y_ptr.dtype.element_ty), mask=inside)


@operator(lambda x, cos, sin, backward: torch.empty(x.shape, dtype=x.dtype, device=x.device))
def _rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        h, d = x.shape[-2:]
        x3, cos, sin = x.reshape(-1, h, d), rows(cos, d), rows(sin, d)  # a view for a slice of a fused projection
        x3 = x3 if x3.stride(2) == 1 else x3.contiguous()
        block_h, block_d, num_warps = rotary_tiles(h, d)
        _device.launch(
            rotary_kernel, (x3.shape[0], cdiv(h, block_h)),
            x_ptr=x3, cos_ptr=cos, sin_ptr=sin, y_ptr=y,
            x_stride_m=x3.stride(0), x_stride_h=x3.stride(1), cos_stride=cos.stride(0), sin_stride=sin.stride(0),
            H=h, HALF=d // 2, BACKWARD=backward, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
    return y


class _RotaryEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotary_embedding(x, cos, sin, False)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return _rotary_embedding(dy, *ctx.saved_tensors, True), None, None


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _RotaryEmbedding.apply(x, cos, sin) if needs_gradient(x) else _rotary_embedding(x, cos, sin, False)
