"""Cross entropy of logits that are never whole: library products, and between them one kernel over a chunk of rows of logits.

With x a row's logits, m their maximum, p = softmax(x), q the target (1 - soft) onehot(label) + soft softmax(t), t the teacher's logits:

    loss   = log sum_v exp(x_v - m) - sum_v q_v (x_v - m)
    dx     = dloss (p - q)
    dh     = dloss (p - q) W
    dW     = sum over rows of (p - q)^T (dloss h)

(p - q) W, the gradient of a row's loss but for the factor dloss, needs no other row: so the forward makes it while the chunk's logits are
there, and keeps (M, d) numbers. Its backward is one multiplication: two products where recomputing the logits would take three.
dW, of a weight that is usually frozen, has to wait for dloss and makes the logits again.

One program has one row. Its first sweep keeps a running maximum and sum in every lane and merges the lanes once at the end; the second
turns the logits into p - q where they lie. Each row's arithmetic follows from V alone; nothing is atomic.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_kernels.triton import _device
from mtp_kernels.triton._operator import operator
from mtp_kernels.triton._tiles import cross_entropy_tiles

LOWEST = tl.constexpr(-3.0e38)  # finite: the difference of two infinities is no number


@triton.jit
def _maximum_and_sum(x_ptr, V, BLOCK_V: tl.constexpr):
    """(m = max x, the lowest index that has it, sum of exp(x - m))."""
    lane = tl.arange(0, BLOCK_V)
    top, total, where = tl.full((BLOCK_V,), LOWEST, tl.float32), tl.zeros((BLOCK_V,), tl.float32), lane
    for start in range(0, V, BLOCK_V):
        x = tl.load(x_ptr + start + lane, mask=start + lane < V, other=float("-inf")).to(tl.float32)
        where = tl.where(x > top, start + lane, where)
        higher = tl.maximum(x, top)
        total = total * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    m = tl.max(top, 0)
    return m, tl.min(tl.where(top == m, where, V), 0), tl.sum(total * tl.exp(top - m), 0)


@triton.jit
def cross_entropy_kernel(
    x_ptr, t_ptr, labels_ptr, loss_ptr, guess_ptr, stride, soft, ignore_index, V,
    HAS_TEACHER: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """loss and guess of a row of logits x; with GRADIENT x becomes p - q, zeros where the label is ignored."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_V)
    x_ptr += row * stride
    label = tl.load(labels_ptr + row)
    counts = label != ignore_index
    own = tl.load(x_ptr + label, mask=(label >= 0) & (label < V), other=0.0).to(tl.float32)
    hard = 1.0
    m, guess, total = _maximum_and_sum(x_ptr, V, BLOCK_V)
    if HAS_TEACHER:
        t_ptr += row * stride
        hard = 1.0 - soft
        t_m, _, t_total = _maximum_and_sum(t_ptr, V, BLOCK_V)
        expected = tl.zeros((BLOCK_V,), tl.float32)
    loss = tl.log(total) - hard * (own - m)
    if GRADIENT:
        tl.debug_barrier()  # no thread overwrites a logit that another one has yet to load
    if HAS_TEACHER or GRADIENT:
        for start in range(0, V, BLOCK_V):
            v = start + lane
            x = tl.load(x_ptr + v, mask=v < V, other=0.0).to(tl.float32) - m
            dx = tl.exp(x) / total - tl.where(v == label, hard, 0.0)
            if HAS_TEACHER:
                q = tl.exp(tl.load(t_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32) - t_m) / t_total
                expected += q * x
                dx -= soft * q
            if GRADIENT:
                tl.store(x_ptr + v, tl.where(counts, dx, 0.0).to(x_ptr.dtype.element_ty), mask=v < V)
    if HAS_TEACHER:
        loss -= soft * tl.sum(expected, 0)
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))
    tl.store(guess_ptr + row, guess.to(tl.int64))


