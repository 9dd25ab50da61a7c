"""Tile sizes and launch options: pure functions of shapes (and of what the chip can hold), so that one shape has one result."""

from dataclasses import dataclass


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# ---- gated LoRA

FEW_ROWS = 128  # up to here a product is bound by reading the weight, and its K loop is spread over programs


@dataclass(frozen=True)
class GatedLoraTiles:
    """block_n features x block_m rows per program, block_k of K per step, `segments` sums of segment_k of K each.

    block_k, segments and segment_k follow from the weight alone, never from the number of rows: they fix the order of
    summation, hence a row's bits.
    """

    block_m: int
    block_n: int
    block_k: int
    segments: int
    segment_k: int
    num_warps: int
    num_stages: int


def segments_of(n: int, k: int, block_k: int, row_tiles: int = 1) -> tuple[int, int]:
    """(segments, segment_k): K is cut until about 256 programs share the weight, in pieces of no less than 512."""
    tiles, segments = cdiv(n, 64) * row_tiles, 1
    while tiles * segments < 256 and k >= 512 * 2 * segments:
        segments *= 2
    segment_k = cdiv(cdiv(k, segments), block_k) * block_k
    return max(1, cdiv(k, segment_k)), segment_k


def gated_lora_tiles(m: int, n: int, k: int, itemsize: int, shared_memory: int, two: bool = False) -> GatedLoraTiles:
    """Tiles of y = x W^T for x (m, k), W (n, k), elements of `itemsize` bytes, on a chip with that much shared memory.

    two: a program computes two tiles of features (both halves of a SwiGLU).
    """
    block_k = 64 if itemsize == 2 else 32
    segments, segment_k = segments_of(n, k, block_k)
    if itemsize == 4:  # no matrix instruction: registers are the limit
        block_m, block_n, num_warps = min(64, max(16, next_power_of_2(m))), 64, 8
    elif m <= FEW_ROWS:
        wide = n >= 192 * 128  # enough tiles for every processor at 128 features each, which read x half as often
        block_m, block_n = max(16, next_power_of_2(m)), 128 if wide and not two else 64
        num_warps = 8 if block_m * block_n * (1 + two) > 8192 else 4
    elif k % 8 or n % 8:  # rows of memory that start off a 16-byte boundary are read element by element, which takes registers
        block_m, block_n, num_warps = 64, 64, 8
    else:
        block_m, block_n, num_warps = 128, 64 if two or n <= 64 else 128, 8
    stage = (block_m + block_n * (1 + two)) * block_k * itemsize
    share = shared_memory // 2 if m <= FEW_ROWS else shared_memory  # two programs side by side hide each other's waiting
    num_stages = min(3 if itemsize == 4 else 6 if block_m <= 32 else 4, max(2, share // stage - 1))
    return GatedLoraTiles(block_m, block_n, block_k, segments, segment_k, num_warps, num_stages)


def shrink_tiles(m: int, r: int, k: int, itemsize: int, shared_memory: int) -> GatedLoraTiles:
    """Tiles of s = x A^T for x (m, k), A (r, k): there are few, so rows' tiles are small and K is cut."""
    block_m = min(64 if itemsize == 2 and k % 8 == 0 else 32, max(16, next_power_of_2(m)))  # see above for K off 16-byte boundaries
    block_k = 64 if itemsize == 2 else 32
    segments, segment_k = segments_of(r, k, block_k, cdiv(max(m, 1), block_m))
    stage = (block_m + 64) * block_k * itemsize
    return GatedLoraTiles(block_m, 64, block_k, segments, segment_k, 4, min(4 if itemsize == 2 else 3, max(2, shared_memory // 2 // stage - 1)))


def expand_rank(rank: int, itemsize: int) -> int:
    """Ranks per step of the expansion; a matrix instruction takes no fewer than 16."""
    return min(64 if itemsize == 2 else 16, max(16, next_power_of_2(rank)))


def finish_tiles(m: int, itemsize: int) -> tuple[int, int, int]:
    """(block_m, block_n, num_warps) of `finish`: small tiles, for it is bound by latency."""
    return (16 if m <= 16 else 32), 64, 4 if itemsize == 2 else 8


def outer_tiles(p: int, q: int, itemsize: int, shared_memory: int) -> tuple[int, int, int, int, int]:
    """(block_m, block_p, block_q, num_warps, num_stages) of out (p, q) = u^T v."""
    block = 64
    block_m = 64 if itemsize == 2 else 32
    block_p, block_q = (min(block, max(16, next_power_of_2(size))) for size in (p, q))
    stage = block_m * (block_p + block_q) * itemsize
    return block_m, block_p, block_q, 4, min(4, max(2, shared_memory // (2 * stage)))


# ---- attention


@dataclass(frozen=True)
class AttentionTiles:
    """block_m packed rows x block_s keys, in pieces of `piece` keys; D in two parts, block_d and block_tail (0: none).

    All follow from (D, dtype) and never from the number of rows: they fix the order in which a row's keys are summed, and with
    the warps also how a tile's row is summed and by which matrix instruction. A row tile that is mostly padding costs nothing while
    decoding is bound by reading keys: 64 rows x 64 keys x D 128 are 2.1 MFLOP for 32 KiB.
    """

    block_m: int
    block_s: int
    block_d: int
    block_tail: int
    piece: int
    num_warps: int
    num_stages: int


def attention_head_parts(head_dim: int, widest: int = 64) -> tuple[int, int]:
    """Powers of two that cover D: 80 = 64 + 16. A D that is one is halved if it is above `widest`.

    The row tile's 64 are the widest for sm_80, which would share out a row among its warps.
    """
    first = max(16, next_power_of_2(head_dim + 1) // 2)
    if first == head_dim > widest:
        first //= 2
    rest = head_dim - first
    return first, max(16, next_power_of_2(rest)) if rest > 0 else 0


def attention_tiles(head_dim: int, itemsize: int, shared_memory: int) -> AttentionTiles:
    # Hopper multiplies 64 rows by any width at once, and should not wait between two halves
    block_d, block_tail = attention_head_parts(head_dim, 128 if itemsize == 2 and shared_memory >= 192 * 1024 else 64)
    if itemsize == 4:  # no matrix instruction: registers are the limit
        return AttentionTiles(16, 16, block_d, block_tail, 512, 4, 2)
    roomy = shared_memory >= 96 * 1024  # not gfx942, where registers are the limit too
    large = roomy and (head_dim == 64 or block_d == 128 == head_dim)  # sm_80 keeps 64 rows of Q in registers, and 128 wide has none left for 64 keys
    stages = 1 if head_dim > 128 and not roomy else 3 if head_dim == 128 and roomy and not large else 2
    return AttentionTiles(64, 64 if large else 32, block_d, block_tail, 512, 8 if head_dim > 128 else 4, stages)


def attention_is_whole(programs: int, head_dim: int, itemsize: int, target: tuple[str, int | str]) -> bool:
    """Whether a program takes all pieces of its rows: if that many (tiles of rows x heads of keys) fill a chip, two rounds of two on 132 processors.

    The sums of a piece and those so far need registers: a head wider than 128, on sm_100 96, has too few, and for AMD Triton 3.7 fails to compile it.
    """
    backend, arch = target
    return programs >= 512 and backend == "cuda" and head_dim <= (128 if arch < 100 or itemsize == 4 else 96)


def attention_pieces_at_once(pieces: int, numbers: int) -> int:
    """How many pieces' partial results, `numbers` float32 each, are kept at a time: about 256 MiB of them."""
    return min(pieces, max(1, 2**26 // max(1, numbers)))


def attention_merge_tiles() -> tuple[int, int]:
    """(rows, warps) of a program that merges pieces: few, for it is bound by latency."""
    return 4, 4


@dataclass(frozen=True)
class AttentionBackwardTiles:
    """Queries' gradients: block_m rows, block_s keys per step. Keys' gradients: keys_block_s keys, keys_block_m rows per step."""

    block_m: int
    block_s: int
    num_warps: int
    keys_block_m: int
    keys_block_s: int
    keys_num_warps: int
    block_d: int
    num_stages: int
    scan: int = 1024


def attention_backward_tiles(head_dim: int, itemsize: int) -> AttentionBackwardTiles:
    block_d = max(16, next_power_of_2(head_dim))
    if itemsize == 4:
        rows, num_warps = (16, 2) if head_dim <= 64 else (32, 8)
        return AttentionBackwardTiles(rows, 16, num_warps, 16, 32, 4, block_d, 2)
    num_warps = 4 if head_dim <= 128 else 8  # eight would share out the keys: on Hopper in products 16 wide, and twice the instructions
    return AttentionBackwardTiles(64, 32, num_warps, 32, 64, num_warps, block_d, 2)


# ---- argmax and sampler


def argmax_tiles(n: int) -> tuple[int, int]:
    """(piece, num_warps) of an argmax over n logits: 32 per thread until the pieces are many enough."""
    piece = min(8192, max(32, next_power_of_2(n)))
    return piece, max(1, piece // 1024)


def pick_tiles(pieces: int) -> tuple[int, int]:
    """(block_p, num_warps) of the best among pieces."""
    block_p = next_power_of_2(pieces)
    return block_p, min(8, max(1, block_p // 256))


@dataclass(frozen=True)
class SamplerTiles:
    """block_n features x block_m rows per program, block_k of K per step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def sampler_tiles(b: int, n: int, k: int, itemsize: int, shared_memory: int) -> SamplerTiles:
    """Tiles of a product of few rows with W (n, k) that is all in one launch: about 256 programs, or more of the widest."""
    block_m = 16 if b <= 16 else 32
    widest = 128 if itemsize == 2 and k % 8 == 0 else 64  # see `gated_lora_tiles` for k off 16-byte boundaries
    block_n = min(widest, max(16, next_power_of_2(cdiv(n, 256))))
    block_k = (128 if block_n <= 32 else 64) if itemsize == 2 else 32
    stage = (block_m + block_n) * block_k * itemsize
    return SamplerTiles(block_m, block_n, block_k, 4, min(6, max(2, shared_memory // 2 // stage - 1)))


def shortlist_tiles(candidates: int, k: int) -> tuple[int, int, int]:
    """(block_c, block_k, num_warps): few of the list's rows per program, as there are few of them at all."""
    return min(4, next_power_of_2(candidates)), min(1024, max(32, next_power_of_2(k))), 4


def lookup_tiles(columns: int) -> tuple[int, int]:
    """(block_s, num_warps) of a search through a text: a program has a whole sequence, so each round trip to memory takes many tokens."""
    block_s = min(4096, max(32, next_power_of_2(columns)))
    return block_s, max(1, block_s // 512)


# ---- norm, rotary, SwiGLU


def elementwise_tiles(n: int) -> tuple[int, int]:
    """(block, num_warps) along a row of n elements: eight per thread, which is 16 bytes of a 16-bit dtype."""
    block = min(1024, max(32, next_power_of_2(n)))
    return block, max(1, block // 256)


def rotary_tiles(heads: int, head_dim: int) -> tuple[int, int, int]:
    """(block_h, block_d, num_warps): up to 1024 pairs of one row per program."""
    block_d = next_power_of_2(head_dim // 2)
    block_h = min(next_power_of_2(heads), max(1, 1024 // block_d))
    return block_h, block_d, min(4, max(1, block_h * block_d // 256))


def norm_tiles(n: int) -> tuple[int, int]:
    """(block_n, num_warps): a whole row per program, 16 elements per thread until the warps run out."""
    block_n = max(32, next_power_of_2(n))
    return block_n, min(16, max(1, block_n // 512))


@dataclass(frozen=True)
class NormWeightTiles:
    """Each program sums `rows` rows of block_n columns, block_m rows at a time."""

    rows: int
    block_m: int
    block_n: int
    num_warps: int


def norm_weight_tiles(m: int, n: int) -> NormWeightTiles:
    """About 512 programs, each with at least 32 rows."""
    block_m, block_n = 32, 128
    groups = min(cdiv(m, block_m), max(1, 512 // cdiv(n, block_n)))
    return NormWeightTiles(cdiv(cdiv(m, groups), block_m) * block_m, block_m, block_n, 4)


# ---- losses


def cross_entropy_tiles(v: int) -> tuple[int, int]:
    """(block_v, num_warps): one row of logits per program, up to eight of a block per thread."""
    block_v = min(2048, max(32, next_power_of_2(v)))
    return block_v, max(1, block_v // 256)
