"""A decoder layer of the Llama family on the rows of a pass."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mtp_kernels.nn import GatedLoRALinear, RMSNorm
from mtp_model.cache import KVCache
from mtp_model.config import ModelConfig
from mtp_model.layout import Rows

# The modules that an adapter is put on, and the projections stacked in each.
STACKS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",), "gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def remade(function: Callable[[Tensor], Tensor], x: Tensor, product: Callable[..., Tensor], *arguments) -> Tensor:
    """product(function(x), *arguments), keeping no function(x) for the backward pass: it is computed again there, from x."""
    y, x = function(x), x.detach()
    address = y.data_ptr(), y.numel()

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if (saved.data_ptr(), saved.numel()) == address and saved.is_contiguous() else saved

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return function(x).view(kept)

    with saved_tensors_hooks(pack, unpack):
        return product(y, *arguments)


def _straight(function: Callable[[Tensor], Tensor], x: Tensor, product: Callable[..., Tensor], *arguments) -> Tensor:
    return product(function(x), *arguments)


class DecoderLayer(nn.Module):
    """norm -> q/k/v -> (norm of q and k heads) -> rotary -> attention -> o -> norm -> gate/up -> SwiGLU -> down, adapters on the mask rows.

    For a backward pass the layer keeps the inputs of norms and SwiGLU, and computes these again from them, for they are cheap.
    recompute: keep only the layer's input, and run the layer again there (activation checkpointing).
    """

    recompute = False

    def __init__(self, config: ModelConfig, index: int, device=None, dtype=None):
        super().__init__()
        self.index, self.window = index, config.windows[index] if config.windows else None
        self.operations = None  # MTPModel.use() sets them, here and in the modules below
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        )  # fmt: skip
        d, q, kv, f = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim, config.intermediate_size
        factory = {"device": device, "dtype": dtype}
        self.input_norm = RMSNorm(d, config.rms_norm_eps, **factory)
        self.qkv_proj = GatedLoRALinear(d, (q, kv, kv), config.attention_bias, **factory)
        # A weight for each head of q and of k, so that all are normalised and rotated at once.
        self.qk_norm = nn.Parameter(torch.ones(self.heads + self.kv_heads, self.head_dim, **factory)) if config.qk_norm else None
        self.eps = config.rms_norm_eps
        self.o_proj = GatedLoRALinear(q, d, config.output_bias, **factory)
        self.post_norm = RMSNorm(d, config.rms_norm_eps, **factory)
        self.gate_up_proj = GatedLoRALinear(d, (f, f), config.mlp_bias, **factory)
        self.down_proj = GatedLoRALinear(f, d, config.mlp_bias, **factory)

    def adapted(self) -> dict[str, GatedLoRALinear]:
        return {name: getattr(self, name) for name in STACKS}

    def forward(self, x: Tensor, rows: Rows, rotary: tuple[Tensor, Tensor], cache: KVCache) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, rows, rotary, cache, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x, rows, rotary, cache)

    def _forward(self, x: Tensor, rows: Rows, rotary: tuple[Tensor, Tensor], cache: KVCache) -> Tensor:
        t, b = map(int, rows.positions.shape)  # x: (T * B, d)
        gate, heads = rows.gate, self.heads
        rotated = heads + self.kv_heads
        trained = torch.is_grad_enabled()
        through = remade if trained and not self.recompute else _straight
        qkv = through(self.input_norm, x, self.qkv_proj, gate).view(t, b, rotated + self.kv_heads, self.head_dim)
        if isinstance(rows.start, Tensor):  # the columns to write are known to the device alone
            q = self.operations.rotary_write(qkv, *rotary, *cache.storage(self.index), rows.start, self.qk_norm, self.eps)
            keys, values = cache.keys[self.index], cache.values[self.index]
        else:
            qk, v = qkv.split([rotated, self.kv_heads], 2)
            qk = self.operations.rotary_embedding(qk, *rotary, self.qk_norm, self.eps)  # q and k heads together
            q, k = qk.split([heads, self.kv_heads], 2)
            keys, values = cache.update(self.index, k, v, rows.start, keep=rows.num_ntp > 0)
        # Masks alone see NTP keys of a pass before theirs, which is a constant.
        attended = self.operations.attention(q, keys, values, rows.rule_within(self.window), ntp_key_gradients=rows.num_ntp > 0)
        x = self.o_proj(attended.reshape(t * b, heads * self.head_dim), gate, x)
        if trained:  # SwiGLU's input has to be kept
            wide = through(self.post_norm, x, self.gate_up_proj, gate)
            return through(self.operations.swiglu, wide, self.down_proj, gate, x)
        return self.down_proj(self.gate_up_proj(self.post_norm(x), gate, swiglu=True), gate, x)
