"""The longest prefix of each sequence's drafts that the model itself would have written, and the token it writes next.

With m_i = (d_i == y_{i-1} and i <= count), i = 1..k, the accepted number is the least i with not m_{i+1}, or k if there is none:
a minimum over positions, so what follows a mismatch cannot count. A sequence's drafts lie within one program, a program has
several sequences, and the batch is one launch; its length is read from shapes, nothing is read back from the GPU. `accept_and_commit`
is the same launch with the sequences' state: lengths, room and end-of-text.
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
    drafts_ptr, predictions_ptr, counts_ptr, accepted_ptr, next_ptr, lengths_ptr, room_ptr, finished_ptr, eos_ptr, written_ptr,
    drafts_stride_b, drafts_stride_k, predictions_stride_b, predictions_stride_k, counts_stride, B, K, E,
    HAS_COUNTS: tl.constexpr, COMMIT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
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
    if COMMIT:
        end = tl.where(following == following, K + 1, 0)  # (BLOCK_B,): no end-of-text yet
        for first in range(0, E, BLOCK_E):
            e = first + tl.arange(0, BLOCK_E)
            stop = tl.load(eos_ptr + e, mask=e < E, other=-1)[None, :]
            ends = real[:, :, None] & (written[:, :, None] == stop[:, None, :]) & (e < E)[None, None, :] & (i <= accepted[:, None])[:, :, None]
            end = tl.minimum(end, tl.min(tl.min(tl.where(ends, i[:, :, None], K + 1), 2), 1))
            last = tl.max(tl.where((following[:, None] == stop) & (e < E)[None, :], 1, 0), 1) > 0  # y_a, which `real` leaves out at a = K
            end = tl.minimum(end, tl.where(last, accepted, K + 1))
        done = tl.load(finished_ptr + b, mask=inside, other=1) != 0
        room = tl.load(room_ptr + b, mask=inside, other=0)
        count = tl.where(done, 0, tl.minimum(tl.minimum(accepted, end) + 1, room))
        done = done | (end < count) | (room == count)
        tl.store(written_ptr + b, count.to(tl.int64), mask=inside)
        tl.store(room_ptr + b, room - count, mask=inside)
        tl.store(finished_ptr + b, done, mask=inside)
        length = tl.load(lengths_ptr + b, mask=inside, other=0)
        tl.store(lengths_ptr + b, length + tl.where(done, 0, accepted + 1), mask=inside)


def _outputs(drafts: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
    b, device = drafts.shape[0], drafts.device
    return torch.empty((b,), dtype=torch.int64, device=device), torch.empty((b,), dtype=predictions.dtype, device=device)


def _launch(drafts: Tensor, predictions: Tensor, counts: Tensor | None, **state) -> tuple[Tensor, Tensor]:
    accepted, following = _outputs(drafts, predictions)
    b, k = drafts.shape
    block_k = next_power_of_2(k)
    block_b = max(1, 128 // block_k)  # four numbers per thread of one warp
    _device.launch(  # decoding passes transposed tensors: strides instead of copies
        accept_kernel, (cdiv(b, block_b),),
        drafts_ptr=drafts, predictions_ptr=predictions, counts_ptr=counts, accepted_ptr=accepted, next_ptr=following,
        **{f"{name}_ptr": state.get(name) for name in ("lengths", "room", "finished", "eos", "written")},
        drafts_stride_b=drafts.stride(0), drafts_stride_k=drafts.stride(1),
        predictions_stride_b=predictions.stride(0), predictions_stride_k=predictions.stride(1),
        counts_stride=0 if counts is None else counts.stride(0), B=b, K=k, E=state["eos"].shape[0] if state else 0,
        HAS_COUNTS=counts is not None, COMMIT=bool(state), BLOCK_B=block_b, BLOCK_K=block_k, BLOCK_E=4, num_warps=1,
    )  # fmt: skip
    return accepted, following


@operator(lambda drafts, predictions, counts: _outputs(drafts, predictions))
def _accept(drafts: Tensor, predictions: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    return _launch(drafts, predictions, counts)


def accept(drafts: Tensor, predictions: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _accept(drafts, predictions, counts)


@operator(lambda drafts, predictions, *_: (*_outputs(drafts, predictions), torch.empty_like(predictions[:, 0])), mutates=("lengths", "room", "finished"))
def _accept_and_commit(
    drafts: Tensor, predictions: Tensor, counts: Tensor, lengths: Tensor, room: Tensor, finished: Tensor, eos: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    written = torch.empty_like(lengths)
    return *_launch(drafts, predictions, counts, lengths=lengths, room=room, finished=finished, eos=eos.contiguous(), written=written), written


def accept_and_commit(
    drafts: Tensor, predictions: Tensor, counts: Tensor, lengths: Tensor, room: Tensor, finished: Tensor, eos: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _accept_and_commit(drafts, predictions, counts, lengths, room, finished, eos)
