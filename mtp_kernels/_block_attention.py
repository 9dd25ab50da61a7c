"""Attention of mask rows in whole blocks and of nothing else, as training has it, with its gradients written out (see `_gradients` for why).

A mask sees NTP keys, all of them in columns before `start`, and its own block's keys up to its own, which are behind them in the rows' order. So its
scores are two small products, side by side in one tensor for the softmax:

    p = softmax(scale q K^T + bias),  y = p V
    dV = p^T dy,  ds = p (dy V^T - sum(p dy V^T)),  dq = scale ds K,  dK = scale ds^T q

A few blocks at a time (a `Part`) go through all of it, so that their scores stay in a CPU's caches and no keys are read that none of them sees.
Kept for the gradients are q, K and V, from which p is computed again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class Part:
    """Blocks first to last - 1 and the NTP keys in columns begin to end - 1, all that any of their rows sees.

    bias: (B, 1, blocks, 1, size, end - begin + size), what is added to the scores of those keys and, behind them, of the block's own.
    """

    first: int
    last: int
    begin: int
    end: int
    bias: Tensor


class _Work:
    """On a part, for K and V (B, H_kv, S, D) whose mask keys are from column `start` on.

    A key/value head's rows, (B * H_kv, blocks * groups * size, D), are its blocks side by side, and in a block the heads of its group.
    """

    def __init__(self, part: Part, like: Tensor, start: int):
        self.bias, self.begin, self.end = part.bias, part.begin, part.end
        self.blocks, self.size = part.last - part.first, part.bias.shape[-2]
        self.batch, self.kv_heads, _, self.width = like.shape
        self.taken = slice(part.first * self.size, part.last * self.size)
        self.columns = slice(start + self.taken.start, start + self.taken.stop)  # of the blocks' own keys

    def rows(self, x: Tensor) -> Tensor:
        """The part's rows of (T, B, H, D)."""
        x = x[self.taken].reshape(self.blocks, self.size, self.batch, self.kv_heads, -1, self.width)
        return x.permute(2, 3, 0, 4, 1, 5).reshape(self.batch * self.kv_heads, -1, self.width).contiguous()

    def put(self, x: Tensor, out: Tensor) -> None:
        """Back again, into out (T, B, H, D)."""
        x = x.view(self.batch, self.kv_heads, self.blocks, -1, self.size, self.width).permute(2, 4, 0, 1, 3, 5)
        out[self.taken].view(x.shape).copy_(x)

    def each(self, x: Tensor) -> Tensor:
        """Rows as above, by block: (B * H_kv * blocks, groups * size, ...)."""
        return x.view(self.batch * self.kv_heads * self.blocks, -1, x.shape[-1])

    def past(self, x: Tensor, more: int = 0) -> Tensor:
        """The NTP keys of K or V and as many columns behind them as are asked for: (B * H_kv, end - begin + more, D)."""
        return x[:, :, self.begin : self.end + more].flatten(0, 1)

    def own(self, x: Tensor) -> Tensor:
        """The masks' keys by block: (B * H_kv * blocks, size, D)."""
        return x[:, :, self.columns].reshape(-1, self.size, self.width)

    def products(self, x: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
        """scale x K^T of rows x with the NTP keys and, behind those, with their own block's: (B * H_kv, rows, end - begin + size)."""
        # The last columns are written twice: into a slice PyTorch would take a product for each matrix of the batch.
        out = torch.baddbmm(x.new_zeros(()), x, self.past(keys, self.size).transpose(1, 2), beta=0, alpha=scale)
        own = torch.bmm(self.each(x), self.own(keys).transpose(1, 2))
        torch.mul(own, scale, out=self.each(out)[..., -self.size :])
        return out

    def sums(self, p: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
        """scale p K of such products p: (B * H_kv, rows, D)."""
        x = torch.baddbmm(p.new_zeros(()), p[..., : -self.size], self.past(keys), beta=0, alpha=scale)
        self.each(x).baddbmm_(self.each(p)[..., -self.size :], self.own(keys), alpha=scale)
        return x

    def add_to_keys(self, out: Tensor, p: Tensor, x: Tensor, past: bool, scale: float = 1.0) -> None:
        """Adds scale p^T x to out (B, H_kv, S, D); with `past` to the NTP keys too."""
        if past:
            sums = torch.bmm(p[..., : -self.size].transpose(1, 2), x).view(self.batch, self.kv_heads, -1, self.width)
            out[:, :, self.begin : self.end].add_(sums, alpha=scale)
        own = torch.bmm(self.each(p)[..., -self.size :].transpose(1, 2), self.each(x))
        torch.mul(own.view(self.batch, self.kv_heads, -1, self.width), scale, out=out[:, :, self.columns])

    def probabilities(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        scores = self.products(q, k, scale)
        scores.view(self.batch, self.kv_heads, self.blocks, -1, self.size, scores.shape[-1]).add_(self.bias)
        return scores.softmax(-1)


class BlockAttention(torch.autograd.Function):
    """q (T, B, H, D), k, v (B, H_kv, S, D) -> (T, B, H, D).

    start: the column of the first mask's key. parts: of all blocks, in order. ntp_key_gradients: see `ops.attention`.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, parts: list[Part], start: int, scale: float, ntp_key_gradients: bool) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = parts, start, scale, ntp_key_gradients
        y = q.new_empty(q.shape)
        for part in parts:
            work = _Work(part, k, start)
            work.put(work.sums(work.probabilities(work.rows(q), k, scale), v), y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        q, k, v = ctx.saved_tensors
        parts, start, scale, ntp_key_gradients = ctx.options
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        dq = q.new_empty(q.shape) if need_q else None
        dk, dv = (torch.zeros_like(x) if needed else None for x, needed in ((k, need_k), (v, need_v)))
        for part in parts:
            work = _Work(part, k, start)
            rows, drows = work.rows(q), work.rows(dy)
            p = work.probabilities(rows, k, scale)
            if need_v:
                work.add_to_keys(dv, p, drows, ntp_key_gradients)
            ds = torch._softmax_backward_data(work.products(drows, v), p, -1, p.dtype)
            if need_q:
                work.put(work.sums(ds, k, scale), dq)
            if need_k:
                work.add_to_keys(dk, ds, rows, ntp_key_gradients, scale)
        return dq, dk, dv, *[None] * 4
