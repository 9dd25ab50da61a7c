"""The longest prefix of each sequence's drafts that the model itself would have written, and the token it writes next.

With m_i = (d_i == y_{i-1} and i <= count), i = 1..k, the accepted number is the least i with not m_{i+1}, or k if there is none:
a minimum over positions, so what follows a mismatch cannot count. A sequence's drafts lie within one program, a program has
several sequences, and the batch is one launch; its length is read from shapes, nothing is read back from the GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_kernels.triton import _device
from mtp_kernels.triton._operator import operator
from mtp_kernels.triton._tiles import cdiv, next_power_of_2


@triton.jit
def accept_kernel(
    drafts_ptr, predictions_ptr, counts_ptr, accepted_ptr, next_ptr,
    drafts_stride_b, drafts_stride_k, predictions_stride_b, predictions_stride_k, counts_stride, B, K,
    HAS_COUNTS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    i = tl.arange(0, BLOCK_K)[None, :]
    inside = b < B
    real = inside[:, None] & (i < K)
    draft = tl.load(drafts_ptr + b[:, None] * drafts_stride_b + i * drafts_stride_k, mask=real, other=0).to(tl.int64)
    written = tl.load(predictions_ptr + b[:, None] * predictions_stride_b + i * predictions_stride_k, mask=real, other=0).to(tl.int64)
    match = draft == written
    if HAS_COUNTS:
        match = match & (i < tl.load(counts_ptr + b * counts_stride, mask=inside, other=0)[:, None])
    accepted = tl.min(tl.where(match, K, i), 1)  # at most K: columns past the drafts say K or more
    following = tl.load(predictions_ptr + b * predictions_stride_b + accepted * predictions_stride_k, mask=inside, other=0)
    tl.store(accepted_ptr + b, accepted.to(tl.int64), mask=inside)
    tl.store(next_ptr + b, following, mask=inside)


def _outputs(drafts: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
    b, device = drafts.shape[0], drafts.device
    return torch.empty((b,), dtype=torch.int64, device=device), torch.empty((b,), dtype=predictions.dtype, device=device)


@operator(lambda drafts, predictions, counts: _outputs(drafts, predictions))
def _accept(drafts: Tensor, predictions: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    accepted, following = _outputs(drafts, predictions)
    b, k = drafts.shape
    block_k = next_power_of_2(k)
    block_b = max(1, 128 // block_k)  # four numbers per thread of one warp
    _device.launch(  # decoding passes transposed tensors: strides instead of copies
        accept_kernel, (cdiv(b, block_b),),
        drafts_ptr=drafts, predictions_ptr=predictions, counts_ptr=counts, accepted_ptr=accepted, next_ptr=following,
        drafts_stride_b=drafts.stride(0), drafts_stride_k=drafts.stride(1),
        predictions_stride_b=predictions.stride(0), predictions_stride_k=predictions.stride(1),
        counts_stride=0 if counts is None else counts.stride(0), B=b, K=k,
        HAS_COUNTS=counts is not None, BLOCK_B=block_b, BLOCK_K=block_k, num_warps=1,
    )  # fmt: skip
    return accepted, following


def accept(drafts: Tensor, predictions: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _accept(drafts, predictions, counts)
