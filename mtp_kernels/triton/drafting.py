"""What the next step's drafts come from: the states of the masks behind the last accepted token, or the text itself.

Both are one launch for the batch, of which nothing is read back. The text is searched from its newest token backwards, as far as its own
length and no further than the place that is found.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtp_kernels.triton import _device
from mtp_kernels.triton._operator import operator
from mtp_kernels.triton._tiles import cdiv, elementwise_tiles, lookup_tiles, next_power_of_2


@triton.jit
def drafting_states_kernel(
    z_ptr, anchors_ptr, accepted_ptr, without_ptr, states_ptr, counts_ptr,
    z_stride_t, z_stride_b, anchors_stride_a, anchors_stride_b, accepted_stride, without_stride, FIRST, A, K, D,
    HAS_WITHOUT: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A piece of one mask's state. FIRST: z's row of the first mask."""
    b = tl.program_id(0).to(tl.int64) // K
    j = tl.program_id(0) % K
    a = tl.arange(0, BLOCK_A)
    anchor = tl.load(anchors_ptr + a * anchors_stride_a + b * anchors_stride_b, mask=a < A, other=-1)
    block = tl.min(tl.where((a < A) & (anchor == tl.load(accepted_ptr + b * accepted_stride)), a, A), 0)
    found = block < A
    if HAS_WITHOUT:
        found = found & (tl.load(without_ptr + b * without_stride) == 0)
    row = FIRST + tl.where(found, block, 0) * K + j
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    state = tl.load(z_ptr + row.to(tl.int64) * z_stride_t + b * z_stride_b + d, mask=d < D, other=0.0)
    tl.store(states_ptr + (b * K + j) * D + d, state, mask=d < D)
    if (j == 0) & (tl.program_id(1) == 0):
        tl.store(counts_ptr + b, tl.where(found, K, 0).to(tl.int64))


@triton.jit
def lookup_kernel(
    text_ptr, newest_ptr, drafts_ptr, found_ptr, text_stride, newest_stride, N,
    MATCH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The N drafts of one text."""
    b = tl.program_id(0).to(tl.int64)
    text_ptr += b * text_stride
    newest = tl.load(newest_ptr + b * newest_stride).to(tl.int32)
    place = tl.full((), -1, tl.int32)
    end = newest  # places from here on were looked at
    while (end > MATCH - 1) & (place < 0):
        at = end - 1 - tl.arange(0, BLOCK_S)
        same = at >= MATCH - 1
        for i in tl.static_range(MATCH):  # `at` is below newest, so that newest - i is a token wherever at - i is one
            token = tl.load(text_ptr + newest - i)
            same = same & (tl.load(text_ptr + at - i, mask=same, other=0) == token)
        place = tl.max(tl.where(same, at, -1), 0)
        end -= BLOCK_S
    i = tl.arange(0, BLOCK_N)
    draft = tl.load(text_ptr + place + 1 + i % (newest - place), mask=i < N, other=0)
    tl.store(drafts_ptr + b * N + i, draft, mask=i < N)
    tl.store(found_ptr + b, place >= 0)


def _states(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    b, d = z.shape[1:]
    return torch.empty((b, k, d), dtype=z.dtype, device=z.device), torch.empty((b,), dtype=torch.int64, device=z.device)


@operator(lambda z, anchors, accepted, k, without: _states(z, k))
def _drafting_states(z: Tensor, anchors: Tensor, accepted: Tensor, k: int, without: Tensor | None) -> tuple[Tensor, Tensor]:
    (states, counts), (t, b, d), blocks = _states(z, k), z.shape, anchors.shape[0]
    z = z if z.stride(2) == 1 else z.contiguous()
    block_d, num_warps = elementwise_tiles(d)
    _device.launch(
        drafting_states_kernel, (b * k, cdiv(d, block_d)),
        z_ptr=z, anchors_ptr=anchors, accepted_ptr=accepted, without_ptr=None if without is None else without.view(torch.uint8),
        states_ptr=states, counts_ptr=counts,
        z_stride_t=z.stride(0), z_stride_b=z.stride(1), anchors_stride_a=anchors.stride(0), anchors_stride_b=anchors.stride(1),
        accepted_stride=accepted.stride(0), without_stride=0 if without is None else without.stride(0), FIRST=t - blocks * k, A=blocks, K=k, D=d,
        HAS_WITHOUT=without is not None, BLOCK_A=next_power_of_2(blocks), BLOCK_D=block_d, num_warps=num_warps,
    )  # fmt: skip
    return states, counts


def drafting_states(z: Tensor, anchors: Tensor, accepted: Tensor, k: int, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _drafting_states(z, anchors, accepted, k, without)


def _drafts(text: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    b, device = text.shape[0], text.device
    return torch.empty((b, tokens), dtype=torch.int64, device=device), torch.empty((b,), dtype=torch.bool, device=device)


@operator(lambda text, newest, tokens, match: _drafts(text, tokens))
def _lookup_drafts(text: Tensor, newest: Tensor, tokens: int, match: int) -> tuple[Tensor, Tensor]:
    (drafts, found), (b, s) = _drafts(text, tokens), text.shape
    text = text if text.stride(1) == 1 else text.contiguous()
    block_s, num_warps = lookup_tiles(s)
    _device.launch(
        lookup_kernel, (b,), text_ptr=text, newest_ptr=newest, drafts_ptr=drafts, found_ptr=found, text_stride=text.stride(0),
        newest_stride=newest.stride(0), N=tokens, MATCH=match, BLOCK_S=block_s, BLOCK_N=next_power_of_2(tokens), num_warps=num_warps,
    )  # fmt: skip
    return drafts, found


def lookup_drafts(text: Tensor, newest: Tensor, tokens: int, match: int = 2) -> tuple[Tensor, Tensor]:
    return _lookup_drafts(text, newest, tokens, match)
