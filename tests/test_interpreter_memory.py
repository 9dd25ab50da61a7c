"""What the checked interpreter refuses, and what it lets pass."""

import pytest
import torch

triton = pytest.importorskip("triton")

import interpreter_memory  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="a patch of the interpreter, which is not in use")


@triton.jit
def copy_kernel(x_ptr, y_ptr, end, x_offset, y_offset, X_APART: tl.constexpr, Y_APART: tl.constexpr, BLOCK: tl.constexpr):
    """A block of x to y for each program, APART from the last one's."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + x_offset + tl.program_id(0) * X_APART + i, mask=i < end)
    tl.store(y_ptr + y_offset + tl.program_id(0) * Y_APART + i, x, mask=i < end)


@triton.jit
def reverse_kernel(x_ptr, BARRIER: tl.constexpr):
    i = tl.arange(0, 8)
    x = tl.load(x_ptr + 7 - i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + i, x)


@triton.jit
def add_one_kernel(x_ptr, element, ONE: tl.constexpr, AGAIN: tl.constexpr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """1 to each of x, in place; ONE: one of them is loaded by itself before; AGAIN: all are loaded once more."""
    i = tl.arange(0, BLOCK)
    one = 0.0
    if ONE:
        one = tl.load(x_ptr + element)
    x = tl.load(x_ptr + i) + 1
    if AGAIN:
        x += tl.load(x_ptr + i) - x + 1
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + i, x + 0 * one)


@triton.jit
def store_and_load_kernel(x_ptr, y_ptr, BARRIER: tl.constexpr):
    i = tl.arange(0, 8)
    tl.store(x_ptr + i, i.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@triton.jit
def store_twice_kernel(x_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, i.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + BLOCK - 1 - i, i.to(tl.float32))


@triton.jit
def load_both_ways_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i) + tl.load(x_ptr + BLOCK - 1 - i)
    tl.debug_barrier()
    tl.store(x_ptr + i, tl.load(x_ptr + i) + x)


@triton.jit
def pairs_kernel(y_ptr):
    tl.store(y_ptr + tl.arange(0, 8) // 2, tl.arange(0, 8).to(tl.float32))


@triton.jit
def atomic_kernel(x_ptr):
    tl.atomic_add(x_ptr + tl.arange(0, 8), 1.0)


@triton.jit
def grid_kernel(x_ptr, y_ptr, X: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr):
    tl.store(y_ptr + tl.program_id(0) * X + tl.program_id(1) * Y + tl.program_id(2) * Z, tl.load(x_ptr))


@triton.jit
def one_stores_kernel(x_ptr, WHO: tl.constexpr):
    x = tl.load(x_ptr)
    if tl.program_id(0) == WHO:
        tl.store(x_ptr, x)


def copy(x, y, programs=1, end=8, x_offset=0, y_offset=0, x_apart=8, y_apart=8):
    copy_kernel[(programs,)](x, y, end, x_offset, y_offset, X_APART=x_apart, Y_APART=y_apart, BLOCK=8, num_warps=1)


def test_what_is_in_order():
    x, y = torch.arange(24.0), torch.zeros(24)
    copy(x, y, 3)
    assert torch.equal(x, y)
    copy(x, y, 3, x_apart=0)  # all may load the same
    assert torch.equal(y, x[:8].repeat(3))
    copy(x, x, 3)  # in place
    copy(x[:0], y[:0], 3, end=0)
    copy(x, x[4:], end=4)  # two arguments of one storage
    assert x[4:8].tolist() == x[:4].tolist()
    add_one_kernel[(1,)](torch.zeros(128), 3, ONE=False, AGAIN=True, BARRIER=False, BLOCK=128)


@pytest.mark.parametrize("offset", [-1, 1, 10**9])
def test_outside_the_tensors(offset):
    """Where the bytes are mapped and where they are not."""
    x, y = torch.zeros(40)[16:24], torch.zeros(40)[16:24]
    with pytest.raises(InterpreterError, match=r"copy_kernel, program \(0, 0, 0\): load outside the tensors"):
        copy(x, y, x_offset=offset)
    with pytest.raises(InterpreterError, match="store outside the tensors"):
        copy(x, y, y_offset=offset)
    copy(x, y, end=0, x_offset=offset, y_offset=offset)


def test_between_the_elements_of_a_view():
    x = torch.arange(40.0)[::5]
    with pytest.raises(InterpreterError, match=r"load outside the tensors \(x_ptr; 6 of 8 elements\)"):
        copy(x, torch.zeros(8))
    copy(x, torch.zeros(1), end=1, x_offset=5)


def test_programs_that_meet():
    x, y = torch.zeros(24), torch.zeros(24)
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\): store to what another program stores \(y_ptr; 1 of 8"):
        copy(x, y, 2, y_apart=7)
    with pytest.raises(InterpreterError, match="load of what another program stores"):
        copy(x, x, 2, y_offset=8)
    with pytest.raises(InterpreterError, match="store to what another program loads"):
        copy(x[8:], x, 2)


def test_threads_that_meet():
    x, y = torch.arange(8.0), torch.zeros(8)
    reverse_kernel[(1,)](x, BARRIER=True)
    reverse_kernel[(1,)](x, BARRIER=False, num_warps=1)
    assert x.tolist() == list(range(8))
    refused = "store to what this program loaded otherwise, without a barrier"
    with pytest.raises(InterpreterError, match=refused):
        reverse_kernel[(1,)](x, BARRIER=False)  # four warps are Triton's default
    wide = torch.zeros(128)
    for again in (False, True):  # the element's newest load is then by the pointers of the store
        add_one_kernel[(1,)](wide, 3, ONE=True, AGAIN=again, BARRIER=True, BLOCK=128)
        with pytest.raises(InterpreterError, match=refused + r" \(x_ptr; 1 of 128"):
            add_one_kernel[(1,)](wide, 3, ONE=True, AGAIN=again, BARRIER=False, BLOCK=128)
    with pytest.raises(InterpreterError, match=refused + r" \(x_ptr; 64 of 64"):  # half the threads have a copy
        add_one_kernel[(1,)](wide, 3, ONE=False, AGAIN=False, BARRIER=False, BLOCK=64)
    load_both_ways_kernel[(1,)](wide, BLOCK=128)
    store_twice_kernel[(1,)](wide, BARRIER=True, BLOCK=128)
    with pytest.raises(InterpreterError, match="store to what this program stored otherwise, without a barrier"):
        store_twice_kernel[(1,)](wide, BARRIER=False, BLOCK=128)
    store_and_load_kernel[(1,)](x, y, BARRIER=True)
    store_and_load_kernel[(1,)](x, y, BARRIER=False, num_warps=1)
    assert torch.equal(x, y)
    with pytest.raises(InterpreterError, match="load of what this program stored, without a barrier"):
        store_and_load_kernel[(1,)](x, y, BARRIER=False)


def test_several_values_for_one_element():
    with pytest.raises(InterpreterError, match="store of several values to one element"):
        pairs_kernel[(1,)](torch.zeros(8))


def test_a_launch_after_one_that_was_refused():
    x = torch.zeros(8)
    with pytest.raises(InterpreterError):
        copy(x, x, x_offset=1)
    copy(x, torch.zeros(8))


def test_atomics():
    with pytest.raises(InterpreterError, match="an atomic access"):
        atomic_kernel[(1,)](torch.zeros(8))


@pytest.mark.parametrize("axis", range(3))
def test_programs_differ_along_every_axis(axis, monkeypatch):
    seen, number = set(), interpreter_memory._Launch._program
    monkeypatch.setattr(interpreter_memory._Launch, "_program", lambda self: seen.add(number(self)) or number(self))
    apart = [12, 4, 1]
    grid_kernel[(2, 3, 4)](torch.zeros(1), torch.zeros(24), *apart)
    assert seen == set(range(24))
    apart[axis] = 0
    with pytest.raises(InterpreterError, match="store to what another program stores"):
        grid_kernel[(2, 3, 4)](torch.zeros(1), torch.zeros(24), *apart)


@pytest.mark.parametrize("who", [0, 1, 2])
def test_several_readers(who):
    with pytest.raises(InterpreterError, match="another program"):
        one_stores_kernel[(3,)](torch.zeros(1), WHO=who, num_warps=1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.uint8])
def test_other_sizes_of_elements(dtype):
    x = torch.zeros(16, dtype=dtype)
    copy(x[:8], torch.zeros(8, dtype=dtype))
    with pytest.raises(InterpreterError, match="load outside the tensors"):
        copy(x[:7], torch.zeros(8, dtype=dtype))


def test_tensors_given_by_name():
    x, y = torch.arange(8.0), torch.zeros(8)
    copy_kernel[(1,)](x_ptr=x, y_ptr=y, end=8, x_offset=0, y_offset=0, X_APART=8, Y_APART=8, BLOCK=8)
    assert torch.equal(x, y)


def test_the_end_of_a_storage_and_large_storages(monkeypatch):
    for tracked in (2**26, 8):
        monkeypatch.setattr(interpreter_memory, "TRACKED_BYTES", tracked)
        copy(torch.zeros(8), torch.zeros(8))
        with pytest.raises(InterpreterError, match="load outside the tensors"):
            copy(torch.zeros(8), torch.zeros(64), end=9, x_offset=1)
        with pytest.raises(InterpreterError, match="load outside the tensors"):
            copy(torch.zeros(7), torch.zeros(64), end=8)
