"""Latent consistency: loss = sum_m weight_m / d * sum_j (z_mj - target_{index_m j})^2; target and weight are constants.

    dz_m = dloss weight_m 2 / d (z_m - target_{index_m})

The backward reads z and target again, so that no difference is kept. Rows of weight 0 are not read at all. The forward writes each row's
part, and one sum adds them: nothing is atomic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_kernels.triton import _device
from mtp_kernels.triton._operator import operator, rows
from mtp_kernels.triton._tiles import norm_tiles


@triton.jit
def latent_consistency_kernel(
    z_ptr, target_ptr, index_ptr, weight_ptr, dloss_ptr, out_ptr, z_stride, target_stride,
    D: tl.constexpr, BACKWARD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out: a row's part of the loss; in the backward the row's dz."""
    m, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + m)
    inside = d < tl.where(weight != 0, D, 0)
    z = tl.load(z_ptr + m * z_stride + d, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + tl.load(index_ptr + m) * target_stride + d, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        dz = tl.load(dloss_ptr) * weight * (2.0 / D) * (z - target)
        tl.store(out_ptr + m * D + d, dz.to(out_ptr.dtype.element_ty), mask=d < D)
    else:
        tl.store(out_ptr + m, weight * tl.div_rn(tl.sum((z - target) * (z - target), 0), D * 1.0))


def _launch(z: Tensor, target: Tensor, index: Tensor, weight: Tensor, dloss: Tensor | None, out: Tensor) -> Tensor:
    m, d = z.shape
    z, target = rows(z, d), rows(target, d)
    block_d, num_warps = norm_tiles(d)
    _device.launch(
        latent_consistency_kernel, (m,),
        z_ptr=z, target_ptr=target, index_ptr=index.contiguous(), weight_ptr=weight.contiguous(), dloss_ptr=dloss, out_ptr=out,
        z_stride=z.stride(0), target_stride=target.stride(0), D=d, BACKWARD=dloss is not None, BLOCK_D=block_d, num_warps=num_warps,
    )  # fmt: skip
    return out


@operator(lambda z, target, index, weight: torch.empty((), dtype=torch.float32, device=z.device))
def _latent_consistency(z: Tensor, target: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return _launch(z, target, index, weight, None, torch.empty(z.shape[0], dtype=torch.float32, device=z.device)).sum()


@operator(lambda dloss, z, target, index, weight: torch.empty(z.shape, dtype=z.dtype, device=z.device))
def _latent_consistency_backward(dloss: Tensor, z: Tensor, target: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return _launch(z, target, index, weight, dloss, torch.empty(z.shape, dtype=z.dtype, device=z.device))


class _LatentConsistency(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, target: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(z, target, index, weight)
        return _latent_consistency(z, target, index, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        return _latent_consistency_backward(dloss, *ctx.saved_tensors), None, None, None


def latent_consistency(z: Tensor, target: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    gradient = torch.is_grad_enabled() and z.requires_grad
    compute = _LatentConsistency.apply if gradient else _latent_consistency
    return compute(z, target.detach(), index, weight.detach())
