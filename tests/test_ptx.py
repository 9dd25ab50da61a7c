"""The machine that runs compiled kernels on a CPU: what its instructions compute and what it refuses; then kernels on it, in processes of their own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx import machine
from ptx.machine import UnknownInstruction
from ptx.memory import MemoryFault

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit
    def turned_kernel(x_ptr, y_ptr, OFFSET: tl.constexpr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
        """y is x + 1 from the last to the first of each program's elements; x + 1 is stored to x first, and loaded by other threads."""
        i, x_ptr, y_ptr = tl.arange(0, BLOCK), x_ptr + tl.program_id(0) * BLOCK, y_ptr + tl.program_id(0) * BLOCK
        tl.store(x_ptr + i, tl.load(x_ptr + i + OFFSET) + 1)
        if BARRIER:
            tl.debug_barrier()
        tl.store(y_ptr + i, tl.load(x_ptr + BLOCK - 1 - i))


ROOT = Path(__file__).resolve().parents[1]
KIND = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}  # the register that holds so many bytes
nan, inf = float("nan"), float("inf")


def launch(body, *tensors, threads=32, grid=(1,), shared=0, numbers=()):
    """Run `body`, which finds its tensors' addresses in %rd1 on, its thread in %r1, program in %r2, lane in %r3 and warp in %r4.

    numbers: (name, type, bits) of further parameters; None: one that no argument is given for.
    """
    params = [(f"p{i}", "u64 .ptr .global .align 1") for i in range(1, len(tensors) + 1)] + [(name, kind) for name, kind, _ in numbers]
    loads = "\n".join(f"ld.param.b64 %rd{i}, [p{i}];" for i in range(1, len(tensors) + 1))
    text = f"""
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel({", ".join(f".param .{kind} {name}" for name, kind in params)})
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>, %hs<9>;
    .reg .b32 %r<200>;
    .reg .b64 %rd<50>;
    .loc 1 7 0 // the kernel's seventh line
    {loads}
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    and.b32 %r3, %r1, 31;
    shr.u32 %r4, %r1, 5;
    {body}
    ret;
}}
    .file 1 "/somewhere/kernels.py"
"""
    arguments = [*tensors, *(value for _, _, value in numbers if value is not None)]
    machine.run(text, grid, arguments, {f"p{i}": x for i, x in enumerate(tensors, 1)}, shared)


def lanes(body, *tensors, threads=32, grid=(1,), out=torch.int32, **options):
    """What `body` leaves in %r0 (or %rd0, of 64 bits) of each thread of each program. `tensors` begin at %rd2."""
    size, count = out.itemsize, threads * int(np.prod(grid))
    result = torch.zeros(count, dtype=out)
    body += f"""
    mad.lo.s32 %r199, %r2, {threads}, %r1;
    mad.wide.u32 %rd49, %r199, {size}, %rd1;
    st.global.{KIND[size]} [%rd49], %{"rd" if size == 8 else "r"}0;"""
    launch(body, result, *tensors, threads=threads, grid=grid, **options)
    return result


def compute(code, out, *inputs):
    """`code` for each element of `inputs`, tensors of one length: they are in %a, %b, %c, and what is in %o comes back as `out`."""
    count = len(inputs[0])
    threads = -(-count // 32) * 32
    padded = [torch.cat([x, x[:1].expand(threads - count)]) for x in inputs]
    body = f".reg .{KIND[out.itemsize]} %o; .reg .b32 %s<9>;"
    for i, (name, x) in enumerate(zip("abc", inputs, strict=False)):
        size = x.element_size()
        body += f".reg .{KIND[size]} %{name}; mad.wide.u32 %rd9, %r1, {size}, %rd{i + 2}; ld.global.b{8 * size} %{name}, [%rd9];\n"
    result = torch.zeros(threads, dtype=out)
    launch(f"{body} {code} mad.wide.u32 %rd9, %r1, {out.itemsize}, %rd1; st.global.b{8 * out.itemsize} [%rd9], %o;", result, *padded, threads=threads)
    return result[:count]


def bits(x):
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).tolist()


def i32(*values):
    return torch.tensor([v - 2**32 if v >= 2**31 else v for v in values], dtype=torch.int32)


def i64(*values):
    return torch.tensor([v - 2**64 if v >= 2**63 else v for v in values], dtype=torch.int64)


def f32(*values):
    return torch.tensor(values, dtype=torch.float32)


def refused(match, body, *tensors, **options):
    with pytest.raises(MemoryFault, match=match):
        launch(body, *tensors, **options)


# the language


@pytest.mark.parametrize("text, value", [
    ("5", 5), ("-5", -5), ("0xff", 255), ("0xFFFFFFFF", -1), ("-0x10", -16), ("7U", 7), ("0f3F800000", 0x3F800000), ("0fBF800000", 0xBF800000 - 2**32),
    ("0fFF800000", 0xFF800000 - 2**32), ("0f7FC00001", 0x7FC00001),
])  # fmt: skip
def test_immediates(text, value):
    assert set(lanes(f"mov.b32 %r0, {text};").tolist()) == {value}


def test_immediates_of_64_and_16_bits_and_as_numbers():
    assert set(lanes("mov.b64 %rd0, -3; add.s64 %rd0, %rd0, 0x7FFFFFFFFFFFFFFF;", out=torch.int64).tolist()) == {2**63 - 4}
    assert set(lanes("mov.b64 %rd0, 0d3FF8000000000000;", out=torch.float64).tolist()) == {1.5}
    assert set(lanes("mov.b16 %rs1, -2; cvt.s32.s16 %r0, %rs1;").tolist()) == {-2}
    assert set(lanes("add.f32 %r0, 0f3F800000, 0f40000000;", out=torch.float32).tolist()) == {3.0}
    assert set(lanes("mov.pred %p1, -1; mov.pred %p2, 0; and.pred %p3, %p1, %p2; or.pred %p4, %p1, %p2; selp.b32 %r0, 5, 6, %p3;").tolist()) == {6}


def test_comments_names_of_registers_and_labels():
    body = """
    .reg .b32 %only;
    /* two lines of a comment;
       mov.b32 %r0, 9; */
    mov.b32 %only, 4; // mov.b32 %only, 5;
    bra.uni $L__1;
    mov.b32 %only, 6;
$L__1:
    { .reg .b32 t; mov.b32 t, %only; mov.b32 %r0, t; }
    """
    assert set(lanes(body).tolist()) == {4}


def test_guards():
    body = "mov.b32 %r0, 1; setp.lt.s32 %p1, %r1, 10; @%p1 mov.b32 %r0, 2; @!%p1 add.s32 %r0, %r0, %r1; setp.lt.s32 %p2, %r1, 0; @%p2 mov.b32 %r0, 9;"
    assert lanes(body).tolist() == [2 if i < 10 else 1 + i for i in range(32)]


