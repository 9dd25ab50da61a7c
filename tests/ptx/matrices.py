"""Instructions of whole warps on matrices in shared memory and registers, and the copies that bring them there."""

import re

import numpy as np

from .arithmetic import from_bfloat16
from .memory import MemoryFault
from .parse import number


class Matrices:
    """Part of `machine.Machine`."""

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
