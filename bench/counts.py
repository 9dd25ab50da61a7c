"""What an operation must move and compute, and what a plan of ours moves beyond that: arithmetic on shapes, no measurement.

Bytes of an operation: every input read once and every output written once, an adapter's only if a gate is on; forward and
backward: also what autograd must keep in between, written once and read once. Operations: a multiplication and an addition are
two; of a matrix product's epilogue none are counted; exponential, division and root are one each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

H100_SHARED_MEMORY = 232_448


@dataclass(frozen=True)
class GPU:
    """A vendor's datasheet: bytes per second, and dense 16-bit matrix operations per second."""

    name: str
    bandwidth: float
    matmul: float


DATASHEETS = (
    GPU("H100 SXM", 3.35e12, 989e12),
    GPU("H200 SXM", 4.8e12, 989e12),
    GPU("A100 80GB SXM", 2.04e12, 312e12),
    GPU("B200", 8.0e12, 2250e12),
    GPU("MI300X", 5.3e12, 1307e12),
)


@dataclass(frozen=True)
class Count:
    bytes: int
    operations: int

    def seconds(self, gpu: GPU) -> float:
        """The least time on that GPU: moving the bytes or doing the operations, whichever takes longer."""
        return max(self.bytes / gpu.bandwidth, self.operations / gpu.matmul)

    def bound(self, gpu: GPU) -> str:
        return "memory" if self.bytes / gpu.bandwidth >= self.operations / gpu.matmul else "matmul"


