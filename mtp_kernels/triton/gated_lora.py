"""Gated LoRA linear: y = x W^T (+ b) (+ residual), and + scale * (x A^T) B^T on the rows whose gate is on.

The features stand on the rows of the matrix instruction and x's rows on its columns (acc = W x^T), so that a few rows still
fill it. A launch needs the shrunk rows s = scale * x A^T before it can expand them, which gives two plans:

    rows          launch 1                                       launch 2
    1 to 128 (a)  project: float32 sums of [W; A] x^T, W's tiles   finish: add the segments' sums, + B s on gate-on rows,
                  and A's side by side, K cut into segments       + bias, + residual, (SwiGLU), round
    more          shrink: s, by project and finish for A alone;    product: W x^T and, in the same program, + B s on
                  row tiles without a gate-on row are skipped     gate-on rows, + bias, + residual, (SwiGLU), round

(a) float32: to 64; never under gradients, whose backward pass wants s. Without a gate one launch of `product` suffices where K is
not cut. `python -m bench.kernels` counts what each plan moves.

In both plans a row's base sum is, for each segment of K in order, a chain over K from zero, and the segments are added in
order; tiles and segments along K follow from the weight's shape alone. So a row has the same bits whatever stands
beside it, and a gate-off row those of the layer without an adapter: where the gate is off the expanded sum is not selected.

Backward, with g = dL/dy and off rows left out of every sum but dx's first:

    ds = scale * g B          (rows, G R)    the shrink's program, with B^T for A
    dx = g W + ds A           (rows, K)      the product's program, with W^T and A^T for W and B
    dA = ds^T x,  dB = g^T s                 `outer`: one program per tile of the result walks the rows in order
    dW = g^T x,   db = sum of g              a library's product; only if asked for

Nothing is added atomically: two runs give the same bits.
"""

from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_kernels.triton import _device
from mtp_kernels.triton import _gated_lora_kernels as kernels
from mtp_kernels.triton._operator import needs_gradient, operator
from mtp_kernels.triton._operator import rows as as_rows
from mtp_kernels.triton._tiles import FEW_ROWS, cdiv, expand_rank, finish_tiles, gated_lora_tiles, outer_tiles, shrink_tiles
from mtp_kernels.triton.swiglu import swiglu

NO_GATE, FIRST_ROW, FIRST_ROW_IN_MEMORY, ROW_BY_ROW = 0, 1, 2, 3


