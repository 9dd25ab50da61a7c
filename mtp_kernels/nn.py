"""Modules: weights and one call into `ops` each.

A module's `operations` are the checked functions of `ops`; a model that guarantees its shapes may set `ops.unchecked()`.
Under torch.autocast a module casts its input and its weights as torch's own layer of the kind does; a model with unchecked
operations has chosen its dtype and is left in it. torch.compile and torch.export take them; the transforms of torch.func (vmap, grad) do not.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtp_kernels import ops
from mtp_kernels.packed import forget, version
from mtp_kernels.types import SamplerWeights


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which torch.autocast wants matrix products on x's device; None where it is not enabled."""
    kind = x.device.type
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)  # which torch 2.11 cannot trace
    if not known or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


class GatedLoRALinear(nn.Module):
    """One or several linear projections of the same input, with a LoRA adapter on the rows that the gate selects.

    `weight` holds the projections one below the other, (sum(out_features), in_features); `lora_A` their shrink matrices
    (len(out_features) * rank, in_features); `lora_B` their expand matrices (sum(out_features), rank). Without an adapter
    (rank 0) this is an ordinary linear layer. See `ops.gated_lora_linear` for the formula.

    `GatedLoRALinear(d, (q, kv, kv))` is a q/k/v group, `GatedLoRALinear(d, (f, f))` a gate/up group. In evaluation mode
    without gradients the adapter is kept in the form that the operation is fastest with, and so is, on a CPU under torch.inference_mode, the
    weight, until a parameter changes; writing through `.data` or numpy in place does not count as a change (it bypasses torch's version counter),
    `train()` and then `eval()` do.
    """

    operations = ops
    rank, scale = 0, 1.0
    targets: tuple[bool, ...] | None = None
    _prepared: tuple | None = None

    def __init__(self, in_features: int, out_features: int | Sequence[int], bias: bool = False, device=None, dtype=None):
        super().__init__()
        self.in_features = in_features
        self.splits = (out_features,) if isinstance(out_features, int) else tuple(out_features)
        self.out_features = total = sum(self.splits)  # of all projections together
        self.weight = nn.Parameter(torch.empty(total, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(total, device=device, dtype=dtype)) if bias else None
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as nn.Linear does and A anew; the bias and B become zero."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.lora_A is not None:
            nn.init.uniform_(self.lora_A, -self._bound, self._bound)
            nn.init.zeros_(self.lora_B)

    @property
    def _bound(self) -> float:
        return self.in_features**-0.5

    @classmethod
    def from_linear(
        cls, linear: nn.Linear | Sequence[nn.Linear], rank: int = 0, alpha: float | None = None
    ) -> "GatedLoRALinear":
        """The layer that computes what an nn.Linear does, or what several of the same input do, side by side.

        One linear's parameters are shared, not copied; those of several are stacked copies. rank 0: without an adapter,
        else see `add_adapter`. Raises ValueError for other modules (subclasses too: a quantised weight is not this
        weight), and for linears that differ in input size, dtype, device or in having a bias.
        """
        linears = [linear] if isinstance(linear, nn.Module) else list(linear)
        wrong = [type(each).__name__ for each in linears if type(each) is not nn.Linear]
        if wrong or not linears:
            raise ValueError(f"from_linear was passed {wrong or 'no module'}; accepted are one nn.Linear or several")
        kinds = {(each.in_features, each.weight.dtype, each.weight.device, each.bias is not None) for each in linears}
        if len(kinds) > 1:
            raise ValueError(f"the linears' (in_features, dtype, device, bias) are {sorted(map(str, kinds))}; accepted is one of each")
        first = linears[0]
        module = cls(first.in_features, [each.out_features for each in linears], device="meta")
        for name in ("weight", "bias"):
            parts = [getattr(each, name) for each in linears]
            if parts[0] is not None and len(parts) > 1:
                trained = any(part.requires_grad for part in parts)
                parts = [nn.Parameter(torch.cat([part.detach() for part in parts]), requires_grad=trained)]
            setattr(module, name, parts[0])
        if rank:
            module.add_adapter(rank, alpha)
        return module.train(first.training)

    def add_adapter(
        self, rank: int, alpha: float | None = None, dtype: torch.dtype | None = None, generator=None, targets: Sequence[bool] | None = None
    ) -> None:
        """Give each projection an adapter of `rank`, scaled by `alpha / rank`; A is random, B zero (so it adds nothing).

        alpha: default the rank, scale 1. dtype: default the weight's. targets: which of the projections are adapted, default
        all; the others' B is zero and stays so. Raises ValueError for a rank outside 1 to 512, an alpha that
        is no positive number, and targets that are not one for each projection, or all false.
        """
        if not 1 <= rank <= ops.MAX_RANK:
            raise ValueError(f"rank is {rank}; accepted are 1 to {ops.MAX_RANK}")
        if alpha is not None and not (isinstance(alpha, (int, float)) and 0 < alpha < math.inf):
            raise ValueError(f"alpha is {alpha!r}; accepted is a positive number, or None for the rank")
        if targets is not None and (len(targets) != len(self.splits) or not any(targets)):
            raise ValueError(f"targets is {targets!r}; accepted is one for each of {len(self.splits)} projections, at least one of them true")
        self.targets = None if targets is None or all(targets) else tuple(bool(target) for target in targets)
        dtype = dtype or self.weight.dtype
        with torch.inference_mode(False):  # under which parameters could not be trained
            a = torch.empty(len(self.splits) * rank, self.in_features, device="cpu", dtype=torch.float32)  # whatever torch's defaults are
            a.uniform_(-self._bound, self._bound, generator=generator)
            self.lora_A = nn.Parameter(a.to(self.weight.device, dtype))
            self.lora_B = nn.Parameter(torch.zeros(sum(self.splits), rank, device=self.weight.device, dtype=dtype))
        self.rank, self.scale = rank, 1.0 if alpha is None else alpha / rank

    def remove_adapter(self) -> None:
        """Take the adapter off; what remains is the ordinary linear layer."""
        self.lora_A = self.lora_B = self._prepared = None
        self.rank, self.scale, self.targets = 0, 1.0, None

    def train(self, mode: bool = True) -> "GatedLoRALinear":
        self._prepared = None
        if mode != self.training:
            forget(p for p in (self.weight, self.lora_A, self.lora_B) if p is not None)
        return super().train(mode)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_prepared": None}  # a copy has other storage: what is kept must not be taken for its own

    def _adapter(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """(A, B, splits) in `dtype`. In evaluation without gradients they are kept, on a CPU stored input-major, which is faster
        for few rows, and with B block-diagonal, the adapters as one (the reference would put them together at each call; a
        fused kernel has no use for it)."""
        a, b, splits = self.lora_A, self.lora_B, self.splits
        if self.targets is not None and torch.is_grad_enabled():  # no gradient reaches the other projections' B
            b = torch.cat([part if target else torch.zeros_like(part) for part, target in zip(b.split(splits), self.targets, strict=True)])
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or a.is_inference():
            return a.to(dtype), b.to(dtype), splits
        key = (dtype, *version(a, b))
        prepared = self._prepared
        if prepared is None or prepared[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # of what is made in inference mode no copies can be kept (see `packed`)
                a, b = a.detach(), b.detach()
                shrink, expand, on_cpu = a.to(dtype), b.to(dtype), a.device.type == "cpu"
                if on_cpu and 1 < len(splits) <= ops.MAX_RANK // self.rank:
                    expand, splits = torch.block_diag(*expand.split(splits)), (sum(splits),)
                if on_cpu:
                    shrink, expand = (x.t().contiguous().t() for x in (shrink, expand))
            # the last two keep the parameters' storage, so that no other tensor can come to lie at the key's addresses
            prepared = self._prepared = key, (shrink, expand, splits), a, b
        return prepared[1]

    def forward(
        self, x: Tensor, gate: int | Tensor | None = None, residual: Tensor | None = None, swiglu: bool = False
    ) -> Tensor:
        """x: (..., in_features); gate: None (off), an int or a tensor, see `ops`; residual is added to the result.

        swiglu: return silu(first half) * second half instead, in the same launch where kernels are fused; no residual then.
        """
        if swiglu and residual is not None:
            raise ValueError("residual and swiglu were both passed; accepted is one of them")
        weight, bias, outside = self.weight, self.bias, None
        dtype = _autocast_dtype(x) if self.operations is ops else None
        if dtype is not None:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            if residual is not None and residual.dtype is not dtype:
                residual, outside = None, residual  # as in `residual + linear(x)`, it keeps its precision
        adapter = {}
        if self.lora_A is not None and gate is not None:
            lora_a, lora_b, splits = self._adapter(x.dtype)
            adapter = {"lora_a": lora_a, "lora_b": lora_b, "gate": gate, "scale": self.scale, "splits": splits}
        if swiglu:
            return self.operations.gated_lora_swiglu(x, weight, bias=bias, **adapter)
        y = self.operations.gated_lora_linear(x, weight, bias=bias, residual=residual, **adapter)
        return y if outside is None else outside + y

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.splits}, bias={self.bias is not None}, rank={self.rank}"


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension. See `ops.rms_norm`."""

    operations = ops

    def __init__(self, size: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None):
        if self.operations is ops and _autocast_dtype(x) is not None:  # norms stay in the weight's precision there
            x, residual = x.to(self.weight.dtype), None if residual is None else residual.to(self.weight.dtype)
        return self.operations.rms_norm(x, self.weight, self.eps, residual)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), the MLP of the Llama family (Shazeer 2020), with an adapter on the gate's rows.

    `gate_up_proj` and `down_proj` are `GatedLoRALinear`s, the first a group of two.
    """

    operations = ops

    def __init__(self, size: int, intermediate_size: int, bias: bool = False, device=None, dtype=None):
        super().__init__()
        self.gate_up_proj = GatedLoRALinear(size, (intermediate_size, intermediate_size), bias, device, dtype)
        self.down_proj = GatedLoRALinear(intermediate_size, size, bias, device, dtype)

    @classmethod
    def from_linear(
        cls, gate_proj: nn.Linear, up_proj: nn.Linear, down_proj: nn.Linear, rank: int = 0, alpha: float | None = None
    ) -> "SwiGLU":
        """The module that computes what an MLP's three nn.Linear do. See `GatedLoRALinear.from_linear`.

        Raises ValueError also for linears whose sizes do not make an MLP.
        """
        module = cls(1, 1, device="meta")
        module.gate_up_proj = GatedLoRALinear.from_linear((gate_proj, up_proj), rank, alpha)
        module.down_proj = GatedLoRALinear.from_linear(down_proj, rank, alpha)
        sizes = (*module.gate_up_proj.splits, down_proj.in_features)
        if len(set(sizes)) > 1:
            raise ValueError(f"gate_proj, up_proj and down_proj have {sizes} intermediate features; accepted is one number")
        return module.train(gate_proj.training)

    def add_adapter(self, rank: int, alpha: float | None = None, dtype: torch.dtype | None = None, generator=None) -> None:
        """See `GatedLoRALinear.add_adapter`."""
        self.gate_up_proj.add_adapter(rank, alpha, dtype, generator)
        self.down_proj.add_adapter(rank, alpha, dtype, generator)

    def remove_adapter(self) -> None:
        """See `GatedLoRALinear.remove_adapter`."""
        self.gate_up_proj.remove_adapter()
        self.down_proj.remove_adapter()

    def forward(self, x: Tensor, gate: int | Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """x: (..., size); gate and residual as in `GatedLoRALinear`. Returns x's shape."""
        return self.down_proj(self.gate_up_proj(x, gate, swiglu=True), gate, residual)


class SamplerHead(nn.Module):
    """The sampler's two blocks of Linear -> SiLU -> LayerNorm. See `ops.sampler_hidden` and `ops.sampler_draft`."""

    operations = ops

    def __init__(self, size: int, device=None, dtype=None):
        super().__init__()
        self.linear1 = nn.Linear(2 * size, size, device=device, dtype=dtype)
        self.norm1 = nn.LayerNorm(size, device=device, dtype=dtype)
        self.linear2 = nn.Linear(size, size, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(size, device=device, dtype=dtype)

    def weights(self, dtype: torch.dtype | None = None) -> SamplerWeights:
        """The parameters, in `dtype` (default their own), as the operations take them."""
        parts = (self.linear1, self.norm1, self.linear2, self.norm2)
        tensors = [tensor for part in parts for tensor in (part.weight, part.bias)]
        return SamplerWeights(*(t if dtype is None else t.to(dtype) for t in tensors))

    def forward(self, previous: Tensor, z: Tensor) -> Tensor:
        dtype = _autocast_dtype(z) if self.operations is ops else None
        if dtype is not None:
            previous, z = previous.to(dtype), z.to(dtype)
        return self.operations.sampler_hidden(previous, z, self.weights(z.dtype))

    def draft(self, z: Tensor, first: Tensor, embedding: Tensor, lm_head: Tensor, candidates: int | Tensor | None = None, **noise) -> Tensor:
        """Drafts (B, k) from the masks' states z (B, k, d) and the token before them, first (B,). noise: keys and temperature. See `ops.sampler_draft`."""
        return self.operations.sampler_draft(z, first, embedding, self.weights(z.dtype), lm_head, candidates=candidates, **noise)
