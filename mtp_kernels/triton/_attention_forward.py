"""Attention's forward kernels, and the rule in tiles that they share with the backward kernels.

Query rows are packed: row r of a sequence and key head is pass row r // GROUPS with query head r % GROUPS of that key
head's. Keys are summed in *pieces*, piece p the columns [p PIECE, (p + 1) PIECE) of the NTP keys, one more for the pass's
mask keys. Each starts from nothing and gives, in base 2 and float32, for x = scale log2(e) q K^T where allowed, else -inf,

    m = max x,   z = sum exp2(x - m),   acc = sum exp2(x - m) V

and pieces are merged one after the other:  M' = max(M, m),  a = exp2(M - M'),  b = exp2(m - M'),
Z' = a Z + b z,  A' = a A + b acc;  at last o = A / Z:

by `attend_kernel`, a program for each piece, and `merge_kernel`; or, where rows are so many that their tiles fill the chip, by `attend_whole_kernel`,
a program for all pieces, without what the others keep in memory between them (520 bytes per row, head and piece at D = 128). Both give the same bits.

What fixes a row's bits. Pieces and key tiles lie at absolute columns; the row tile, the warps and with them the order of
every sum follow from (D, dtype), whatever the number of rows. A key that a row may not attend changes nothing: its
probability is 0, a tile or a piece of such keys leaves m as it is and scales by exp2(0) = 1. Products that a compiler might or
might not fuse with the sum behind them are spelled as `fma`, so that the same arithmetic results in every loop below.
"""

import triton
import triton.language as tl

RULE_STRIDES = ("stride_first_t", "stride_first_b", "stride_visible_t", "stride_visible_b")


@triton.jit
def visible_keys(
    t, b, T, num_keys, visible_ptr, mask_start_ptr, stride_visible_t, stride_visible_b, HAS_MASKS: tl.constexpr,
):  # fmt: skip
    """How many NTP keys each row sees; 0 past the end. Never more than there are, whatever padding rows say."""
    limit = num_keys
    if HAS_MASKS:
        limit = tl.minimum(limit, tl.load(mask_start_ptr + b).to(tl.int32))
    visible = tl.load(visible_ptr + t.to(tl.int64) * stride_visible_t + b * stride_visible_b, mask=t < T, other=0)
    return tl.minimum(visible.to(tl.int32), limit)


@triton.jit
def seen_keys(t, b, T, num_keys, visible, first_ptr, stride_first_t, stride_first_b):
    """(first, visible): each row sees the NTP keys [first, visible); (num_keys, 0) if that is none."""
    first = tl.load(first_ptr + t.to(tl.int64) * stride_first_t + b * stride_first_b, mask=t < T, other=0).to(tl.int32)
    some = first < visible
    return tl.where(some, tl.maximum(first, 0), num_keys), tl.where(some, visible, 0)