@cache  # a captured graph reads it as long as it lives
def _starts(splits: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each projection's features begin, and their end, on the device."""
    return torch.tensor([sum(splits[:g]) for g in range(len(splits) + 1)], dtype=torch.int32, device=device)


def _gate(gate: int | Tensor | None, m: int) -> tuple[int, int, Tensor | None]:
    """(kind, first_on, gate in memory)."""
    if gate is None:
        return NO_GATE, 0, None
    if not isinstance(gate, Tensor):
        return (FIRST_ROW, gate, None) if gate < m else (NO_GATE, 0, None)
    if gate.dtype == torch.bool:
        return ROW_BY_ROW, 0, gate.reshape(-1).contiguous().view(torch.uint8)
    return FIRST_ROW_IN_MEMORY, 0, gate


def _precision(dtype: torch.dtype) -> str:
    """float32 products are exact to float32: no tf32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _product(x, weight, n, gate, *, s=None, lora_b=None, splits=(), bias=None, residual=None, swiglu=False):
    """y (M, n) of one `product` launch; x (M, K), weight (n or 2n, K), s (M, G R)."""
    m, k = x.shape
    kind, first_on, gate_memory = gate
    tiles = gated_lora_tiles(m, weight.shape[0], k, x.element_size(), _device.shared_memory(), two=swiglu)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    expand = s is not None and kind != NO_GATE
    rank = lora_b.shape[1] if expand else 1
    _device.launch(
        kernels.product_kernel, (cdiv(m, tiles.block_m) * cdiv(n, tiles.block_n),),
        x_ptr=x, w_ptr=weight, s_ptr=s if expand else None, b_ptr=lora_b if expand else None, bias_ptr=bias,
        residual_ptr=residual, y_ptr=y, gate_ptr=gate_memory,
        starts_ptr=_starts(splits, x.device) if len(splits) > 1 else None, first_on=first_on,
        M=m, N=n, K=k, R=rank, segment_k=tiles.segment_k,
        stride_xm=x.stride(0), stride_xk=x.stride(1), stride_wn=weight.stride(0), stride_wk=weight.stride(1),
        stride_bn=lora_b.stride(0) if expand else 0, stride_br=lora_b.stride(1) if expand else 0,
        stride_sm=s.stride(0) if expand else 0, stride_ym=y.stride(0),
        stride_rm=residual.stride(0) if residual is not None else 0,
        GATE=kind, GROUPS=max(1, len(splits)), EXPAND=expand, SWIGLU=swiglu,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, EVEN_N=n % tiles.block_n == 0,
        EVEN_K=k % tiles.block_k == 0, SEGMENTS=tiles.segments, PRECISION=_precision(x.dtype),
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, BLOCK_R=expand_rank(rank, x.element_size()),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return y


def _project_and_finish(x, weight, lora_a, lora_b, gate, scale, splits, bias, residual, swiglu, tiles, y=None):
    """K's segments side by side, then their sum and everything behind it. Without an adapter, a gate says which rows to
    compute at all, and scale is the result's."""
    (m, k), n = x.shape, weight.shape[0]
    kind, first_on, gate_memory = gate
    expand = lora_a is not None and kind != NO_GATE
    gr = lora_a.shape[0] if expand else 0
    sums = torch.empty(tiles.segments, m, n + gr, dtype=torch.float32, device=x.device)
    _device.launch(
        kernels.project_kernel,
        (cdiv(n, tiles.block_n) + cdiv(gr, tiles.block_n), tiles.segments, cdiv(m, tiles.block_m)),
        x_ptr=x, w_ptr=weight, a_ptr=lora_a if expand else None, sums_ptr=sums, gate_ptr=gate_memory, first_on=first_on,
        M=m, N=n, K=k, GR=gr, segment_k=tiles.segment_k,
        stride_xm=x.stride(0), stride_xk=x.stride(1), stride_wn=weight.stride(0), stride_wk=weight.stride(1),
        stride_an=lora_a.stride(0) if expand else 0, stride_ak=lora_a.stride(1) if expand else 0, stride_segment=sums.stride(0),
        GATE=kind, HAS_A=expand, EVEN_N=n % tiles.block_n == 0, EVEN_K=k % tiles.block_k == 0, PRECISION=_precision(x.dtype),
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    features = n // 2 if swiglu else n
    rank = lora_b.shape[1] if expand else 1
    y = torch.empty(m, features, dtype=x.dtype, device=x.device) if y is None else y
    block_m, block_n, num_warps = finish_tiles(m, x.element_size())
    _device.launch(
        kernels.finish_kernel, (cdiv(features, block_n), cdiv(m, block_m)),
        sums_ptr=sums, b_ptr=lora_b if expand else None, bias_ptr=bias, residual_ptr=residual, y_ptr=y, gate_ptr=gate_memory,
        starts_ptr=_starts(splits, x.device) if expand and len(splits) > 1 else None, first_on=first_on, scale=scale,
        M=m, N=features, R=rank, stride_sm=sums.stride(1), stride_segment=sums.stride(0),
        stride_bn=lora_b.stride(0) if expand else 0, stride_br=lora_b.stride(1) if expand else 0,
        stride_ym=y.stride(0), stride_rm=residual.stride(0) if residual is not None else 0,
        GATE=kind, EXPAND=expand, GROUPS=max(1, len(splits)), SWIGLU=swiglu, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        SEGMENTS=tiles.segments, PRECISION=_precision(x.dtype), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=expand_rank(rank, x.element_size()),
        num_warps=num_warps, num_stages=2,
    )  # fmt: skip
    return y


def _shrink(x: Tensor, lora_a: Tensor, gate, scale: float, y: Tensor | None = None) -> Tensor:
    """scale * x A^T, (M, R) for A (R, K); the rows of tiles without a gate-on row are not written."""
    m, k = x.shape
    tiles = shrink_tiles(m, lora_a.shape[0], k, x.element_size(), _device.shared_memory())
    return _project_and_finish(x, lora_a, None, None, gate, scale, (), None, None, False, tiles, y)


def _outer(u: Tensor, v: Tensor, gate, out: Tensor) -> None:
    """out (P, Q) = u^T v over the gate-on rows of u (M, P) and v (M, Q)."""
    kind, first_on, gate_memory = gate
    (m, p), q = u.shape, v.shape[1]
    block_m, block_p, block_q, num_warps, num_stages = outer_tiles(p, q, u.element_size(), _device.shared_memory())
    _device.launch(
        kernels.outer_kernel, (cdiv(p, block_p) * cdiv(q, block_q),),
        u_ptr=u, v_ptr=v, out_ptr=out, gate_ptr=gate_memory, first_on=first_on, M=m, P=p, Q=q,
        stride_um=u.stride(0), stride_vm=v.stride(0), stride_op=out.stride(0),
        GATE=kind, PRECISION=_precision(u.dtype), BLOCK_M=block_m, BLOCK_P=block_p, BLOCK_Q=block_q,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


@operator(lambda x, weight, lora_a, lora_b, gate, first_on, scale, splits, bias, residual, swiglu: x.new_empty(
    x.shape[0], weight.shape[0] // (1 + swiglu)))  # fmt: skip
def _gated_lora(
    x: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, gate: Tensor | None, first_on: int, scale: float,
    splits: list[int], bias: Tensor | None, residual: Tensor | None, swiglu: bool,
) -> Tensor:  # fmt: skip
    """y for x (M, K). The gate is `gate`, or the number first_on where that is not negative. By the faster plan."""
    m, n = x.shape[0], weight.shape[0]
    kind, splits = _gate(gate if first_on < 0 else first_on, m), tuple(splits)
    tiles = gated_lora_tiles(m, n, x.shape[1], x.element_size(), _device.shared_memory())
    if 0 < m <= min(FEW_ROWS, tiles.block_m) and (kind[0] != NO_GATE or tiles.segments > 1):
        if kind[0] == NO_GATE:
            lora_a, scale = None, 1.0
        return _project_and_finish(x, weight, lora_a, lora_b, kind, scale, splits, bias, residual, swiglu, tiles)
    s = _shrink(x, lora_a, kind, scale) if kind[0] != NO_GATE else None
    return _product(
        x, weight, n // (1 + swiglu), kind, s=s, lora_b=lora_b, splits=splits, bias=bias, residual=residual, swiglu=swiglu
    )


def _shrunk(x: Tensor, lora_a: Tensor | None, gate: Tensor | None, first_on: int) -> Tensor:
    on = gate is not None if first_on < 0 else first_on < x.shape[0]
    return x.new_empty(x.shape[0], lora_a.shape[0]) if on else x.new_empty(0, 0)


@operator(lambda x, weight, lora_a, lora_b, gate, first_on, scale, splits, bias, residual: (
    x.new_empty(x.shape[0], weight.shape[0]), _shrunk(x, lora_a, gate, first_on)))  # fmt: skip
def _gated_lora_training(
    x: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, gate: Tensor | None, first_on: int, scale: float,
    splits: list[int], bias: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, s), s kept for the backward pass; the same bits as `_gated_lora` on gate-off rows."""
    kind = _gate(gate if first_on < 0 else first_on, x.shape[0])
    s = _shrink(x, lora_a, kind, scale) if kind[0] != NO_GATE else x.new_empty(0, 0)
    y = _product(x, weight, weight.shape[0], kind, s=s, lora_b=lora_b, splits=tuple(splits), bias=bias, residual=residual)
    return y, s


def _like(x: Tensor | None, needed: bool, of: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=of.dtype, device=of.device) if needed else of.new_empty(0)


@operator(lambda dy, x, weight, lora_a, lora_b, gate, first_on, scale, splits, s, need_dx, need_lora: (
    _like(x, need_dx, x), _like(lora_a, need_lora, x), _like(lora_b, need_lora, x)))  # fmt: skip
def _gated_lora_backward(
    dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, gate: Tensor | None, first_on: int,
    scale: float, splits: list[int], s: Tensor, need_dx: bool, need_lora: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dA, dB), empty where not needed."""
    m, splits = x.shape[0], tuple(splits)
    kind = _gate(gate if first_on < 0 else first_on, m)
    dx, da, db = _like(None, False, x), _like(lora_a, need_lora, x), _like(lora_b, need_lora, x)
    ds = None
    if kind[0] != NO_GATE:
        rank = lora_b.shape[1]
        ds = torch.empty(m, len(splits) * rank, dtype=x.dtype, device=x.device)
        parts = list(zip(dy.split(splits, 1), lora_b.split(splits), ds.split(rank, 1), s.split(rank, 1), strict=True))
        for g, b, into, _ in parts:
            _shrink(g, b.t(), kind, scale, into)
        if need_lora:
            _outer(ds, x, kind, da)
            for (g, _, _, shrunk), into in zip(parts, db.split(splits), strict=True):
                _outer(g, shrunk, kind, into)
    elif need_lora:
        da.zero_(), db.zero_()
    if need_dx:
        dx = _product(dy, weight.t(), x.shape[1], kind, s=ds, lora_b=None if ds is None else lora_a.t())
    return dx, da, db


class _GatedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, gate, first_on, scale, splits, bias, residual) -> Tensor:
        y, s = _gated_lora_training(x, weight, lora_a, lora_b, gate, first_on, scale, splits, bias, residual)
        ctx.save_for_backward(x, weight, lora_a, lora_b, gate, s)
        ctx.numbers = first_on, scale, splits
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, lora_a, lora_b, gate, s = ctx.saved_tensors
        need, dy = ctx.needs_input_grad, as_rows(dy, dy.shape[1])
        need_lora = need[2] or need[3]
        dx = da = db = None
        if need[0] or need_lora:
            dx, da, db = _gated_lora_backward(dy, x, weight, lora_a, lora_b, gate, *ctx.numbers, s, need[0], need_lora)
        return (
            dx if need[0] else None, dy.t() @ x if need[1] else None, da if need[2] else None, db if need[3] else None,
            None, None, None, None, dy.sum(0) if need[8] else None, dy if need[9] else None,
        )  # fmt: skip


def _arguments(x, weight, lora_a, lora_b, gate, scale, splits, bias, residual):
    n = weight.shape[0]
    first_on = -1 if gate is None or isinstance(gate, Tensor) else gate
    gate = gate if isinstance(gate, Tensor) else None
    residual = None if residual is None else as_rows(residual, n)
    bias = None if bias is None else bias.contiguous()
    return as_rows(x, x.shape[-1]), weight, lora_a, lora_b, gate, first_on, scale, list(splits), bias, residual


def gated_lora_linear(x, weight, lora_a=None, lora_b=None, gate=None, *, scale=1.0, splits=None, bias=None, residual=None):
    n = weight.shape[0]
    arguments = _arguments(x, weight, lora_a, lora_b, gate, scale, splits or (n,), bias, residual)
    if needs_gradient(x, weight, lora_a, lora_b, bias, residual):
        y = _GatedLoRA.apply(*arguments)
    else:
        y = _gated_lora(*arguments, False)
    return y.view(*x.shape[:-1], n)


def gated_lora_swiglu(x, weight, lora_a=None, lora_b=None, gate=None, *, scale=1.0, splits=None, bias=None):
    features = weight.shape[0] // 2
    splits = splits or (features, features)
    if needs_gradient(x, weight, lora_a, lora_b, bias):
        # The backward pass needs both halves, so they are kept: two operations.
        return swiglu(gated_lora_linear(x, weight, lora_a, lora_b, gate, scale=scale, splits=splits, bias=bias))
    y = _gated_lora(*_arguments(x, weight, lora_a, lora_b, gate, scale, splits, bias, None), True)
    return y.view(*x.shape[:-1], features)
