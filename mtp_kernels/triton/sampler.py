"""Drafting with the sampler head: k steps, one after another, of four launches each, and nothing read back from the GPU.

    once      from_mask = z W1[:, d:]^T + b1, all k masks at once, by the gated LoRA product; for shortlists also z W_lm^T and its top C
    step i    block         u = silu(E[token_{i-1}] W1[:, :d]^T + from_mask_i), and the moments of u's tiles
              block         v = silu(LN(u) W2^T + b2), and the moments of v's tiles
              vocabulary    per tile of the vocabulary, the best of LN(v) W_lm^T, or shortlist: per piece of the list
              pick          token_i: the best of the tiles

Each LayerNorm is made by the launch that reads it, from the moments that the one before has left, so that it costs neither a launch nor a second
reading of the row. Logits are compared in float32, with noise for text that is drawn, and never written. The k tokens lie in the result, where the
next step reads them; every size is known from shapes, so that a CUDA graph can hold all of it. With few rows all is bound by reading W1, W2 and W_lm.
"""

import torch
from torch import Tensor

from mtp_kernels.triton import _device, _tiles
from mtp_kernels.triton import _sampler_kernels as kernels
from mtp_kernels.triton._operator import operator
from mtp_kernels.triton._tiles import cdiv, next_power_of_2
from mtp_kernels.triton.gated_lora import gated_lora_linear
from mtp_kernels.types import SamplerWeights

EPS = 1e-5


def _empty(z: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=z.device)


