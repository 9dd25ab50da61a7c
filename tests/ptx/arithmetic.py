"""Arithmetic of PTX in numpy, on an array of threads' values."""

import numpy as np

DTYPE = {
    **{f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}") for kind, letter in (("b", "u"), ("u", "u"), ("s", "i")) for bits in (8, 16, 32, 64)},
    "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "bf16": np.dtype("u2"), "bf16x2": np.dtype("u4"), "f16x2": np.dtype("u4"),
    "s16x2": np.dtype("u4"), "pred": np.dtype(bool),
}  # fmt: skip


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zero."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def unsigned(kind: str) -> np.dtype:
    return np.dtype(f"u{DTYPE[kind].itemsize}") if kind != "pred" else DTYPE[kind]


def shift(left: bool, signed: bool):
    def run(a, b):
        width = a.dtype.itemsize * 8
        b = np.asarray(b).astype(np.int64)
        kept = np.minimum(b, width - 1).astype(a.dtype)
        if left:
            return np.where(b >= width, a.dtype.type(0), a << kept)
        return a >> kept if signed else np.where(b >= width, a.dtype.type(0), a >> kept)

    return run


def _quotient(a, b):
    wide_a, wide_b = np.asarray(a).astype(np.int64), np.asarray(b).astype(np.int64)
    safe = np.where(wide_b == 0, 1, np.abs(wide_b))
    return np.sign(wide_a) * np.sign(wide_b) * (np.abs(wide_a) // safe)


def _remainder(a, b):
    return np.asarray(a).astype(np.int64) - _quotient(a, b) * np.asarray(b).astype(np.int64)


def high(a, b):
    if a.dtype.itemsize == 4:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * np.asarray(b).astype(wide)) >> 32
    product = a.astype(object) * np.asarray(b).astype(object)
    return np.array([int(x) >> 64 & 2**64 - 1 for x in product], np.uint64).view(a.dtype)


def field(signed: bool):
    """Bits from a place on; beyond the number's last one, its sign goes on."""
    wide = np.int64 if signed else np.uint64

    def run(a, position, length):
        position, length = (np.asarray(x).astype(np.int64) & 255 for x in (position, length))
        above = (64 - np.minimum(length, 64)).astype(wide)
        return (np.asarray(a).astype(wide) >> position.astype(wide)) << above >> above

    return run


def _permute(a, b, selector):
    both = np.asarray(a).astype(np.uint64) | np.asarray(b).astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast(both, selector).shape, np.uint64)
    for i in range(4):
        pick = np.asarray(selector).astype(np.uint64) >> np.uint64(4 * i)
        byte = both >> ((pick & np.uint64(7)) * np.uint64(8)) & np.uint64(0xFF)
        byte = np.where(pick & np.uint64(8), np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0)), byte)
        out |= byte << np.uint64(8 * i)
    return out


def _logic3(a, b, c, table):
    out, table = np.zeros_like(a), int(table)
    for i in range(8):
        if table >> i & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def saturated(x, nan, dtype):
    """Whole numbers in float64 as integers, the nearest that there is."""
    limits = np.iinfo(dtype)
    fits = np.where(x < float(limits.max), np.maximum(x, float(limits.min)), 0)
    return np.where(np.isnan(x), nan, np.where(x >= float(limits.max), dtype.type(limits.max), fits.astype(dtype)))


def _fused(a, b, c):
    """a b + c, rounded once to float32 (of float64, but for rare ties)."""
    a, b, c = np.asarray(a), np.asarray(b), np.asarray(c)
    if a.dtype == np.float64:
        parts = []
        for x in (a, b):  # Dekker's: halves whose products are exact
            high = 134217729 * x - (134217729 * x - x)
            parts += [high, x - high]
        product, total = a * b, a * b + c
        missing = parts[0] * parts[2] - product + parts[0] * parts[3] + parts[1] * parts[2] + parts[1] * parts[3]
        return np.where(np.isfinite(missing), total + (_lost(product, c, total) + missing), total)
    product = a.astype(np.float64) * b
    total = product + c
    bits = total.view(np.int64)
    halfway = bits & 0x1FFFFFFF == 0x10000000  # between two float32: what float64 has lost decides
    if halfway.any():
        lost = _lost(product, c, total)
        total = np.where(halfway & (lost != 0), (bits + np.where((lost > 0) == (total > 0), 1, -1)).view(np.float64), total)
    return total.astype(np.float32)


def _lost(a, b, total):
    """a + b - total exactly, where total is a + b rounded."""
    back = total - a
    return (a - (total - back)) + (b - back)


def _extreme(plain, sign):
    """min or max, in which a negative zero is smaller than a positive one."""

    def run(a, b):
        zero = np.where(sign(np.signbit(a), np.signbit(b)), np.float32(-0.0), np.float32(0))
        return np.where((np.asarray(a) == 0) & (np.asarray(b) == 0), zero, plain(a, b))

    return run


FLOAT = {  # of 32 or 64 bits; fmin and fmax leave NaN out
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": _fused, "mad": _fused, "neg": np.negative, "abs": np.abs,
    "min": _extreme(np.fmin, np.logical_or), "max": _extreme(np.fmax, np.logical_and), "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal,
    "sqrt": np.sqrt, "rsqrt": lambda x: (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype), "sin": np.sin, "cos": np.cos,
}  # fmt: skip
FLOAT_OR_NAN = FLOAT | {"min": _extreme(np.minimum, np.logical_or), "max": _extreme(np.maximum, np.logical_and)}
INTEGER = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "neg": np.negative, "abs": np.abs, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "div": _quotient, "rem": _remainder, "prmt": _permute, "lop3": _logic3,
    "popc": lambda a: np.array([int(x).bit_count() for x in a.view(f"u{a.dtype.itemsize}")]),
}  # fmt: skip
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
UNKNOWN = {"rz", "rm", "rp", "rna", "sat", "satfinite", "relu", "xorsign", "cc"}  # what changes an arithmetic instruction's result
ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
