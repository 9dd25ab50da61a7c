"""Cross entropy's kernel against float64; interpreted where there is no GPU."""

import functools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from mtp_kernels import linear_cross_entropy, reference  # noqa: E402
from mtp_kernels.testing import assert_within_budget, guarded_outputs, guarded_randn  # noqa: E402
from mtp_kernels.triton import cross_entropy as kernels  # noqa: E402
from mtp_kernels.triton._tiles import cross_entropy_tiles  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
D = 24
fused = functools.partial(linear_cross_entropy, implementation="triton")


def formula(hidden, head, labels, teacher=None, soft=1.0):
    """All logits at once, and PyTorch's own gradients; in 16 bits the logits are rounded, as a library gives them."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = (hidden @ head.T).to(wide)
    q = torch.zeros_like(logits)
    if teacher is None or soft < 1:
        q += (1 if teacher is None else 1 - soft) * F.one_hot(labels.clamp(min=0), head.shape[0])
    if teacher is not None:
        q += soft * (teacher @ head.detach().T).to(wide).softmax(-1).detach()
    loss = -(q * logits.log_softmax(-1)).sum(-1)
    return loss.masked_fill(labels == -100, 0), logits.argmax(-1)


def with_gradients(function, hidden, head, labels, teacher, soft, dloss, **options):
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    loss, guess = function(hidden, head, labels, teacher=teacher, soft=soft, **options)
    return loss.detach(), guess, *torch.autograd.grad(loss, [hidden, head], dloss.to(loss.dtype))


def case(rows, v, dtype, device, ignored=True):
    hidden, teacher = (guarded_randn((rows, D), dtype, device, seed) for seed in (0, 1))
    head = guarded_randn((v, D), dtype, device, 2, 0.5)
    labels = torch.arange(rows, device=device) * 7 % v
    if ignored:
        labels[1::3] = -100
    return hidden, head, labels, teacher, torch.randn(rows, generator=torch.Generator().manual_seed(3)).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft", [None, 1.0, 0.3, 0.0])
@pytest.mark.parametrize("rows, v, chunk", [(5, 77, 2), (1, 1, 1), (5, 5, 100), (3, 2500, 2)])
def test_values_and_gradients(rows, v, chunk, soft, dtype, device):
    hidden, head, labels, teacher, dloss = case(rows, v, dtype, device)
    teacher, soft = (None, 1.0) if soft is None else (teacher, soft)
    with guarded_outputs(kernels):
        got = with_gradients(fused, hidden, head, labels, teacher, soft, dloss, chunk=chunk)
    exact = with_gradients(formula, hidden.double(), head.double(), labels, None if teacher is None else teacher.double(), soft, dloss)
    eager = with_gradients(formula, hidden, head, labels, teacher, soft, dloss)
    for g, e, r in zip(got[:1] + got[2:], exact[:1] + exact[2:], eager[:1] + eager[2:], strict=True):
        assert_within_budget(g, e, r)
    logits = (hidden @ head.T).float()
    assert got[1].dtype == torch.int64 and torch.equal(logits.gather(1, got[1].unsqueeze(1)).squeeze(1), logits.amax(-1))
    ignored = labels == -100
    assert not got[0][ignored].any() and not got[2][ignored].any()
    with guarded_outputs(kernels):
        plain = fused(hidden, head, labels, teacher=teacher, soft=soft, chunk=chunk)
    assert all(map(torch.equal, plain, got[:2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (2, 3)])
def test_shapes(shape, dtype, device):
    hidden, head = guarded_randn((*shape, D), dtype, device), guarded_randn((9, D), dtype, device, 1)
    hidden.requires_grad_(), head.requires_grad_()
    loss, guess = fused(hidden, head, torch.ones(shape, dtype=torch.int64, device=device), chunk=2)
    assert loss.shape == guess.shape == shape and (loss.dtype, guess.dtype) == (torch.float32, torch.int64)
    loss.sum().backward()
    assert hidden.grad.shape == hidden.shape and head.grad.shape == head.shape
    assert hidden.grad.dtype == head.grad.dtype == dtype and bool(head.grad.any()) == bool(loss.numel())


def test_another_ignored_label(device):
    hidden, head, labels, teacher, dloss = case(6, 5, torch.float32, device, ignored=False)
    got = with_gradients(fused, hidden, head, labels, teacher, 0.5, dloss, ignore_index=2)
    wanted = with_gradients(fused, hidden, head, labels.masked_fill(labels == 2, -100), teacher, 0.5, dloss)
    assert (labels == 2).any() and not got[0][labels == 2].any()
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("first, second, third", [(0, 1, 2), (3, 40, 41), (5, 2047, 2048), (7, 2055, 4103), (100, 2060, 3000), (4090, 4098, 4099)])
def test_the_lowest_id_wins_a_tie(first, second, third, device):
    """In one block, in different ones, in the same lane and in a lower one."""
    head = -torch.ones(4104, 1, device=device)
    head[[first, second, third]] = 1.0
    hidden = torch.tensor([[2.0], [-2.0], [0.0]], device=device)
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    _, guess = fused(hidden, head, labels)
    assert guess.tolist() == [first, next(i for i in range(4) if i not in (first, second, third)), 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft", [None, 0.5])
def test_large_logits(soft, dtype, device):
    """Up to 60,000 on either side: exponentials of differences only."""
    head = torch.tensor([3e4, 2e4, -3e4, 0.0, 29984.0], device=device).view(-1, 1).to(dtype).repeat(500, 1)[:2300]
    head[[0, 1]] = torch.tensor([[3.2e4], [-3.2e4]], device=device).to(dtype)
    hidden = torch.tensor([[1.5], [-1.5], [1.0], [1e-3]], device=device).to(dtype)
    labels, teacher = torch.tensor([0, 2, 1, 3], device=device), None if soft is None else hidden.flip(0)
    options = labels, teacher, 1.0 if soft is None else soft, torch.ones(4, device=device)
    got, eager = (with_gradients(f, hidden, head, *options) for f in (fused, formula))
    exact = with_gradients(formula, hidden.double(), head.double(), labels, None if soft is None else teacher.double(), *options[2:])
    assert torch.equal(got[1], eager[1])
    for g, e, r in zip(got[:1] + got[2:], exact[:1] + exact[2:], eager[:1] + eager[2:], strict=True):
        assert g.isfinite().all()
        assert_within_budget(g, e, r)


def launches(monkeypatch, chunk):
    """The launches seen, each of which has room for the logits of `chunk` rows and no more."""
    seen, launch = [], kernels._device.launch

    def record(kernel, grid, **options):
        seen.append((grid, options["GRADIENT"], options["HAS_TEACHER"]))
        room = {options[name].untyped_storage().nbytes() for name in ("x_ptr", "t_ptr") if options[name] is not None}
        assert room == {4 * chunk * options["V"]}
        launch(kernel, grid, **options)

    monkeypatch.setattr(kernels._device, "launch", record)
    return seen


def test_a_frozen_head_makes_the_logits_once(device, monkeypatch):
    seen = launches(monkeypatch, 2)
    hidden, head, labels, teacher, _ = case(4, 9, torch.float32, device)
    fused(hidden.requires_grad_(), head, labels, chunk=2)[0].sum().backward()
    assert seen == [((2,), True, False)] * 2
    seen.clear()
    fused(hidden.detach(), head.requires_grad_(), labels, teacher=teacher, chunk=2)[0].sum().backward()
    assert seen == [((2,), False, True)] * 2 + [((2,), True, True)] * 2
    seen.clear()
    with torch.no_grad():
        fused(hidden, head, labels, teacher=teacher, soft=0.0, chunk=2)
    assert seen == [((2,), False, False)] * 2


def test_the_teacher_is_constant(device):
    hidden, head, labels, teacher, _ = case(5, 9, torch.float32, device)
    hidden.requires_grad_(), teacher.requires_grad_()
    loss, _ = fused(hidden, head, labels, teacher=teacher)
    assert torch.autograd.grad(loss.sum(), [hidden, teacher], allow_unused=True)[1] is None
    assert not fused(hidden.detach(), head, labels, teacher=teacher)[0].requires_grad


def test_backward_twice(device):
    hidden, head, labels, _, dloss = case(5, 9, torch.float32, device)
    loss, _ = fused(hidden.requires_grad_(), head, labels)
    first, second = (torch.autograd.grad(loss, hidden, dloss, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_strides(device):
    hidden, head, labels, teacher, dloss = case(6, 40, torch.float32, device)
    wanted = with_gradients(fused, hidden, head, labels, teacher, 0.4, dloss, chunk=4)
    wide = torch.cat([hidden, teacher], -1)
    strided = (wide[:, :D], head.t().contiguous().t(), labels.repeat_interleave(2)[::2], wide[:, D:], 0.4, dloss.repeat_interleave(2)[::2])
    for g, w in zip(with_gradients(fused, *strided, chunk=4), wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
    one = torch.ones((), device=device).expand(6)
    got, wanted = (with_gradients(fused, hidden, head, labels, teacher, 0.4, g) for g in (one, one.contiguous()))
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("v", [1, 31, 32, 33, 1000, 128256])
def test_tiles(v):
    block, num_warps = cross_entropy_tiles(v)
    assert block & (block - 1) == 0 and 32 <= block <= 2048 and num_warps in (1, 2, 4, 8) and block >= 32 * num_warps


@pytest.mark.parametrize("with_teacher", [False, True])
def test_operators(with_teacher, device):
    hidden, head, labels, teacher, dloss = case(5, 9, torch.float32, device)
    teacher = teacher if with_teacher else None
    checks, ops = ("test_schema", "test_faketensor"), torch.ops.mtp_kernels
    for gradient in (False, True):
        torch.library.opcheck(ops.linear_cross_entropy.default, (hidden, head, labels, teacher, 0.5, -100, 2, gradient), test_utils=checks)
    torch.library.opcheck(ops.linear_cross_entropy_dhead.default, (dloss, hidden, head, labels, teacher, 0.5, -100, 2), test_utils=checks)
    for function in (fused, reference.linear_cross_entropy):
        compiled = torch.compile(lambda *args, f=function, **options: f(*args, **options), fullgraph=True, backend="aot_eager")
        got, wanted = (with_gradients(f, hidden, head, labels, teacher, 0.5, dloss, chunk=2) for f in (compiled, function))
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w)
