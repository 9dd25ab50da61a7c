"""Runs a kernel's PTX, thread by thread, in numpy: every thread of several programs at once, the lowest instruction first.

It knows what Triton writes for the kernels of this package on sm_80 and sm_90, matrix instructions and copies in flight included, and refuses
every other instruction by name. Arithmetic is that of the PTX manual but for what it leaves open: approximations are numpy's, and a matrix
instruction rounds once behind each of its sums. Warps run in step, so a race changes no result here: `memory` refuses it instead.
"""

import re
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from .memory import GlobalMemory, MemoryFault, SharedMemory
from .parse import Address, Instruction, Program, float_bits, number, parse

DTYPE = {
    **{f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}") for kind, letter in (("b", "u"), ("u", "u"), ("s", "i")) for bits in (8, 16, 32, 64)},
    "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "bf16": np.dtype("u2"), "bf16x2": np.dtype("u4"), "f16x2": np.dtype("u4"),
    "s16x2": np.dtype("u4"), "pred": np.dtype(bool),
}  # fmt: skip
LANES = 4096  # threads that run at once
MOST_STEPS = 10**8


class UnknownInstruction(Exception):
    """One that this machine does not know."""


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zero."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _unsigned(kind: str) -> np.dtype:
    return np.dtype(f"u{DTYPE[kind].itemsize}") if kind != "pred" else DTYPE[kind]


def _shift(left: bool, signed: bool):
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


def _high(a, b):
    if a.dtype.itemsize == 4:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * np.asarray(b).astype(wide)) >> 32
    product = a.astype(object) * np.asarray(b).astype(object)
    return np.array([int(x) >> 64 & 2**64 - 1 for x in product], np.uint64).view(a.dtype)


def _field(signed: bool):
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


def _saturated(x, nan, dtype):
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
SKIPPED = {"membar", "fence", "prefetch", "griddepcontrol", "createpolicy", "wgmma.fence"}


