"""Attention under the rule of a pass: o = softmax(scale q K^T) V over the keys that the rule allows each row.

Forward (`_attention_forward`): a program owns a tile of packed rows of one key head and one piece of keys, of fixed length and
by absolute column; a second kernel merges the pieces in order. Where rows are many, a program takes all pieces of its rows and
merges them itself. The pass's mask keys are one more piece, which NTP rows have not. So a row has the same bits whatever stands
beside it and wherever its predecessors are. Long passes whose pieces are shared out take them in several rounds, which bounds
the memory for partial results and changes no bit.

Backward (`_attention_backward`): dq by tiles of rows, dk and dv by tiles of keys, mask keys and NTP keys in launches of their
own. Work is proportional to the keys that rows see, memory to rows and keys and never to their product.

The rule stays on the device: no launch waits for its values.
"""

import math

import torch
from torch import Tensor

from mtp_kernels.triton import _attention_backward, _attention_forward, _device
from mtp_kernels.triton import _tiles as tiles_of
from mtp_kernels.types import AttentionRule

_LOG2_E = math.log2(math.e)
_RULE_OF_MERGE = (
    "first_ptr", "visible_ptr", "mask_start_ptr", *_attention_forward.RULE_STRIDES, "T", "B", "num_masks", "HAS_FIRST", "HAS_MASKS",
)  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _common(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, block: Tensor, slot: Tensor, mask_start: Tensor, first: Tensor | None,
    num_masks: int, block_size: int,
) -> dict:  # fmt: skip
    """Arguments that every kernel over tiles takes."""
    t, b, h, d = q.shape
    kv_heads = k.shape[1]
    return dict(
        q_ptr=q, k_ptr=k, v_ptr=v,
        first_ptr=first, visible_ptr=visible, block_ptr=block.contiguous(), slot_ptr=slot.contiguous(), mask_start_ptr=mask_start.contiguous(),
        stride_qt=q.stride(0), stride_qb=q.stride(1), stride_qh=q.stride(2),
        stride_kb=k.stride(0), stride_kh=k.stride(1), stride_ks=k.stride(2),
        stride_vb=v.stride(0), stride_vh=v.stride(1), stride_vs=v.stride(2),
        stride_first_t=0 if first is None else first.stride(0), stride_first_b=0 if first is None else first.stride(1),
        stride_visible_t=visible.stride(0), stride_visible_b=visible.stride(1),
        T=t, B=b, num_masks=num_masks, block_size=block_size,
        HAS_FIRST=first is not None, HAS_MASKS=num_masks > 0, WHOLE_BLOCKS=block_size > 0,
        KV_HEADS=kv_heads, GROUPS=h // kv_heads, D=d, PRECISION=_precision(q.dtype),
    )  # fmt: skip


