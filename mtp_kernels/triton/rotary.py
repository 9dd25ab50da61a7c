"""Rotary position embedding: y = x cos + swap(x) sin, per head; in halves, with c = cos and s = sin of the tables,

    y1 = x1 c1 + x2 s1        y2 = x2 c2 + x1 s2        (s1 = -sin a, s2 = sin a)

Backward: the transpose, which exchanges s1 and s2, that is, the rotation by -a:

    dx1 = dy1 c1 + dy2 s2     dx2 = dy2 c2 + dy1 s1

Computed in float32 and rounded once. The tables get no gradient.

With a norm, x is first n w: n = x r, r = 1 / sqrt(mean(x^2) + eps) over D, n and n w rounded as the two operations one after the
other round them. Backward, with g = w times the gradient above:

    dx = r (g - n mean(g n))

The sum of squares is taken in float64, where those of 16-bit numbers are exact: the kernels below, whose tiles may differ, agree.

`rotary_write` rotates the q and k heads of a fused projection's result, and puts k and v into the cache where a number on the device says:
one launch instead of the rotation, a copy and a transfer of that number. What is not finite is written as zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_kernels.triton import _device
from mtp_kernels.triton._operator import needs_gradient, operator, rows
from mtp_kernels.triton._tiles import cdiv, rotary_tiles


@triton.jit
def _tables(cos_ptr, sin_ptr, d, HALF: tl.constexpr, BACKWARD: tl.constexpr):
    """c1, c2, s1, s2 in float32; the pointers are at the row."""
    c1 = tl.load(cos_ptr + d, mask=d < HALF, other=0.0).to(tl.float32)
    c2 = tl.load(cos_ptr + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)
    s1 = tl.load(sin_ptr + (HALF if BACKWARD else 0) + d, mask=d < HALF, other=0.0).to(tl.float32)
    s2 = tl.load(sin_ptr + (0 if BACKWARD else HALF) + d, mask=d < HALF, other=0.0).to(tl.float32)
    return c1, c2, s1, s2


@triton.jit
def _rotated(x1, x2, c1, c2, s1, s2):
    """The products of both kernels, whose bits must agree: which of the two is fused with the sum is not left to the compiler."""
    return tl.fma(x1, c1, x2 * s1), tl.fma(x2, c2, x1 * s2)


@triton.jit
def _mean(a1, a2, HALF: tl.constexpr):
    """(BLOCK_H, 1) the mean over D of products, given by halves, which are 0 beyond them."""
    return (tl.sum(a1, 1) + tl.sum(a2, 1))[:, None] / (2.0 * HALF)


@triton.jit
def _inverse_rms(x1, x2, eps, HALF: tl.constexpr):
    """(BLOCK_H, 1) 1 / sqrt(mean(x^2) + eps), each step rounded correctly."""
    a1, a2 = x1.to(tl.float64), x2.to(tl.float64)
    return tl.div_rn(1.0, tl.sqrt_rn(_mean(a1 * a1, a2 * a2, HALF).to(tl.float32) + eps))


@triton.jit
def _weights(norm_ptr, h, d, inside, HALF: tl.constexpr):
    norm_ptrs = norm_ptr + h * (2 * HALF) + d
    w1 = tl.load(norm_ptrs, mask=inside, other=0.0).to(tl.float32)
    w2 = tl.load(norm_ptrs + HALF, mask=inside, other=0.0).to(tl.float32)
    return w1, w2


@triton.jit
def _normalised(x1, x2, norm_ptr, eps, h, d, inside, dtype: tl.constexpr, HALF: tl.constexpr):
    w1, w2 = _weights(norm_ptr, h, d, inside, HALF)
    r = _inverse_rms(x1, x2, eps, HALF)
    y1 = (x1 * r).to(dtype).to(tl.float32) * w1
    y2 = (x2 * r).to(dtype).to(tl.float32) * w2
    return y1.to(dtype).to(tl.float32), y2.to(dtype).to(tl.float32)


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)


@triton.jit
def rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, norm_ptr, saved_ptr, y_ptr,
    x_stride_m, x_stride_h, cos_stride, sin_stride, saved_stride_m, saved_stride_h, eps,
    H, HALF: tl.constexpr, NORM: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some heads of one row. BACKWARD: x is the gradient of y, and with NORM saved_ptr has the x that was normalised."""
    dtype = y_ptr.dtype.element_ty
    m = tl.program_id(0).to(tl.int64)
    h = (tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    d = tl.arange(0, BLOCK_D)
    c1, c2, s1, s2 = _tables(cos_ptr + m * cos_stride, sin_ptr + m * sin_stride, d, HALF, BACKWARD)
    inside = (h < H) & (d < HALF)[None, :]
    x_ptrs = x_ptr + m * x_stride_m + h * x_stride_h + d
    x1 = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)  # (BLOCK_H, BLOCK_D)
    x2 = tl.load(x_ptrs + HALF, mask=inside, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + (m * H + h) * (2 * HALF) + d
    if NORM and not BACKWARD:
        x1, x2 = _normalised(x1, x2, norm_ptr, eps, h, d, inside, dtype, HALF)
    y1, y2 = _rotated(x1, x2, c1, c2, s1, s2)
    if NORM and BACKWARD:
        saved_ptrs = saved_ptr + m * saved_stride_m + h * saved_stride_h + d
        n1 = tl.load(saved_ptrs, mask=inside, other=0.0).to(tl.float32)
        n2 = tl.load(saved_ptrs + HALF, mask=inside, other=0.0).to(tl.float32)
        r = _inverse_rms(n1, n2, eps, HALF)
        n1, n2 = n1 * r, n2 * r
        w1, w2 = _weights(norm_ptr, h, d, inside, HALF)
        y1, y2 = y1 * w1, y2 * w2
        mean = _mean(y1 * n1, y2 * n2, HALF)
        y1, y2 = r * (y1 - n1 * mean), r * (y2 - n2 * mean)
    tl.store(y_ptrs, y1.to(dtype), mask=inside)
    tl.store(y_ptrs + HALF, y2.to(dtype), mask=inside)


@triton.jit
def rotary_write_kernel(
    qkv_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, start_ptr, norm_ptr, q_ptr,
    qkv_stride_m, qkv_stride_h, cos_stride, sin_stride, keys_stride_s, keys_stride_b, keys_stride_h,
    values_stride_s, values_stride_b, values_stride_h, start_stride, eps,
    B, S, H, H_KV, HALF: tl.constexpr, NORM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some heads of one row: q to q_ptr, contiguous; k and v to the row's column of the cache, if there is one."""
    m = tl.program_id(0).to(tl.int64)
    t, b = m // B, m % B
    h = (tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    d = tl.arange(0, BLOCK_D)
    dtype = q_ptr.dtype.element_ty
    c1, c2, s1, s2 = _tables(cos_ptr + m * cos_stride, sin_ptr + m * sin_stride, d, HALF, False)
    inside = (h < H + 2 * H_KV) & (d < HALF)[None, :]
    x_ptrs = qkv_ptr + m * qkv_stride_m + h * qkv_stride_h + d
    x1 = tl.load(x_ptrs, mask=inside, other=0.0)  # (BLOCK_H, BLOCK_D)
    x2 = tl.load(x_ptrs + HALF, mask=inside, other=0.0)
    y1, y2 = x1.to(tl.float32), x2.to(tl.float32)
    if NORM:
        y1, y2 = _normalised(y1, y2, norm_ptr, eps, h, d, inside & (h < H + H_KV), dtype, HALF)
    y1, y2 = _rotated(y1, y2, c1, c2, s1, s2)
    y1, y2 = y1.to(dtype), y2.to(dtype)
    is_q = inside & (h < H)
    q_ptrs = q_ptr + (m * H + h) * (2 * HALF) + d
    tl.store(q_ptrs, y1, mask=is_q)
    tl.store(q_ptrs + HALF, y2, mask=is_q)
    column = tl.load(start_ptr + b * start_stride).to(tl.int64) + t
    written = inside & (h >= H) & (h < tl.where((column >= 0) & (column < S), H + 2 * H_KV, 0))
    is_k = written & (h < H + H_KV)
    k_ptrs = keys_ptr + column * keys_stride_s + b * keys_stride_b + (h - H) * keys_stride_h + d
    tl.store(k_ptrs, _finite(y1), mask=is_k)
    tl.store(k_ptrs + HALF, _finite(y2), mask=is_k)
    is_v = written & (h >= H + H_KV)
    v_ptrs = values_ptr + column * values_stride_s + b * values_stride_b + (h - H - H_KV) * values_stride_h + d
    tl.store(v_ptrs, _finite(x1), mask=is_v)
    tl.store(v_ptrs + HALF, _finite(x2), mask=is_v)


def _by_head(x: Tensor) -> Tensor:
    """(M, H, D), of unit stride along D: a view for a slice of a fused projection."""
    x = x.reshape(-1, *x.shape[-2:])
    return x if x.stride(2) == 1 else x.contiguous()


@operator(lambda x, cos, sin, norm, eps, saved, backward: torch.empty(x.shape, dtype=x.dtype, device=x.device))
def _rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float, saved: Tensor | None, backward: bool) -> Tensor:
    """saved: in the backward pass with a norm, the forward's x."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        h, d = x.shape[-2:]
        x3, cos, sin = _by_head(x), rows(cos, d), rows(sin, d)
        saved = None if saved is None else _by_head(saved)
        block_h, block_d, num_warps = rotary_tiles(h, d)
        _device.launch(
            rotary_kernel, (x3.shape[0], cdiv(h, block_h)),
            x_ptr=x3, cos_ptr=cos, sin_ptr=sin, norm_ptr=None if norm is None else norm.contiguous(), saved_ptr=saved, y_ptr=y,
            x_stride_m=x3.stride(0), x_stride_h=x3.stride(1), cos_stride=cos.stride(0), sin_stride=sin.stride(0),
            saved_stride_m=0 if saved is None else saved.stride(0), saved_stride_h=0 if saved is None else saved.stride(1), eps=eps,
            H=h, HALF=d // 2, NORM=norm is not None, BACKWARD=backward, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=num_warps,
        )  # fmt: skip
    return y


class _RotaryEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(cos, sin, norm, None if norm is None else x)
        ctx.eps = eps
        return _rotary_embedding(x, cos, sin, norm, eps, None, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        cos, sin, norm, x = ctx.saved_tensors
        return _rotary_embedding(dy, cos, sin, norm, ctx.eps, x, True), None, None, None, None


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    if needs_gradient(x):
        return _RotaryEmbedding.apply(x, cos, sin, norm, eps)
    return _rotary_embedding(x, cos, sin, norm, eps, None, False)


def _heads(qkv: Tensor, keys: Tensor) -> Tensor:
    """Empty memory for q."""
    t, b, heads, d = qkv.shape
    return torch.empty((t, b, heads - 2 * keys.shape[2], d), dtype=qkv.dtype, device=qkv.device)


@operator(lambda qkv, cos, sin, keys, values, start, norm, eps: _heads(qkv, keys), mutates=("keys", "values"))
def _rotary_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: Tensor, norm: Tensor | None, eps: float
) -> Tensor:
    q, (t, b, heads, d) = _heads(qkv, keys), qkv.shape
    x3, cos, sin = _by_head(qkv), rows(cos, d), rows(sin, d)
    block_h, block_d, num_warps = rotary_tiles(heads, d)
    _device.launch(
        rotary_write_kernel, (t * b, cdiv(heads, block_h)),
        qkv_ptr=x3, cos_ptr=cos, sin_ptr=sin, keys_ptr=keys, values_ptr=values, start_ptr=start,
        norm_ptr=None if norm is None else norm.contiguous(), q_ptr=q,
        qkv_stride_m=x3.stride(0), qkv_stride_h=x3.stride(1), cos_stride=cos.stride(0), sin_stride=sin.stride(0),
        keys_stride_s=keys.stride(0), keys_stride_b=keys.stride(1), keys_stride_h=keys.stride(2),
        values_stride_s=values.stride(0), values_stride_b=values.stride(1), values_stride_h=values.stride(2), start_stride=start.stride(0),
        eps=eps, B=b, S=keys.shape[0], H=q.shape[2], H_KV=keys.shape[2], HALF=d // 2, NORM=norm is not None,
        BLOCK_H=block_h, BLOCK_D=block_d, num_warps=num_warps,
    )  # fmt: skip
    torch.autograd.graph.increment_version((keys, values))  # so that a backward pass that needs what was overwritten says so
    return q


def rotary_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: Tensor, norm: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    return _rotary_write(qkv, cos, sin, keys, values, start, norm, eps)