class _Steps:
    """The launches of one call's steps, and the memory between them."""

    def __init__(self, z: Tensor, lm_head: Tensor, candidates: int):
        """candidates: how many tokens a step chooses from, 0 for all."""
        b, _, d = z.shape
        size, memory = z.element_size(), _device.shared_memory()
        self.b, self.d = b, d
        self.tiles, self.head_tiles = (_tiles.sampler_tiles(b, n, d, size, memory) for n in (d, lm_head.shape[0]))
        self.list_tiles = _tiles.shortlist_tiles(candidates, d)
        self.width_tiles = cdiv(d, self.tiles.block_n)
        pieces = cdiv(candidates, self.list_tiles[0]) if candidates else cdiv(lm_head.shape[0], self.head_tiles.block_n)
        self.u, self.v = (_empty(z, b, d, dtype=z.dtype) for _ in range(2))
        self.u_moments, self.v_moments = (_empty(z, 2, self.width_tiles, b, dtype=torch.float32) for _ in range(2))
        self.values, self.ids = (_empty(z, pieces, b, dtype=dtype) for dtype in (torch.float32, torch.int32))
        self.precision = "ieee" if z.dtype == torch.float32 else "tf32"  # float32 products are exact to float32

    def _norm(self, moments: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> dict:
        return dict(
            moments_ptr=moments, norm_weight_ptr=weight, norm_bias_ptr=bias, eps=EPS, K=self.d,
            TILES=self.width_tiles, WIDTH=self.tiles.block_n, BLOCK_T=next_power_of_2(self.width_tiles),
        )  # fmt: skip

    def _blocks(self, tiles: _tiles.SamplerTiles) -> dict:
        return dict(
            PRECISION=self.precision, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip

    def block(self, x: Tensor, weight: Tensor, added: Tensor, into: tuple[Tensor, Tensor], token: Tensor | None = None, norm=(None,) * 3) -> None:
        """into = silu(rows of x weight^T + added) and its moments; the rows are the tokens', or all, normalised. added: (B, d) or (d,)."""
        _device.launch(
            kernels.block_kernel, (cdiv(self.b, self.tiles.block_m), self.width_tiles),
            x_ptr=x, token_ptr=token, w_ptr=weight, added_ptr=added, y_ptr=into[0], y_moments_ptr=into[1], B=self.b, N=self.d,
            stride_token=0 if token is None else token.stride(0), stride_xm=x.stride(0), stride_xk=x.stride(1),
            stride_wn=weight.stride(0), stride_wk=weight.stride(1), stride_added=added.stride(0) if added.ndim == 2 else 0,
            NORM=token is None, **self._norm(*norm), **self._blocks(self.tiles),
        )  # fmt: skip

    @staticmethod
    def _noise(keys: Tensor | None, temperature: float) -> dict:
        return dict(keys_ptr=keys, stride_key=0 if keys is None else keys.stride(0), temperature=temperature)

    def vocabulary(self, norm: tuple[Tensor, Tensor, Tensor], lm_head: Tensor, *noise) -> None:
        _device.launch(
            kernels.vocabulary_kernel, (cdiv(self.b, self.head_tiles.block_m), self.values.shape[0]),
            x_ptr=self.v, w_ptr=lm_head, values_ptr=self.values, ids_ptr=self.ids, B=self.b, N=lm_head.shape[0],
            stride_wn=lm_head.stride(0), stride_wk=lm_head.stride(1), **self._noise(*noise), **self._norm(*norm), **self._blocks(self.head_tiles),
        )  # fmt: skip

    def shortlist(self, norm: tuple[Tensor, Tensor, Tensor], lm_head: Tensor, listed: Tensor, *noise) -> None:
        block_c, block_k, num_warps = self.list_tiles
        _device.launch(
            kernels.shortlist_kernel, (self.values.shape[0], self.b),
            x_ptr=self.v, w_ptr=lm_head, list_ptr=listed, values_ptr=self.values, ids_ptr=self.ids, C=listed.shape[1],
            stride_list=listed.stride(0), stride_wn=lm_head.stride(0), stride_wk=lm_head.stride(1),
            BLOCK_C=block_c, BLOCK_K=block_k, num_warps=num_warps, **self._noise(*noise), **self._norm(*norm),
        )  # fmt: skip

    def pick(self, into: Tensor) -> None:
        pieces = self.values.shape[0]
        block_p, num_warps = _tiles.pick_tiles(pieces)
        _device.launch(
            kernels.pick_kernel, (self.b,),
            values_ptr=self.values, ids_ptr=self.ids, out_ptr=into, PIECES=pieces, stride_out=into.stride(0),
            BLOCK_P=block_p, num_warps=num_warps,
        )  # fmt: skip


@operator(lambda z, *_: _empty(z, *z.shape[:2], dtype=torch.int64))
def _sampler_draft(
    z: Tensor, first: Tensor, embedding: Tensor, weights: list[Tensor], lm_head: Tensor, candidates: int, listed: Tensor | None, keys: Tensor | None,
    temperature: float,
) -> Tensor:  # fmt: skip
    drafts = _empty(z, *z.shape[:2], dtype=torch.int64)
    if not drafts.numel():
        return drafts
    w, d = SamplerWeights(*(x.contiguous() if x.ndim == 1 else x for x in weights)), z.shape[2]
    with torch.no_grad():
        from_mask = gated_lora_linear(z, w.w1[:, d:], bias=w.b1)
        if candidates:
            listed = gated_lora_linear(z, lm_head).topk(candidates, dim=-1, sorted=False).indices
    steps, token = _Steps(z, lm_head, 0 if listed is None else listed.shape[2]), first
    second_norm = steps.v_moments, w.norm2_weight, w.norm2_bias
    for i in range(z.shape[1]):
        steps.block(embedding, w.w1[:, :d], from_mask[:, i], (steps.u, steps.u_moments), token=token)
        steps.block(steps.u, w.w2, w.b2, (steps.v, steps.v_moments), norm=(steps.u_moments, w.norm1_weight, w.norm1_bias))
        noise = None if keys is None else keys[:, i], temperature
        if listed is None:
            steps.vocabulary(second_norm, lm_head, *noise)
        else:
            steps.shortlist(second_norm, lm_head, listed[:, i], *noise)
        token = drafts[:, i]
        steps.pick(token)
    return drafts


def sampler_draft(
    z: Tensor,
    first: Tensor,
    embedding: Tensor,
    weights: SamplerWeights,
    lm_head: Tensor,
    *,
    candidates: int | Tensor | None = None,
    keys: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    listed = candidates.contiguous() if isinstance(candidates, Tensor) else None
    short = listed is None and candidates is not None and candidates < lm_head.shape[0]
    return _sampler_draft(z, first, embedding, list(weights), lm_head, candidates if short else 0, listed, keys, float(temperature))
