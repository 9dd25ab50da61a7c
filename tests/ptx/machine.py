"""Runs a kernel's PTX, thread by thread, in numpy: every thread of several programs at once, the lowest instruction first.

It knows what Triton writes for the kernels of this package on sm_80 and sm_90, matrix instructions and copies in flight included, and refuses
every other instruction by name. Arithmetic is that of the PTX manual but for what it leaves open: approximations are numpy's, and a matrix
instruction rounds once behind each of its sums. Warps run in step, so a race changes no result here: `memory` refuses it instead.
"""

import re
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from .arithmetic import (
    COMPARE,
    DTYPE,
    FLOAT,
    FLOAT_OR_NAN,
    INTEGER,
    ROUND,
    UNKNOWN,
    field,
    flush,
    from_bfloat16,
    high,
    saturated,
    shift,
    to_bfloat16,
    unsigned,
)  # fmt: skip
from .matrices import Matrices
from .memory import GlobalMemory, MemoryFault, SharedMemory
from .parse import Address, Instruction, Program, float_bits, number, parse

LANES = 4096  # threads that run at once
MOST_STEPS = 10**8


class UnknownInstruction(Exception):
    """One that this machine does not know."""


SKIPPED = {"membar", "fence", "prefetch", "griddepcontrol", "createpolicy", "wgmma.fence"}


class Machine(Matrices):
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
            self.registers[name] = np.zeros(len(self.lanes), unsigned(self.program.type_of(name)))
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
            f = shift(name == "shl", kind[0] == "s")
            value, amount, put = self.source(operands[1], kind), self.source(operands[2], "u32"), self.sink(operands[0], kind)
            return lambda mask: put(f(value(), amount()), mask)
        elif name == "bfe":
            f = field(kind[0] == "s")
            value, rest, put = self.source(operands[1], kind), [self.source(o, "u32") for o in operands[2:]], self.sink(operands[0], kind)
            return lambda mask: put(f(value(), *(r() for r in rest)), mask)
        elif name in ("mul", "mad") and op[1] == "wide":
            wide = kind[0] + str(2 * int(kind[1:]))
            a, b = (self.source(o, kind) for o in operands[1:3])
            c, put, dtype = (self.source(operands[3], wide) if name == "mad" else lambda: 0), self.sink(operands[0], wide), DTYPE[wide]
            return lambda mask: put(np.asarray(a()).astype(dtype) * np.asarray(b()).astype(dtype) + c(), mask)
        elif name in ("mul", "mad"):
            times = {"lo": np.multiply, "hi": high}[op[1]]
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
        packed = kind.endswith("x2")  # two halves, and a predicate for each
        if len(operands) != 3 + joined + packed or packed and joined:
            raise ValueError("only one comparison is known, or two of halves")
        *targets, first, second = operands[: 3 + packed]
        a, b, puts = self.source(first, kind), self.source(second, kind), [self.sink(target, "pred") for target in targets]
        scalar = kind.removesuffix("x2")

        def numbers(half=0):
            x, y = ((np.asarray(x) >> np.uint32(16 * half)).astype(np.uint16).view(DTYPE[scalar]) if packed else x for x in (a(), b()))
            return (from_bfloat16(np.asarray(x)), from_bfloat16(np.asarray(y))) if scalar == "bf16" else (x, y)

        if compare in ("num", "nan"):
            test = lambda x, y: (np.isnan(x) | np.isnan(y)) == (compare == "nan")  # noqa: E731
        elif compare not in COMPARE:
            ordered = COMPARE[compare.removesuffix("u")]
            test = lambda x, y: np.isnan(x) | np.isnan(y) | ordered(x, y)  # noqa: E731
        elif compare == "ne" and (scalar[0] == "f" or scalar == "bf16"):
            test = lambda x, y: ~(np.isnan(x) | np.isnan(y)) & (x != y)  # noqa: E731
        else:
            test = COMPARE[compare]
        if joined:
            third, join = self.source(operands[3], "pred"), {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[op[2]]
            return lambda mask: puts[0](join(test(*numbers()), third()), mask)
        if packed:

            def both(mask):
                for put, found in zip(puts, [test(*numbers(half)) for half in (0, 1)], strict=True):
                    put(found, mask)

            return both
        return lambda mask: puts[0](test(*numbers()), mask)

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
                places = [wide.type(i * bits) for i in range(len(of))]

                def pack(mask):
                    values = [np.asarray(s()).astype(wide) << at for s, at in zip(sources, places, strict=True)]
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
            upper, lower = (self.source(o, of) for o in operands[1:3])
            narrow = to_bfloat16 if to == "bf16x2" else lambda x: np.asarray(x).astype(np.float16).view(np.uint16)
            return lambda mask: put(narrow(upper()).astype(np.uint32) << 16 | narrow(lower()), mask)
        source, rounding = self.source(operands[1], of), next((ROUND[part] for part in op if part in ROUND), None)
        read = (lambda: from_bfloat16(np.asarray(source()))) if of == "bf16" else lambda: np.asarray(source())
        if (of == "bf16" or of[0] == "f") and to[0] in "us":
            if rounding is None:
                raise ValueError("a number without its rounding")
            nan = 0 if of != "f64" and DTYPE[to].itemsize < 8 else 1 << 8 * DTYPE[to].itemsize - 1
            return lambda mask: put(saturated(rounding(read().astype(np.float64)), unsigned(to).type(nan).view(DTYPE[to]), DTYPE[to]), mask)
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
