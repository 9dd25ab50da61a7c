"""What is drawn from logits without a random generator's state: noise by seed, position and token, and which tokens may be drawn.

The noise of token v at position p is output p V + v of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA) begun at the seed, as a standard
Gumbel number; it is the same whoever asks, in whatever pass and batch. `triton/_noise.py` has the same in a kernel.
"""

import math

import torch
from torch import Tensor

from mtp_kernels.types import Sampling


def signed(bits: int) -> int:
    """The int64 of these 64 bits."""
    return (bits & 2**64 - 1 ^ 2**63) - 2**63


GOLDEN, FIRST, SECOND = (signed(bits) for bits in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
BELOW_ONE = 1 - 2.0**-24  # the largest float32
WHOLE = 2.0**40  # the most likely token's weight in `least_kept`


def sampling_keys(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    return seeds + positions * signed(GOLDEN * vocab_size)


def _mixed(z: Tensor, shift: int) -> Tensor:
    return z ^ ((z >> shift) & (1 << 64 - shift) - 1)  # a shift that fills with zeros


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Float32 noise of the tokens ids (..., V) for keys (..., 1)."""
    z = keys + (ids + 1) * GOLDEN
    z = _mixed(_mixed(z, 30) * FIRST, 27) * SECOND
    uniform = ((_mixed(z, 31) >> 1) & 2**63 - 1).to(torch.float32) * 2.0**-63  # fine near 0, where the largest noise comes from
    uniform = uniform.clamp(max=BELOW_ONE)  # what rounds to 1 too has a finite noise: the only token that is left must be drawn
    return -torch.log(-torch.log1p(-uniform))


def least_kept(logits: Tensor, sampling: Sampling) -> Tensor | None:
    """(..., 1) the least that a logit of (..., V) float32 must be for top_k, top_p and min_p to leave its token; None: all are left."""
    least = _least_of_top(logits, sampling)
    if sampling.min_p is None:
        return least
    near = logits.amax(-1, keepdim=True) + sampling.temperature * math.log(sampling.min_p)
    return near if least is None else torch.maximum(near, least)


def _least_of_top(logits: Tensor, sampling: Sampling) -> Tensor | None:
    """`least_kept` of top_k and top_p alone, the smallest logit that they leave.

    Probabilities are added up as whole numbers, for those have the same sum in any order: which tokens are left must not depend on
    how a library goes through a row, nor on the rows beside it.
    """
    size, top_k, top_p = int(logits.shape[-1]), sampling.top_k, sampling.top_p
    if (top_k is None or top_k >= size) and top_p in (None, 1):
        return None
    top = logits.topk(top_k).values if top_k is not None and top_k < size else logits.sort(-1, descending=True).values
    if top_p in (None, 1):
        return top[..., -1:]
    weight = (((top - top[..., :1]).double() / sampling.temperature).exp() * WHOLE).to(torch.int64)
    upto, last = weight.cumsum(-1), top[..., -1:]
    whole = upto[..., -1:]
    if top.shape[-1] < size:  # those of a logit equal to the last one's stay with it
        whole = whole + weight[..., -1:] * ((logits == last).sum(-1, keepdim=True) - (top == last).sum(-1, keepdim=True))
    count = ((upto - weight).double() < top_p * whole.double()).sum(-1, keepdim=True)
    return top.gather(-1, count.clamp(min=1) - 1)  # 0 only of what is not a number