class Machine:
    """`programs` of one launch, at once. arguments: the parameters' values, as bits or numbers, in order."""

    def __init__(self, program: Program, grid: tuple[int, int, int], programs: np.ndarray, arguments: list, memory: GlobalMemory, shared: int):
        self.program, self.memory = program, memory
        count, threads = len(programs), program.threads
        self.threads, self.lanes = threads, np.arange(count * threads)
        self.shared = SharedMemory(count, threads, shared)
        x, y, _ = grid
        index = self.index = np.repeat(programs, threads)
        self.special = {
            "%tid.x": self.lanes % threads, "%tid.y": 0 * self.lanes, "%tid.z": 0 * self.lanes, "%laneid": self.lanes % 32,
            "%ctaid.x": index % x, "%ctaid.y": index // x % y, "%ctaid.z": index // (x * y), "%ntid.x": 0 * self.lanes + threads,
            **{f"%nctaid.{axis}": 0 * self.lanes + n for axis, n in zip("xyz", grid, strict=True)},
        }  # fmt: skip
        self.arguments = dict(zip(program.params, arguments, strict=True))
        self.registers: dict[str, np.ndarray] = {}
        self.alive = np.ones(len(self.lanes), bool)
        self.results: dict[str, tuple] = {}  # of wgmma: register -> (its coming values, the group of each thread's product or -1)
        self.code = [self._build(i) for i in program.code]

    # operands

    def register(self, name: str) -> np.ndarray:
        if name not in self.registers:
            self.registers[name] = np.zeros(len(self.lanes), _unsigned(self.program.type_of(name)))
        return self.registers[name]

    def source(self, operand: str, kind: str) -> Callable[[], np.ndarray]:
        """Its values as `kind`: of a wider register the low bits, a narrower one extended."""
        dtype = DTYPE[kind]
        if operand in self.special:
            fixed = self.special[operand].astype(dtype)
            return lambda: fixed
        if operand == "global_smem":
            return lambda: dtype.type(0)
        value = number(operand)
        if value is not None:
            if dtype.kind in "ui":
                value = float_bits(operand) if isinstance(value, float) else value
                value = np.array(value & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}").view(dtype)[()]
            elif dtype.kind == "b":
                value = np.bool_(value)
            elif isinstance(value, float):
                value = dtype.type(value)
            else:
                raise ValueError("a whole number where a float belongs")
            return lambda: value
        register = self.register(operand)
        if register.dtype.itemsize == dtype.itemsize:
            view = register.view(dtype)
            return lambda: view
        narrow = np.dtype(f"u{dtype.itemsize}")
        if register.dtype.itemsize > dtype.itemsize:
            return lambda: register.astype(narrow).view(dtype)
        return lambda: register.astype(dtype)

    def sink(self, operand: str, kind: str) -> Callable[[np.ndarray, np.ndarray | None], None]:
        """Takes values of `kind`: into a wider register, extended by their sign."""
        if operand == "_":
            return lambda values, active: None
        register, dtype = self.register(operand), DTYPE[kind]

        def run(values, active):
            values = np.asarray(values)
            if values.dtype != dtype:
                values = values.astype(dtype)
            if values.dtype.itemsize == register.dtype.itemsize:
                values = values.view(register.dtype)
            else:
                values = (values if dtype.kind in "ui" else values.view(f"u{dtype.itemsize}")).astype(register.dtype)
            if active is None:
                register[...] = values
            else:
                np.copyto(register, values, where=active)

        return run

    def address(self, operand: Address, kind: str) -> Callable[[], np.ndarray]:
        base, offset = self.source(operand.base, kind), DTYPE[kind].type(operand.offset & (1 << 8 * DTYPE[kind].itemsize) - 1)
        return lambda: np.broadcast_to(base() + offset, len(self.lanes))

    def active(self, mask: np.ndarray | None) -> np.ndarray:
        return self.lanes if mask is None else self.lanes[mask]

    def who(self, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(program, warp, barriers so far) of these threads."""
        return self.index[lanes], lanes % self.threads // 32, self.shared.epoch[lanes // self.threads]

    # instructions

    def _build(self, instruction: Instruction) -> Callable[[np.ndarray | None], None]:
        op = instruction.op
        for length in range(len(op), 0, -1):
            maker = getattr(self, "_".join(("make", *op[:length])).replace("::", "_"), None)
            if maker:
                break
        else:
            if ".".join(op[:2]) in SKIPPED or op[0] in SKIPPED:
                return lambda mask: None
            maker = self.make_arithmetic
        try:
            run = maker(op, instruction.operands)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise UnknownInstruction(f"{self.program.name}: {instruction.text} ({error!r})") from error
        if instruction.guard is None or op[0] == "bra":
            return run
        name, wanted = instruction.guard
        predicate = self.register(name)

        def guarded(mask):
            allowed = predicate if wanted else ~predicate
            allowed = allowed if mask is None else allowed & mask
            if allowed.all():
                run(None)
            elif allowed.any():
                run(allowed.copy())

        return guarded

    def make_arithmetic(self, op, operands):
        name, kind, floats = op[0], op[-1], FLOAT_OR_NAN if "NaN" in op else FLOAT
        if UNKNOWN & set(op):
            raise ValueError("only rounding to the nearest is known")
        if kind in ("f32", "f64"):
            f = floats[name]
            if "ftz" in op:
                f = lambda *xs, f=f: flush(f(*map(flush, xs)))  # noqa: E731
        elif kind in ("bf16", "bf16x2", "f16", "f16x2"):
            f = self._halves(floats[name], kind)
        elif kind == "s16x2":
            f = lambda *xs: INTEGER[name](*(np.asarray(x).view(np.int16) for x in xs)).view(np.uint32)  # noqa: E731
        elif name == "shl" or name == "shr":
            f = _shift(name == "shl", kind[0] == "s")
            value, amount, put = self.source(operands[1], kind), self.source(operands[2], "u32"), self.sink(operands[0], kind)
            return lambda mask: put(f(value(), amount()), mask)
        elif name == "bfe":
            f = _field(kind[0] == "s")
            value, rest, put = self.source(operands[1], kind), [self.source(o, "u32") for o in operands[2:]], self.sink(operands[0], kind)
            return lambda mask: put(f(value(), *(r() for r in rest)), mask)
        elif name in ("mul", "mad") and op[1] == "wide":
            wide = kind[0] + str(2 * int(kind[1:]))
            a, b = (self.source(o, kind) for o in operands[1:3])
            c, put, dtype = (self.source(operands[3], wide) if name == "mad" else lambda: 0), self.sink(operands[0], wide), DTYPE[wide]
            return lambda mask: put(np.asarray(a()).astype(dtype) * np.asarray(b()).astype(dtype) + c(), mask)
        elif name in ("mul", "mad"):
            times = {"lo": np.multiply, "hi": _high}[op[1]]
            f = (lambda a, b, c: times(a, b) + c) if name == "mad" else times
        elif name == "not" and kind == "pred":
            f = np.logical_not
        elif name == "popc":
            value, put = self.source(operands[1], kind), self.sink(operands[0], "u32")
            return lambda mask: put(INTEGER["popc"](value()), mask)
        elif name in INTEGER:
            f = INTEGER[name]
        else:
            raise KeyError(name)
        sources, put = [self.source(o, kind) for o in operands[1:]], self.sink(operands[0], kind)
        return lambda mask: put(f(*(s() for s in sources)), mask)

    @staticmethod
    def _halves(f, kind):
        """f in float32 on 16-bit numbers, one or two of them in a register."""
        bfloat = kind.startswith("bf")

        def run(*xs):
            xs = [np.asarray(x).view(np.uint16) for x in xs]
            y = f(*((from_bfloat16(x) if bfloat else x.view(np.float16).astype(np.float32)) for x in xs))
            y = to_bfloat16(y) if bfloat else y.astype(np.float16).view(np.uint16)
            return y.view(DTYPE[kind])

        return run

    def make_setp(self, op, operands):
        kind, compare, joined = op[-1], op[1], op[2] in ("and", "or", "xor")
        if len(operands) != 3 + joined or kind.endswith("x2"):
            raise ValueError("only one comparison is known")
        a, b = (self.source(o, kind) for o in operands[1:3])
        put = self.sink(operands[0], "pred")

        def numbers():
            x, y = a(), b()
            return (from_bfloat16(np.asarray(x)), from_bfloat16(np.asarray(y))) if kind == "bf16" else (x, y)

        if compare in ("num", "nan"):
            test = lambda x, y: (np.isnan(x) | np.isnan(y)) == (compare == "nan")  # noqa: E731
        elif compare not in COMPARE:
            ordered = COMPARE[compare.removesuffix("u")]
            test = lambda x, y: np.isnan(x) | np.isnan(y) | ordered(x, y)  # noqa: E731
        elif compare == "ne" and (kind[0] == "f" or kind == "bf16"):
            test = lambda x, y: ~(np.isnan(x) | np.isnan(y)) & (x != y)  # noqa: E731
        else:
            test = COMPARE[compare]
        if joined:
            third, join = self.source(operands[3], "pred"), {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[op[2]]
            return lambda mask: put(join(test(*numbers()), third()), mask)
        return lambda mask: put(test(*numbers()), mask)

    def make_selp(self, op, operands):
        a, b, c = (*(self.source(o, op[-1]) for o in operands[1:3]), self.source(operands[3], "pred"))
        put = self.sink(operands[0], op[-1])
        return lambda mask: put(np.where(c(), a(), b()), mask)

    def make_mov(self, op, operands):
        to, of = operands
        kind = op[-1]
        if isinstance(of, tuple) and len(of) > 1 or isinstance(to, tuple) and len(to) > 1:
            parts = to if isinstance(to, tuple) else of
            part = f"b{8 * DTYPE[kind].itemsize // len(parts)}"
            bits = 8 * DTYPE[part].itemsize
            if isinstance(of, tuple):
                sources, put, wide = [self.source(o, part) for o in of], self.sink(to, kind), DTYPE[kind]
                shift = [wide.type(i * bits) for i in range(len(of))]

                def pack(mask):
                    values = [np.asarray(s()).astype(wide) << at for s, at in zip(sources, shift, strict=True)]
                    put(np.bitwise_or.reduce(np.broadcast_arrays(*values)), mask)

                return pack
            source, puts = self.source(of, kind), [self.sink(o, part) for o in to]

            def unpack(mask):
                value = np.asarray(source()).copy()
                for i, put in enumerate(puts):
                    put(value >> DTYPE[kind].type(i * bits), mask)

            return unpack
        source, put = self.source(of[0] if isinstance(of, tuple) else of, kind), self.sink(to[0] if isinstance(to, tuple) else to, kind)
        return lambda mask: put(source(), mask)

    def make_cvta(self, op, operands):
        return self.make_mov(("mov", op[-1]), operands)

    def make_cvt(self, op, operands):
        to, of = op[-2:]
        if UNKNOWN & set(op):
            raise ValueError("only rounding to the nearest, and to whole numbers, is known")
        put = self.sink(operands[0], to)
        if to in ("bf16x2", "f16x2"):
            high, low = (self.source(o, of) for o in operands[1:3])
            narrow = to_bfloat16 if to == "bf16x2" else lambda x: np.asarray(x).astype(np.float16).view(np.uint16)
            return lambda mask: put(narrow(high()).astype(np.uint32) << 16 | narrow(low()), mask)
        source, rounding = self.source(operands[1], of), next((ROUND[part] for part in op if part in ROUND), None)
        read = (lambda: from_bfloat16(np.asarray(source()))) if of == "bf16" else lambda: np.asarray(source())
        if (of == "bf16" or of[0] == "f") and to[0] in "us":
            if rounding is None:
                raise ValueError("a number without its rounding")
            nan = 0 if of != "f64" and DTYPE[to].itemsize < 8 else 1 << 8 * DTYPE[to].itemsize - 1
            return lambda mask: put(_saturated(rounding(read().astype(np.float64)), _unsigned(to).type(nan).view(DTYPE[to]), DTYPE[to]), mask)
        value = read if rounding is None else lambda: rounding(read())
        if to == "bf16":
            return lambda mask: put(to_bfloat16(value()), mask)
        return lambda mask: put(value().astype(DTYPE[to]), mask)

    def make_ld_param(self, op, operands):
        to, where = operands
        if where.offset:
            raise ValueError("only whole parameters are known")
        value, kind = self.arguments[where.base], op[-1]
        put = self.sink(to, kind)
        bits = np.array([value], np.uint64).view(np.uint8)[: DTYPE[kind].itemsize].view(DTYPE[kind])[0]
        return lambda mask: put(bits, mask)

    def _vector(self, op, operand):
        """(registers' names, their type, bytes of one)."""
        names = operand if isinstance(operand, tuple) else (operand,)
        count = next((int(part[1:]) for part in op if re.fullmatch(r"v\d", part)), 1)
        if count != len(names):
            raise ValueError(f"{len(names)} registers")
        return names, op[-1], DTYPE[op[-1]].itemsize

    def make_ld_global(self, op, operands):
        (names, kind, size), where = self._vector(op, operands[0]), self.address(operands[1], "b64")
        puts = [self.sink(name, kind) for name in names]

        def run(mask):
            lanes = self.active(mask)
            self._loaded(self.memory.load(where()[lanes], size * len(names), self.who(lanes)), puts, kind, mask)

        return run

    def make_ld_shared(self, op, operands):
        (names, kind, size), where = self._vector(op, operands[0]), self.address(operands[1], "b32")
        puts = [self.sink(name, kind) for name in names]

        def run(mask):
            lanes = self.active(mask)
            self._loaded(self.shared.load(lanes, where()[lanes], size * len(names)), puts, kind, mask)

        return run

    def _loaded(self, data, puts, kind, mask):
        values = data.view(DTYPE[kind])
        for i, put in enumerate(puts):
            if mask is None:
                put(values[:, i], None)
            else:
                full = np.zeros(len(self.lanes), DTYPE[kind])
                full[mask] = values[:, i]
                put(full, mask)

    def _stored(self, op, operand):
        names, kind, _ = self._vector(op, operand)
        sources = [self.source(name, kind) for name in names]

        def values(lanes):
            columns = [np.broadcast_to(source(), len(self.lanes))[lanes] for source in sources]
            return np.ascontiguousarray(np.stack(columns, 1)).view(np.uint8)

        return values

    def make_st_global(self, op, operands):
        values, where = self._stored(op, operands[1]), self.address(operands[0], "b64")

        def run(mask):
            lanes = self.active(mask)
            self.memory.store(where()[lanes], values(lanes), self.who(lanes))

        return run

    def make_st_shared(self, op, operands):
        values, where = self._stored(op, operands[1]), self.address(operands[0], "b32")

        def run(mask):
            lanes = self.active(mask)
            self.shared.store(lanes, where()[lanes], values(lanes))

        return run

    # threads together

    def _warps(self, mask) -> np.ndarray:
        """The numbers of the warps that run; a warp must run whole."""
        if mask is None:
            return np.arange(len(self.lanes) // 32)
        lanes = mask.reshape(-1, 32)
        if (lanes.any(1) != lanes.all(1)).any():
            raise MemoryFault("an instruction of a whole warp where only a part of it runs")
        return np.flatnonzero(lanes.all(1))

    def _whole_warps(self, members: str) -> Callable[[np.ndarray | None], None]:
        """Refuses an instruction of threads that are not whole warps; members: their operand, a bit for each lane."""
        source = self.source(members, "u32")

        def check(mask):
            self._warps(mask)
            if (np.broadcast_to(source(), len(self.lanes))[self.active(mask)] != 0xFFFFFFFF).any():
                raise MemoryFault("an instruction of a whole warp that names only a part of it")

        return check

    def make_bar_sync(self, op, operands):
        if operands != ("0",):
            raise ValueError("only barrier 0, of all threads, is known")

        def run(mask):
            here = np.ones((len(self.lanes) // self.threads, self.threads), bool) if mask is None else mask.reshape(-1, self.threads)
            if (here.any(1) & (here != self.alive.reshape(here.shape)).any(1)).any():
                raise MemoryFault("a barrier that a part of a program's threads reaches")
            self.shared.barrier(np.flatnonzero(here.any(1)))

        return run

    make_barrier_sync = make_bar_sync

    def make_bar_warp(self, op, operands):
        return lambda mask: None

    def make_shfl_sync(self, op, operands):
        mode, kind = op[2], op[-1]
        to, flag, (of, amount, bound, members) = (operands[0], None, operands[1:]) if len(operands) == 5 else (operands[0], operands[1], operands[2:])
        source, amount, bound, put = self.source(of, kind), self.source(amount, "u32"), self.source(bound, "u32"), self.sink(to, kind)
        put_flag, check = self.sink(flag, "pred") if flag else None, self._whole_warps(members)

        def run(mask):
            check(mask)
            lane, b, c = self.lanes % 32, np.asarray(amount()).astype(np.int64) & 31, np.asarray(bound()).astype(np.int64)
            segment, clamp = c >> 8 & 31, c & 31
            last, first = lane & segment | clamp & ~segment, lane & segment
            other = {"bfly": lambda: lane ^ b, "idx": lambda: first | b & ~segment, "up": lambda: lane - b, "down": lambda: lane + b}[mode]()
            inside = other >= last if mode == "up" else other <= last
            other = np.where(inside, other, lane)
            put(np.broadcast_to(source(), len(self.lanes))[self.lanes - lane + other], mask)
            if put_flag:
                put_flag(inside, mask)

        return run

    def make_redux_sync(self, op, operands):
        f = {"min": np.min, "max": np.max, "add": np.sum, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce}[op[2]]
        source, put, kind = self.source(operands[1], op[-1]), self.sink(operands[0], op[-1]), DTYPE[op[-1]]
        check = self._whole_warps(operands[2])

        def run(mask):
            check(mask)
            put(np.repeat(f(np.broadcast_to(source(), len(self.lanes)).reshape(-1, 32), axis=1).astype(kind), 32), mask)

        return run

    # matrices

    def _spread(self, values: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """Values of the running warps, (w, 32), at their lanes of all."""
        full = np.zeros((len(self.lanes) // 32, 32), values.dtype)
        full[warps] = values
        return full.reshape(-1)

    def _matrix_addresses(self, op, operand):
        count = int(next(part for part in op if re.fullmatch(r"x\d", part))[1:])
        where = self.address(operand, "b32")
        # thread 8 j + i gives the address of row i of matrix j
        return count, lambda warps: (where().reshape(-1, 32)[warps][:, : 8 * count], (warps[:, None] * 32 + np.arange(8 * count)))

    def make_ldmatrix(self, op, operands):
        count, rows = self._matrix_addresses(op, operands[1])
        puts, transposed = [self.sink(name, "b32") for name in operands[0]], "trans" in op

        def run(mask):
            warps = self._warps(mask)
            addresses, lanes = rows(warps)
            data = self.shared.load(lanes.reshape(-1), addresses.reshape(-1), 16).view(np.uint16).reshape(len(warps), count, 8, 8)
            if transposed:
                data = data.swapaxes(2, 3)
            registers = np.ascontiguousarray(data).view(np.uint32).reshape(len(warps), count, 32)
            for i, put in enumerate(puts):
                put(self._spread(registers[:, i], warps), mask)

        return run

    def make_stmatrix(self, op, operands):
        count, rows = self._matrix_addresses(op, operands[0])
        names = operands[1] if isinstance(operands[1], tuple) else (operands[1],)
        sources, transposed = [self.source(name, "b32") for name in names], "trans" in op

        def run(mask):
            warps = self._warps(mask)
            registers = np.stack([np.broadcast_to(s(), len(self.lanes)).reshape(-1, 32)[warps] for s in sources], 1)
            data = np.ascontiguousarray(registers).view(np.uint16).reshape(len(warps), count, 8, 8)
            if transposed:
                data = np.ascontiguousarray(data.swapaxes(2, 3))
            addresses, lanes = rows(warps)
            self.shared.store(lanes.reshape(-1), addresses.reshape(-1), data.view(np.uint8).reshape(-1, 16))

        return run

    @staticmethod
    def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
        if kind == "bf16":
            return from_bfloat16(bits).astype(np.float64)
        if kind == "f16":
            return bits.view(np.float16).astype(np.float64)
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)  # tf32: ten bits of fraction

    def _fragment(self, sources, warps, kind, blocks):
        """A or the transpose of B of a warp's product: (w, 8 * blocks, 16 bytes * 2), from registers that hold 8 rows of 16 bytes each."""
        registers = np.stack([np.broadcast_to(s(), len(self.lanes)).reshape(-1, 32)[warps] for s in sources], 1)
        per = 2 if kind in ("bf16", "f16") else 1
        parts = np.ascontiguousarray(registers).view(f"u{4 // per}").reshape(len(warps), len(sources) // blocks, blocks, 8, 4 * per)
        return self._numbers(parts.transpose(0, 2, 3, 1, 4).reshape(len(warps), 8 * blocks, -1), kind)

    def make_mma_sync(self, op, operands):
        shape = op[3]
        to, a, b, c = operands
        kinds = op[-4:]
        if shape not in ("m16n8k16", "m16n8k8") or kinds[0] != "f32" or kinds[3] != "f32":
            raise ValueError("only m16n8 with float32 sums is known")
        a, b, c = ([self.source(o, "f32" if x is c else "b32") for o in x] for x in (a, b, c))
        puts = [self.sink(o, "f32") for o in to]

        def run(mask):
            warps = self._warps(mask)
            left, right = self._fragment(a, warps, kinds[1], 2), self._fragment(b, warps, kinds[2], 1)
            product = left @ right.swapaxes(1, 2)  # (w, 16, 8)
            product = product.reshape(len(warps), 2, 32, 2)
            for i, (put, before) in enumerate(zip(puts, c, strict=True)):
                start = np.broadcast_to(before(), len(self.lanes)).reshape(-1, 32)[warps]
                put(self._spread((product[:, i // 2, :, i % 2] + start).astype(np.float32), warps), mask)

        return run

    def make_cp_async(self, op, operands):
        where, of = self.address(operands[0], "b32"), self.address(operands[1], "b64")
        size = number(operands[2])
        given = self.source(operands[3], "u32") if len(operands) > 3 else lambda: np.uint32(size)

        def run(mask):
            lanes = self.active(mask)
            count = np.broadcast_to(given(), len(self.lanes))[lanes]
            if not np.isin(count, (0, size)).all():
                raise MemoryFault("a copy of a part")
            values = np.zeros((len(lanes), size), np.uint8)
            whole = count > 0
            values[whole] = self.memory.load(of()[lanes[whole]], size, self.who(lanes[whole]))
            self.shared.copy(lanes, where()[lanes], values)

        return run

    def make_cp_async_commit_group(self, op, operands):
        return lambda mask: self.shared.commit_copies(self.active(mask))

    def make_cp_async_wait_group(self, op, operands):
        newest = number(operands[0])
        return lambda mask: self.shared.wait_copies(self.active(mask), newest)

    def make_cp_async_wait_all(self, op, operands):
        return lambda mask: self.shared.wait_copies(self.active(mask), None)

    def make_fence_proxy(self, op, operands):
        return lambda mask: self.shared.fence(self.active(mask))

    def make_wgmma_commit_group(self, op, operands):
        return lambda mask: self.shared.commit_products(self.active(mask))

    def make_wgmma_wait_group(self, op, operands):
        newest = number(operands[0])

        def run(mask):
            lanes = self.active(mask)
            self.shared.wait_products(lanes, newest)
            for name, (coming, group) in self.results.items():
                done = lanes[(group[lanes] >= 0) & (group[lanes] < self.shared.product_groups[lanes] - newest)]
                self.register(name).view(np.float32)[done] = coming[done]
                group[done] = -1

        return run

    def make_wgmma_mma_async(self, op, operands):
        """D (64, n) = A (64, 16) B (16, n) + D of four warps; B, and A if it is no registers, by descriptors of shared memory."""
        n, kinds = int(re.fullmatch(r"m64n(\d+)k16", op[4])[1]), op[-2:]
        to, a, b, keep, sign_a, sign_b, *transposes = operands
        if (number(sign_a), number(sign_b)) != (1, 1) or op[-3] != "f32":
            raise ValueError("only products without a change of sign, with float32 sums are known")
        transposes = [number(t) for t in transposes]
        of_a = [self.source(o, "b32") for o in a] if isinstance(a, tuple) else self.source(a, "b64")
        transpose_a, transpose_b = (0, transposes[0]) if isinstance(a, tuple) else transposes
        of_b, kept = self.source(b, "b64"), self.source(keep, "pred")
        registers = [self.register(name).view(np.float32) for name in to]

        def run(mask):
            warps = self._warps(mask)
            if self.threads % 128 or len(warps) % 4 or (warps.reshape(-1, 4) != warps[::4, None] // 4 * 4 + np.arange(4)).any():
                raise MemoryFault("an instruction of four warps where only a part of them runs")
            leaders = warps[::4] * 32
            if isinstance(of_a, list):
                left = self._fragment(of_a, warps, kinds[0], 2).reshape(len(leaders), 64, 16)
            else:
                left = self._numbers(self._described(of_a, leaders, 64, transpose_a), kinds[0])
            right = self._numbers(self._described(of_b, leaders, n, transpose_b), kinds[1])
            product = (left @ right.swapaxes(1, 2)).reshape(len(warps), 2, 8, n // 8, 4, 2)
            keeps = np.broadcast_to(kept(), len(self.lanes))
            lanes = self.active(mask)
            for i, (name, register) in enumerate(zip(to, registers, strict=True)):
                values = product[:, i // 2 % 2, :, i // 4, :, i % 2].reshape(-1)
                coming, group = self.results.setdefault(name, (register.copy(), np.full(len(register), -1)))
                before = np.where(group[lanes] < 0, register[lanes], coming[lanes])
                coming[lanes] = values + np.where(keeps[lanes], before, np.float32(0))
                group[lanes] = self.shared.product_groups[lanes]
                register[lanes] = np.nan  # until it is waited for

        return run

    def _described(self, source, leaders, rows, transposed) -> np.ndarray:
        """(g, rows, 16) 16-bit elements of the matrix that each group's descriptor describes, rows along M or N."""
        descriptors = np.broadcast_to(source(), len(self.lanes)).reshape(-1, 128)
        groups = descriptors[leaders // 128]
        if (groups != groups[:, :1]).any():
            raise MemoryFault("the threads of a matrix instruction give different descriptors")
        d = groups[:, 0].astype(np.int64)
        begin, leading, stride, mode = ((d >> at & (1 << bits) - 1) for at, bits in ((0, 14), (16, 14), (32, 14), (62, 2)))
        begin, leading, stride = (x[:, None, None] * 16 for x in (begin, leading, stride))
        if (d >> 49 & 7).any() or len(set(mode.tolist())) > 1:
            raise ValueError("a base offset, or several swizzles in one instruction, are not known")
        width = {0: 16, 1: 128, 2: 64, 3: 32}[int(mode[0]) & 3]  # bytes of a row of an atom
        r, k = np.arange(rows)[:, None], np.arange(16)[None]
        if transposed:  # rows lie side by side
            per = width // 2
            if width == 16:
                offset = r % 8 * 2 + k % 8 * 16 + r // 8 * stride + k // 8 * leading
            else:
                offset = r % per * 2 + k % 8 * width + r // per * leading + k // 8 * stride
        elif width == 16:
            offset = r % 8 * 16 + k % 8 * 2 + r // 8 * stride + k // 8 * leading
        else:
            offset = r % 8 * width + k * 2 + r // 8 * stride
        address = begin + offset
        bits = {16: 0, 32: 1, 64: 3, 128: 7}[width]
        address = address ^ (address >> 7 & bits) << 4
        return self.shared.read_by_product(leaders, address.reshape(len(leaders), -1)).reshape(len(leaders), rows, 16)

    # control

    def make_bra(self, op, operands):
        return lambda mask: None

    make_ret = make_exit = make_bra

    def run(self) -> None:
        program, total = self.program, len(self.program.code)
        waiting = {0: self.alive.copy()}  # where to go on -> the threads that do
        steps = 0
        with np.errstate(all="ignore"):
            while waiting:
                at = min(waiting)
                active = waiting.pop(at)
                mask = None if active.all() else active
                until = min(waiting, default=total)
                while at < total:
                    if at >= until:
                        waiting[at] = waiting[at] | active if at in waiting else active
                        break
                    instruction = program.code[at]
                    steps += 1
                    if steps > MOST_STEPS:
                        raise MemoryFault(f"{program.name} does not end")
                    name = instruction.op[0]
                    if name in ("ret", "exit"):
                        leaving = self._guard(instruction, active)
                        self.alive &= ~leaving
                        active = active & ~leaving
                        if not active.any():
                            break
                        mask = active
                    elif name == "bra":
                        taken = self._guard(instruction, active)
                        target = program.labels[instruction.operands[0]]
                        rest = active & ~taken
                        if not rest.any():
                            at = target
                            continue
                        if taken.any():
                            waiting[target] = waiting[target] | taken if target in waiting else taken
                            waiting[at + 1] = waiting[at + 1] | rest if at + 1 in waiting else rest
                            break
                    else:
                        try:
                            self.code[at](mask)
                        except MemoryFault as fault:
                            raise MemoryFault(f"{program.name}, {instruction.where}: {fault} ({instruction.text})") from None
                    at += 1

    def _guard(self, instruction, active):
        if instruction.guard is None:
            return active
        name, wanted = instruction.guard
        predicate = self.register(name)
        return active & (predicate if wanted else ~predicate)


_parsed = lru_cache(maxsize=64)(parse)


def run(ptx: str, grid: tuple[int, ...], arguments: list, tensors: dict, shared: int) -> None:
    """One launch. arguments: tensors, and numbers' bits as non-negative integers, in the order of the kernel's parameters.

    tensors: name -> tensor, all of `arguments`' and in place; what the kernel stores is stored into them.
    """
    program, memory = _parsed(ptx), GlobalMemory(tensors)
    bits = [memory.address(x) if hasattr(x, "data_ptr") else x for x in arguments]
    bits += [0] * (len(program.params) - len(bits))  # scratch that no kernel here uses
    grid = (*grid, 1, 1)[:3]
    count = int(np.prod(grid))
    at_once = max(1, LANES // program.threads)
    for first in range(0, count, at_once):
        Machine(program, grid, np.arange(first, min(first + at_once, count)), bits, memory, shared).run()
    try:
        memory.conflicts()
    except MemoryFault as fault:
        raise MemoryFault(f"{program.name}: {fault}") from None
    memory.give_back()
