"""The id of the largest logit: argmax over v of (x W^T)_v, the lowest id on a tie.

The logits are the gated LoRA product's without an adapter, `ROWS` rows at a time, so a row's do not depend on its neighbours, nor then
does its id. They are written and read again: 4 bytes per logit of 16 bits, where W has 2 d that all rows share. Their argmax takes the best of
each piece of `argmax_tiles` ids, then of the pieces' bests; both keep the lowest id, so where the pieces begin is of no consequence.
"""

import torch
from torch import Tensor

from mtp_kernels.triton import _device, _tiles
from mtp_kernels.triton import _sampler_kernels as kernels
from mtp_kernels.triton._operator import operator, rows
from mtp_kernels.triton.gated_lora import gated_lora_linear

ROWS = 1024


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:1], dtype=torch.int64, device=x.device)


@operator(lambda x, weight: _empty(x))
def _linear_argmax(x: Tensor, weight: Tensor) -> Tensor:
    ids, n = _empty(x), weight.shape[0]
    piece, num_warps = _tiles.argmax_tiles(n)
    pieces = _tiles.cdiv(n, piece)
    block_p, pick_warps = _tiles.pick_tiles(pieces)
    for chunk, into in zip(x.split(ROWS), ids.split(ROWS), strict=True):
        with torch.no_grad():
            logits = gated_lora_linear(chunk, weight)
        m = chunk.shape[0]
        bests = torch.empty((pieces, m), dtype=torch.float32, device=x.device), torch.empty((pieces, m), dtype=torch.int32, device=x.device)
        _device.launch(
            kernels.argmax_kernel, (m, pieces),
            logits_ptr=logits, values_ptr=bests[0], ids_ptr=bests[1], N=n, stride_m=logits.stride(0), PIECE=piece, num_warps=num_warps,
        )  # fmt: skip
        _device.launch(
            kernels.pick_kernel, (m,),
            values_ptr=bests[0], ids_ptr=bests[1], out_ptr=into, PIECES=pieces, stride_out=1, BLOCK_P=block_p, num_warps=pick_warps,
        )  # fmt: skip
    return ids


def linear_argmax(hidden: Tensor, weight: Tensor) -> Tensor:
    return _linear_argmax(rows(hidden, hidden.shape[-1]), weight).view(hidden.shape[:-1])
