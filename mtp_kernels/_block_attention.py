"""Attention of mask rows in whole blocks and of nothing else, as training has it, with its gradients written out (see `_gradients` for why).

A mask sees NTP keys, all of them in columns before `start`, and its own block's keys up to its own, which are behind them in the rows' order. So its
scores are two small products, side by side in one tensor for the softmax:

    p = softmax(scale q K^T + bias),  y = p V
    dV = p^T dy,  ds = p (dy V^T - sum(p dy V^T)),  dq = scale ds K,  dK = scale ds^T q

Kept for the gradients are q, K and V, from which p is computed again.
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
        """Back again."""
        x = x.view(self.batch, self.kv_heads, self.blocks, self.groups, self.size, -1)
        return x.permute(2, 4, 0, 1, 3, 5).reshape(self.blocks * self.size, self.batch, self.kv_heads * self.groups, -1)

    def each(self, x: Tensor) -> Tensor:
        """Rows as above, by block: (B * H_kv * blocks, groups * size, ...)."""
        return x.view(self.batch * self.kv_heads * self.blocks, self.groups * self.size, -1)

    def past(self, x: Tensor) -> Tensor:
        """The NTP keys of (B, H_kv, S, D): (B * H_kv, start, D)."""
        return x[:, :, : self.start].flatten(0, 1)

    def own(self, x: Tensor) -> Tensor:
        """The masks' keys by block: (B * H_kv * blocks, size, D)."""
        x = x[:, :, self.start : self.start + self.blocks * self.size]
        return x.reshape(self.batch * self.kv_heads * self.blocks, self.size, -1)

    def products(self, x: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
        """scale x K^T of rows x with the NTP keys and, behind those, with their own block's: (B * H_kv, rows, start + size)."""
        out = x.new_empty(*x.shape[:2], self.start + self.size)
        out[..., : self.start].baddbmm_(x, self.past(keys).transpose(1, 2), beta=0, alpha=scale)
        self.each(out)[..., self.start :].baddbmm_(self.each(x), self.own(keys).transpose(1, 2), beta=0, alpha=scale)
        return out

    def sums(self, p: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
        """scale p K of such products p: (B * H_kv, rows, D)."""
        x = torch.baddbmm(p.new_zeros(()), p[..., : self.start], self.past(keys), beta=0, alpha=scale)
        self.each(x).baddbmm_(self.each(p)[..., self.start :], self.own(keys), alpha=scale)
        return x

    def to_keys(self, p: Tensor, x: Tensor, like: Tensor, past: bool, scale: float = 1.0) -> Tensor:
        """scale p^T x, (B, H_kv, S, D); zeros where no key is, and of the NTP keys without `past`."""
        out, end = torch.zeros_like(like), self.start + self.blocks * self.size
        if past:
            out[:, :, : self.start] = torch.bmm(p[..., : self.start].transpose(1, 2), x).unflatten(0, (self.batch, self.kv_heads))
        own = torch.bmm(self.each(p)[..., self.start :].transpose(1, 2), self.each(x))
        out[:, :, self.start : end] = own.view(self.batch, self.kv_heads, end - self.start, -1)
        return out.mul_(scale)

    def probabilities(self, q: Tensor, k: Tensor, past_bias: Tensor, own_bias: Tensor, scale: float) -> Tensor:
        scores = self.products(q, k, scale)
        by_row = scores.view(self.batch, self.kv_heads, self.blocks, self.groups, self.size, -1)
        by_row[..., : self.start].add_(past_bias)
        by_row[..., self.start :].add_(own_bias)
        return scores.softmax(-1)


class BlockAttention(torch.autograd.Function):
    """q (T, B, H, D), k, v (B, H_kv, S, D) -> (T, B, H, D).

    past_bias (B, 1, blocks, 1, size, start) and own_bias (size, size) are added to the scores. ntp_key_gradients: see `ops.attention`.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, past_bias: Tensor, own_bias: Tensor, scale: float, ntp_key_gradients: bool) -> Tensor:
        (t, batch, heads, _), kv_heads, size = q.shape, k.shape[1], own_bias.shape[0]
        blocks = _Blocks(batch, kv_heads, heads // kv_heads, t // size, size, past_bias.shape[-1])
        q = blocks.rows(q)
        ctx.save_for_backward(q, k, v, past_bias, own_bias)
        ctx.options = blocks, scale, ntp_key_gradients
        return blocks.unrows(blocks.sums(blocks.probabilities(q, k, past_bias, own_bias, scale), v))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        q, k, v, past_bias, own_bias = ctx.saved_tensors
        blocks, scale, ntp_key_gradients = ctx.options
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        p, dy = blocks.probabilities(q, k, past_bias, own_bias, scale), blocks.rows(dy)
        dv = blocks.to_keys(p, dy, v, ntp_key_gradients) if need_v else None
        ds = torch._softmax_backward_data(blocks.products(dy, v), p, -1, p.dtype)
        dq = blocks.unrows(blocks.sums(ds, k, scale)) if need_q else None
        dk = blocks.to_keys(ds, q, k, ntp_key_gradients, scale) if need_k else None
        return dq, dk, dv, *[None] * 4
