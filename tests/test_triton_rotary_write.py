"""Rotation and writing into the cache in one launch, against the rotary kernel and plain indexing; interpreted where there is no GPU."""

import functools
import os

import pytest
import torch

pytest.importorskip("triton")

from mtp_kernels import reference, rotary_embedding, rotary_write  # noqa: E402
from mtp_kernels.testing import guarded, guarded_outputs, guarded_randn  # noqa: E402
from mtp_kernels.triton import rotary as kernels  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
fused = functools.partial(rotary_write, implementation="triton")


def tables(t, b, d, dtype, device):
    return [guarded_randn((t, b, d), dtype, device, seed) for seed in (1, 2)]  # any tables, not only cosines


def caches(columns, b, kv_heads, d, dtype, device):
    """(keys, values) full of random numbers, and what checks that nothing beside them was written."""
    (keys, one), (values, other) = (guarded((columns, b, kv_heads, d), dtype, device) for _ in range(2))
    for seed, x in enumerate((keys, values)):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
    return keys, values, lambda: (one(), other())


def expected(qkv, cos, sin, keys, values, start, *norm):
    """(q, keys, values) by the rotary kernel and a loop; rows whose column does not exist are nowhere."""
    kv_heads, columns = keys.shape[2], keys.shape[0]
    heads = qkv.shape[2] - 2 * kv_heads
    qk = rotary_embedding(qkv[:, :, : heads + kv_heads], cos, sin, *norm, implementation="triton")
    keys, values = keys.clone(), values.clone()
    for b, first in enumerate(start.tolist()):
        for t in range(qkv.shape[0]):
            if 0 <= first + t < columns:
                keys[first + t, b], values[first + t, b] = qk[t, b, heads:], qkv[t, b, heads + kv_heads :]
    return qk[:, :, :heads], keys, values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t, heads, kv_heads, d, start, normed", [
    (1, 1, 1, 2, [0], False), (3, 4, 2, 16, [4, 0], False), (2, 3, 3, 80, [5, 1, 7], False), (4, 33, 1, 96, [2], False),
    (1, 2, 1, 128, [8, 3], False), (0, 2, 1, 8, [1], False), (3, 5, 1, 16, [4, 0], True), (2, 3, 1, 80, [5, 1, 7], True), (1, 28, 4, 128, [8], True),
])  # fmt: skip
def test_bits_and_places(t, heads, kv_heads, d, start, normed, dtype, device):
    b = len(start)
    qkv = guarded_randn((t, b, heads + 2 * kv_heads, d), dtype, device)
    cos, sin = tables(t, b, d, dtype, device)
    keys, values, untouched = caches(9, b, kv_heads, d, dtype, device)
    start = torch.tensor(start, device=device)
    norm = (guarded_randn((heads + kv_heads, d), dtype, device, 5), 0.1) if normed else ()
    wanted = expected(qkv, cos, sin, keys, values, start, *norm)
    plain = keys.clone(), values.clone()
    with guarded_outputs(kernels):
        q = fused(qkv, cos, sin, keys, values, start, *norm)
    untouched()
    assert q.is_contiguous() and all(map(torch.equal, (q, keys, values), wanted))
    from_reference = reference.rotary_write(qkv, cos, sin, *plain, start, *norm)
    assert from_reference.is_contiguous() and torch.equal(plain[1], values)
    for one, other in ((from_reference, q), (plain[0], keys)):
        torch.testing.assert_close(one, other, rtol=4 * torch.finfo(dtype).eps, atol=(32 if normed else 8) * torch.finfo(dtype).eps)


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_written_as_zero(implementation, dtype, device):
    largest = torch.finfo(dtype).max
    qkv = torch.randn(2, 1, 5, 16, device=device).to(dtype)
    qkv[0, 0, 2:, 3], qkv[0, 0, 3:, 13], qkv[1, 0, 3:, 6], qkv[1, 0, 4, 15] = torch.nan, torch.inf, -torch.inf, -largest
    qkv[1, 0, 3, 1::8] = largest  # which is too much once rotated
    cos, sin = (torch.full((2, 1, 16), value, dtype=dtype, device=device) for value in (0.75, 0.75))
    rotated = rotary_embedding(qkv[:, :, :4], cos, sin, implementation=implementation)
    keys, values = torch.ones(2, 2, 1, 1, 16, dtype=dtype, device=device)
    q = rotary_write(qkv, cos, sin, keys, values, torch.tensor([0], device=device), implementation=implementation)
    assert torch.equal(q.isfinite(), rotated[:, :, :3].isfinite()) and not q.isfinite().all() and not rotated[1, 0, 3, [1, 9]].isfinite().any()
    for stored, computed in ((keys, rotated[:, :, 3:]), (values, qkv[:, :, 4:])):
        assert torch.equal(stored, torch.where(computed.isfinite(), computed, 0)) and torch.equal(stored == 0, ~computed.isfinite())