@triton.jit
def packed_rows(
    T, num_keys, first_ptr, visible_ptr, mask_start_ptr, stride_first_t, stride_first_b, stride_visible_t, stride_visible_b,
    HAS_FIRST: tl.constexpr, HAS_MASKS: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A program's rows, those of a key head's group side by side: (tile, b, kv_head) and of each (t, head, inside, first, visible)."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last rows see most: they go first
    b = tl.program_id(1) // KV_HEADS
    kv_head = tl.program_id(1) % KV_HEADS
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t = row // GROUPS
    inside = t < T
    visible = visible_keys(t, b, T, num_keys, visible_ptr, mask_start_ptr, stride_visible_t, stride_visible_b, HAS_MASKS)
    first = visible
    if HAS_FIRST:
        first, visible = seen_keys(t, b, T, num_keys, visible, first_ptr, stride_first_t, stride_first_b)
    return tile, b, kv_head, t, kv_head * GROUPS + row % GROUPS, inside, first, visible


@triton.jit
def mask_key_range(first, last, T, num_masks, block_size, WHOLE_BLOCKS: tl.constexpr):
    """[begin, end) of the mask keys that pass rows first..last may attend: all of them, or their blocks'."""
    start = T - num_masks
    begin = 0
    end = num_masks
    if WHOLE_BLOCKS:
        begin = tl.maximum(first - start, 0) // block_size * block_size
        end = (tl.maximum(last - start, 0) // block_size + 1) * block_size
    return begin, tl.where(last >= start, tl.minimum(end, num_masks), begin)


@triton.jit
def load_keys(
    base_ptr, column, earliest, end, stride,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, CHECKED: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """(BLOCK_S, BLOCK_D) of K or V from `column`; CHECKED: columns outside [earliest, end) are not read, and zero."""
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    pointers = base_ptr + tl.cast(column, tl.int64) * stride + (s[:, None] * stride + d[None, :])
    if CHECKED:
        read = column + s < end
        if HAS_FIRST:
            read = read & (column + s >= earliest)
        return tl.load(pointers, mask=read[:, None] & (d < D)[None, :], other=0.0)
    if BLOCK_D > D:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_rows(base_ptr, offsets, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_M, BLOCK_D) of Q, O or dO, zero past the last row."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(base_ptr + offsets[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(base_ptr, offsets, x, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Its counterpart, for what has as many columns."""
    d = tl.arange(0, BLOCK_D)
    tl.store(base_ptr + offsets[:, None] + d[None, :], x.to(base_ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def of_head(ptr, b, kv_head, stride_b, stride_h):
    """Where sequence b's keys or values of a head begin."""
    return ptr + (b.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h)


@triton.jit
def first_keys(first, inside, HAS_FIRST: tl.constexpr):
    """(earliest, latest) of the rows' first keys."""
    if HAS_FIRST:
        return tl.min(first, 0), tl.max(tl.where(inside, first, 0), 0)
    return 0, 0


@triton.jit
def load_queries(
    q_ptr, b, t, head, inside, stride_qt, stride_qb, stride_qh, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """A program's rows of Q in two parts, (BLOCK_M, BLOCK_D) and (BLOCK_M, BLOCK_TAIL), the second of no meaning where there is none."""
    q_ptr += b.to(tl.int64) * stride_qb
    offsets = t.to(tl.int64) * stride_qt + head * stride_qh
    q = load_rows(q_ptr, offsets, inside, D, BLOCK_D)
    q_tail = q
    if BLOCK_TAIL > 0:
        q_tail = load_rows(q_ptr + BLOCK_D, offsets, inside, D - BLOCK_D, BLOCK_TAIL)
    return q, q_tail


@triton.jit
def no_sums(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr):
    """(m, z, acc, acc_tail) of no keys."""
    z = tl.zeros([BLOCK_M], tl.float32)
    acc_tail = z
    if BLOCK_TAIL > 0:
        acc_tail = tl.zeros([BLOCK_M, BLOCK_TAIL], tl.float32)
    return tl.full([BLOCK_M], float("-inf"), tl.float32), z, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), acc_tail


@triton.jit
def allowed_keys(
    column, masks_end, first, visible, block, slot, key_block_ptr, key_slot_ptr,
    HAS_FIRST: tl.constexpr, HAS_MASKS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_S): which keys of the tile at `column` each row may attend. masks_end: of the mask keys, 0 where the keys are NTP keys.

    One test for both kinds of keys, so that one loop serves them: the other kind's part is made to hold for every row.
    """
    s = column + tl.arange(0, BLOCK_S)
    if HAS_FIRST:  # both ends in one comparison, for want of registers
        seen = tl.maximum(visible - first, 0).to(tl.uint32, bitcast=True)
        allowed = (s[None, :] - first[:, None]).to(tl.uint32, bitcast=True) < seen[:, None]
    else:
        allowed = s[None, :] < visible[:, None]
    if HAS_MASKS:
        key_block = tl.load(key_block_ptr + s, mask=s < masks_end, other=0).to(tl.int32)
        key_slot = tl.load(key_slot_ptr + s, mask=s < masks_end, other=0).to(tl.int32)
        allowed = allowed & (key_block[None, :] == block[:, None]) & (key_slot[None, :] <= slot[:, None])
    return allowed


@triton.jit
def _attend(
    m, z, acc, acc_tail, q, q_tail, first, visible, block, slot, earliest, begin, end,
    k_ptr, v_ptr, key_block_ptr, key_slot_ptr, masks_end, stride_ks, stride_vs, scale,
    CHECKED: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_MASKS: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """Go on with (m, z, acc) over the key tiles of [begin, end). Not CHECKED: every row may attend every key of them.

    To be called behind `if begin < end`, as the backward loops are: where zeros may meet what a loop has added, on a path around it, ptxas has
    Hopper's matrix instructions wait for each other (`bench.compiled` finds it out).
    """
    TAIL: tl.constexpr = D - BLOCK_D
    for column in range(begin, end, BLOCK_S):
        k = load_keys(k_ptr, column, earliest, end, stride_ks, D, BLOCK_S, BLOCK_D, CHECKED, HAS_FIRST)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if BLOCK_TAIL > 0:
            k = load_keys(k_ptr + BLOCK_D, column, earliest, end, stride_ks, TAIL, BLOCK_S, BLOCK_TAIL, CHECKED, HAS_FIRST)
            qk = tl.dot(q_tail, tl.trans(k), qk, input_precision=PRECISION)
        x = qk * scale
        if CHECKED:
            allowed = allowed_keys(column, masks_end, first, visible, block, slot, key_block_ptr, key_slot_ptr, HAS_FIRST, HAS_MASKS, BLOCK_S)
            x = tl.where(allowed, x, float("-inf"))
        m_next = tl.maximum(m, tl.max(x, 1))
        reference = tl.where(m_next == float("-inf"), 0.0, m_next)  # -inf - -inf is NaN
        p = tl.exp2(tl.fma(qk, scale, -reference[:, None]))
        if CHECKED:
            p = tl.where(allowed, p, 0.0)
        shrink = tl.exp2(m - reference)
        z = tl.fma(z, shrink, tl.sum(p, 1))
        p = p.to(q.dtype)
        v = load_keys(v_ptr, column, earliest, end, stride_vs, D, BLOCK_S, BLOCK_D, CHECKED, HAS_FIRST)
        acc *= shrink[:, None]
        if BLOCK_TAIL > 0:
            acc_tail *= shrink[:, None]
            v_tail = load_keys(v_ptr + BLOCK_D, column, earliest, end, stride_vs, TAIL, BLOCK_S, BLOCK_TAIL, CHECKED, HAS_FIRST)
        acc = tl.dot(p, v, acc, input_precision=PRECISION)
        if BLOCK_TAIL > 0:
            acc_tail = tl.dot(p, v_tail, acc_tail, input_precision=PRECISION)
        m = m_next
    return m, z, acc, acc_tail


@triton.jit
def _merge(m, z, acc, m_piece, z_piece, acc_piece):
    """The running sums and one more piece's."""
    m_next = tl.maximum(m, m_piece)
    reference = tl.where(m_next == float("-inf"), 0.0, m_next)
    a = tl.exp2(m - reference)
    b = tl.exp2(m_piece - reference)
    z = tl.fma(z, a, z_piece * b)
    acc = tl.fma(acc, a[:, None], acc_piece * b[:, None])
    return m_next, z, acc


@triton.jit
def keys_of_piece(
    piece, of_masks, tile, b, t, first, visible, earliest, latest, least, most, block_ptr, slot_ptr, mask_start_ptr, T, num_masks, block_size,
    HAS_FIRST: tl.constexpr, HAS_MASKS: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, GROUPS: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The keys of a piece that a tile of rows may attend, and the rule for them: (begin, whole, end, start, masks_end, first, earliest, visible, block, slot).

    Every row may attend the keys [begin, whole), the rule decides on [whole, end); they are read from column `start` on.
    The rows' first keys are earliest to latest, and they see least to most NTP keys. of_masks: this piece is the mask keys.
    """
    begin = piece * PIECE
    end = tl.minimum(begin + PIECE, most)
    if HAS_FIRST:
        begin = tl.maximum(begin, earliest // BLOCK_S * BLOCK_S)
        least = tl.where(latest > begin, begin, least)
    whole = tl.maximum(begin + (tl.minimum(least, end) - begin) // BLOCK_S * BLOCK_S, begin)
    start = tl.cast(0, tl.int64)
    masks_end = 0
    block = t
    slot = t
    if HAS_MASKS:
        if of_masks:
            last = tl.minimum(((tile + 1) * BLOCK_M - 1) // GROUPS, T - 1)
            begin, end = mask_key_range(tile * BLOCK_M // GROUPS, last, T, num_masks, block_size, WHOLE_BLOCKS)
            whole = begin
            start = tl.load(mask_start_ptr + b).to(tl.int64)
        masks_end = tl.where(of_masks, end, 0)
        visible = tl.where(of_masks, end, visible)
        if HAS_FIRST:
            first = tl.where(of_masks, 0, first)
            earliest = tl.where(of_masks, 0, earliest)
        asked = t < tl.where(of_masks, T, 0)
        block = tl.load(block_ptr + t, mask=asked, other=0).to(tl.int32)
        slot = tl.load(slot_ptr + t, mask=asked, other=0).to(tl.int32)
    return begin, whole, end, start, masks_end, first, earliest, visible, block, slot


@triton.jit
def sums_of_piece(
    begin, whole, end, start, masks_end, first, earliest, visible, block, slot, q, q_tail,
    k_ptr, v_ptr, mask_block_ptr, mask_slot_ptr, stride_ks, stride_vs, scale,
    HAS_FIRST: tl.constexpr, HAS_MASKS: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """(m, z, acc, acc_tail) of the keys that `keys_of_piece` names."""
    m, z, acc, acc_tail = no_sums(BLOCK_M, BLOCK_D, BLOCK_TAIL)
    if begin < whole:
        m, z, acc, acc_tail = _attend(
            m, z, acc, acc_tail, q, q_tail, first, visible, block, slot, earliest, begin, whole,
            k_ptr, v_ptr, mask_block_ptr, mask_slot_ptr, masks_end, stride_ks, stride_vs, scale,
            False, False, False, PRECISION, D, BLOCK_S, BLOCK_D, BLOCK_TAIL,
        )  # fmt: skip
    if whole < end:
        m, z, acc, acc_tail = _attend(
            m, z, acc, acc_tail, q, q_tail, first, visible, block, slot, earliest, whole, end,
            k_ptr + start * stride_ks, v_ptr + start * stride_vs, mask_block_ptr, mask_slot_ptr, masks_end, stride_ks, stride_vs, scale,
            True, HAS_FIRST, HAS_MASKS, PRECISION, D, BLOCK_S, BLOCK_D, BLOCK_TAIL,
        )  # fmt: skip
    return m, z, acc, acc_tail


@triton.jit(do_not_specialize=["T", "B", "num_masks", "block_size", "num_keys", "first_piece", *RULE_STRIDES])
def attend_kernel(
    q_ptr, k_ptr, v_ptr, acc_ptr, max_ptr, sum_ptr,
    first_ptr, visible_ptr, block_ptr, slot_ptr, mask_start_ptr,
    stride_qt, stride_qb, stride_qh, stride_kb, stride_kh, stride_ks: tl.constexpr, stride_vb, stride_vh, stride_vs: tl.constexpr,
    stride_first_t, stride_first_b, stride_visible_t, stride_visible_b,
    T, B, num_masks, block_size, num_keys, first_piece, scale,
    HAS_FIRST: tl.constexpr, HAS_MASKS: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of packed rows over one piece of keys, its (m, z, acc) to max, sum (pieces, T, B, H), acc (pieces, T, B, H, D).

    Pieces are numbered from first_piece on; the one behind the NTP keys' is the masks'. A piece of which no row of the tile
    sees a key is left unwritten. scale includes log2(e).
    """
    tile, b, kv_head, t, head, inside, first, visible = packed_rows(
        T, num_keys, first_ptr, visible_ptr, mask_start_ptr, stride_first_t, stride_first_b, stride_visible_t, stride_visible_b,
        HAS_FIRST, HAS_MASKS, KV_HEADS, GROUPS, BLOCK_M,
    )  # fmt: skip
    least = tl.min(tl.where(inside, visible, num_keys), 0)
    earliest, latest = first_keys(first, inside, HAS_FIRST)
    piece = first_piece + tl.program_id(2)
    begin, whole, end, start, masks_end, first, earliest, visible, block, slot = keys_of_piece(
        piece, piece == tl.cdiv(num_keys, PIECE), tile, b, t, first, visible, earliest, latest, least, tl.max(visible, 0),
        block_ptr, slot_ptr, mask_start_ptr, T, num_masks, block_size, HAS_FIRST, HAS_MASKS, WHOLE_BLOCKS, GROUPS, PIECE, BLOCK_M, BLOCK_S,
    )  # fmt: skip
    if begin >= end:
        return

    q, q_tail = load_queries(q_ptr, b, t, head, inside, stride_qt, stride_qb, stride_qh, D, BLOCK_D, BLOCK_TAIL)
    m, z, acc, acc_tail = sums_of_piece(
        begin, whole, end, start, masks_end, first, earliest, visible, block, slot, q, q_tail,
        of_head(k_ptr, b, kv_head, stride_kb, stride_kh), of_head(v_ptr, b, kv_head, stride_vb, stride_vh),
        block_ptr + (T - num_masks), slot_ptr + (T - num_masks), stride_ks, stride_vs, scale,
        HAS_FIRST, HAS_MASKS, PRECISION, D, BLOCK_M, BLOCK_S, BLOCK_D, BLOCK_TAIL,
    )  # fmt: skip
    index = ((tl.program_id(2).to(tl.int64) * T + t) * B + b) * (KV_HEADS * GROUPS) + head
    tl.store(max_ptr + index, m, mask=inside)
    tl.store(sum_ptr + index, z, mask=inside)
    store_rows(acc_ptr, index * D, acc, inside, D, BLOCK_D)
    if BLOCK_TAIL > 0:
        store_rows(acc_ptr + BLOCK_D, index * D, acc_tail, inside, D - BLOCK_D, BLOCK_TAIL)


@triton.jit(do_not_specialize=["T", "B", "num_masks", "block_size", "num_keys", *RULE_STRIDES])
def attend_whole_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, kept_ptr,
    first_ptr, visible_ptr, block_ptr, slot_ptr, mask_start_ptr,
    stride_qt, stride_qb, stride_qh, stride_kb, stride_kh, stride_ks: tl.constexpr, stride_vb, stride_vh, stride_vs: tl.constexpr,
    stride_first_t, stride_first_b, stride_visible_t, stride_visible_b,
    T, B, num_masks, block_size, num_keys, scale,
    KEEP: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_MASKS: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, PIECE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of packed rows over all of its pieces: bit for bit what `attend_kernel` and `merge_kernel` give, without the memory between them."""
    tile, b, kv_head, t, head, inside, first, visible = packed_rows(
        T, num_keys, first_ptr, visible_ptr, mask_start_ptr, stride_first_t, stride_first_b, stride_visible_t, stride_visible_b,
        HAS_FIRST, HAS_MASKS, KV_HEADS, GROUPS, BLOCK_M,
    )  # fmt: skip
    most = tl.max(visible, 0)
    least = tl.min(tl.where(inside, visible, num_keys), 0)
    earliest, latest = first_keys(first, inside, HAS_FIRST)
    k_ptr = of_head(k_ptr, b, kv_head, stride_kb, stride_kh)
    v_ptr = of_head(v_ptr, b, kv_head, stride_vb, stride_vh)
    q, q_tail = load_queries(q_ptr, b, t, head, inside, stride_qt, stride_qb, stride_qh, D, BLOCK_D, BLOCK_TAIL)

    masks_piece = tl.cdiv(most, PIECE)
    first_piece = tl.minimum(earliest // PIECE, masks_piece)
    last_piece = masks_piece - 1
    if HAS_MASKS:
        last_piece += (tl.minimum(((tile + 1) * BLOCK_M - 1) // GROUPS, T - 1) >= T - num_masks).to(tl.int32)
    m, z, acc, acc_tail = no_sums(BLOCK_M, BLOCK_D, BLOCK_TAIL)
    for piece in range(first_piece, last_piece + 1):
        begin, whole, end, start, masks_end, own_first, own_earliest, own_visible, block, slot = keys_of_piece(
            piece, piece == masks_piece, tile, b, t, first, visible, earliest, latest, least, most,
            block_ptr, slot_ptr, mask_start_ptr, T, num_masks, block_size, HAS_FIRST, HAS_MASKS, WHOLE_BLOCKS, GROUPS, PIECE, BLOCK_M, BLOCK_S,
        )  # fmt: skip
        m_piece, z_piece, acc_piece, tail_piece = sums_of_piece(
            begin, whole, end, start, masks_end, own_first, own_earliest, own_visible, block, slot, q, q_tail, k_ptr, v_ptr,
            block_ptr + (T - num_masks), slot_ptr + (T - num_masks), stride_ks, stride_vs, scale,
            HAS_FIRST, HAS_MASKS, PRECISION, D, BLOCK_M, BLOCK_S, BLOCK_D, BLOCK_TAIL,
        )  # fmt: skip
        written = piece * PIECE < visible
        if HAS_FIRST:
            written = written & (piece >= first // PIECE)
        if HAS_MASKS:
            written = written | (t >= tl.where(piece == masks_piece, T - num_masks, T))
        m_piece = tl.where(written, m_piece, float("-inf"))
        z_piece = tl.where(written, z_piece, 0.0)
        m_before = m
        z_before = z
        m, z, acc = _merge(m_before, z_before, acc, m_piece, z_piece, tl.where(written[:, None], acc_piece, 0.0))
        if BLOCK_TAIL > 0:
            _, _, acc_tail = _merge(m_before, z_before, acc_tail, m_piece, z_piece, tl.where(written[:, None], tail_piece, 0.0))

    z = tl.where(z == 0, 1.0, z)  # only rows without a key, which are padding
    index = (t.to(tl.int64) * B + b) * (KV_HEADS * GROUPS) + head
    store_rows(out_ptr, index * D, acc / z[:, None], inside, D, BLOCK_D)
    if BLOCK_TAIL > 0:
        store_rows(out_ptr + BLOCK_D, index * D, acc_tail / z[:, None], inside, D - BLOCK_D, BLOCK_TAIL)
    if KEEP:
        tl.store(kept_ptr + index, tl.where(m == float("-inf"), 0.0, m), mask=inside)
        tl.store(kept_ptr + tl.cast(T, tl.int64) * B * (KV_HEADS * GROUPS) + index, 1.0 / z, mask=inside)


@triton.jit(do_not_specialize=["T", "B", "num_masks", "num_keys", "first_piece", "last_piece", *RULE_STRIDES])
def merge_kernel(
    acc_ptr, max_ptr, sum_ptr, state_acc_ptr, state_max_ptr, state_sum_ptr, out_ptr, kept_ptr,
    first_ptr, visible_ptr, mask_start_ptr, stride_first_t, stride_first_b, stride_visible_t, stride_visible_b,
    T, B, num_masks, num_keys, first_piece, last_piece,
    FIRST: tl.constexpr, LAST: tl.constexpr, KEEP: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_MASKS: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pieces first_piece..last_piece - 1 of BLOCK_R rows of (T, B, H), merged in order, as far as a row has them.

    Not FIRST: behind the sums in `state`, from the launch before. LAST: the result to out, and for KEEP M and 1 / Z to kept (2, T, B, H);
    else the sums to `state`.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = row // (B * H)
    inside = t < T
    row64 = row.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    offsets = row64[:, None] * D + d[None, :]
    held = inside[:, None] & (d < D)[None, :]
    visible = visible_keys(t, row // H % B, T, num_keys, visible_ptr, mask_start_ptr, stride_visible_t, stride_visible_b, HAS_MASKS)
    first = visible
    if HAS_FIRST:
        first, visible = seen_keys(t, row // H % B, T, num_keys, visible, first_ptr, stride_first_t, stride_first_b)
    pieces = tl.cdiv(visible, PIECE)
    masks_piece = tl.cdiv(num_keys, PIECE)
    if FIRST:
        m = tl.full([BLOCK_R], float("-inf"), tl.float32)
        z = tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    else:
        m = tl.load(state_max_ptr + row64, mask=inside, other=float("-inf"))
        z = tl.load(state_sum_ptr + row64, mask=inside, other=0.0)
        acc = tl.load(state_acc_ptr + offsets, mask=held, other=0.0)
    for piece in range(first_piece, last_piece):
        written = inside & (piece < pieces)
        if HAS_FIRST:
            written = written & (piece >= first // PIECE)
        if HAS_MASKS:
            written = written | (inside & (t >= tl.where(piece == masks_piece, T - num_masks, T)))
        slot64 = tl.cast(piece - first_piece, tl.int64) * T * B * H
        m_piece = tl.load(max_ptr + slot64 + row64, mask=written, other=float("-inf"))
        z_piece = tl.load(sum_ptr + slot64 + row64, mask=written, other=0.0)
        acc_piece = tl.load(acc_ptr + slot64 * D + offsets, mask=held & written[:, None], other=0.0)
        m, z, acc = _merge(m, z, acc, m_piece, z_piece, acc_piece)
    if LAST:
        z = tl.where(z == 0, 1.0, z)  # only rows without a key, which are padding
        tl.store(out_ptr + offsets, (acc / z[:, None]).to(out_ptr.dtype.element_ty), mask=held)
        if KEEP:
            tl.store(kept_ptr + row64, tl.where(m == float("-inf"), 0.0, m), mask=inside)
            tl.store(kept_ptr + tl.cast(T, tl.int64) * B * H + row64, 1.0 / z, mask=inside)
    else:
        if not FIRST:
            tl.debug_barrier()  # every warp has loaded its copy of the state that is overwritten now
        tl.store(state_max_ptr + row64, m, mask=inside)
        tl.store(state_sum_ptr + row64, z, mask=inside)
        tl.store(state_acc_ptr + offsets, acc, mask=held)