def _forward(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, block: Tensor, slot: Tensor, mask_start: Tensor, first: Tensor | None,
    num_masks: int, num_keys: int, block_size: int, scale: float, save_sums: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o, sums): each row's M and 1 / Z, (2, T, B, H) float32, or empty if not to be saved."""
    q, k, v = (_inner_contiguous(x) for x in (q, k, v))
    t, b, h, d = q.shape
    kv_heads = k.shape[1]
    out = torch.empty(t, b, h, d, dtype=q.dtype, device=q.device)
    kept = torch.empty((2, t, b, h) if save_sums else (0,), dtype=torch.float32, device=q.device)
    tiles = tiles_of.attention_tiles(d, q.element_size(), _device.shared_memory())
    common = _common(q, k, v, visible, block, slot, mask_start, first, num_masks, block_size)
    common |= dict(
        scale=scale * _LOG2_E, PIECE=tiles.piece, BLOCK_M=tiles.block_m, BLOCK_S=tiles.block_s, BLOCK_D=tiles.block_d, BLOCK_TAIL=tiles.block_tail,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    grid = tiles_of.cdiv(t * (h // kv_heads), tiles.block_m), b * kv_heads
    if tiles_of.attention_is_whole(grid[0] * grid[1], d, q.element_size(), _device.target()):
        _device.launch(_attention_forward.attend_whole_kernel, grid, **common, out_ptr=out, kept_ptr=kept, num_keys=num_keys, KEEP=save_sums)
        return out, kept
    block_r, merge_warps = tiles_of.attention_merge_tiles()
    pieces = tiles_of.cdiv(num_keys, tiles.piece) + (num_masks > 0)
    at_once = tiles_of.attention_pieces_at_once(pieces, t * b * h * d)
    slots = at_once + (at_once < pieces)  # the last one holds the sums so far
    acc = torch.empty(slots, t, b, h, d, dtype=torch.float32, device=q.device)
    maxima, sums = (torch.empty(slots, t, b, h, dtype=torch.float32, device=q.device) for _ in range(2))
    for start in range(0, pieces, at_once):
        last = min(start + at_once, pieces)
        _device.launch(
            _attention_forward.attend_kernel, (*grid, last - start), **common,
            acc_ptr=acc, max_ptr=maxima, sum_ptr=sums, num_keys=num_keys, first_piece=start,
        )  # fmt: skip
        _device.launch(
            _attention_forward.merge_kernel, (tiles_of.cdiv(t * b * h, block_r),),
            acc_ptr=acc, max_ptr=maxima, sum_ptr=sums, state_acc_ptr=acc[-1], state_max_ptr=maxima[-1], state_sum_ptr=sums[-1],
            out_ptr=out, kept_ptr=kept, **{name: common[name] for name in _RULE_OF_MERGE}, num_keys=num_keys, first_piece=start, last_piece=last,
            FIRST=start == 0, LAST=last == pieces, KEEP=save_sums, H=h, D=d, PIECE=tiles.piece,
            BLOCK_R=block_r, BLOCK_D=tiles_of.next_power_of_2(d), num_warps=merge_warps, num_stages=4,
        )  # fmt: skip
    return out, kept


@torch.library.custom_op("mtp_kernels::attention", mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, block: Tensor, slot: Tensor, mask_start: Tensor, first: Tensor | None,
    num_masks: int, num_keys: int, block_size: int, scale: float, save_sums: bool, ntp_key_gradients: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(q, k, v, visible, block, slot, mask_start, first, num_masks, num_keys, block_size, scale, save_sums)


@_operator.register_fake
def _(q, k, v, visible, block, slot, mask_start, first, num_masks, num_keys, block_size, scale, save_sums, ntp_key_gradients):
    out = q.new_empty(q.shape)
    return out, q.new_empty((2, *q.shape[:3]) if save_sums else (0,), dtype=torch.float32)


@torch.library.custom_op("mtp_kernels::attention_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor,
    visible: Tensor, block: Tensor, slot: Tensor, mask_start: Tensor, first: Tensor | None,
    num_masks: int, num_keys: int, block_size: int, scale: float, need_keys: bool, ntp_key_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv); dk and dv empty if not needed."""
    q, k, v = (_inner_contiguous(x) for x in (q, k, v))
    do = do.contiguous()
    t, b, h, d = q.shape
    kv_heads = k.shape[1]
    tiles = tiles_of.attention_backward_tiles(d, q.element_size())
    common = _common(q, k, v, visible, block, slot, mask_start, first, num_masks, block_size) | dict(
        do_ptr=do, kept_ptr=kept, delta_ptr=torch.empty_like(kept[0]), num_keys=num_keys, scale=scale * _LOG2_E, softmax_scale=scale,
        BLOCK_D=tiles.block_d, num_stages=tiles.num_stages,
    )  # fmt: skip
    dq = torch.empty(t, b, h, d, dtype=q.dtype, device=q.device)
    _device.launch(
        _attention_backward.query_gradient_kernel, (tiles_of.cdiv(t * (h // kv_heads), tiles.block_m), b * kv_heads),
        **common, out_ptr=out, dq_ptr=dq, BLOCK_M=tiles.block_m, BLOCK_S=tiles.block_s, num_warps=tiles.num_warps,
    )  # fmt: skip
    if not need_keys:
        return dq, q.new_empty(0), q.new_empty(0)
    dk, dv = (torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    parts = [(True, num_masks)] if num_masks else []
    if ntp_key_gradients:
        parts.append((False, num_keys))
    for masks, keys in parts:
        _device.launch(
            _attention_backward.key_gradients_kernel, (tiles_of.cdiv(keys, tiles.keys_block_s), b * kv_heads),
            **common, dk_ptr=dk, dv_ptr=dv, stride_dh=dk.stride(1), MASKS=masks, SCAN=tiles.scan,
            BLOCK_M=tiles.keys_block_m, BLOCK_S=tiles.keys_block_s, num_warps=tiles.keys_num_warps,
        )  # fmt: skip
    return dq, dk, dv


@_backward.register_fake
def _(do, q, k, v, out, kept, visible, block, slot, mask_start, first, num_masks, num_keys, block_size, scale, need_keys, ntp_key_gradients):
    keys = (k.new_empty(k.shape), v.new_empty(v.shape)) if need_keys else (q.new_empty(0), q.new_empty(0))
    return q.new_empty(q.shape), *keys


def _setup_context(ctx, inputs, output):
    q, k, v, visible, block, slot, mask_start, first, *ctx.numbers, _, ctx.ntp_key_gradients = inputs
    ctx.save_for_backward(q, k, v, *output, visible, block, slot, mask_start, first)


def _derivatives(ctx, do, _):
    need_k, need_v = ctx.needs_input_grad[1:3]
    dq, dk, dv = _backward(do, *ctx.saved_tensors, *ctx.numbers, need_k or need_v, ctx.ntp_key_gradients)
    return dq, dk if need_k else None, dv if need_v else None, *[None] * 11


_operator.register_autograd(_derivatives, setup_context=_setup_context)


def attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, *, scale: float | None = None, ntp_key_gradients: bool = True) -> Tensor:
    """The contract's attention."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (
        q, k, v, rule.visible, rule.block, rule.slot, rule.mask_start, rule.first, rule.num_masks, rule.num_keys, rule.block_size, scale
    )  # fmt: skip
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if differentiable or torch.compiler.is_compiling():
        return _operator(*arguments, differentiable, ntp_key_gradients)[0]
    return _forward(*arguments, False)[0]
