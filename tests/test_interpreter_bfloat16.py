"""The patch of Triton's interpreter against PyTorch, to the last bit."""

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="a patch of the interpreter, which is not in use")
BF16 = torch.bfloat16


@triton.jit
def copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < N, other=1.5), mask=i < N)


@triton.jit
def cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, TOWARD_ZERO: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if TOWARD_ZERO:
        tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty, fp_downcast_rounding="rtz"))
    else:
        tl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty))


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "div":
        z = x / y
    elif OP == "neg":
        z = -x
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "minimum":
        z = tl.minimum(x, y)
    elif OP == "where":
        z = tl.where((x < y) & (y > 0.25), x, y * 2.5)
    elif OP == "compare":
        z = ((x < y).to(tl.float32) + (x >= 0.0) * 2.0 + (x == y) * 4.0).to(x.dtype)
    elif OP == "full":
        z = x + tl.full((BLOCK,), 0.3, x.dtype)
    elif OP == "fma":
        z = tl.fma(x, y, x)
    elif OP == "exp":
        z = tl.exp(x.to(tl.float32)).to(x.dtype)
    elif OP == "clamp":
        z = tl.clamp(x, -0.5, 0.5)
    tl.store(out_ptr + i, z)


@triton.jit
def plus(a, b):
    return a + b


@triton.jit
def reduce_kernel(x_ptr, y_ptr, index_ptr, M: tl.constexpr, N: tl.constexpr, OP: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n)
    if OP == "sum":
        y = tl.sum(x, 1)
    elif OP == "max":
        y = tl.max(x, 1)
    elif OP == "min":
        y = tl.min(x, 1)
    elif OP == "argmax":
        y, index = tl.max(x, 1, return_indices=True)
        tl.store(index_ptr + m, index)
    elif OP == "reduce":
        y = tl.reduce(x, 1, plus)
    elif OP == "raw":
        y = tl.reduce(x, 1, tl.standard._sum_combine)
    elif OP == "scan":
        y = tl.sum(tl.where(n == N - 1, tl.cumsum(x, 1), 0.0), 1)
    tl.store(y_ptr + m, y)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(a_ptr + m[:, None] * K + k), tl.load(b_ptr + k[:, None] * N + n)
    c = tl.dot(a, b, tl.full((M, N), 0.5, tl.float32))
    tl.store(c_ptr + m[:, None] * N + n, c)


def same_bits(a, b):
    nan = torch.isnan(b)
    assert torch.equal(torch.isnan(a), nan)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert a.dtype == b.dtype and torch.equal(a[~nan].view(kind), b[~nan].view(kind))


def every_bfloat16():
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)