def _chunks(
    hidden: Tensor, lm_head: Tensor, labels: Tensor, teacher: Tensor | None, soft: float, ignore_index: int, chunk: int,
    loss: Tensor, guess: Tensor, gradient: bool,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Writes loss and guess, a chunk of rows at a time; yields its rows, and what then stands where their logits were.

    The only room for logits is one chunk's, and one chunk's of the teacher.
    """
    m, v = hidden.shape[0], lm_head.shape[0]
    sources = [hidden] if teacher is None else [hidden, teacher]
    rooms = [torch.empty((min(chunk, m), v), dtype=hidden.dtype, device=hidden.device) for _ in sources]
    labels, (block_v, num_warps) = labels.contiguous(), cross_entropy_tiles(v)
    for start in range(0, m, chunk):
        rows = slice(start, min(start + chunk, m))
        size = rows.stop - start
        x, *t = (torch.mm(source[rows], lm_head.t(), out=room[:size]) for source, room in zip(sources, rooms, strict=True))
        _device.launch(
            cross_entropy_kernel, (size,),
            x_ptr=x, t_ptr=t[0] if t else None, labels_ptr=labels[rows], loss_ptr=loss[rows], guess_ptr=guess[rows],
            stride=v, soft=soft, ignore_index=ignore_index, V=v,
            HAS_TEACHER=bool(t), GRADIENT=gradient, BLOCK_V=block_v, num_warps=num_warps,
        )  # fmt: skip
        yield rows, x


def _outputs(hidden: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    (m, d), device = hidden.shape, hidden.device
    loss, guess = torch.empty((m,), dtype=torch.float32, device=device), torch.empty((m,), dtype=torch.int64, device=device)
    return loss, guess, torch.empty((m if gradient else 0, d), dtype=hidden.dtype, device=device)


@operator(lambda hidden, lm_head, labels, teacher, soft, ignore_index, chunk, gradient: _outputs(hidden, gradient))
def _linear_cross_entropy(
    hidden: Tensor, lm_head: Tensor, labels: Tensor, teacher: Tensor | None, soft: float, ignore_index: int, chunk: int, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, guess, each row's gradient for a dloss of 1, no rows if not asked for)."""
    loss, guess, dhidden = _outputs(hidden, gradient)
    for rows, dx in _chunks(hidden, lm_head, labels, teacher, soft, ignore_index, chunk, loss, guess, gradient):
        if gradient:
            torch.mm(dx, lm_head, out=dhidden[rows])
    return loss, guess, dhidden


@operator(lambda dloss, hidden, lm_head, *_: torch.empty(lm_head.shape, dtype=lm_head.dtype, device=lm_head.device))
def _linear_cross_entropy_dhead(
    dloss: Tensor, hidden: Tensor, lm_head: Tensor, labels: Tensor, teacher: Tensor | None, soft: float, ignore_index: int, chunk: int
) -> Tensor:
    dhead = torch.zeros(lm_head.shape, dtype=torch.float32, device=lm_head.device)
    loss, guess, _ = _outputs(hidden, False)  # again, and not used
    for rows, dx in _chunks(hidden, lm_head, labels, teacher, soft, ignore_index, chunk, loss, guess, True):
        dhead += torch.mm(dx.t(), (hidden[rows] * dloss[rows].unsqueeze(1)).to(hidden.dtype))
    return dhead.to(lm_head.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, lm_head: Tensor, labels: Tensor, teacher: Tensor | None, soft: float, ignore_index: int, chunk: int,
        for_hidden: bool, for_head: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        loss, guess, dhidden = _linear_cross_entropy(hidden, lm_head, labels, teacher, soft, ignore_index, chunk, for_hidden)
        ctx.mark_non_differentiable(guess)
        ctx.save_for_backward(dhidden, *((hidden, lm_head, labels, teacher) if for_head else ()))
        ctx.options = soft, ignore_index, chunk
        return loss, guess

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor, _):
        (dhidden, *again), dhead = ctx.saved_tensors, None
        dhidden = (dhidden * dloss.unsqueeze(1)).to(dhidden.dtype) if ctx.needs_input_grad[0] else None
        if again:
            dhead = _linear_cross_entropy_dhead(dloss, *again, *ctx.options)
        return dhidden, dhead, *(None,) * 7


def linear_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    *,
    teacher: Tensor | None = None,
    soft: float = 1.0,
    ignore_index: int = -100,
    chunk: int = 2048,
) -> tuple[Tensor, Tensor]:
    d = hidden.shape[-1]
    teacher = teacher.detach().reshape(-1, d) if teacher is not None and soft else None
    arguments = hidden.reshape(-1, d), lm_head, labels.reshape(-1), teacher, float(soft), ignore_index, chunk
    for_hidden, for_head = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, lm_head))
    if for_hidden or for_head:
        loss, guess = _LinearCrossEntropy.apply(*arguments, for_hidden, for_head)
    else:
        loss, guess, _ = _linear_cross_entropy(*arguments, False)
    return loss.view(labels.shape), guess.view(labels.shape)
