"""The kernels of `gated_lora`, which see for the plans. acc = W x^T: features on the rows of the matrix instruction.

GATE: 0 none, 1 rows from `first_on` on, 2 the same with the number in memory at gate_ptr, 3 one byte per row at gate_ptr.
"""

import triton
import triton.language as tl


@triton.jit
def _gate(rows, M, gate_ptr, first_on, GATE: tl.constexpr):
    """Which of `rows` are on."""
    if GATE == 1:
        on = rows >= first_on
    elif GATE == 2:
        on = rows >= tl.load(gate_ptr).to(tl.int32)
    else:
        on = tl.load(gate_ptr + rows, mask=rows < M, other=0) != 0
    return on & (rows < M)


@triton.jit
def _segment(
    x_ptrs, w_ptrs, w2_ptrs, ks, k_begin, k_end, stride_xk, stride_wk,
    TWO: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W x^T over k_begin <= k < k_end, (BLOCK_N, BLOCK_M) float32; with TWO, of two weight tiles."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc2 = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(k_begin, k_end, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + k * stride_xk)  # (BLOCK_K, BLOCK_M)
            w = tl.load(w_ptrs + k * stride_wk)  # (BLOCK_N, BLOCK_K)
        else:
            inside = ks + k < k_end
            x = tl.load(x_ptrs + k * stride_xk, mask=inside[:, None], other=0.0)
            w = tl.load(w_ptrs + k * stride_wk, mask=inside[None, :], other=0.0)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
        if TWO:
            if EVEN_K:
                w2 = tl.load(w2_ptrs + k * stride_wk)
            else:
                w2 = tl.load(w2_ptrs + k * stride_wk, mask=(ks + k < k_end)[None, :], other=0.0)
            acc2 = tl.dot(w2, x, acc2, input_precision=PRECISION)
    return acc, acc2


@triton.jit
def _expand(
    acc, s_ptr, b_ptr, starts_ptr, on, rows, first_n, N, R, scale, stride_sm, stride_segment, stride_bn, stride_br,
    GROUPS: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + B s^T where the gate is on, s = scale * the sum of the segments of x A^T, rounded to B's dtype.

    A tile of features may touch several projections; each has its own s and B. N counts the features of all of them.
    """
    dtype = b_ptr.dtype.element_ty
    first_group = 0
    last_group = 0
    for g in tl.static_range(1, GROUPS):
        start = tl.load(starts_ptr + g)
        first_group += (first_n >= start).to(tl.int32)
        last_group += (tl.minimum(first_n + BLOCK_N, N) > start).to(tl.int32)
    features = first_n + tl.arange(0, BLOCK_N)
    more = acc
    for g in range(first_group, last_group + 1):
        mine = features < N
        if GROUPS > 1:
            mine = (features >= tl.load(starts_ptr + g)) & (features < tl.load(starts_ptr + g + 1))
        for r in range(0, R, BLOCK_R):
            ranks = r + tl.arange(0, BLOCK_R)
            b_ptrs = b_ptr + features[:, None].to(tl.int64) * stride_bn + ranks[None, :] * stride_br
            b = tl.load(b_ptrs, mask=mine[:, None] & (ranks < R)[None, :], other=0.0)  # (BLOCK_N, BLOCK_R)
            s_ptrs = s_ptr + rows[None, :].to(tl.int64) * stride_sm + (g * R + ranks)[:, None]
            s_inside = on[None, :] & (ranks < R)[:, None]
            s = tl.load(s_ptrs, mask=s_inside, other=0.0)  # (BLOCK_R, BLOCK_M)
            if SEGMENTS > 1:
                for i in range(1, SEGMENTS):
                    s += tl.load(s_ptrs + i * stride_segment, mask=s_inside, other=0.0)
            more = tl.dot(b, (s.to(tl.float32) * scale).to(dtype), more, input_precision=PRECISION)
    return tl.where(on[None, :], more, acc)


@triton.jit
def _store(
    acc, acc2, y_ptr, bias_ptr, residual_ptr, rows, features, M, N, stride_ym, stride_rm, factor,
    SWIGLU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y = acc (+ bias) (+ residual), or silu(acc + bias) * (acc2 + bias of the second half), both rounded first."""
    dtype = y_ptr.dtype.element_ty
    if HAS_BIAS:
        acc += tl.load(bias_ptr + features, mask=features < N, other=0.0).to(tl.float32)[:, None]
        if SWIGLU:
            acc2 += tl.load(bias_ptr + N + features, mask=features < N, other=0.0).to(tl.float32)[:, None]
    inside = (features < N)[:, None] & (rows < M)[None, :]
    if HAS_RESIDUAL:
        at = residual_ptr + rows[None, :].to(tl.int64) * stride_rm + features[:, None]
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    y = (acc * factor).to(dtype)
    if SWIGLU:  # as the two operations one after the other round
        gate = y.to(tl.float32)
        y = ((gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32) * acc2.to(dtype).to(tl.float32)).to(dtype)
    tl.store(y_ptr + rows[None, :].to(tl.int64) * stride_ym + features[:, None], y, mask=inside)


@triton.jit(do_not_specialize=["first_on"])
def product_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, bias_ptr, residual_ptr, y_ptr, gate_ptr, starts_ptr, first_on,
    M, N, K, R, segment_k,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_bn, stride_br, stride_sm, stride_ym, stride_rm,
    GATE: tl.constexpr, GROUPS: tl.constexpr, EXPAND: tl.constexpr, SWIGLU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of y. N counts the features of y; s is scaled already."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Programs that run at the same time share row tiles and weight tiles: bands of 8 row tiles.
    pid = tl.program_id(0)
    band = pid // (8 * tiles_n)
    height = tl.minimum(tiles_m - band * 8, 8)
    inner = pid % (8 * tiles_n)
    rows = (band * 8 + inner % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = (inner // height) * BLOCK_N
    features = first_n + tl.arange(0, BLOCK_N)
    if GATE != 0:
        on = _gate(rows, M, gate_ptr, first_on, GATE)
        any_on = tl.max(on.to(tl.int32), 0) > 0
    # Rows and features past the end read the last one again and are not stored.
    source = features if EVEN_N else tl.minimum(features, N - 1)
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tl.minimum(rows, M - 1)[None, :].to(tl.int64) * stride_xm + ks[:, None] * stride_xk
    w_ptrs = w_ptr + source[:, None].to(tl.int64) * stride_wn + ks[None, :] * stride_wk
    w2_ptrs = w_ptrs
    if SWIGLU:
        w2_ptrs = w_ptrs + tl.cast(N, tl.int64) * stride_wn
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    total2 = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in range(SEGMENTS):
        acc, acc2 = _segment(
            x_ptrs, w_ptrs, w2_ptrs, ks, i * segment_k, tl.minimum((i + 1) * segment_k, K), stride_xk, stride_wk,
            SWIGLU, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total += acc
        total2 += acc2
    if EXPAND:
        if any_on:
            total = _expand(
                total, s_ptr, b_ptr, starts_ptr, on, rows, first_n, N * (1 + SWIGLU), R, 1.0, stride_sm, 0, stride_bn, stride_br,
                GROUPS, 1, PRECISION, BLOCK_N, BLOCK_R,
            )  # fmt: skip
            if SWIGLU:
                total2 = _expand(
                    total2, s_ptr, b_ptr, starts_ptr, on, rows, N + first_n, N * 2, R, 1.0, stride_sm, 0, stride_bn, stride_br,
                    GROUPS, 1, PRECISION, BLOCK_N, BLOCK_R,
                )  # fmt: skip
    _store(
        total, total2, y_ptr, bias_ptr, residual_ptr, rows, features, M, N, stride_ym, stride_rm, 1.0,
        SWIGLU, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_on"])
def project_kernel(
    x_ptr, w_ptr, a_ptr, sums_ptr, gate_ptr, first_on,
    M, N, K, GR, segment_k,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_an, stride_ak, stride_segment,
    GATE: tl.constexpr, HAS_A: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One segment of one tile of [W; A] x^T, float32; sums: (SEGMENTS, M, N + GR).

    Row tiles without a gate-on row are left unwritten in A's part, and without an A in W's.
    """
    tile = tl.program_id(0)
    segment = tl.program_id(1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    if GATE != 0:
        on = _gate(rows, M, gate_ptr, first_on, GATE)
        any_on = tl.max(on.to(tl.int32), 0) > 0
        if not HAS_A:
            if not any_on:
                return
    ks = tl.arange(0, BLOCK_K)
    k_begin = segment * segment_k
    k_end = tl.minimum(k_begin + segment_k, K)
    x_ptrs = x_ptr + tl.minimum(rows, M - 1)[None, :].to(tl.int64) * stride_xm + ks[:, None] * stride_xk
    sums_ptrs = sums_ptr + segment.to(tl.int64) * stride_segment + rows[None, :].to(tl.int64) * (N + GR)
    if tile < tiles_n:
        features = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        source = features if EVEN_N else tl.minimum(features, N - 1)
        w_ptrs = w_ptr + source[:, None].to(tl.int64) * stride_wn + ks[None, :] * stride_wk
        acc, _ = _segment(
            x_ptrs, w_ptrs, w_ptrs, ks, k_begin, k_end, stride_xk, stride_wk,
            False, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tl.store(sums_ptrs + features[:, None], acc, mask=(features < N)[:, None] & (rows < M)[None, :])
    elif HAS_A:
        if any_on:
            ranks = (tile - tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
            a_ptrs = a_ptr + tl.minimum(ranks, GR - 1)[:, None].to(tl.int64) * stride_an + ks[None, :] * stride_ak
            acc, _ = _segment(
                x_ptrs, a_ptrs, a_ptrs, ks, k_begin, k_end, stride_xk, stride_ak,
                False, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            tl.store(sums_ptrs + (N + ranks)[:, None], acc, mask=(ranks < GR)[:, None] & (rows < M)[None, :])


@triton.jit(do_not_specialize=["first_on", "scale"])
def finish_kernel(
    sums_ptr, b_ptr, bias_ptr, residual_ptr, y_ptr, gate_ptr, starts_ptr, first_on, scale,
    M, N, R, stride_sm, stride_segment, stride_bn, stride_br, stride_ym, stride_rm,
    GATE: tl.constexpr, EXPAND: tl.constexpr, GROUPS: tl.constexpr, SWIGLU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of y from `project`'s sums. N counts the features of y; stride_sm those of a row of sums.

    With EXPAND, `scale` is the adapter's; without, of y itself, and row tiles without a gate-on row are left unwritten.
    """
    first_n = tl.program_id(0) * BLOCK_N
    features = first_n + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if GATE != 0:
        on = _gate(rows, M, gate_ptr, first_on, GATE)
        any_on = tl.max(on.to(tl.int32), 0) > 0
        if not EXPAND:
            if not any_on:
                return
    inside = (features < N)[:, None] & (rows < M)[None, :]
    ALL = N * (1 + SWIGLU)
    sums_ptrs = sums_ptr + rows[None, :].to(tl.int64) * stride_sm + features[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    total2 = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in range(SEGMENTS):
        at = sums_ptrs + i * stride_segment
        acc = tl.load(at, mask=inside, other=0.0)
        acc2 = acc
        if SWIGLU:
            acc2 = tl.load(at + N, mask=inside, other=0.0)
        total += acc
        total2 += acc2
    if EXPAND:
        if any_on:
            total = _expand(
                total, sums_ptr + ALL, b_ptr, starts_ptr, on, rows, first_n, ALL, R, scale, stride_sm, stride_segment,
                stride_bn, stride_br, GROUPS, SEGMENTS, PRECISION, BLOCK_N, BLOCK_R,
            )  # fmt: skip
            if SWIGLU:
                total2 = _expand(
                    total2, sums_ptr + ALL, b_ptr, starts_ptr, on, rows, N + first_n, ALL, R, scale, stride_sm, stride_segment,
                    stride_bn, stride_br, GROUPS, SEGMENTS, PRECISION, BLOCK_N, BLOCK_R,
                )  # fmt: skip
    factor = 1.0 if EXPAND else scale
    _store(
        total, total2, y_ptr, bias_ptr, residual_ptr, rows, features, M, N, stride_ym, stride_rm, factor,
        SWIGLU, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_on"])
def outer_kernel(
    u_ptr, v_ptr, out_ptr, gate_ptr, first_on, M, P, Q, stride_um, stride_vm, stride_op,
    GATE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """out[p, q] = sum over gate-on rows of u[row, p] v[row, q]: one program per tile, rows in order."""
    tiles_q = tl.cdiv(Q, BLOCK_Q)
    ps = tl.program_id(0) // tiles_q * BLOCK_P + tl.arange(0, BLOCK_P)
    qs = tl.program_id(0) % tiles_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    begin = 0
    if GATE == 1:
        begin = first_on // BLOCK_M * BLOCK_M
    elif GATE == 2:
        begin = tl.load(gate_ptr).to(tl.int32) // BLOCK_M * BLOCK_M
    acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    for m in range(begin, M, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        on = _gate(rows, M, gate_ptr, first_on, GATE)
        at = rows.to(tl.int64)
        u = tl.load(u_ptr + at[None, :] * stride_um + ps[:, None], mask=on[None, :] & (ps < P)[:, None], other=0.0)
        v = tl.load(v_ptr + at[:, None] * stride_vm + qs[None, :], mask=on[:, None] & (qs < Q)[None, :], other=0.0)
        acc = tl.dot(u, v, acc, input_precision=PRECISION)
    out_ptrs = out_ptr + ps[:, None].to(tl.int64) * stride_op + qs[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(ps < P)[:, None] & (qs < Q)[None, :])
