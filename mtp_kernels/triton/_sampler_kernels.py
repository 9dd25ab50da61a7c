"""The kernels of `linear_argmax` and `sampler`, which see for the launches. acc = W x^T: features on the rows of the matrix instruction.

An argmax is taken in two launches: the best of each fixed piece of the ids, then of the pieces' bests, (pieces, M) values and ids.
A LayerNorm is not a launch of its own: the product before it leaves the mean and the sum of squared deviations of each of its tiles
of features, (2, tiles, B) float32, and every program of the product after it puts those together and normalises the x that it reads.
"""

import triton
import triton.language as tl

from mtp_kernels.triton._noise import gumbel


@triton.jit
def _best(values, ids, axis: tl.constexpr):
    """The largest value along an axis and the lowest id that has it. A NaN is less than everything, so that the id is always one of `ids`."""
    values = tl.where(values == values, values, float("-inf"))
    largest = tl.max(values, axis)
    return largest, tl.min(tl.where(values == tl.expand_dims(largest, axis), ids, 2147483647), axis)


@triton.jit
def argmax_kernel(logits_ptr, keys_ptr, least_ptr, values_ptr, ids_ptr, N, stride_m, temperature, PIECE: tl.constexpr):
    """The best of one piece of one row's logits; program_id(0) is the row. keys_ptr: add noise; least_ptr: leave out smaller ones."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    logits = tl.load(logits_ptr + m * stride_m + n, mask=n < N, other=float("-inf")).to(tl.float32)
    if least_ptr is not None:
        logits = tl.where(logits >= tl.load(least_ptr + m), logits, float("-inf"))
    if keys_ptr is not None:
        logits += temperature * gumbel(tl.load(keys_ptr + m), n)
    value, id = _best(logits, n, 0)
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + m
    tl.store(values_ptr + at, value)
    tl.store(ids_ptr + at, id)


@triton.jit
def pick_kernel(values_ptr, ids_ptr, out_ptr, PIECES, stride_out, BLOCK_P: tl.constexpr):
    """out[m] = the best of a row's pieces."""
    m = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    at = p.to(tl.int64) * tl.num_programs(0) + m
    values = tl.load(values_ptr + at, mask=p < PIECES, other=float("-inf"))
    _, id = _best(values, tl.load(ids_ptr + at, mask=p < PIECES, other=2147483647), 0)
    tl.store(out_ptr + m * stride_out, id.to(tl.int64))


@triton.jit
def _statistics(moments_ptr, rows, B, K, eps, TILES, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr):
    """(mean, 1 / sqrt(variance + eps)) of each row of K values, from those of its tiles of WIDTH."""
    t = tl.arange(0, BLOCK_T)[:, None]
    inside = (t < TILES) & (rows < B)[None, :]
    at = moments_ptr + t * B + rows[None, :]
    count = tl.maximum(tl.minimum(K - t * WIDTH, WIDTH), 0).to(tl.float32)
    means = tl.load(at, mask=inside, other=0.0)  # (BLOCK_T, rows)
    mean = tl.sum(tl.fma(count, means, 0.0), 0) / K  # rounded before it is added, or threads would add it up to different bits
    apart = means - mean[None, :]
    squares = tl.sum(tl.load(at + TILES * B, mask=inside, other=0.0) + count * apart * apart, 0)
    return mean, 1.0 / tl.sqrt(squares / K + eps)