def awkward_floats():
    """Ties, one unit to each side of them, subnormals, overflow, NaN with payload in the low bits, infinities."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (2**13,), generator=generator, dtype=torch.int64)
    ties = (bits[:4096] & ~0xFFFF) | 0x8000
    special = torch.tensor([0x7F800000, -0x800000, 0x7F800001, 0x7FFFFFFF, -1, 0x7F7FFFFF, 1, 0x8000, 0x8001, 0x18000])
    all_bits = torch.cat([bits, ties, ties + 1, ties - 1, special])
    count = 2**14
    return torch.cat([all_bits[: count - len(special)], special])[:count].to(torch.int32).view(torch.float32)


def test_load_and_store_with_a_mask():
    x = torch.randn(13).to(BF16)
    y = torch.full((16,), 7.0, dtype=BF16)
    copy_kernel[(1,)](x, y, 13, BLOCK=16)
    assert torch.equal(y[:13], x) and (y[13:] == 7).all()


def test_every_bfloat16_widens():
    x = every_bfloat16()
    for dtype in (torch.float32, torch.float16, torch.float64):
        y = torch.empty(x.shape, dtype=dtype)
        cast_kernel[(1,)](x, y, BLOCK=len(x), TOWARD_ZERO=False)
        same_bits(y, x.to(dtype))


def test_narrowing_rounds_to_nearest_even():
    x = awkward_floats()
    assert len(x) == 2**14
    y = torch.empty(x.shape, dtype=BF16)
    cast_kernel[(1,)](x, y, BLOCK=len(x), TOWARD_ZERO=False)
    same_bits(y, x.to(BF16))
    finite = x.isfinite()
    cast_kernel[(1,)](x, y, BLOCK=len(x), TOWARD_ZERO=True)
    assert torch.equal(y[finite].view(torch.int16), (x[finite].view(torch.int32) >> 16).to(torch.int16))
    half = torch.arange(2**14).to(torch.int16).view(torch.float16)
    cast_kernel[(1,)](half, y, BLOCK=len(half), TOWARD_ZERO=False)
    same_bits(y, half.to(BF16))


def test_integers():
    x = torch.arange(-1024, 1024) * 3
    y, back = torch.empty(x.shape, dtype=BF16), torch.empty_like(x)
    cast_kernel[(1,)](x, y, BLOCK=len(x), TOWARD_ZERO=False)
    same_bits(y, x.to(BF16))
    cast_kernel[(1,)](y, back, BLOCK=len(x), TOWARD_ZERO=False)
    assert torch.equal(back, y.to(torch.int64))


EXPECTED = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda x, y: torch.where((x < y) & (y > 0.25), x, y * 2.5),
    "compare": lambda x, y: (x < y) + (x >= 0) * 2.0 + (x == y) * 4.0,
    "full": lambda x, y: x + torch.tensor(0.3, dtype=BF16),
    "fma": lambda x, y: (x.float() * y.float() + x.float()),
    "exp": lambda x, y: x.double().exp().float(),
    "clamp": lambda x, y: x.clamp(-0.5, 0.5),
}


@pytest.mark.parametrize("op", EXPECTED)
def test_arithmetic(op):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(4096, generator=generator).to(BF16) for _ in range(2))
    y[::7] = x[::7]
    x[:3] = torch.tensor([torch.inf, -torch.inf, 0.0])
    out = torch.empty_like(x)
    arithmetic_kernel[(1,)](x, y, out, BLOCK=4096, OP=op)
    expected = EXPECTED[op](x, y).to(BF16)
    if op == "neg":  # before 3.9 it is 0 - x, which never gives -0
        out, expected = out + 0, expected + 0
    same_bits(out, expected)


@pytest.mark.parametrize("op", ["sum", "max", "min", "argmax", "reduce", "raw", "scan"])
def test_reductions(op):
    x = torch.randint(-64, 64, (16, 32), generator=torch.Generator().manual_seed(2)).to(BF16) / 16
    x[3] = -x[3].abs() - 1
    y, index = torch.empty(16, dtype=BF16), torch.empty(16, dtype=torch.int32)
    reduce_kernel[(1,)](x, y, index, M=16, N=32, OP=op)
    if op == "reduce":  # rounded at every step
        exact = x[:, 0]
        for column in x.T[1:]:
            exact = exact + column
    elif op in ("sum", "raw", "scan"):
        exact = x.float().sum(1).to(BF16)
    else:
        exact = x.amin(1) if op == "min" else x.amax(1)
    same_bits(y, exact)
    if op == "argmax":
        assert torch.equal(index.long(), x.float().argmax(1))


def test_dot_accumulates_in_float32():
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-128, 128, shape, generator=generator).to(BF16) / 32 for shape in ((16, 64), (64, 32)))
    c = torch.empty(16, 32)
    dot_kernel[(1,)](a, b, c, M=16, N=32, K=64)
    assert torch.equal(c, (a.double() @ b.double() + 0.5).float())  # these sums are exact in float32
    assert not torch.equal(c, (a @ b).float() + 0.5)
    half = torch.empty(16, 32, dtype=BF16)
    dot_kernel[(1,)](a, b, half, M=16, N=32, K=64)
    assert torch.equal(half, c.to(BF16))
