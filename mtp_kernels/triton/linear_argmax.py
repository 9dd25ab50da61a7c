"""The id of the largest logit, the lowest on a tie; or, with noise on the logits, an id drawn from them. Of logits, or of hidden states: of x W^T.

These are the gated LoRA product's without an adapter, `ROWS` rows at a time, so a row's do not depend on its neighbours, nor then
does its id. They are written and read again: 4 bytes per logit of 16 bits, where W has 2 d that all rows share. Their argmax takes the best of
each piece of `argmax_tiles` ids, then of the pieces' bests; both keep the lowest id, so where the pieces begin is of no consequence. Noise
is made where the logits are read, of a row's key and a token's id; which tokens may be drawn is told by the smallest logit that is left.
"""

import torch
from torch import Tensor

from mtp_kernels._sampling import least_kept
from mtp_kernels.triton import _device, _tiles
from mtp_kernels.triton import _sampler_kernels as kernels
from mtp_kernels.triton._operator import operator, rows
from mtp_kernels.triton.gated_lora import gated_lora_linear
from mtp_kernels.types import Sampling

ROWS = 1024


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:1], dtype=torch.int64, device=x.device)


def _best(logits: Tensor, keys: Tensor | None = None, sampling: Sampling | None = None) -> Tensor:
    ids, (m, n) = _empty(logits), logits.shape
    piece, num_warps = _tiles.argmax_tiles(n)
    pieces = _tiles.cdiv(n, piece)
    block_p, pick_warps = _tiles.pick_tiles(pieces)
    least = None if sampling is None else least_kept(logits.to(torch.float32), sampling)
    bests = torch.empty((pieces, m), dtype=torch.float32, device=logits.device), torch.empty((pieces, m), dtype=torch.int32, device=logits.device)
    _device.launch(
        kernels.argmax_kernel, (m, pieces),
        logits_ptr=logits, keys_ptr=keys, least_ptr=None if least is None else least.contiguous(),
        values_ptr=bests[0], ids_ptr=bests[1], N=n, stride_m=logits.stride(0), temperature=0.0 if sampling is None else float(sampling.temperature),
        PIECE=piece, num_warps=num_warps,
    )  # fmt: skip
    _device.launch(
        kernels.pick_kernel, (m,),
        values_ptr=bests[0], ids_ptr=bests[1], out_ptr=ids, PIECES=pieces, stride_out=1, BLOCK_P=block_p, num_warps=pick_warps,
    )  # fmt: skip
    return ids


@operator(lambda logits: _empty(logits))
def _argmax(logits: Tensor) -> Tensor:
    return _best(logits)


@operator(lambda logits, keys, temperature, top_k, top_p, min_p: _empty(logits))
def _sample(logits: Tensor, keys: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
    return _best(logits, keys, Sampling(temperature, top_k, top_p, min_p))


def _options(sampling: Sampling) -> tuple:
    return sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p


def argmax(logits: Tensor) -> Tensor:
    return _argmax(rows(logits, logits.shape[-1])).view(logits.shape[:-1])


def sample(logits: Tensor, keys: Tensor, sampling: Sampling) -> Tensor:
    return _sample(rows(logits, logits.shape[-1]), keys.reshape(-1).contiguous(), *_options(sampling)).view(logits.shape[:-1])


def _of_chunks(best, hidden: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
    """best(logits, *others) of `ROWS` rows at a time."""
    with torch.no_grad():
        parts = [best(gated_lora_linear(x, weight), *more) for x, *more in zip(*(each.split(ROWS) for each in (hidden, *others)), strict=True)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def linear_argmax(hidden: Tensor, weight: Tensor) -> Tensor:
    return _of_chunks(_argmax, rows(hidden, hidden.shape[-1]), weight).view(hidden.shape[:-1])


def linear_sample(hidden: Tensor, weight: Tensor, keys: Tensor, sampling: Sampling) -> Tensor:
    def best(logits: Tensor, keys: Tensor) -> Tensor:
        return _sample(logits, keys, *_options(sampling))

    return _of_chunks(best, rows(hidden, hidden.shape[-1]), weight, keys.reshape(-1).contiguous()).view(hidden.shape[:-1])