@triton.jit
def _normalised(x, k, K, mean, r, norm_weight_ptr, norm_bias_ptr):
    """LayerNorm of x (BLOCK_K, rows) at the places k of K, rounded to x's dtype; zero past the end."""
    weight = tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)[:, None]
    bias = tl.load(norm_bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[:, None]
    return ((x.to(tl.float32) - mean[None, :]) * r[None, :] * weight + bias).to(x.dtype)


@triton.jit
def _product(
    x_ptrs, inside, w_ptrs, K, stride_xk, stride_wk, mean, r, norm_weight_ptr, norm_bias_ptr,
    NORM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W x^T, (BLOCK_N, BLOCK_M) float32; x_ptrs (1, BLOCK_M) and w_ptrs (BLOCK_N, 1) are at the first of K."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptrs + k[:, None] * stride_xk, mask=inside[None, :] & (k < K)[:, None], other=0.0)  # (BLOCK_K, BLOCK_M)
        w = tl.load(w_ptrs + k[None, :] * stride_wk, mask=(k < K)[None, :], other=0.0)  # (BLOCK_N, BLOCK_K)
        if NORM:
            x = _normalised(x, k, K, mean, r, norm_weight_ptr, norm_bias_ptr)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
    return acc


@triton.jit
def block_kernel(
    x_ptr, token_ptr, moments_ptr, norm_weight_ptr, norm_bias_ptr, w_ptr, added_ptr, y_ptr, y_moments_ptr,
    B, N, K, TILES, stride_token, stride_xm, stride_xk, stride_wn, stride_wk, stride_added, eps,
    NORM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One tile of y (B, N) = silu(x' W^T + added) and its moments; x' = LayerNorm(x) with NORM, else the tokens' rows of x."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    features = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < B
    mean = tl.zeros((BLOCK_M,), tl.float32)
    r = mean
    source = rows.to(tl.int64)
    if NORM:
        mean, r = _statistics(moments_ptr, rows, B, K, eps, TILES, WIDTH, BLOCK_T)
    else:
        source = tl.load(token_ptr + source * stride_token, mask=inside, other=0).to(tl.int64)
    acc = _product(
        x_ptr + source[None, :] * stride_xm, inside, w_ptr + tl.minimum(features, N - 1)[:, None].to(tl.int64) * stride_wn, K,
        stride_xk, stride_wk, mean, r, norm_weight_ptr, norm_bias_ptr, NORM, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    real = (features < N)[:, None] & inside[None, :]
    acc += tl.load(added_ptr + rows[None, :] * stride_added + features[:, None], mask=real, other=0.0).to(tl.float32)
    y = (acc / (1.0 + tl.exp(-acc))).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[None, :] * N + features[:, None], y, mask=real)
    y = tl.where(real, y.to(tl.float32), 0.0)
    count = tl.minimum(N - tile * BLOCK_N, BLOCK_N).to(tl.float32)
    y_mean = tl.sum(y, 0) / count
    apart = y - y_mean[None, :]
    at = y_moments_ptr + tile * B + rows
    tl.store(at, y_mean, mask=inside)
    # a choice between product and sum: fused into one instruction, they would give the threads of a row different bits
    tl.store(at + tl.num_programs(1) * B, tl.sum(tl.where(real, apart * apart, 0.0), 0), mask=inside)


@triton.jit
def vocabulary_kernel(
    x_ptr, moments_ptr, norm_weight_ptr, norm_bias_ptr, w_ptr, keys_ptr, values_ptr, ids_ptr,
    B, N, K, TILES, stride_wn, stride_wk, stride_key, eps, temperature,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The best of one tile of W's rows for each LayerNorm(x); values and ids (tiles, B). keys_ptr: with noise on the logits."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    features = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < B
    mean, r = _statistics(moments_ptr, rows, B, K, eps, TILES, WIDTH, BLOCK_T)
    acc = _product(
        x_ptr + rows[None, :] * K, inside, w_ptr + tl.minimum(features, N - 1)[:, None].to(tl.int64) * stride_wn, K,
        1, stride_wk, mean, r, norm_weight_ptr, norm_bias_ptr, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if keys_ptr is not None:
        acc += temperature * gumbel(tl.load(keys_ptr + rows * stride_key, mask=inside, other=0)[None, :], tl.minimum(features, N - 1)[:, None])
    value, id = _best(acc, features[:, None], 0)  # past the end is the last row of W again, whose own id is lower
    tl.store(values_ptr + tile * B + rows, value, mask=inside)
    tl.store(ids_ptr + tile * B + rows, id, mask=inside)


@triton.jit
def shortlist_kernel(
    x_ptr, moments_ptr, norm_weight_ptr, norm_bias_ptr, w_ptr, list_ptr, keys_ptr, values_ptr, ids_ptr,
    C, K, TILES, stride_list, stride_wn, stride_wk, stride_key, eps, temperature,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The best of BLOCK_C ids of one sequence's list, of unit stride; values and ids (pieces, B). One row of x: no matrix instruction."""
    B = tl.num_programs(1)
    row = tl.program_id(1) + tl.arange(0, 1)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, r = _statistics(moments_ptr, row, B, K, eps, TILES, WIDTH, BLOCK_T)
    ids = tl.load(list_ptr + tl.program_id(1).to(tl.int64) * stride_list + c, mask=c < C, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row[None, :] * K + k[:, None], mask=(k < K)[:, None], other=0.0)  # (BLOCK_K, 1)
        x = _normalised(x, k, K, mean, r, norm_weight_ptr, norm_bias_ptr).to(tl.float32)
        inside = (c < C)[:, None] & (k < K)[None, :]
        acc += tl.trans(x) * tl.load(w_ptr + ids[:, None] * stride_wn + k[None, :] * stride_wk, mask=inside, other=0.0).to(tl.float32)
    logits = tl.sum(acc, 1)
    if keys_ptr is not None:
        logits += temperature * gumbel(tl.load(keys_ptr + tl.program_id(1) * stride_key), ids)
    value, id = _best(tl.where(c < C, logits, float("-inf")), tl.where(c < C, ids.to(tl.int32), 2147483647), 0)
    at = tl.program_id(0) * B + tl.program_id(1)
    tl.store(values_ptr + at, value)
    tl.store(ids_ptr + at, id)