def test_vectors_and_offsets_of_addresses():
    x, y = torch.arange(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    body = "setp.eq.s32 %p1, %r1, 0; add.s64 %rd3, %rd1, 16; @%p1 ld.global.v4.b32 {%r5, %r6, %r7, _}, [%rd3+-16];"
    launch(
        body + "@%p1 ld.global.v2.b32 {%r8, %r9}, [ %rd3 + 8 ]; @%p1 st.global.v4.b32 [%rd2+16], {%r9, %r8, %r7, %r6}; @%p1 st.global.b32 [%rd2], %r5;", x, y
    )
    assert y.tolist() == [0, 0, 0, 0, 7, 6, 2, 1]
    body = "mov.b64 %rd5, {%r1, 7}; mov.b64 {%r5, %r6}, %rd5; mad.lo.s32 %r0, %r6, 100, %r5;"
    assert lanes(body).tolist() == [700 + i for i in range(32)]
    body = "cvt.u16.u32 %rs1, %r1; mov.b32 %r5, {%rs1, 0x8001}; mov.b32 {_, %rs2}, %r5; cvt.u32.u16 %r6, %rs2; shl.b32 %r6, %r6, 8; add.s32 %r0, %r6, %r5;"
    assert lanes(body).tolist() == i32(*(((0x8001 << 16) + i + (0x8001 << 8)) % 2**32 for i in range(32))).tolist()


def test_threads_part_and_meet_again():
    """A loop of as many rounds as the lane's number; behind it all 32 run in step again, or the warp could not exchange values."""
    body = """
    mov.b32 %r5, 0;
    mov.b32 %r6, 0;
LOOP:
    setp.ge.s32 %p1, %r5, %r3;
    @%p1 bra DONE;
    add.s32 %r5, %r5, 1;
    and.b32 %r7, %r5, 1;
    setp.eq.s32 %p2, %r7, 0;
    @!%p2 bra ODD;
    add.s32 %r6, %r6, 100;
    bra.uni NEXT;
ODD:
    add.s32 %r6, %r6, 1;
NEXT:
    bra.uni LOOP;
DONE:
    shfl.sync.bfly.b32 %r0, %r6, 1, 31, -1;
    """
    counts = [100 * (i // 2) + (i + 1) // 2 for i in range(32)]
    assert lanes(body, threads=64).tolist() == [counts[i ^ 1] for i in range(32)] * 2


def test_branches_forward():
    """Past a part that others run, and into it from above: the warp is whole again behind each."""
    body = """
    setp.lt.s32 %p1, %r3, 7; setp.lt.s32 %p2, %r3, 20; mov.b32 %r5, 0;
    @%p1 bra SKIP;
    mov.b32 %r5, 1;
SKIP:
    shfl.sync.idx.b32 %r6, %r5, 9, 31, -1;
    @!%p2 bra OTHERS;
    add.s32 %r6, %r6, 10;
    bra.uni BEHIND;
OTHERS:
    add.s32 %r6, %r6, 100;
BEHIND:
    shfl.sync.idx.b32 %r7, %r6, 30, 31, -1;
    mad.lo.s32 %r0, %r7, 1000, %r6;
    """
    assert lanes(body).tolist() == [101011 if i < 20 else 101101 for i in range(32)]


def test_programs_of_a_grid():
    """Loops of a length for each program; more programs than run at once; a barrier in a loop that programs leave in different rounds."""
    body = """
    mov.u32 %r5, %ctaid.y; mov.u32 %r6, %ctaid.z; mov.u32 %r7, %nctaid.x; mov.u32 %r8, %nctaid.y;
    mad.lo.s32 %r9, %r6, %r8, %r5; mad.lo.s32 %r2, %r9, %r7, %r2; // the program's number
    mov.b32 %r0, 0; mov.b32 %r5, 0;
LOOP:
    bar.sync 0;
    add.s32 %r0, %r0, 3; add.s32 %r5, %r5, 1;
    setp.lt.s32 %p1, %r5, %r2;
    @%p1 bra LOOP;
    """
    result = lanes(body, threads=1024, grid=(2, 3, 2)).view(12, 1024)
    assert torch.equal(result, 3 * torch.arange(12, dtype=torch.int32).clamp(min=1)[:, None].expand(12, 1024))


def test_threads_that_leave_early():
    x = torch.zeros(64, dtype=torch.int32)
    body = "mad.wide.u32 %rd3, %r1, 4, %rd1; setp.gt.s32 %p1, %r1, 40; @%p1 ret; st.global.b32 [%rd3], 1; setp.lt.s32 %p2, %r1, 4; @!%p2 bra END; "
    launch(body + "st.global.b32 [%rd3], 2;\nEND:\n", x, threads=64)
    assert x.tolist() == [2] * 4 + [1] * 37 + [0] * 23


@pytest.mark.parametrize("statement", [
    "frobnicate.b32 %r0, %r1;", "add.rz.f32 %r0, %r1, %r1;", "add.sat.s32 %r0, %r1, %r1;", "cvt.rz.bf16.f32 %rs1, %r1;", "cvt.s32.f32 %r0, %r1;",
    "ld.volatile.global.b32 %r0, [%rd1];", "atom.global.add.u32 %r0, [%rd1], 1;", "setp.eq.s32 %p1|%p2, %r1, 0;", "setp.eq.f16x2 %p1, %r1, %r2;",
    "add.f32 %r0, %r1, 1;", "bar.sync 1;", "bar.sync 0, 64;", "mov.u32 %r0, %clock;", "ld.param.b32 %r0, [p1+4];", "ld.global.v2.b32 %r0, [%rd1];",
    "mov.b32 %r0, nowhere;", "setp.foo.s32 %p1, %r1, 0;", "mul.even.s32 %r0, %r1, %r1;",
    "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r0, %r1}, {%r0, %r1, %r2, %r3}, {%r0, %r1}, {%r0, %r1};",
])  # fmt: skip
def test_what_is_not_known_is_named(statement):
    with pytest.raises(UnknownInstruction, match=rf"kernel: {re.escape(statement[:-1])} \("):
        launch(statement, torch.zeros(4, dtype=torch.int32))


def test_what_cannot_be_read_is_named():
    with pytest.raises(ValueError, match="kernel: cannot read '<<<'"):
        launch("<<<;")


def test_a_fault_says_where():
    refused(r"kernel, kernels\.py:7: .*\(ld\.global\.b32 %r0, \[%rd1\+4096\]\)", "ld.global.b32 %r0, [%rd1+4096];", torch.zeros(4))


def test_a_program_that_does_not_end(monkeypatch):
    monkeypatch.setattr(machine, "MOST_STEPS", 100)
    refused("kernel does not end", "LOOP:\nbra.uni LOOP;")


# integers


@pytest.mark.parametrize("code, out, values", [
    ("mul.wide.s32 %o, %a, %b;", torch.int64, lambda a, b: a * b),
    ("mul.wide.u32 %o, %a, %b;", torch.int64, lambda a, b: a % 2**32 * (b % 2**32)),
    ("mad.wide.s32 %o, %a, -3, 5;", torch.int64, lambda a, b: a * -3 + 5),
    ("mul.wide.u32 %rd9, %a, 16; mad.wide.u32 %o, %a, %b, %rd9;", torch.int64, lambda a, b: a % 2**32 * (b % 2**32 + 16)),
    ("mul.lo.s32 %o, %a, %b;", torch.int32, lambda a, b: a * b),
    ("mad.lo.s32 %o, %a, %b, 7;", torch.int32, lambda a, b: a * b + 7),
    ("mul.hi.s32 %o, %a, %b;", torch.int32, lambda a, b: a * b >> 32),
    ("mul.hi.u32 %o, %a, %b;", torch.int32, lambda a, b: a % 2**32 * (b % 2**32) >> 32),
    ("mad.hi.s32 %o, %a, %b, 7;", torch.int32, lambda a, b: (a * b >> 32) + 7),
    ("add.s32 %o, %a, %b;", torch.int32, lambda a, b: a + b),
    ("sub.s32 %o, %a, %b;", torch.int32, lambda a, b: a - b),
    ("min.s32 %o, %a, %b;", torch.int32, min),
    ("min.u32 %o, %a, %b;", torch.int32, lambda a, b: min(a % 2**32, b % 2**32)),
    ("max.s32 %o, %a, %b;", torch.int32, max),
    ("div.s32 %o, %a, %b;", torch.int32, lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)),
    ("rem.s32 %o, %a, %b;", torch.int32, lambda a, b: abs(a) % abs(b) * (1 if a >= 0 else -1)),
    ("div.u32 %o, %a, %b;", torch.int32, lambda a, b: a % 2**32 // (b % 2**32)),
    ("rem.u32 %o, %a, %b;", torch.int32, lambda a, b: a % 2**32 % (b % 2**32)),
    ("xor.b32 %o, %a, %b;", torch.int32, lambda a, b: a ^ b),
    ("and.b32 %s1, %a, %b; not.b32 %o, %s1;", torch.int32, lambda a, b: ~(a & b)),
    ("neg.s32 %o, %a;", torch.int32, lambda a, b: -a),
    ("abs.s32 %o, %a;", torch.int32, lambda a, b: abs(a)),
    ("lop3.b32 %o, %a, %b, 0x0F0F3355, 0x96;", torch.int32, lambda a, b: a ^ b ^ 0x0F0F3355),
    ("lop3.b32 %o, %a, %b, 0x0F0F3355, 0xEA;", torch.int32, lambda a, b: a & b | 0x0F0F3355),
    ("lop3.b32 %o, %a, %b, 0x0F0F3355, 0x30;", torch.int32, lambda a, b: a & ~b),
    ("popc.b32 %o, %a;", torch.int32, lambda a, b: (a % 2**32).bit_count()),
    ("selp.b32 %o, %a, %b, %p1;", torch.int32, lambda a, b: b),
])  # fmt: skip
def test_integers(code, out, values):
    a = i32(7, -7, 7, -7, 2**31, 2**31 - 1, 0xFFFFFFFF, 123456789, 0, 0x12345678)
    b = i32(2, 2, -2, -2, 3, 2**31 - 1, 0xFFFFFFFF, -987654321, 5, 0x9ABCDEF0)
    width = 8 * out.itemsize
    expected = [(values(x, y) + 2 ** (width - 1)) % 2**width - 2 ** (width - 1) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert compute(code, out, a, b).tolist() == expected


@pytest.mark.parametrize("code, values", [
    ("mul.lo.s64 %o, %a, %b;", lambda a, b: a * b),
    ("mad.lo.s64 %o, %a, %b, -1;", lambda a, b: a * b - 1),
    ("mul.hi.u64 %o, %a, %b;", lambda a, b: a % 2**64 * (b % 2**64) >> 64),
    ("mul.hi.s64 %o, %a, %b;", lambda a, b: a * b >> 64),
    ("min.s64 %o, %a, %b;", min),
    ("shr.s64 %o, %a, 60;", lambda a, b: a >> 60),
    ("shr.u64 %o, %a, 60;", lambda a, b: a % 2**64 >> 60),
    ("shl.b64 %o, %a, 3;", lambda a, b: a << 3),
    ("cvt.u32.u64 %s1, %a; cvt.u64.u32 %o, %s1;", lambda a, b: a % 2**32),
    ("cvt.u32.u64 %s1, %a; cvt.s64.s32 %o, %s1;", lambda a, b: (a + 2**31) % 2**32 - 2**31),
])  # fmt: skip
def test_integers_of_64_bits(code, values):
    a, b = i64(5, -5, 2**62 + 12345, 2**64 - 1, 0x123456789ABCDEF0, 0xFFFFFFFF80000000), i64(-7, -7, 2**63 - 1, 2**64 - 1, 0xFEDCBA9876543210, 1)
    expected = [(values(x, y) + 2**63) % 2**64 - 2**63 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert compute(code, torch.int64, a, b).tolist() == expected


def test_shifts_beyond_the_width():
    a, amount = i32(-5, -5, -5, -5, 5, 5), i32(1, 31, 32, 0xFFFFFFFF, 33, 31)
    assert compute("shl.b32 %o, %a, %b;", torch.int32, a, amount).tolist() == [-10, -(2**31), 0, 0, 0, -(2**31)]
    assert compute("shr.u32 %o, %a, %b;", torch.int32, a, amount).tolist() == [2**31 - 3, 1, 0, 0, 0, 0]
    assert compute("shr.s32 %o, %a, %b;", torch.int32, a, amount).tolist() == [-3, -1, -1, -1, 0, 0]
    assert compute("shl.b16 %o, %a, 15;", torch.int16, torch.tensor([3, 2], dtype=torch.int16)).tolist() == [-(2**15), 0]
    assert compute("shr.u16 %o, %a, 4;", torch.int16, torch.tensor([-1, 32], dtype=torch.int16)).tolist() == [0x0FFF, 2]


def test_fields_of_bits():
    a, at, length = i32(*[0x87654321] * 8), i32(4, 4, 28, 28, 0, 16, 40, 8), i32(8, 0, 4, 8, 32, 12, 5, 4)
    assert compute("bfe.u32 %o, %a, %b, %c;", torch.int32, a, at, length).tolist() == i32(0x32, 0, 8, 8, 0x87654321, 0x765, 0, 3).tolist()
    assert compute("bfe.s32 %o, %a, %b, %c;", torch.int32, a, at, length).tolist() == i32(0x32, 0, -8, -8, 0x87654321, 0x765, -1, 3).tolist()
    assert compute("bfe.s32 %o, %a, 12, 4; bfe.s32 %o, %a, 4, 5;", torch.int32, i32(0x87654371)).tolist() == [-9]


def test_permuted_bytes():
    a, b = i32(0x33221180), i32(0x776655F4)
    pairs = [(0x3210, 0x33221180), (0x7654, 0x776655F4), (0x0145, 0x8011F455), (0x5410, 0x55F41180), (0x8C3B, 0xFFFF3300), (0xFFFF1111, 0x11111111)]
    for selector, expected in pairs:
        assert compute(f"prmt.b32 %o, %a, %b, {selector:#x};", torch.int32, a, b).tolist() == i32(expected).tolist()


@pytest.mark.parametrize("to, of, out, values", [
    ("s32", "s8", torch.int32, [-1, 127, -128, 0x44]),
    ("s32", "u8", torch.int32, [255, 127, 128, 0x44]),
    ("s32", "s16", torch.int32, [-1, 127, -128, 0x3344]),
    ("u32", "u16", torch.int32, [0xFFFF, 127, 0xFF80, 0x3344]),
    ("u16", "u8", torch.int16, [255, 127, 128, 0x44]),
    ("s64", "s8", torch.int64, [-1, 127, -128, 0x44]),
    ("s8", "s32", torch.int16, [-1, 127, -128, 0x44]),
    ("u8", "s32", torch.int16, [255, 127, 128, 0x44]),
    ("s64", "s32", torch.int64, [-1, 127, -128, 0x11223344]),
    ("u64", "u32", torch.int64, [2**32 - 1, 127, 2**32 - 128, 0x11223344]),
    ("rn.f32", "s32", torch.float32, [-1.0, 127.0, -128.0, 0x11223340]),
    ("rn.f32", "u32", torch.float32, [2.0**32, 127.0, 2.0**32, 0x11223340]),
    ("rn.f64", "s32", torch.float64, [-1.0, 127.0, -128.0, 0x11223344]),
    ("rn.f16", "s8", torch.float16, [-1.0, 127.0, -128.0, 68.0]),
    ("rn.bf16", "u8", torch.bfloat16, [255.0, 127.0, 128.0, 68.0]),
])  # fmt: skip
def test_widths_and_signs(to, of, out, values):
    assert compute(f"cvt.{to}.{of} %o, %a;", out, i32(0xFFFFFFFF, 127, 0xFFFFFF80, 0x11223344)).tolist() == values


@pytest.mark.parametrize("kind, value, expected", [
    ("s32", 0xFFFFFFFE, -2), ("u32", 0xFFFFFFFE, 2**32 - 2), ("b32", 2**64 - 2, 2**32 - 2), ("s16", 0xFFFE, -2), ("u8", 0x1FE, 254), ("b64", 2**64 - 2, -2),
])  # fmt: skip
def test_parameters_are_extended(kind, value, expected):
    assert set(lanes(f"ld.param.{kind} %rd0, [n];", out=torch.int64, numbers=[("n", kind, value)]).tolist()) == {expected}
    parameters = [("m", "u64", 3), ("n", kind, value), ("more", "f32", 0x3F800000), ("scratch", "u64 .ptr .global .align 1", None)]
    assert set(lanes(f"ld.param.{kind} %rd0, [n];", out=torch.int64, numbers=parameters).tolist()) == {expected}


def test_loads_are_extended():
    x = torch.tensor([-2, 3], dtype=torch.int8)
    assert set(lanes("ld.global.s8 %r0, [%rd2];", x).tolist()) == {-2}
    assert set(lanes("ld.global.u8 %r0, [%rd2];", x).tolist()) == {254}
    assert set(lanes("ld.global.b8 %rs1, [%rd2+1]; cvt.u32.u16 %r0, %rs1;", x).tolist()) == {3}


# floats


def test_least_and_greatest():
    a, b = f32(nan, 1, nan, 0.0, -0.0, -0.0, 0.0, inf, -3), f32(1, nan, nan, -0.0, 0.0, -0.0, 0.0, 2, -2)
    least, greatest = f32(1, 1, nan, -0.0, -0.0, -0.0, 0.0, 2, -3), f32(1, 1, nan, 0.0, 0.0, -0.0, 0.0, inf, -2)
    poisoned = torch.tensor([True] * 3 + [False] * 6)
    for name, expected in (("min", least), ("max", greatest)):
        for suffix, values in (("", expected), (".NaN", torch.where(poisoned, nan, expected))):
            got = compute(f"{name}{suffix}.f32 %o, %a, %b;", torch.float32, a, b)
            torch.testing.assert_close(got, values, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(got.signbit()[3:], values.signbit()[3:])
            for dtype, kind in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
                got = compute(f"{name}{suffix}.{kind} %o, %a, %b;", dtype, a.to(dtype), b.to(dtype))
                torch.testing.assert_close(got, values.to(dtype), rtol=0, atol=0, equal_nan=True)
                assert torch.equal(got.signbit()[3:], values.signbit()[3:])


def test_a_fused_product_is_rounded_once():
    one = 1 + 2.0**-12
    a, b, c = f32(one, one, one, 3, 0, inf, 2.0**70), f32(one, one, -one, 5, 7, 0, 2.0**70), f32(-1, 2.0**-60, -(2.0**-60), 0.5, -0.0, 1, -inf)
    assert compute("fma.rn.f32 %o, %a, %b, %c;", torch.float32, a, b, c)[:5].tolist() == [
        2.0**-11 + 2.0**-24, 1 + 2.0**-11 + 2.0**-23, -(1 + 2.0**-11 + 2.0**-23), 15.5, 0.0,
    ]  # fmt: skip
    below = compute("fma.rn.f32 %o, %a, %b, %c;", torch.float32, f32(one, -one, one), f32(one, one, one), f32(-(2.0**-60), 2.0**-60, 0))
    assert below.tolist() == [1 + 2.0**-11, -(1 + 2.0**-11), 1 + 2.0**-11]  # not quite half a unit, and half of one, to the even side
    assert compute("fma.rn.f32 %o, %a, %b, %c;", torch.float32, a, b, c)[5:].isnan().tolist() == [True, False]
    unfused = compute("mul.rn.f32 %s1, %a, %b; add.rn.f32 %o, %s1, %c;", torch.float32, a, b, c)
    assert unfused[:2].tolist() == [2.0**-11, 1 + 2.0**-11]
    wide = torch.tensor([1 + 2.0**-30, 3.0, 2.0**600], dtype=torch.float64)
    assert compute("fma.rn.f64 %o, %a, %a, -1.5;".replace("-1.5", "0dBFF0000000000000"), torch.float64, wide).tolist() == [2.0**-29 + 2.0**-60, 8.0, inf]


def test_approximations_and_subnormal_numbers():
    x = f32(0.5, 3, -2, 2.0**-130, 0)
    for name, function in (("ex2.approx.f32", torch.exp2), ("rcp.rn.f32", torch.reciprocal), ("abs.f32", torch.abs), ("neg.f32", torch.neg)):
        torch.testing.assert_close(compute(f"{name} %o, %a;", torch.float32, x), function(x), rtol=2e-7, atol=0)
    for name, function in (("lg2.approx.f32", torch.log2), ("sqrt.rn.f32", torch.sqrt), ("rsqrt.approx.f32", torch.rsqrt)):
        torch.testing.assert_close(compute(f"{name} %o, %a;", torch.float32, x), function(x), rtol=2e-7, atol=0, equal_nan=True)
    tiny = f32(2.0**-130, -(2.0**-130), 2.0**-126)
    assert bits(compute("mul.ftz.f32 %o, %a, 0f40000000;", torch.float32, tiny)) == bits(f32(0.0, -0.0, 2.0**-125))
    assert compute("mul.f32 %o, %a, 0f40000000;", torch.float32, tiny).tolist() == [2.0**-129, -(2.0**-129), 2.0**-125]
    assert compute("mul.ftz.f32 %o, %a, %b;", torch.float32, f32(2.0**-100, 2.0**-130), f32(2.0**-30, 2.0**60)).tolist() == [0.0, 0.0]
    assert compute("ex2.approx.ftz.f32 %o, %a;", torch.float32, f32(-130)).tolist() == [0.0]
    assert compute("div.full.f32 %o, %a, %b;", torch.float32, f32(1, 6), f32(4, -3)).tolist() == [0.25, -2.0]


def test_sixteen_bits():
    generator = torch.Generator().manual_seed(0)
    for dtype, kind in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
        a, b = (torch.randn(64, generator=generator).to(dtype) for _ in range(2))
        pairs = [x.view(torch.int32) for x in (a, b)]
        for name, function in (("add", torch.add), ("mul", torch.mul), ("sub", torch.sub)):
            expected = function(a.double(), b.double()).to(dtype)
            assert torch.equal(compute(f"{name}.{kind} %o, %a, %b;", dtype, a, b), expected)
            assert torch.equal(compute(f"{name}.{kind}x2 %o, %a, %b;", torch.int32, *pairs).view(dtype), expected)
        c = (a.double() * b.double() + 1).to(dtype)
        assert torch.equal(compute(f"fma.rn.{kind} %o, %a, %b, %c;", dtype, a, b, torch.ones_like(a)), c)
    x, y = i32(0x7FFF0001, 0xFFFF8000), i32(0x00018003, 0x00018000)
    assert compute("add.s16x2 %o, %a, %b;", torch.int32, x, y).tolist() == i32(0x80008004, 0x00000000).tolist()


def test_two_halves_of_a_register():
    """The first source is the upper half; ties go to the even side."""
    a = f32(1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -(1 + 2.0**-8), 3.4e38, 1e-40, inf)
    b = f32(2.0, -1 - 3 * 2.0**-8, 7, 8, 9, 10, 11, 12)
    halves = compute("cvt.rn.bf16x2.f32 %o, %a, %b;", torch.int32, a, b).view(torch.bfloat16).view(-1, 2)
    assert halves[:5].tolist() == [[2.0, 1.0], [-(1 + 2.0**-6), 1.0], [7.0, 1 + 2.0**-6], [8.0, 1 + 2.0**-7], [9.0, -1.0]]
    assert torch.equal(halves[:, 1], a.bfloat16()) and torch.equal(halves[:, 0], b.bfloat16())
    assert compute("cvt.rn.bf16.f32 %o, %a;", torch.bfloat16, a).tolist() == a.bfloat16().tolist()
    assert compute("cvt.rn.bf16.f32 %o, %a;", torch.bfloat16, f32(nan, -nan)).isnan().all()
    b[1] = 1 + 2.0**-11
    halves = compute("cvt.rn.f16x2.f32 %o, %a, %b;", torch.int32, a, b).view(torch.float16).view(-1, 2)
    assert torch.equal(halves, torch.stack([b, a], 1).half())
    assert compute("cvt.f32.bf16 %o, %a;", torch.float32, a.bfloat16()).tolist() == a.bfloat16().float().tolist()
    assert compute("cvt.f32.f16 %o, %a;", torch.float32, a.half()).tolist() == a.half().float().tolist()
    assert compute("cvt.f32.f16 %o, %a;", torch.float32, i32(0xABCD3C00)).tolist() == [1.0]  # the lower half of a wider register
    assert compute("cvt.f64.bf16 %o, %a;", torch.float64, a.bfloat16()).tolist() == a.bfloat16().double().tolist()
    assert compute("cvt.rn.f32.f64 %o, %a;", torch.float32, torch.tensor([0.1, 1e300], dtype=torch.float64)).tolist() == f32(0.1, inf).tolist()


@pytest.mark.parametrize("rounding, values", [("rzi", [1, -1, 2, 2]), ("rni", [2, -2, 2, 3]), ("rmi", [1, -2, 2, 2]), ("rpi", [2, -1, 3, 3])])
def test_whole_numbers(rounding, values):
    x = f32(1.5, -1.5, 2.5, 2.75)
    assert compute(f"cvt.{rounding}.s32.f32 %o, %a;", torch.int32, x).tolist() == values
    assert compute(f"cvt.{rounding}.s32.bf16 %o, %a;", torch.int32, x.bfloat16()).tolist() == values
    assert compute(f"cvt.{rounding}.f32.f32 %o, %a;", torch.float32, x).tolist() == values


def test_numbers_too_large_for_an_integer():
    x = f32(3e9, -3e9, 5e9, 1e20, -1e20, inf, -inf, nan, 2147483520.0)
    top, bottom = 2**31 - 1, -(2**31)
    assert compute("cvt.rzi.s32.f32 %o, %a;", torch.int32, x).tolist() == [top, bottom, top, top, bottom, top, bottom, 0, 2147483520]
    assert compute("cvt.rzi.u32.f32 %o, %a;", torch.int32, x).tolist() == [3 * 10**9 - 2**32, 0, -1, -1, 0, -1, 0, 0, 2147483520]
    assert compute("cvt.rzi.s8.f32 %o, %a;", torch.int16, f32(200, -200, -7, nan)).tolist() == [127, -128, -7, 0]
    wide = compute("cvt.rzi.s64.f32 %o, %a;", torch.int64, x).tolist()
    assert wide == [3 * 10**9, -3 * 10**9, 5 * 10**9, 2**63 - 1, -(2**63), 2**63 - 1, -(2**63), -(2**63), 2147483520]


@pytest.mark.parametrize("compare, results", [
    ("lt", [True, False, False, False, False]), ("ltu", [True, False, False, True, True]), ("ge", [False, True, True, False, False]),
    ("geu", [False, True, True, True, True]), ("eq", [False, True, False, False, False]), ("equ", [False, True, False, True, True]),
    ("ne", [True, False, True, False, False]), ("neu", [True, False, True, True, True]), ("le", [True, True, False, False, False]),
    ("gt", [False, False, True, False, False]), ("gtu", [False, False, True, True, True]), ("leu", [True, True, False, True, True]),
    ("num", [True, True, True, False, False]), ("nan", [False, False, False, True, True]),
])  # fmt: skip
def test_comparisons_with_what_is_not_a_number(compare, results):
    a, b = f32(1, -0.0, 3, nan, 1), f32(2, 0.0, -4, 1, nan)
    for dtype, kind in ((torch.float32, "f32"), (torch.float16, "f16"), (torch.bfloat16, "bf16"), (torch.float64, "f64")):
        code = f"setp.{compare}.{kind} %p1, %a, %b; selp.b32 %o, 1, 0, %p1;"
        assert compute(code, torch.int32, a.to(dtype), b.to(dtype)).tolist() == results, kind
    for dtype, kind in ((torch.float16, "f16x2"), (torch.bfloat16, "bf16x2")):
        x, y = (torch.stack([halves, halves.roll(1)], 1).to(dtype).view(torch.int32).flatten() for halves in (a, b))
        code = f"setp.{compare}.{kind} %p1|%p2, %a, %b; selp.b32 %o, 1, 0, %p1; @%p2 add.s32 %o, %o, 2;"
        assert compute(code, torch.int32, x, y).tolist() == [one + 2 * other for one, other in zip(results, [results[-1], *results[:-1]], strict=True)], kind


def test_comparisons():
    a, b = i32(1, -1, 5, -3), i32(2, 1, 5, -4)
    for compare, results in (("lt.s32", [1, 1, 0, 0]), ("lt.u32", [1, 0, 0, 0]), ("lo.u32", [1, 0, 0, 0]), ("ls.u32", [1, 0, 1, 0]), ("hi.u32", [0, 1, 0, 1]),
                             ("hs.u32", [0, 1, 1, 1]), ("ge.s32", [0, 0, 1, 1]), ("eq.b32", [0, 0, 1, 0]), ("ne.b32", [1, 1, 0, 1])):  # fmt: skip
        assert compute(f"setp.{compare} %p1, %a, %b; selp.b32 %o, 1, 0, %p1;", torch.int32, a, b).tolist() == results, compare
    for join, results in (("and", [1, 0, 0, 0]), ("or", [1, 1, 1, 0]), ("xor", [0, 1, 1, 0])):
        code = f"setp.gt.s32 %p2, %a, 0; setp.lt.{join}.s32 %p1, %a, %b, %p2; @%p1 mov.b32 %o, 1;"
        assert compute(code, torch.int32, a, b).tolist() == results, join
    assert compute("setp.lt.s32 %p1, %a, 0; selp.f32 %o, 0f3F800000, 0fBF800000, %p1;", torch.float32, a).tolist() == [-1, 1, -1, 1]
    assert compute("setp.lt.s32 %p1, %a, 0; not.pred %p2, %p1; xor.pred %p3, %p2, 1; selp.b64 %o, -1, 2, %p2;", torch.int64, a).tolist() == [-1, 2, -1, 2]


# threads of a warp


@pytest.mark.parametrize("mode, amount, bound, source", [
    ("bfly", 5, 31, lambda i: i ^ 5),
    ("idx", 3, 31, lambda i: 3),
    ("idx", 3, 0x181F, lambda i: i // 8 * 8 + 3),  # of every eight lanes
    ("idx", 11, 0x181F, lambda i: i // 8 * 8 + 3),
    ("up", 3, 0, lambda i: i - 3 if i >= 3 else None),
    ("up", 3, 0x1000, lambda i: i - 3 if i % 16 >= 3 else None),
    ("down", 4, 31, lambda i: i + 4 if i < 28 else None),
    ("down", 4, 0x101F, lambda i: i + 4 if i % 16 < 12 else None),
    ("bfly", 16, 15, lambda i: i ^ 16 if i >= 16 else None),
    ("idx", 35, 31, lambda i: 3),
])  # fmt: skip
def test_shuffles(mode, amount, bound, source):
    """Each lane gets another's value, or its own where there is none, which the predicate says."""
    body = f"mad.lo.s32 %r5, %r1, 7, 11; shfl.sync.{mode}.b32 %r6|%p1, %r5, {amount}, {bound:#x}, -1; selp.b32 %r7, 1000, 0, %p1; add.s32 %r0, %r6, %r7;"
    expected = []
    for thread in range(64):
        other = source(thread % 32)
        expected.append((thread if other is None else thread // 32 * 32 + other) * 7 + 11 + (1000 if other is not None else 0))
    assert lanes(body, threads=64).tolist() == expected


def test_shuffles_of_amounts_by_lane_and_in_a_part_of_a_warp():
    assert lanes("sub.s32 %r5, 31, %r3; shfl.sync.idx.b32 %r0, %r1, %r5, 31, 0xffffffff;", threads=64).tolist() == [*range(31, -1, -1), *range(63, 31, -1)]
    refused("only a part of it runs", "setp.lt.s32 %p1, %r1, 40; @%p1 shfl.sync.idx.b32 %r0, %r1, 0, 31, -1;", threads=64)
    for statement in ("shfl.sync.bfly.b32 %r0, %r1, 1, 31, 15;", "mov.b32 %r5, 0x7fffffff; redux.sync.max.s32 %r0, %r1, %r5;"):
        refused("that names only a part of it", statement)
    one_warp = "setp.lt.s32 %p1, %r1, 32; mov.b32 %r0, -1; @%p1 shfl.sync.bfly.b32 %r0, %r1, 1, 31, -1;"
    assert lanes(one_warp, threads=64).tolist() == [i ^ 1 for i in range(32)] + [-1] * 32


@pytest.mark.parametrize("name, function", [
    ("min.s32", min), ("max.s32", max), ("min.u32", lambda x: min(v % 2**32 for v in x)), ("max.u32", lambda x: max(v % 2**32 for v in x)), ("add.s32", sum),
    ("and.b32", np.bitwise_and.reduce), ("or.b32", np.bitwise_or.reduce),
])  # fmt: skip
def test_reductions_of_a_warp(name, function):
    values = torch.randint(-(2**31), 2**31, (64,), generator=torch.Generator().manual_seed(1), dtype=torch.int64).int()
    expected = [int(function(part)) for part in values.view(2, 32).tolist()]
    expected = [(v + 2**31) % 2**32 - 2**31 for v in expected]
    assert compute(f"mov.b32 %s1, -1; redux.sync.{name} %o, %a, %s1;", torch.int32, values).tolist() == [v for v in expected for _ in range(32)]


# matrices in a warp's registers


def matrices_of_shared_memory(body, image, addresses, registers):
    """`image`, of 512 words, in shared memory; each lane's address in %r5; its `registers` from %r10 on after `body`."""
    four = "{%r6, %r7, %r8, %r9}"
    fill = "".join(f"ld.global.v4.b32 {four}, [%rd5+{512 * i}]; st.shared.v4.b32 [%r5+{512 * i}], {four};\n" for i in range(4))
    out = torch.zeros(32, registers, dtype=torch.int32)
    body = f"""
    shl.b32 %r5, %r1, 4; mad.wide.u32 %rd5, %r1, 16, %rd2;
    {fill}
    mad.wide.u32 %rd5, %r1, 4, %rd3; ld.global.b32 %r5, [%rd5];
    {body}
    mad.wide.u32 %rd5, %r1, {4 * registers}, %rd1;
    {"".join(f"st.global.b32 [%rd5+{4 * i}], %r{10 + i};" for i in range(registers))}
    """
    launch(body, out, image, addresses, shared=2048)
    return out


def words(n, seed=0):
    return torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int64).int()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    """Lane 8 j + i says where row i of matrix j is; lane l gets elements (l / 4, 2 (l % 4)) and the next of each, of the transpose if asked for."""
    image, rows = words(512), torch.randperm(128, generator=torch.Generator().manual_seed(2))[:32].int()
    names = [f"%r{10 + i}" for i in range(count)]
    got = matrices_of_shared_memory(
        f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16 {{{', '.join(names)}}}, [%r5];", image, rows * 16, count
    )
    elements = image.view(torch.int16).view(128, 8)
    expected = torch.zeros(32, count, 2, dtype=torch.int16)
    for lane in range(32):
        for matrix in range(count):
            for half in range(2):
                row, column = lane // 4, lane % 4 * 2 + half
                if transposed:
                    row, column = column, row
                expected[lane, matrix, half] = elements[rows[8 * matrix + row], column]
    assert torch.equal(got.view(torch.int16).view(32, count, 2), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_is_ldmatrix_back(count, transposed):
    """Loaded from rows in an order and stored to other rows: those have been copied. Further lanes' addresses are not looked at."""
    image, rows = words(512), torch.cat([torch.randperm(64)[: 8 * count], torch.full((32 - 8 * count,), 10**6)]).int()
    names, kind = ", ".join(f"%r{20 + i}" for i in range(count)), f"x{count}{'.trans' if transposed else ''}"
    body = f"""
    ldmatrix.sync.aligned.m8n8.{kind}.shared.b16 {{{names}}}, [%r5];
    add.s32 %r5, %r5, 1024;
    stmatrix.sync.aligned.m8n8.{kind}.shared.b16 [%r5], {{{names}}};
    shl.b32 %r5, %r1, 5;
    """ + "".join(f"ld.shared.b32 %r{10 + i}, [%r5+{1024 + 4 * i}];" for i in range(8))  # fmt: skip
    got = matrices_of_shared_memory(body, image, rows * 16, 8).view(64, 4)
    image, expected = image.view(128, 4), image.view(128, 4)[64:].clone()
    for row in rows[: 8 * count]:
        expected[row] = image[row]
    assert torch.equal(got, expected)


def fragments(place, matrix, per):
    """Each lane's registers, (32, registers), of a matrix: element e of a lane, `per` of them in a register, is the one at place(lane, e)."""
    count = matrix.numel() // 32
    chosen = torch.stack([torch.stack([matrix[place(lane // 4, lane % 4, e)] for e in range(count)]) for lane in range(32)])
    return chosen.view(torch.int32).view(32, count // per).contiguous()


# of the PTX manual: (row, column) of a lane's element by groupID, threadID_in_group and the element's number
A16 = lambda g, t, e: (g if e < 2 or 4 <= e < 6 else g + 8, t * 2 + (e & 1) if e < 4 else t * 2 + (e & 1) + 8)  # noqa: E731
B16 = lambda g, t, e: (t * 2 + (e & 1) if e < 2 else t * 2 + (e & 1) + 8, g)  # noqa: E731
A8 = lambda g, t, e: (g if e in (0, 2) else g + 8, t if e < 2 else t + 4)  # noqa: E731
B8 = lambda g, t, e: (t if e == 0 else t + 4, g)  # noqa: E731
C = lambda g, t, e: (g if e < 2 else g + 8, t * 2 + (e & 1))  # noqa: E731


@pytest.mark.parametrize("kind, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16), ("tf32", torch.float32)])
def test_mma(kind, dtype):
    """Two warps, of which one multiplies; whole numbers, so that the result is exact."""
    k, per, place_a, place_b = (8, 1, A8, B8) if kind == "tf32" else (16, 2, A16, B16)
    generator = torch.Generator().manual_seed(3)
    a, b, c = (torch.randint(-8, 9, shape, generator=generator).float() for shape in ((16, k), (k, 8), (16, 8)))
    out, parts = torch.zeros(32, 4, dtype=torch.int32), [fragments(place_a, a.to(dtype), per), fragments(place_b, b.to(dtype), per), fragments(C, c, 1)]
    loads = "".join(
        f"mad.wide.u32 %rd9, %r3, {4 * x.shape[1]}, %rd{i + 2};" + "".join(f"ld.global.b32 %r{10 * (i + 1) + j}, [%rd9+{4 * j}];" for j in range(x.shape[1]))
        for i, x in enumerate(parts)
    )
    names = ["{" + ", ".join(f"%r{at + j}" for j in range(n)) + "}" for at, n in ((40, 4), (10, parts[0].shape[1]), (20, parts[1].shape[1]), (30, 4))]
    body = f"""
    {loads}
    setp.eq.s32 %p1, %r4, 1;
    @%p1 mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {", ".join(names)};
    mad.wide.u32 %rd9, %r3, 16, %rd1;
    @%p1 st.global.v4.b32 [%rd9], {{%r40, %r41, %r42, %r43}};
    """
    launch(body, out, *parts, threads=64)
    assert torch.equal(out, fragments(C, a @ b + c, 1))
    refused("only a part of it runs", body.replace("setp.eq.s32 %p1, %r4, 1", "setp.gt.s32 %p1, %r1, 40"), out, *parts, threads=64)


def test_ten_bits_of_a_fraction():
    """tf32 leaves out the lower thirteen."""
    body = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r0, %r5, %r6, %r7}, {%r8, %r8, %r8, %r8}, {%r9, %r9}, {%r10, %r10, %r10, %r10};"
    got = lanes(f"mov.b32 %r8, {0x3F803FFF:#x}; mov.b32 %r9, 0f3F800000; mov.b32 %r10, 0; {body}", out=torch.float32)
    assert set(got.tolist()) == {8 * (1 + 2.0**-10)}


# shared memory

ADDRESS = "shl.b32 %r5, %r1, 2; xor.b32 %r6, %r5, {apart};\n"


def exchange(between, apart=128, first="st.shared.b32 [%r5], %r1;", second="ld.shared.b32 %r0, [%r6];"):
    return ADDRESS.format(apart=apart) + first + between + second


def test_what_another_warp_stored():
    assert lanes(exchange("bar.sync 0;"), threads=64, grid=(3,), shared=256).tolist() == [i ^ 32 for i in range(64)] * 3
    assert lanes(exchange("barrier.sync 0;"), threads=64, shared=256).tolist() == [i ^ 32 for i in range(64)]
    assert lanes(exchange("", apart=4), threads=64, shared=256).tolist() == [i ^ 1 for i in range(64)]
    assert lanes(exchange("bar.warp.sync -1;", apart=64), threads=64, shared=256).tolist() == [i ^ 16 for i in range(64)]
    refused("kernels.py:7: a load of shared memory that another warp has stored to", exchange(""), threads=64, shared=256)
    refused("a load of shared memory that another warp has stored to", exchange("bar.warp.sync -1;"), threads=64, shared=256)
    again = exchange("bar.sync 0;") + "bar.sync 0; st.shared.b32 [%r5], %r1;"
    refused("a load of shared memory that another warp has stored to", again + "ld.shared.b32 %r0, [%r6];", threads=64, shared=256)
    assert lanes(again + "bar.sync 0; ld.shared.b32 %r0, [%r6];", threads=64, shared=256).tolist() == [i ^ 32 for i in range(64)]


def test_what_another_warp_loaded_or_stored_may_not_be_stored_to():
    load = "ld.shared.b32 %r0, [%r5];"
    refused("another warp has loaded since", exchange("", first=load, second="st.shared.b32 [%r6], %r1;"), threads=64, shared=256)
    refused("another warp has stored to since", exchange("", second="st.shared.b32 [%r6], %r1;"), threads=64, shared=256)
    launch(exchange("bar.sync 0;", first=load, second="st.shared.b32 [%r6], %r1;"), threads=64, shared=256)
    launch(exchange("bar.sync 0;", second="st.shared.b32 [%r6], %r1;"), threads=64, shared=256)
    launch(exchange("", apart=4, first=load, second="st.shared.b32 [%r6], %r1;"), threads=64, shared=256)
    launch(exchange("", first=load, second="ld.shared.b32 %r6, [%r6];"), threads=64, shared=256)
    vectors = "shl.b32 %r5, %r4, 4; st.shared.v4.b32 [%r5], {1, 1, 1, 1}; xor.b32 %r5, %r5, 28; ld.shared.b32 %r0, [%r5];"
    refused("a load of shared memory that another warp has stored to", vectors, threads=64, shared=32)
    half = vectors.replace("28", "30").replace("ld.shared.b32", "ld.shared.u16")
    refused("a load of shared memory that another warp has stored to", half, threads=64, shared=32)


def test_a_barrier_of_one_program_is_none_of_another():
    body = exchange("setp.eq.s32 %p1, %r2, 0; @%p1 bar.sync 0;")
    refused("another warp has stored to", body, threads=64, grid=(2,), shared=256)
    launch(body.replace("%r2, 0", "%r2, 9; not.pred %p1, %p1"), threads=64, grid=(2,), shared=256)


def test_a_barrier_that_a_part_of_a_program_reaches():
    part = "setp.eq.s32 %p1, %r4, 1; @%p1 bar.sync 0;"
    refused("a barrier that a part of a program's threads reaches", part, threads=64)
    refused("a barrier that a part of a program's threads reaches", part, threads=64, grid=(2,))
    refused("a barrier that a part of a program's threads reaches", "setp.eq.s32 %p1, %r1, 1; @%p1 bar.sync 0;", threads=32)
    two = "setp.eq.s32 %p1, %r4, 1; @%p1 bra THERE;\nbar.sync 0; bra.uni END;\nTHERE:\nbar.sync 0;\nEND:\n"
    refused("a barrier that a part of a program's threads reaches", two, threads=64)
    launch(part.replace("%r4", "%r2"), threads=64, grid=(2,))
    launch("setp.eq.s32 %p1, %r4, 1; @%p1 ret; bar.sync 0;", threads=64)  # the others have left


def test_two_values_for_one_place():
    refused("two threads store different values to one place of shared memory", "mov.b32 %r5, 8; st.shared.b32 [%r5], %r1;", shared=64)
    refused("two threads store different values to one place", "shl.b32 %r5, %r1, 1; and.b32 %r5, %r5, 60; st.shared.v2.b16 [%r5], {1, %r1};", shared=64)
    assert set(lanes("mov.b32 %r5, 8; st.shared.b32 [%r5], 7; ld.shared.b32 %r0, [%r5];", shared=64).tolist()) == {7}


@pytest.mark.parametrize("statement", ["st.shared.b32 [%r5], 1;", "ld.shared.b32 %r0, [%r5];", "cp.async.ca.shared.global [%r5], [%rd1], 4;"])
def test_shared_memory_has_an_end(statement):
    """And a beginning; it need not end at a round number."""
    x = torch.zeros(4)
    refused("shared memory at 100 of 100 bytes", f"mov.b32 %r5, 100; {statement}", x, shared=100)
    refused("shared memory at", f"mov.b32 %r5, -4; {statement}", x, shared=100)
    refused("shared memory at 0 of 0 bytes", f"mov.b32 %r5, 0; {statement}", x)
    launch(f"setp.eq.s32 %p1, %r1, 0; mov.b32 %r5, 96; @%p1 {statement}", x, shared=100)
    refused("4 bytes of shared memory at 98, which is no multiple of 4", f"mov.b32 %r5, 98; {statement}", x, shared=102)


def test_vectors_of_shared_memory_are_aligned():
    refused("16 bytes of shared memory at 8, which is no multiple of 16", "mov.b32 %r5, 8; ld.shared.v4.b32 {%r6, %r7, %r8, %r9}, [%r5];", shared=64)
    refused("8 bytes of shared memory at 4", "mov.b32 %r5, 4; st.shared.v2.b32 [%r5], {%r6, %r7};", shared=64)
    refused("16 bytes of shared memory at 8", "mov.b32 %r5, 8; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r6}, [%r5];", shared=64)
    assert lanes("mov.b32 %r5, global_smem; shl.b32 %r6, %r1, 2; add.s32 %r5, %r5, %r6; ld.shared.b32 %r0, [%r5];", out=torch.float32, shared=128).isnan().all()


def test_programs_have_shared_memory_of_their_own():
    body = "mov.b32 %r5, 0; st.shared.b32 [%r5], %r2; bar.sync 0; ld.shared.b32 %r0, [%r5];"
    assert lanes(body, threads=64, grid=(5,), shared=1025).tolist() == [p for p in range(5) for _ in range(64)]


# copies in flight

COPY = "shl.b32 %r5, %r1, 2; mad.wide.u32 %rd5, %r1, 4, %rd2; cp.async.ca.shared.global [%r5], [%rd5], 4;\n"
VALUES = torch.arange(64, dtype=torch.int32) + 100
LOAD = "ld.shared.b32 %r0, [%r5];"


def test_a_copy_arrives_when_it_is_waited_for():
    for wait in ("cp.async.commit_group; cp.async.wait_group 0;", "cp.async.wait_all;"):
        assert lanes(COPY + wait + LOAD, VALUES, shared=128).tolist() == VALUES[:32].tolist()
    everywhere = COPY + "cp.async.commit_group; cp.async.wait_group 0; bar.sync 0; xor.b32 %r5, %r5, 128;" + LOAD
    assert lanes(everywhere, VALUES, threads=64, grid=(2,), shared=256).tolist() == VALUES.roll(32).tolist() * 2


def test_copies_of_sixteen_bytes_and_of_none():
    body = """
    shl.b32 %r5, %r1, 4; mad.wide.u32 %rd5, %r1, 16, %rd2; setp.lt.s32 %p1, %r1, 3; selp.b32 %r6, 16, 0, %p1;
    selp.b64 %rd5, %rd5, -1, %p1;
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd5 + 0 ], 0x10, %r6;
    cp.async.commit_group; cp.async.wait_group 0; shl.b32 %r5, %r1, 2;
    """
    assert lanes(body + LOAD, VALUES[:12].clone(), shared=512).tolist() == VALUES[:12].tolist() + [0] * 20
    refused("a copy of a part", body.replace("16, 0, %p1", "16, 8, %p1"), torch.zeros(64), VALUES, shared=512)
    refused("outside the tensors", body.replace("16, 0, %p1", "16, 16, %p1"), torch.zeros(64), VALUES, shared=512)


def test_a_copy_in_flight_is_left_alone():
    x = torch.zeros(64, dtype=torch.int32)
    for before in (COPY, COPY + "cp.async.commit_group;", COPY + "cp.async.commit_group; cp.async.wait_group 1;", COPY + "cp.async.wait_group 0;"):
        refused("a load of shared memory into which a copy is in flight", before + LOAD, x, VALUES, shared=128)
        refused("a store to shared memory into which a copy is in flight", before + "st.shared.b32 [%r5], 1;", x, VALUES, shared=128)
        refused("a store to shared memory into which a copy is in flight", before + "cp.async.ca.shared.global [%r5], [%rd5], 4;", x, VALUES, shared=128)
    refused("two threads copy to one place", COPY.replace("shl.b32 %r5, %r1, 2", "mov.b32 %r5, 0"), x, VALUES, shared=128)


def test_copies_need_a_barrier_too():
    x = torch.zeros(64, dtype=torch.int32)
    done = "cp.async.commit_group; cp.async.wait_group 0;"
    refused("a load of shared memory that another warp has stored to", COPY + done + "xor.b32 %r5, %r5, 128;" + LOAD, x, VALUES, threads=64, shared=256)
    early = COPY + "bar.sync 0;" + done + "xor.b32 %r5, %r5, 128;" + LOAD
    refused("a load of shared memory that another warp has stored to", early, x, VALUES, threads=64, shared=256)
    loaded = "shl.b32 %r5, %r1, 2; xor.b32 %r5, %r5, 128;" + LOAD
    refused("another warp has loaded", loaded + COPY, x, VALUES, threads=64, shared=256)
    launch(loaded + "bar.sync 0;" + COPY + done, x, VALUES, threads=64, shared=256)
    of_one_warp = COPY + "cp.async.commit_group; setp.eq.s32 %p1, %r4, 0; @%p1 cp.async.wait_group 0; bar.sync 0;"
    refused("a copy is in flight", of_one_warp + LOAD, x, VALUES, threads=64, shared=256)
    launch(of_one_warp + "@%p1 " + LOAD, x, VALUES, threads=64, shared=256)


def test_the_newest_groups_stay_in_flight():
    body = """
    cp.async.commit_group;
    add.s32 %r6, %r5, 128;
    cp.async.ca.shared.global [%r6], [%rd5+128], 4;
    cp.async.commit_group;
    cp.async.wait_group 1;
    """
    assert lanes(COPY + body + LOAD, VALUES, shared=256).tolist() == VALUES[:32].tolist()
    refused("a load of shared memory into which", COPY + body + "ld.shared.b32 %r0, [%r6];", VALUES, VALUES, shared=256)
    assert lanes(COPY + body + "cp.async.wait_group 0; ld.shared.b32 %r0, [%r6];", VALUES, shared=256).tolist() == VALUES[32:].tolist()
    assert lanes(COPY + body + "cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r0, [%r6];", VALUES, shared=256).tolist() == VALUES[32:].tolist()


def test_what_was_there_before_a_copy_is_gone_after_it():
    """The bytes are those of global memory when the copy began, or later: here before another store to them."""
    x = VALUES.clone()
    body = COPY + "cp.async.commit_group; cp.async.wait_group 0; st.global.b32 [%rd5], 0;" + LOAD
    assert lanes(body, x, shared=128).tolist() == VALUES[:32].tolist() and x[:32].eq(0).all()


# matrices of four warps

# by the swizzle's bytes: the descriptor's mode
MODE = {0: 0, 32: 3, 64: 2, 128: 1}
K = 64


def place(swizzle, across, rows, r, k):
    """The byte where element (r, k) of a matrix of `rows` x K is stored; `across`: elements of one k lie side by side, not those of one row.

    Without a swizzle, 8 x 8 elements lie together. Otherwise, 8 lines of as many bytes as the swizzle has; of those, pieces of 16 change places.
    """
    r, k, rows, columns = (k, r, K, rows) if across else (r, k, rows, K)  # lines, and the elements in a line
    if not swizzle:
        tile = r // 8 * (columns // 8) + k // 8
        return tile * 128 + r % 8 * 16 + k % 8 * 2
    per = swizzle // 2
    tile = k // per * (rows // 8) + r // 8
    line, piece = r % 8, k % per // 8
    piece ^= {32: line // 4, 64: line // 2, 128: line}[swizzle]
    return tile * 8 * swizzle + line * swizzle + piece * 16 + k % 8 * 2


def descriptor(swizzle, across, rows, begin, part):
    """Of the sixteen columns from 16 * part on, of a matrix at `begin`: where they begin, and the distances between tiles."""
    lines, columns = (K, rows) if across else (rows, K)
    if not swizzle:
        down, right = columns // 8 * 128, 128  # to the next tile of lines, of elements in a line
        leading, stride, apart = (down, right, 2 * down) if across else (right, down, 2 * right)
    else:
        down, right = 8 * swizzle, lines // 8 * 8 * swizzle
        leading, stride = right, down
        apart = 2 * down if across else None
    if apart is None:  # within a line, and then in the next tile to the right
        begin += part * 32 // swizzle * right + part * 32 % swizzle
    else:
        begin += part * apart
    return begin >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | MODE[swizzle] << 62


def image_of(matrix, swizzle, across, dtype):
    """The bytes of a matrix with 64 columns in shared memory."""
    elements = torch.zeros(matrix.numel(), dtype=dtype)
    for r in range(len(matrix)):
        for k in range(K):
            elements[place(swizzle, across, len(matrix), r, k) // 2] = matrix[r, k].to(dtype)
    return elements


def whole_numbers(*shape, seed=0):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


FENCE, BARRIER = "fence.proxy.async.shared::cta;", "bar.sync 0;"
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned {};"
DONE = COMMIT + WAIT.format(0)


def braces(first, count):
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def product(n, a, b, kind="bf16", keep="1", across=(0, 0)):
    """One instruction: 64 x n sums from %r50 on."""
    turned = f"{across[0]}, {across[1]}" if a.startswith("%rd") else f"{across[1]}"
    return f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {braces(50, n // 2)}, {a}, {b}, {keep}, 1, 1, {turned};"


def in_shared_memory(body, *tensors, out, size, threads=128):
    """`body` after `size` bytes have been copied from the second tensor; then %r50 on, into `out`, (threads, registers)."""
    each, count = size // threads, out.shape[1]
    copies = "".join(f"ld.global.v4.b32 {braces(6, 4)}, [%rd9+{at}]; st.shared.v4.b32 [%r5+{at}], {braces(6, 4)};" for at in range(0, each, 16))
    stores = "".join(f"st.global.b32 [%rd9+{4 * i}], %r{50 + i};" for i in range(count))
    body = f"""
    mul.lo.s32 %r5, %r1, {each}; mad.wide.u32 %rd9, %r1, {each}, %rd2;
    {copies}
    {body}
    mad.wide.u32 %rd9, %r1, {4 * count}, %rd1;
    {stores}
    """
    launch(body, out, *tensors, threads=threads, shared=size)
    return out


def wide_fragments(matrix):
    """(threads, registers): the PTX manual's D of wgmma; warp w has rows 16 w to 16 w + 15."""
    n = matrix.shape[1]
    out = torch.zeros(128, n // 2)
    for thread in range(128):
        for e in range(n // 2):
            row, column = thread // 32 * 16 + thread % 32 // 4 + 8 * (e // 2 % 2), 8 * (e // 4) + thread % 4 * 2 + e % 2
            out[thread, e] = matrix[row, column]
    return out


A, B = whole_numbers(64, K, seed=1), whole_numbers(64, K, seed=2)


@pytest.mark.parametrize("across", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("swizzles", [(0, 128), (128, 64), (64, 32), (32, 0)])
def test_wgmma(swizzles, across):
    """All of K in four instructions, of which the first does not add."""
    kind, dtype = [("bf16", torch.bfloat16), ("f16", torch.float16)][across[0]]
    images = torch.cat([image_of(x, s, t, dtype) for x, s, t in zip((A, B), swizzles, across, strict=True)])
    descriptors = [descriptor(s, t, 64, begin, part) for part in range(4) for s, t, begin in zip(swizzles, across, (0, 8192), strict=True)]
    body = FENCE + BARRIER + "wgmma.fence.sync.aligned;" + "".join(f"mov.b64 %rd{10 + i}, {d:#x};" for i, d in enumerate(descriptors))
    body += "".join(f"mov.b32 %r{50 + i}, 0f7F800000;" for i in range(32))  # not to be added to
    for part in range(4):
        body += product(64, f"%rd{10 + 2 * part}", f"%rd{11 + 2 * part}", kind, ["0", "1"][part > 0], across)
    got = in_shared_memory(body + DONE, images, out=torch.zeros(128, 32), size=16384)
    assert torch.equal(got, wide_fragments(A @ B.T))


def simple(between=FENCE + BARRIER, after=DONE, keep="1", before=""):
    """A B' of eight of B's rows, of one instruction without a swizzle, added to the lane's number."""
    starts = "".join(f"cvt.rn.f32.u32 %r{50 + i}, %r3;" for i in range(4))
    descriptors = f"mov.b64 %rd10, {descriptor(0, 0, 64, 0, 1):#x}; mov.b64 %rd11, {descriptor(0, 0, 64, 8192, 1):#x};"
    return between + starts + descriptors + before + "wgmma.fence.sync.aligned;" + product(8, "%rd10", "%rd11", keep=keep) + after


IMAGES = torch.cat([image_of(A, 0, 0, torch.bfloat16), image_of(B, 0, 0, torch.bfloat16)])
SUMS = wide_fragments(A[:, 16:32] @ B[:8, 16:32].T)
LANE = torch.arange(128)[:, None] % 32


def multiply(body, registers=4, **options):
    return in_shared_memory(body, IMAGES, out=torch.full((128, registers), 5.0), size=16384, **options)


def test_sums_are_kept_where_a_predicate_says_so():
    assert torch.equal(multiply(simple()), SUMS + LANE)
    assert torch.equal(multiply(simple(keep="0")), SUMS)
    assert torch.equal(multiply(simple(keep="%p1", before="setp.eq.s32 %p1, %r4, %r4;")), SUMS + LANE)
    assert torch.equal(multiply(simple(keep="%p1", before="setp.ne.s32 %p1, %r4, %r4;")), SUMS)


@pytest.mark.parametrize("n, across", [(8, 0), (24, 0), (64, 0), (24, 1)])
def test_the_first_matrix_in_registers(n, across):
    """across: B's elements of one row of K lie side by side."""
    parts = torch.cat([fragments(A16, A[16 * w : 16 * w + 16, 16:32].bfloat16(), 2) for w in range(4)])
    loads = "mad.wide.u32 %rd9, %r1, 16, %rd3;" + "".join(f"ld.global.b32 %r{40 + i}, [%rd9+{4 * i}];" for i in range(4))
    body = f"{FENCE}{BARRIER}{loads} mov.b64 %rd11, {descriptor(128, across, 64, 0, 1):#x}; wgmma.fence.sync.aligned;"
    body += product(n, braces(40, 4), "%rd11", keep="0", across=(0, across)) + DONE
    got = in_shared_memory(body, image_of(B, 128, across, torch.bfloat16), parts, out=torch.zeros(128, n // 2), size=8192)
    assert torch.equal(got, wide_fragments(A[:, 16:32] @ B[:n, 16:32].T))


def test_sums_are_there_when_they_are_waited_for():
    for after in ("", COMMIT, COMMIT + WAIT.format(1), WAIT.format(0)):
        assert multiply(simple(after=after)).isnan().all()
    another = product(8, "%rd10", "%rd11")
    twice = multiply(simple(after=another + DONE))
    assert torch.equal(twice, 2 * SUMS + LANE)
    assert multiply(simple(after=COMMIT + another + COMMIT + WAIT.format(1))).isnan().all()  # the newest group's sums
    others = another.replace(braces(50, 4), braces(60, 4))
    move = "".join(f"mov.b32 %r{50 + i}, %r{60 + i};" for i in range(4))
    zero = "".join(f"mov.b32 %r{60 + i}, 0;" for i in range(4))
    assert torch.equal(multiply(simple(before=zero, after=COMMIT + others + COMMIT + WAIT.format(1))), SUMS + LANE)
    assert multiply(simple(before=zero, after=COMMIT + others + COMMIT + WAIT.format(1) + move)).isnan().all()
    assert torch.equal(multiply(simple(before=zero, after=COMMIT + others + DONE + move)), SUMS)


STORE = "st.shared.b32 [%r5], 1;"  # of each thread, into every tile of either matrix


@pytest.mark.parametrize("what, body", [
    ("stored to without a fence", simple(BARRIER)),
    ("stored to since the newest barrier", simple(FENCE)),
    ("stored to since the newest barrier", simple(BARRIER + FENCE.join([STORE, ""]))),
    ("stored to without a fence", simple(FENCE + STORE + BARRIER)),
    ("stored to without a fence", simple("setp.lt.s32 %p1, %r4, 2; @%p1 " + FENCE + BARRIER)),
    ("that a matrix instruction may still read", simple(after=STORE)),
    ("that a matrix instruction may still read", simple(after=COMMIT + STORE)),
    ("that a matrix instruction may still read", simple(after=COMMIT + WAIT.format(1) + BARRIER + STORE)),
    ("that a matrix instruction may still read", simple(after=COMMIT + "cp.async.ca.shared.global [%r5], [%rd2], 16;")),
    ("another warp has loaded", simple(after=DONE + STORE)),
    ("another warp has loaded", simple(after=DONE + "setp.eq.s32 %p1, %r4, 0; @%p1 " + STORE)),  # which the first has loaded too
    ("of four warps where only a part of them runs", "setp.lt.s32 %p1, %r4, 2;" + simple().replace("wgmma.mma", "@%p1 wgmma.mma")),
    ("of a whole warp where only a part of it runs", "setp.ne.s32 %p1, %r3, 2;" + simple().replace("wgmma.mma", "@%p1 wgmma.mma")),
    ("give different descriptors", simple(before="cvt.u64.u32 %rd11, %r1;")),
    ("reads shared memory at", simple(before=f"mov.b64 %rd11, {descriptor(0, 0, 64, 16384, 0):#x};")),
    ("a matrix instruction reads shared memory into which a copy is in flight", simple(FENCE + "cp.async.ca.shared.global [%r5], [%rd2], 16;" + BARRIER)),
])  # fmt: skip
def test_what_goes_wrong_with_matrices(what, body):
    with pytest.raises(MemoryFault, match=what):
        multiply(body)


def test_what_is_in_order_with_matrices():
    assert torch.equal(multiply(simple(after=DONE + BARRIER + STORE)), SUMS + LANE)
    elsewhere = "setp.eq.s32 %p1, %r1, 0; @%p1 " + STORE  # other columns than those of the product
    assert torch.equal(multiply(simple(after=elsewhere + DONE)), SUMS + LANE)


def test_two_groups_of_four_warps():
    """Each its own: warps 2 to 5 are none."""
    body = simple(before="setp.ge.s32 %p1, %r4, 4;").replace("wgmma.mma", "@%p1 wgmma.mma")
    got = in_shared_memory(body, IMAGES, out=torch.zeros(256, 4), size=16384, threads=256)
    assert torch.equal(got, torch.cat([LANE.float().expand(128, 4), SUMS + LANE]))
    middle = body.replace("%p1, %r4, 4;", "%p1, %r4, 2; setp.lt.and.s32 %p1, %r4, 6, %p1;")
    with pytest.raises(MemoryFault, match="of four warps where only a part of them runs"):
        in_shared_memory(middle, IMAGES, out=torch.zeros(256, 4), size=16384, threads=256)


# global memory


def test_outside_the_tensors():
    x, y = torch.zeros(8), torch.zeros(8)
    for statement in ("ld.global.b32 %r0, [%rd1+{}];", "st.global.b32 [%rd1+{}], %r0;", "cp.async.ca.shared.global [%r9], [%rd1+{}], 4;"):
        for offset in (32, -4, 2048, 2**30, -(2**30)):  # between the two, and far from any
            statement_ = "setp.eq.s32 %p1, %r1, 0; mov.b32 %r9, 0; @%p1 " + statement.format(offset)
            refused(r"4 bytes at 0x\w+ lie outside the tensors of the launch: p1 at 0x\w+ of 32 bytes, p2 at", statement_, x, y, shared=64)
        launch("setp.eq.s32 %p1, %r1, 0; mov.b32 %r9, 0; @%p1 " + statement.format(28), x, y, shared=64)
    refused("lie outside", "ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd1+16];", torch.zeros(7))
    refused("lie outside", "sub.s64 %rd3, %rd2, %rd1; ld.global.b32 %r0, [%rd3];", x, y)


def test_global_memory_is_aligned():
    x = torch.zeros(64)
    refused("4 bytes at 0x[0-9a-f]+, which is no multiple of 4", "ld.global.b32 %r0, [%rd1+2];", x)
    refused("16 bytes at .* which is no multiple of 16", "st.global.v4.b32 [%rd1+8], {%r5, %r5, %r5, %r5};", x)
    refused("8 bytes at .* which is no multiple of 8", "ld.global.b64 %rd3, [%rd1];", x[1:])  # where a view begins counts
    launch("ld.global.v2.b32 {%r5, %r6}, [%rd1];", x[2:])
    buffer = np.zeros(512, np.uint8)
    begin = -buffer.ctypes.data % 256 + 8
    refused("16 bytes at .* which is no multiple of 16", "ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd1];", torch.from_numpy(buffer[begin:]))
    launch("ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd1+8];", torch.from_numpy(buffer[begin:]))


def test_views():
    """A view begins at its offset and may go beyond what it shows; what is stored lands in the tensor that it is of."""
    whole = torch.arange(24, dtype=torch.int32).view(4, 6)
    view, turned = whole[1:, 2:4], whole.t()
    body = "mad.wide.u32 %rd3, %r1, 24, %rd1; setp.lt.s32 %p1, %r1, 3; @%p1 ld.global.b32 %r5, [%rd3]; add.s32 %r5, %r5, 100; @%p1 st.global.b32 [%rd3], %r5;"
    launch(body, view)
    assert whole.tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 108, 9, 10, 11], [12, 13, 114, 15, 16, 17], [18, 19, 120, 21, 22, 23]]
    launch("setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1+4], -1; @%p1 st.global.b32 [%rd2+-32], -2;", turned, view)  # one storage, twice
    assert whole[0].tolist() == [-2, -1, 2, 3, 4, 5] and whole[1:].min() > 0


MINE = "mad.lo.s32 %r5, %r2, 64, %r1; mad.wide.u32 %rd5, %r5, 4, %rd1;"


def test_programs_may_not_meet_in_memory():
    x = torch.zeros(256, dtype=torch.int32)
    launch(MINE + "st.global.b32 [%rd5], %r5; ld.global.b32 %r6, [%rd5];", x, threads=64, grid=(4,))
    assert x.tolist() == list(range(256))
    refused("kernel: two programs store to byte 0 of p1", "setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1], 7;", x, grid=(2,))
    refused("kernel: two programs store to byte 0 of p1", "setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1], 7;", x, threads=1024, grid=(5,))
    other = "xor.b32 %r6, %r5, 64; mad.wide.u32 %rd6, %r6, 4, %rd1;"
    refused("a program stores what another loads, byte", MINE + other + "st.global.b32 [%rd5], %r5; ld.global.b32 %r6, [%rd6];", x, threads=64, grid=(2,))
    refused("a program stores what another loads, byte", MINE + other + "ld.global.b32 %r6, [%rd6]; st.global.b32 [%rd5], %r5;", x, threads=64, grid=(4,))
    refused("a program stores what another loads, byte", MINE + "ld.global.b8 %rs1, [%rd1+3]; st.global.b32 [%rd5], %r5;", x, threads=64, grid=(2,))
    copy = MINE + "st.global.b32 [%rd5], %r5; mov.b32 %r6, 0; setp.eq.s32 %p1, %r1, 0; @%p1 cp.async.ca.shared.global [%r6], [%rd1], 4;"
    refused("a program stores what another loads, byte 0", copy, x, threads=64, grid=(2,), shared=16)
    launch(MINE + "ld.global.b32 %r6, [%rd2]; st.global.b32 [%rd5], %r6;", x, VALUES, threads=64, grid=(4,))
    assert x.eq(100).all()


def test_warps_may_not_meet_in_memory_without_a_barrier():
    x = torch.zeros(64, dtype=torch.int32)
    store, load = "st.global.b32 [%rd5], %r5;", "ld.global.b32 %r7, [%rd6];"
    other = MINE + "xor.b32 %r6, %r5, 32; mad.wide.u32 %rd6, %r6, 4, %rd1;"
    again = "st.global.b32 [%rd6], %r5;"
    message = "a warp stores, without a barrier between them, what another loads, byte 128 of p1"
    refused(message, other + store + load, x, threads=64)
    refused(message, other + load + store, x, threads=64)
    refused(message, other + store + BARRIER + store + load, x, threads=64)
    refused("two warps store, without a barrier between them, to byte 0 of p1", other + store + again, x, threads=64)
    for between in (store + BARRIER + load, load + BARRIER + store, store + BARRIER + again, store + "bar.warp.sync -1;" + "ld.global.b32 %r7, [%rd5];"):
        launch(other + between, x, threads=64)
    neighbour = other.replace("%r5, 32", "%r5, 1")
    launch(neighbour + store + load + again, x, threads=64)  # of one warp
    assert x.tolist() == [i ^ 1 for i in range(64)]


def test_two_values_for_one_element():
    x = torch.zeros(4, dtype=torch.int32)
    refused("two threads store different values to byte 4 of p1", "st.global.b32 [%rd1+4], %r1;", x)
    launch("st.global.b32 [%rd1+4], 8;", x)
    assert x.tolist() == [0, 8, 0, 0]


def test_large_tensors_are_held_to_their_bounds_alone(monkeypatch):
    from ptx import memory

    monkeypatch.setattr(memory, "TRACKED_BYTES", 255)
    x = torch.zeros(64, dtype=torch.int32)
    launch("setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1], 7;", x, grid=(2,))
    both = "setp.eq.s32 %p1, %r1, 0; selp.b64 %rd3, %rd1, %rd2, %p1; st.global.b32 [%rd3], 7;"
    refused("two programs store to byte 0 of p2", both, x, torch.zeros(4), grid=(2,))
    refused("outside", "ld.global.b32 %r0, [%rd1+256];", x)
    monkeypatch.setattr(memory, "TRACKED_BYTES", 256)
    refused("two programs", "setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1], 7;", x, grid=(2,))


def test_nothing_is_given_back_after_a_fault():
    x = torch.zeros(64, dtype=torch.int32)
    refused("two programs", "setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1], 7;", x, grid=(2,))
    assert not x.any()


# kernels


def planted():
    """A good launch, then faults that must be found out; in a process of its own."""
    import ptx

    ptx.apply("sm_90")
    from mtp_kernels.triton import _device

    for barrier, offset, elements in ((True, 0, 256), (False, 0, 256), (True, 1, 256), (True, 128, 384)):
        x, y = torch.arange(elements, dtype=torch.float32), torch.zeros(256)
        try:
            _device.launch(turned_kernel, (2,), x, y, OFFSET=offset, BARRIER=barrier, BLOCK=128, num_warps=4)
            print(torch.equal(x[:256], torch.arange(1.0, 257)), torch.equal(y, x[:256].view(2, 128).flip(1).reshape(-1)))
        except MemoryFault as fault:
            print(fault)


def run(target, *arguments):
    """A process in which Triton is not interpreted; its CPU is all that it has."""
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT))), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TEST_PTX": target}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)


needs_triton = pytest.mark.skipif("TEST_PTX" in os.environ or not importlib.util.find_spec("triton"), reason="no Triton, or this is such a process")


@needs_triton
def test_planted_faults_are_found_out():
    result = run("sm_90", "-c", "import test_ptx; test_ptx.planted()")
    assert result.returncode == 0, result.stdout + result.stderr
    good, race, outside, programs = result.stdout.splitlines()
    assert good == "True True"
    assert race == "turned_kernel: a warp stores, without a barrier between them, what another loads, byte 508 of x_ptr"
    assert re.match(r"turned_kernel, test_ptx\.py:\d+: 4 bytes at 0x\w+ lie outside the tensors of the launch: x_ptr at", outside)
    assert programs == "turned_kernel: a program stores what another loads, byte 512 of x_ptr"


# of each file, some tests that run its kernels, in bfloat16 where there is a choice
KERNEL_TESTS = {
    "attention": [
        "test_attention[quadratic-3-starts5-heads5-40-dtype5]", "test_attention[masks-4-starts11-heads11-64-dtype11]",
        "test_an_ntp_row_has_the_same_bits_in_every_step[123-heads1-80-dtype1]", "test_gradients_in_half_precision[torch.bfloat16]",
    ],
    "gated_lora": [
        "test_forward[(9, 100, (70, 30, 20), 5)-by row-torch.bfloat16]", "test_forward[(140, 72, (64, 130), 16)-by row-torch.bfloat16]",
        "test_gradients[(9, 100, (70, 30, 20), 5)-by row-torch.bfloat16]", "test_swiglu_is_the_two_operations[1-64-40-torch.bfloat16]",
    ],
    "norm": ["test_values_and_gradients[shape1-True-dtype2]"],
    "rotary": ["test_values_and_gradient[shape4-dtype2-True]"],
    "rotary_write": ["test_bits_and_places[1-28-4-128-start8-True-torch.bfloat16]"],
    "swiglu": ["test_values_and_gradient[shape3-dtype2]"],
    "sampler": ["test_each_step_takes_the_best[1-3-16-40-7-torch.bfloat16]"],
    "linear_argmax": ["test_the_products_logits[leading1-40-200-torch.bfloat16]"],
    "sampling": ["test_the_best_with_noise[leading1-40-200-torch.bfloat16]"],
    "cross_entropy": ["test_values_and_gradients[3-2500-2-0.3-dtype2]"],
    "latent_consistency": ["test_value_and_gradient[3-4-1100-dtype2]"],
    "drafting": ["test_states_against_a_loop[17-16-2-1100-True-torch.bfloat16-triton]", "test_lookup_against_a_loop[5-2-20-triton]"],
    "accept": ["test_against_a_loop[130-5-True-dtype0]", "test_commit_against_a_loop[130-5-ends3-triton]"],
}  # fmt: skip
MODEL_TEST = "tests/test_model_triton.py::test_half_precision_text_is_autoregressive_text[llama-torch.bfloat16]"


@needs_triton
@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_kernels(target):
    tests = [f"tests/test_triton_{file}.py::{name}" for file, names in KERNEL_TESTS.items() for name in names] + [MODEL_TEST] * (target == "sm_90")
    result = run(target, "-m", "pytest", "-p", "no:cacheprovider", *tests)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(rf"^{len(tests)} passed in", result.stdout, re.M), result.stdout
