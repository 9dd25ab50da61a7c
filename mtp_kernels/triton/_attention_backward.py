"""Attention's backward kernels. Nothing of size rows x keys is kept: probabilities come again from each row's M and 1 / Z
(kept apart: their sum in a logarithm would be rounded to the size of M).

With c the softmax scale, x = c log2(e) q K^T and everything summed over the allowed keys only,

    p = exp2(x - M) / Z        the forward's probabilities
    dv = p^T do                summed over a key head's query heads
    dp = do v^T
    delta = sum over D of o do = sum over keys of p dp
    ds = p (dp - delta)        the softmax's derivative
    dq = c ds k                `query_gradient_kernel`: a tile of rows walks its keys, and notes delta
    dk = c ds^T q              `key_gradients_kernel`: a tile of keys walks its rows

Each result is one program's sum in a fixed order, without atomics: two runs give the same bits. A key outside the rule gets
ds = 0 by selection and not by multiplication, for its k and v may be anything.
"""

import triton
import triton.language as tl

from mtp_kernels.triton._attention_forward import (
    RULE_STRIDES,
    allowed_keys,
    first_keys,
    load_keys,
    load_queries,
    load_rows,
    mask_key_range,
    of_head,
    packed_rows,
)


@triton.jit
def _accumulate_dq(
    dq, q, do, m, inverse_z, delta, first, visible, block, slot, begin, end,
    k_ptr, v_ptr, key_block_ptr, key_slot_ptr, stride_ks, stride_vs, scale,
    CHECKED: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_MASKS: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq / c, with the key tiles of [begin, end) added. Not CHECKED: every row may attend every key of them."""
    for column in range(begin, end, BLOCK_S):
        k = load_keys(k_ptr, column, begin, end, stride_ks, D, BLOCK_S, BLOCK_D, CHECKED, False)
        v = load_keys(v_ptr, column, begin, end, stride_vs, D, BLOCK_S, BLOCK_D, CHECKED, False)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(tl.fma(qk, scale, -m[:, None])) * inverse_z[:, None]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if CHECKED:
            allowed = allowed_keys(column, end, first, visible, block, slot, key_block_ptr, key_slot_ptr, HAS_FIRST, HAS_MASKS, BLOCK_S)
            ds = tl.where(allowed, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["T", "B", "num_masks", "block_size", "num_keys", *RULE_STRIDES])
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, kept_ptr, delta_ptr, dq_ptr,
    first_ptr, visible_ptr, block_ptr, slot_ptr, mask_start_ptr,
    stride_qt, stride_qb, stride_qh, stride_kb, stride_kh, stride_ks: tl.constexpr, stride_vb, stride_vh, stride_vs: tl.constexpr,
    stride_first_t, stride_first_b, stride_visible_t, stride_visible_b,
    T, B, num_masks, block_size, num_keys, scale, softmax_scale,
    HAS_FIRST: tl.constexpr, HAS_MASKS: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq and delta of one tile of packed rows. out, do, dq: (T, B, H, D) contiguous; delta: (T, B, H)."""
    tile, b, kv_head, t, head, inside, first, visible = packed_rows(
        T, num_keys, first_ptr, visible_ptr, mask_start_ptr, stride_first_t, stride_first_b, stride_visible_t, stride_visible_b,
        HAS_FIRST, HAS_MASKS, KV_HEADS, GROUPS, BLOCK_M,
    )  # fmt: skip
    most = tl.max(visible, 0)
    least = tl.min(tl.where(inside, visible, num_keys), 0)

    k_ptr = of_head(k_ptr, b, kv_head, stride_kb, stride_kh)
    v_ptr = of_head(v_ptr, b, kv_head, stride_vb, stride_vh)
    index = (t.to(tl.int64) * B + b) * (KV_HEADS * GROUPS) + head
    q, _ = load_queries(q_ptr, b, t, head, inside, stride_qt, stride_qb, stride_qh, D, BLOCK_D, 0)
    do = load_rows(do_ptr, index * D, inside, D, BLOCK_D)
    out = load_rows(out_ptr, index * D, inside, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + index, delta, mask=inside)
    m = tl.load(kept_ptr + index, mask=inside, other=0.0)
    inverse_z = tl.load(kept_ptr + tl.cast(T, tl.int64) * B * (KV_HEADS * GROUPS) + index, mask=inside, other=0.0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    earliest, latest = first_keys(first, inside, HAS_FIRST)
    if HAS_FIRST:  # key tiles start at the rows' first key, and if that is not one for all, each needs the rule
        least = tl.where(latest > earliest, earliest, tl.maximum(least, earliest))
    whole = earliest + (least - earliest) // BLOCK_S * BLOCK_S
    if earliest < whole:
        dq = _accumulate_dq(
            dq, q, do, m, inverse_z, delta, first, visible, t, t, earliest, whole,
            k_ptr, v_ptr, block_ptr, slot_ptr, stride_ks, stride_vs, scale,
            False, False, False, PRECISION, D, BLOCK_S, BLOCK_D,
        )  # fmt: skip
    if whole < most:
        dq = _accumulate_dq(
            dq, q, do, m, inverse_z, delta, first, visible, t, t, whole, most,
            k_ptr, v_ptr, block_ptr, slot_ptr, stride_ks, stride_vs, scale,
            True, HAS_FIRST, False, PRECISION, D, BLOCK_S, BLOCK_D,
        )  # fmt: skip
    if HAS_MASKS:
        last = tl.minimum(((tile + 1) * BLOCK_M - 1) // GROUPS, T - 1)
        begin, end = mask_key_range(tile * BLOCK_M // GROUPS, last, T, num_masks, block_size, WHOLE_BLOCKS)
        if begin < end:
            start = tl.load(mask_start_ptr + b).to(tl.int64)
            block = tl.load(block_ptr + t, mask=inside, other=0).to(tl.int32)
            slot = tl.load(slot_ptr + t, mask=inside, other=0).to(tl.int32)
            dq = _accumulate_dq(
                dq, q, do, m, inverse_z, delta, first, tl.zeros_like(visible) + end, block, slot, begin, end,
                k_ptr + start * stride_ks, v_ptr + start * stride_vs,
                block_ptr + (T - num_masks), slot_ptr + (T - num_masks), stride_ks, stride_vs, scale,
                True, False, True, PRECISION, D, BLOCK_S, BLOCK_D,
            )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    dq = (dq * softmax_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + index[:, None] * D + d[None, :], dq, mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _rows_that_see(
    first_key, end_key, b, T, first_ptr, visible_ptr, stride_first_t, stride_first_b, stride_visible_t, stride_visible_b,
    HAS_FIRST: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """[begin, end) of the pass rows of sequence b that may see keys of [first_key, end_key).

    Rows are mostly in the order of what they see: without a `first`, all rows from the first such row on.
    """
    begin = T
    end = T
    if HAS_FIRST:
        end = 0
    for start in range(0, T, SCAN):
        t = start + tl.arange(0, SCAN)
        visible = tl.load(visible_ptr + t.to(tl.int64) * stride_visible_t + b * stride_visible_b, mask=t < T, other=0)
        sees = (visible > first_key) & (t < T)
        if HAS_FIRST:
            first = tl.load(first_ptr + t.to(tl.int64) * stride_first_t + b * stride_first_b, mask=t < T, other=0)
            sees = sees & (first < end_key)
            end = tl.maximum(end, tl.max(tl.where(sees, t + 1, 0), 0))
        begin = tl.minimum(begin, tl.min(tl.where(sees, t, T), 0))
    return begin, end


@triton.jit(do_not_specialize=["T", "B", "num_masks", "block_size", "num_keys", *RULE_STRIDES])
def key_gradients_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, kept_ptr, delta_ptr, dk_ptr, dv_ptr,
    first_ptr, visible_ptr, block_ptr, slot_ptr, mask_start_ptr,
    stride_qt, stride_qb, stride_qh, stride_kb, stride_kh, stride_ks: tl.constexpr, stride_vb, stride_vh, stride_vs: tl.constexpr, stride_dh,
    stride_first_t, stride_first_b, stride_visible_t, stride_visible_b,
    T, B, num_masks, block_size, num_keys, scale, softmax_scale,
    MASKS: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_MASKS: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr,
    D: tl.constexpr, PRECISION: tl.constexpr, SCAN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, MASKS: of the pass's mask keys, else of NTP keys. dk, dv: (B, H_kv, S, D) contiguous."""
    b = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    first_key = tl.program_id(0) * BLOCK_S
    key = first_key + tl.arange(0, BLOCK_S)
    first_mask = T - num_masks
    column = 0  # of key 0
    if HAS_MASKS:
        column = tl.load(mask_start_ptr + b).to(tl.int32)
    if MASKS:
        end = num_masks
        first_row = first_mask
        end_row = T
        if WHOLE_BLOCKS:
            first_row += first_key // block_size * block_size
            end_row = tl.minimum(first_mask + tl.cdiv(first_key + BLOCK_S, block_size) * block_size, T)
        key_block = tl.load(block_ptr + first_mask + key, mask=key < end, other=-2).to(tl.int32)
        key_slot = tl.load(slot_ptr + first_mask + key, mask=key < end, other=0).to(tl.int32)
    else:
        end = num_keys
        if HAS_MASKS:
            end = tl.minimum(end, column)
        column = 0
        if first_key >= end:
            return
        first_row, end_row = _rows_that_see(
            first_key, first_key + BLOCK_S, b, T, first_ptr, visible_ptr, stride_first_t, stride_first_b, stride_visible_t, stride_visible_b,
            HAS_FIRST, SCAN,
        )  # fmt: skip

    column64 = tl.cast(column, tl.int64)
    k = load_keys(of_head(k_ptr, b, kv_head, stride_kb, stride_kh) + column64 * stride_ks, first_key, 0, end, stride_ks, D, BLOCK_S, BLOCK_D, True, False)
    v = load_keys(of_head(v_ptr, b, kv_head, stride_vb, stride_vh) + column64 * stride_vs, first_key, 0, end, stride_vs, D, BLOCK_S, BLOCK_D, True, False)
    dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    if first_row < end_row:
        for first in range(first_row * GROUPS, end_row * GROUPS, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)
            t = row // GROUPS
            inside = t < end_row
            head = kv_head * GROUPS + row % GROUPS
            index = (t.to(tl.int64) * B + b) * (KV_HEADS * GROUPS) + head
            q, _ = load_queries(q_ptr, b, t, head, inside, stride_qt, stride_qb, stride_qh, D, BLOCK_D, 0)
            do = load_rows(do_ptr, index * D, inside, D, BLOCK_D)
            m = tl.load(kept_ptr + index, mask=inside, other=0.0)
            inverse_z = tl.load(kept_ptr + tl.cast(T, tl.int64) * B * (KV_HEADS * GROUPS) + index, mask=inside, other=0.0)
            delta = tl.load(delta_ptr + index, mask=inside, other=0.0)
            if MASKS:
                block = tl.load(block_ptr + t, mask=inside, other=-3).to(tl.int32)
                slot = tl.load(slot_ptr + t, mask=inside, other=0).to(tl.int32)
                allowed = (key_block[:, None] == block[None, :]) & (key_slot[:, None] <= slot[None, :])
            else:
                visible = tl.load(visible_ptr + t.to(tl.int64) * stride_visible_t + b * stride_visible_b, mask=inside, other=0).to(tl.int32)
                allowed = (key[:, None] < tl.minimum(visible, end)[None, :])
                if HAS_FIRST:
                    first_seen = tl.load(first_ptr + t.to(tl.int64) * stride_first_t + b * stride_first_b, mask=inside, other=0).to(tl.int32)
                    allowed = allowed & (key[:, None] >= first_seen[None, :])
            kq = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_S, BLOCK_M)
            p = tl.where(allowed, tl.exp2(tl.fma(kq, scale, -m[None, :])) * inverse_z[None, :], 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = tl.where(allowed, p * (dp - delta[None, :]), 0.0)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    d = tl.arange(0, BLOCK_D)
    written = (key < end)[:, None] & (d < D)[None, :]
    offset = (b.to(tl.int64) * KV_HEADS + kv_head) * stride_dh + column64 * D
    offsets = offset + key.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(dk_ptr + offsets, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=written)
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=written)
