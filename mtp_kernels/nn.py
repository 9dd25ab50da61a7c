"""Modules: weights and one call into `ops` each.

A module's `operations` are the checked functions of `ops`; a model that guarantees its shapes may set `ops.unchecked()`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtp_kernels import ops
from mtp_kernels.types import SamplerWeights


class GatedLoRALinear(nn.Module):
    """One or several linear projections of the same input, with a LoRA adapter on the rows that the gate selects.

    `weight` holds the projections one below the other, (sum(out_features), in_features); `lora_A` their shrink matrices
    (len(out_features) * rank, in_features); `lora_B` their expand matrices (sum(out_features), rank). Without an adapter
    (rank 0) this is an ordinary linear layer. See `ops.gated_lora_linear` for the formula.
    """

    operations = ops

    def __init__(self, in_features: int, out_features: int | Sequence[int], bias: bool = False, device=None, dtype=None):
        super().__init__()
        self.in_features = in_features
        self.splits = (out_features,) if isinstance(out_features, int) else tuple(out_features)
        total = sum(self.splits)
        self.weight = nn.Parameter(torch.empty(total, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(total, device=device, dtype=dtype)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.rank, self.scale = 0, 1.0
        self._prepared: tuple[tuple, tuple] | None = None

    def add_adapter(self, rank: int, alpha: float, dtype: torch.dtype | None = None, generator=None) -> None:
        """Give each projection an adapter of `rank`, scaled by `alpha / rank`; A is random, B zero (so it adds nothing)."""
        if not 1 <= rank <= 512:
            raise ValueError(f"rank is {rank}; accepted are 1 to 512")
        dtype = dtype or self.weight.dtype
        bound = self.in_features**-0.5
        a = torch.empty(len(self.splits) * rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(self.weight.device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(sum(self.splits), rank, device=self.weight.device, dtype=dtype))
        self.rank, self.scale = rank, alpha / rank

    def remove_adapter(self) -> None:
        self.lora_A = self.lora_B = self._prepared = None
        self.rank, self.scale = 0, 1.0

    def _adapter(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, ...] | None]:
        """(A, B, splits) in `dtype`. Without gradients, B is block-diagonal, the adapters as one, and kept until changed."""
        a, b, splits = self.lora_A, self.lora_B, self.splits
        if torch.is_grad_enabled():
            return a.to(dtype), b.to(dtype), splits
        key = (dtype, a._version, b._version, a.data_ptr(), b.data_ptr())
        if self._prepared is None or self._prepared[0] != key:
            stacked = 1 < len(splits) <= ops.MAX_RANK // self.rank
            b = torch.block_diag(*b.detach().split(splits)) if stacked else b.detach()
            self._prepared = key, (a.detach().to(dtype), b.to(dtype), None if stacked else splits)
        return self._prepared[1]

    def forward(self, x: Tensor, gate: int | Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        if self.lora_A is None or gate is None:
            return self.operations.gated_lora_linear(x, self.weight, bias=self.bias, residual=residual)
        lora_a, lora_b, splits = self._adapter(x.dtype)
        return self.operations.gated_lora_linear(
            x, self.weight, lora_a, lora_b, gate, scale=self.scale, splits=splits, bias=self.bias, residual=residual
        )

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.splits}, bias={self.bias is not None}, rank={self.rank}"


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension. See `ops.rms_norm`."""

    operations = ops

    def __init__(self, size: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None):
        return self.operations.rms_norm(x, self.weight, self.eps, residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class SamplerHead(nn.Module):
    """The sampler's two blocks of Linear -> SiLU -> LayerNorm. See `ops.sampler_hidden` and `ops.sampler_draft`."""

    def __init__(self, size: int, device=None, dtype=None):
        super().__init__()
        self.linear1 = nn.Linear(2 * size, size, device=device, dtype=dtype)
        self.norm1 = nn.LayerNorm(size, device=device, dtype=dtype)
        self.linear2 = nn.Linear(size, size, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(size, device=device, dtype=dtype)

    def weights(self, dtype: torch.dtype | None = None) -> SamplerWeights:
        parts = (self.linear1, self.norm1, self.linear2, self.norm2)
        tensors = [tensor for part in parts for tensor in (part.weight, part.bias)]
        return SamplerWeights(*(t if dtype is None else t.to(dtype) for t in tensors))

    def forward(self, previous: Tensor, z: Tensor) -> Tensor:
        return ops.sampler_hidden(previous, z, self.weights(z.dtype))

    def draft(self, z: Tensor, first: Tensor, embedding: Tensor, lm_head: Tensor) -> Tensor:
        return ops.sampler_draft(z, first, embedding, self.weights(z.dtype), lm_head)