def gated_lora(m: int, on: int, n: int, k: int, rank: int, groups: int, itemsize: int, swiglu: bool = False, backward: bool = False) -> Count:
    """y (m, n) = x W^T + the adapter on `on` rows; with swiglu y is (m, n / 2). Backward: gradients of x, A and B; W is frozen."""
    weight, x, adapter = n * k, m * k, (groups * rank * k + n * rank) if on else 0
    y, kept = m * (n // 2 if swiglu else n), m * n if swiglu else 0  # SwiGLU's backward pass needs both halves
    numbers = weight + x + adapter + y
    base, lora = 2 * m * n * k, 2 * on * rank * (groups * k + n)
    if not backward:
        return Count(numbers * itemsize, base + lora)
    s = on * groups * rank  # kept too: it is smaller than making it again from x and A
    numbers += 2 * kept + 2 * s  # written by the forward pass, read by the backward pass
    numbers += y + weight + adapter + on * k + x + adapter  # dy, W, A and B, x for dA; dx, dA and dB written
    return Count(numbers * itemsize, 2 * base + 3 * lora)


def rms_norm(m: int, n: int, itemsize: int, backward: bool = False) -> Count:
    """With a residual: reads x, residual, weight; writes y and x + residual. Backward: dx, which is the residual's gradient too."""
    numbers, operations = 4 * m * n + n, 5 * m * n
    if backward:  # reads dy, the sum's own gradient, the sum and the weight; writes dx
        numbers, operations = numbers + 4 * m * n + n, operations + 8 * m * n
    return Count(numbers * itemsize, operations)


def rotary_embedding(m: int, heads: int, d: int, itemsize: int, backward: bool = False, normed: bool = False) -> Count:
    """normed: after a norm of each head, whose weights are read; its backward reads the forward's x too."""
    numbers, operations = 2 * m * heads * d + 2 * m * d + normed * heads * d, (3 + 5 * normed) * m * heads * d
    if not backward:
        return Count(numbers * itemsize, operations)
    return Count((2 * numbers + normed * m * heads * d) * itemsize, 2 * operations + 3 * normed * m * heads * d)


def swiglu(m: int, f: int, itemsize: int, backward: bool = False) -> Count:
    numbers, operations = 3 * m * f, 5 * m * f
    if backward:  # reads dy, g and u; writes dg and du
        numbers, operations = numbers + 5 * m * f, operations + 12 * m * f
    return Count(numbers * itemsize, operations)


def attention(rows: int, batch: int, heads: int, kv_heads: int, d: int, keys: int, pairs: int, itemsize: int, backward: bool = False) -> Count:
    """keys: distinct columns of K and V that rows attend, summed over the batch; pairs: of a row and a key that it attends, likewise.

    Each column is read once per key head. Backward: gradients of q, k and v; scores are computed again from q, K and two float32
    sums per row and head, because keeping them would move rows x keys.
    """
    q, kv, sums = rows * batch * heads * d, 2 * keys * kv_heads * d, 2 * rows * batch * heads
    numbers, operations = 2 * q + kv, heads * pairs * (4 * d + 1) + q  # two products, one exponential; at last a division
    if not backward:
        return Count(numbers * itemsize, operations)
    numbers += 4 * q + 2 * kv  # o is read (it was written anyway), dy, q, K, V; dq, dK and dV written
    operations += heads * pairs * (10 * d + 1) + 2 * q  # scores again, dV, dP, dQ, dK; o dot dy
    return Count(numbers * itemsize + 2 * sums * 4, operations)


# ---- a decoding step


def rotary_write(m: int, heads: int, kv_heads: int, d: int, itemsize: int, normed: bool = False) -> Count:
    """m rows: reads q, k, v, two tables and the norm's weights, if there is one, writes q, and k and v into the cache."""
    numbers = 2 * m * (heads + 2 * kv_heads) * d + 2 * m * d + normed * (heads + kv_heads) * d
    return Count(numbers * itemsize, (3 + 5 * normed) * m * (heads + kv_heads) * d)


def accept_and_commit(b: int, k: int, ends: int) -> Count:
    """b sequences. int64: drafts, predictions, counts and end-of-texts read, lengths and room read and written, three results written.
    A comparison per draft, and per prediction and end-of-text."""
    return Count(8 * (b * (2 * k + 1) + b + ends + 4 * b + 3 * b) + 2 * b, b * k + b * (k + 1) * ends)


def drafting_states(k: int, blocks: int, d: int, itemsize: int) -> Count:
    """One sequence: k states read and written; int64 anchors and the accepted row read, the number of drafts written. A comparison per block."""
    return Count(2 * k * d * itemsize + 8 * (blocks + 2), blocks)


def lookup_drafts(b: int, tokens: int, searched: int, match: int) -> Count:
    """b sequences of int64: the text and where it ends read, the copied tokens read again and written, and a flag. `match` comparisons per place."""
    return Count(8 * b * (searched + 1 + 2 * tokens) + b, b * searched * match)


def linear_argmax(m: int, vocab: int, d: int, itemsize: int, drawn: bool = False) -> Count:
    """No logits are written: their argmax is the product's epilogue, as is the noise of drawn tokens, for which a key is read."""
    return Count((vocab * d + m * d) * itemsize + 8 * m * (1 + drawn), 2 * m * vocab * d)


# ---- a training step's losses


def linear_cross_entropy(m: int, vocab: int, d: int, itemsize: int, teacher: bool = False, backward: bool = False) -> Count:
    """Forward: hidden states, labels, W once; loss and most likely token written. Backward: the gradient of the states, W is frozen.

    Logits stay on the chip. A row's gradient, but for a factor, is made from them, so that they are made once; but it needs their sum over
    the whole vocabulary first, so that W is read twice. It is what must be kept in between.
    """
    states, sources = m * d * itemsize, 1 + teacher
    count = Count(sources * states + vocab * d * itemsize + 20 * m, sources * (2 * m * vocab * d + m * vocab))
    if not backward:
        return count
    return Count(count.bytes + vocab * d * itemsize + 3 * states + 4 * m, count.operations + 2 * m * vocab * d + m * d)


def latent_consistency(m: int, d: int, itemsize: int, backward: bool = False) -> Count:
    """z and m rows of the target, index and weight read, one number written. Backward: all of them again and that number's gradient; dz."""
    forward = Count(2 * m * d * itemsize + 12 * m + 4, 3 * m * d)
    if not backward:
        return forward
    return Count(2 * forward.bytes + m * d * itemsize, forward.operations + 2 * m * d)


# ---- the plans of gated LoRA


@dataclass(frozen=True)
class Plan:
    """One way to launch gated LoRA, counted over its programs.

    requested: bytes that programs load and store, before any cache: what L2 must serve. intermediate: distinct bytes that one launch
    leaves for the next, of these; they pass through memory only if L2 does not hold them. operations: of matrix products, with what is
    computed again. programs: of each launch; a large GPU has 100 to 150 multiprocessors to fill. steps: of K that the launches take one
    after the other, the longest program each, which few rows wait for.
    """

    name: str
    programs: tuple[int, ...]
    steps: int
    requested: int
    intermediate: int
    operations: int
    chosen: bool = False


def touched(splits: Sequence[int], block_n: int, swiglu: bool) -> int:
    """Sum over feature tiles of the projections that a tile touches: how often a projection's part of s (or A) is asked for."""
    if swiglu:  # tiles of the two halves, in pairs
        return 2 * -(-splits[0] // block_n)
    pieces, start = 0, 0
    for size in splits:
        pieces += (start + size - 1) // block_n - start // block_n + 1
        start += size
    return pieces


def plans(m: int, on: int, n: int, k: int, rank: int, splits: Sequence[int], itemsize: int, swiglu: bool = False) -> list[Plan]:
    """The ways to launch the forward pass on m rows of which the last `on` are on; the one that the package takes is marked.

    One launch: every program makes s = x A^T anew for its rows. Project, finish: float32 sums of [W; A] x^T, K cut into segments, then
    their sum and the expansion. Shrink, product: s first, by project and finish for A alone, then the product with the expansion.
    """
    from mtp_kernels.triton._tiles import FEW_ROWS, cdiv, finish_tiles, gated_lora_tiles, shrink_tiles  # needs Triton

    def tiles_of(features: int, two: bool = False):
        """Tiles, row tiles, those of them with a gate-on row, and the rows in these."""
        t = gated_lora_tiles(m, features, k, itemsize, H100_SHARED_MEMORY, two=two)
        off = (m - on) // t.block_m if on else cdiv(m, t.block_m)
        return t, cdiv(m, t.block_m), cdiv(m, t.block_m) - off, max(0, m - off * t.block_m)

    gr, outputs, x_row = (len(splits) * rank if on else 0), (n // 2 if swiglu else n), k * itemsize
    weight, expand, y = n * k * itemsize, n * rank * itemsize, m * outputs * itemsize
    needed = 2 * m * n * k + 2 * on * rank * n  # the base and the expansion

    t, tiles_m, on_tiles, on_rows = tiles_of(n, two=swiglu)
    tiles_n, steps = cdiv(outputs, t.block_n), cdiv(k, t.block_k)
    product = tiles_m * weight + tiles_n * m * x_row + y + on_tiles * expand  # a program reads its features of W and its rows of x
    again = touched(splits, t.block_n, swiglu) * rank * k  # numbers of A that a row tile's programs read between them
    together = Plan("one launch", (tiles_m * tiles_n,), steps, product + on_tiles * again * itemsize, 0, needed + 2 * on_rows * again)

    apart = Plan("product", (tiles_m * tiles_n,), steps, product, 0, needed)
    if on:
        a, (finish_m, finish_n, _) = shrink_tiles(m, gr, k, itemsize, H100_SHARED_MEMORY), finish_tiles(m, itemsize)
        off = (m - on) // a.block_m
        a_tiles, a_rows, a_columns = cdiv(m, a.block_m) - off, m - off * a.block_m, cdiv(gr, a.block_n)
        partial, shrunk = a.segments * a_rows * gr * 4, a_rows * gr * itemsize
        shrink = a_tiles * gr * x_row + a_columns * a_rows * x_row + 2 * partial + shrunk  # reads A and the rows, writes s
        s_reads = on * rank * itemsize * touched(splits, t.block_n, swiglu)
        apart = Plan(
            "shrink, product",
            (a_columns * a.segments * cdiv(m, a.block_m), cdiv(gr, finish_n) * cdiv(m, finish_m), tiles_m * tiles_n),
            cdiv(a.segment_k, a.block_k) + steps, shrink + product + s_reads, partial + shrunk, needed + 2 * a_rows * gr * k,
        )  # fmt: skip

    p, p_tiles, p_on_tiles, p_on_rows = tiles_of(n)
    w_columns, a_columns = cdiv(n, p.block_n), cdiv(gr, p.block_n)
    sums = p.segments * (m * n + p_on_rows * gr) * 4
    block_m, block_n, _ = finish_tiles(m, itemsize)
    finish_rows = cdiv(m, block_m) - ((m - on) // block_m if on else cdiv(m, block_m))
    project = p_tiles * weight + p_on_tiles * gr * x_row + w_columns * m * x_row + a_columns * p_on_rows * x_row + sums
    finish = p.segments * (m * n + on * rank * touched(splits, block_n, swiglu)) * 4 + finish_rows * expand + y
    split = Plan(
        "project, finish", (p_tiles * (w_columns + a_columns) * p.segments, cdiv(m, block_m) * cdiv(outputs, block_n)),
        cdiv(p.segment_k, p.block_k), project + finish, sums, needed + 2 * p_on_rows * gr * k,
    )  # fmt: skip
    chosen = split if m <= min(FEW_ROWS, p.block_m) and (on or p.segments > 1) else apart
    return [replace(plan, chosen=plan is chosen) for plan in ((together, split, apart) if on else (split, apart))]