def test_columns_that_do_not_exist_are_not_written(device):
    qkv, (cos, sin) = guarded_randn((3, 4, 4, 16), torch.float32, device), tables(3, 4, 16, torch.float32, device)
    keys, values, untouched = caches(6, 4, 1, 16, torch.float32, device)
    start = torch.tensor([4, -2, 6, 2**40], device=device)
    wanted = expected(qkv, cos, sin, keys, values, start)
    got = fused(qkv, cos, sin, keys, values, start)
    untouched()
    assert all(map(torch.equal, (got, keys, values), wanted))
    with pytest.raises(IndexError):
        rotary_write(qkv.cpu(), cos.cpu(), sin.cpu(), keys.cpu(), values.cpu(), start.cpu(), implementation="reference")


def test_strides(device):
    """Rows of a wider product, tables shared by the sequences, one layer of a cache stored by sequence, every second start."""
    wide = torch.randn(3, 2, 140, device=device)
    qkv = wide[..., 7:135].unflatten(-1, (8, 16))
    cos, sin = (torch.randn(3, 1, 16, device=device).expand(-1, 2, -1) for _ in range(2))
    stored = torch.randn(2, 2, 2, 9, 3, 16, device=device)  # (keys or values, B, layers, S, more heads than there are, D)
    keys, values = (x[:, 1, :, :2].transpose(0, 1) for x in stored)
    start = torch.tensor([5, 99, 0, 99], dtype=torch.int32, device=device)[::2]
    wanted = expected(qkv.contiguous(), cos.contiguous(), sin.contiguous(), keys, values, start)
    before = stored.clone()
    got = fused(qkv, cos, sin, keys, values, start)
    assert all(map(torch.equal, (got, keys, values), wanted))
    assert torch.equal(stored[:, :, 0], before[:, :, 0]) and torch.equal(stored[..., 2, :], before[..., 2, :])
    by_columns = qkv.transpose(0, 1).contiguous().transpose(0, 1).mT.contiguous().mT  # D is not of unit stride
    assert torch.equal(fused(by_columns, cos, sin, keys, values, start), got) and torch.equal(keys, wanted[1])


def test_one_launch_without_waiting(device, monkeypatch):
    qkv, (cos, sin) = torch.randn(2, 2, 8, 16, device=device), tables(2, 2, 16, torch.float32, device)
    keys, values, _ = caches(8, 2, 2, 16, torch.float32, device)
    start, launches, launch = torch.tensor([1, 3], device=device), [], kernels._device.launch
    fused(qkv, cos, sin, keys, values, start)  # compiled
    monkeypatch.setattr(kernels._device, "launch", lambda *args, **options: launches.append(args) or launch(*args, **options))
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        fused(qkv, cos, sin, keys, values, start)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert len(launches) == 1


def test_operator(device):
    def arguments():
        return torch.ones(2, 2, 8, 4, device=device), *tables(2, 2, 4, torch.float32, device), *caches(8, 2, 2, 4, torch.float32, device)[:2]

    start, operator = torch.tensor([1, 3], device=device), torch.ops.mtp_kernels.rotary_write.default
    for norm in (None, torch.ones(6, 4, device=device)):
        torch.library.opcheck(operator, (*arguments(), start, norm, 1e-6), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda *x: fused(*x), fullgraph=True, backend="aot_eager")
    for one, other in ((arguments(), arguments()),):
        assert torch.equal(compiled(*one, start), fused(*other, start)) and all(map(torch.equal, one, other))


def test_a_gradient_that_needs_what_was_overwritten_says_so(device):
    qkv, (cos, sin) = torch.randn(2, 1, 4, 8, device=device), tables(2, 1, 8, torch.float32, device)
    for implementation in ("triton", "reference"):
        keys, values, _ = caches(4, 1, 1, 8, torch.float32, device)
        factor = torch.ones((), device=device, requires_grad=True)
        loss = (keys * factor).sum()
        rotary_write(qkv, cos, sin, keys, values, torch.tensor([0], device=device), implementation=implementation)
        with pytest.raises(RuntimeError, match="inplace"):
            loss.backward()


@pytest.mark.skipif(bool(os.environ.get("TEST_PTX")), reason="more than 20 GB on the machine for PTX")
def test_heads_further_apart_than_32_bits_reach(device, tmp_path):
    """Of a cache head by head, and of what is rotated; on a CPU in a file of 4 GiB, all but a few pages of it a hole."""
    size, apart = 2**31 + 64, 2**30
    if device == "cpu":
        store = torch.from_file(str(tmp_path / "store"), shared=True, size=size, dtype=torch.float16)
    else:
        store = torch.empty(size, dtype=torch.float16, device=device)
    qkv = torch.randn(1, 1, 9, 8, device=device).half()
    cos, sin = tables(1, 1, 8, torch.float16, device)
    keys, values = store.as_strided((4, 1, 3, 8), (8, 32, apart, 1)), torch.zeros(4, 1, 3, 8, dtype=torch.float16, device=device)
    q = fused(qkv, cos, sin, keys, values, torch.tensor([1], device=device))
    wanted = rotary_embedding(qkv[:, :, :6], cos, sin, implementation="triton")
    assert torch.equal(q, wanted[:, :, :3]) and torch.equal(keys[1:2], wanted[:, :, 3:]) and torch.equal(values[1:2], qkv[:, :, 6:])
    x = keys[:1].copy_(qkv[:, :, :3])
    assert torch.equal(rotary_embedding(x, cos, sin, implementation="triton"), q)
