"""Attention of mask rows in whole blocks and of nothing else, as training has it, with its gradients written out (see `_gradients` for why).

A mask sees NTP keys, all of them in columns before `start`, and its own block's keys up to its own, which are behind them in the rows' order. So its
scores are two small products, with one softmax over both:

    p = exp(scale q K^T + bias - L),  L = log of the row's sum of exponentials,  y = p V
    dV = p^T dy,  ds = scale p (dy V^T - y . dy),  dq = ds K,  dK = ds^T q

Kept for the gradients are q, K, V, y and L, from which p is computed again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class _Blocks:
    """Sizes, and the order of rows in which a key/value head's blocks, and the heads of its group in a block, lie side by side."""

    batch: int
    kv_heads: int
    groups: int
    blocks: int
    size: int
    start: int

    def rows(self, x: Tensor) -> Tensor:
        """(T, B, H, D) as (B * H_kv, blocks * groups * size, D)."""
        x = x.reshape(self.blocks, self.size, self.batch, self.kv_heads, self.groups, -1)
        return x.permute(2, 3, 0, 4, 1, 5).reshape(self.batch * self.kv_heads, self.blocks * self.groups * self.size, -1).contiguous()

    def unrows(self, x: Tensor) -> Tensor:
        x = x.view(self.batch, self.kv_heads, self.blocks, self.groups, self.size, -1)
        return x.permute(2, 4, 0, 1, 3, 5).reshape(self.blocks * self.size, self.batch, self.kv_heads * self.groups, -1)

    def each(self, x: Tensor) -> Tensor:
        """Rows as above, by block: (B * H_kv * blocks, groups * size, ...)."""
        return x.view(self.batch * self.kv_heads * self.blocks, self.groups * self.size, -1)

    def past(self, x: Tensor) -> Tensor:
        """The NTP keys of (B, H_kv, S, D): (B * H_kv, start, D)."""
        return x[:, :, : self.start].reshape(self.batch * self.kv_heads, self.start, -1)

    def own(self, x: Tensor) -> Tensor:
        """The masks' keys by block: (B * H_kv * blocks, size, D)."""
        x = x[:, :, self.start : self.start + self.blocks * self.size]
        return x.reshape(self.batch * self.kv_heads * self.blocks, self.size, -1)

    def keys(self, past: Tensor | None, own: Tensor, like: Tensor) -> Tensor:
        """A gradient of all keys, (B, H_kv, S, D), from the two; None for zeros."""
        x, end = torch.zeros_like(like), self.start + self.blocks * self.size
        if past is not None:
            x[:, :, : self.start] = past.view(self.batch, self.kv_heads, self.start, -1)
        x[:, :, self.start : end] = own.view(self.batch, self.kv_heads, end - self.start, -1)
        return x

    def scores(self, q: Tensor, k: Tensor, past_bias: Tensor, own_bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Of rows q with the NTP keys, (B * H_kv, rows, start), and with their own block's, (B * H_kv, rows, size)."""
        past = torch.baddbmm(q.new_zeros(()), q, self.past(k).transpose(1, 2), beta=0, alpha=scale)
        past.view(self.batch, self.kv_heads, self.blocks, self.groups, self.size, self.start).add_(past_bias)
        own = torch.baddbmm(own_bias, self.each(q), self.own(k).transpose(1, 2), alpha=scale)
        return past, own.view(*q.shape[:2], self.size)


class BlockAttention(torch.autograd.Function):
    """q (T, B, H, D), k, v (B, H_kv, S, D) -> (T, B, H, D).

    past_bias (B, 1, blocks, 1, size, start) and own_bias (groups * size, size) are added to the scores. ntp_key_gradients: see `ops.attention`.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, past_bias: Tensor, own_bias: Tensor, size: int, scale: float, ntp_key_gradients: bool) -> Tensor:
        (t, batch, heads, _), kv_heads = q.shape, k.shape[1]
        blocks = _Blocks(batch, kv_heads, heads // kv_heads, t // size, size, past_bias.shape[-1])
        rows = blocks.rows(q)
        past, own = blocks.scores(rows, k, past_bias, own_bias, scale)
        top = own.amax(-1, keepdim=True)  # a row sees itself, but maybe no NTP key
        top = torch.maximum(top, past.amax(-1, keepdim=True)) if blocks.start else top
        past.sub_(top).exp_()
        own.sub_(top).exp_()
        total = past.sum(-1, keepdim=True).add_(own.sum(-1, keepdim=True))
        y = torch.bmm(past, blocks.past(v))
        blocks.each(y).baddbmm_(blocks.each(own), blocks.own(v))
        y = blocks.unrows(y.div_(total))
        ctx.save_for_backward(rows, k, v, past_bias, own_bias, y, top.add_(total.log_()))
        ctx.options = blocks, scale, ntp_key_gradients
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        q, k, v, past_bias, own_bias, y, sums = ctx.saved_tensors
        blocks, scale, ntp_key_gradients = ctx.options
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        past, own = (x.sub_(sums).exp_() for x in blocks.scores(q, k, past_bias, own_bias, scale))
        mean = blocks.rows(torch.linalg.vecdot(dy, y).unsqueeze(-1))
        dy = blocks.rows(dy)
        dq = dk = dv = None
        if need_v:
            of_past = torch.bmm(past.transpose(1, 2), dy) if ntp_key_gradients else None
            dv = blocks.keys(of_past, torch.bmm(blocks.each(own).transpose(1, 2), blocks.each(dy)), v)
        past = torch.bmm(dy, blocks.past(v).transpose(1, 2)).sub_(mean).mul_(past).mul_(scale)
        own = torch.bmm(blocks.each(dy), blocks.own(v).transpose(1, 2)).view_as(own).sub_(mean).mul_(own).mul_(scale)
        if need_k:
            of_past = torch.bmm(past.transpose(1, 2), q) if ntp_key_gradients else None
            dk = blocks.keys(of_past, torch.bmm(blocks.each(own).transpose(1, 2), blocks.each(q)), k)
        if need_q:
            dq = torch.bmm(past, blocks.past(k))
            blocks.each(dq).baddbmm_(blocks.each(own), blocks.own(k))
            dq = blocks.unrows(dq)
        return dq, dk, dv, *[None] * 5
