"""The plain way to train mask tokens: every row in one pass with gradients, as one writes it with PyTorch alone.

Tokens and masks go through the layers side by side, batch first. The adapter is computed for every row and multiplied by the gate,
attention takes a mask made from the rule (dense for `scaled_dot_product_attention`, or FlexAttention's), the logits of all
labelled rows stand at once, autograd does the rest. Parameters are an `MTPModel`'s own, so losses and gradients are comparable with
`mtp_model.loss.mtp_loss`; nothing else of the package is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_model.data import Batch
from mtp_model.model import MTPModel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Sequences:
    """The rows of a batch, T = length tokens and then k masks after each anchor, all (B, T) unless said otherwise.

    last: the last token that a row sees. block, slot: (T,) of masks, -1 and 0 for tokens. real: no padding anchor's.
    """

    ids: Tensor
    answer: Tensor
    last: Tensor
    block: Tensor
    slot: Tensor
    real: Tensor

    @classmethod
    def of(cls, batch: Batch, anchors: tuple[Tensor, Tensor], k: int) -> "Sequences":
        """Raises ValueError for packed sequences."""
        if batch.first is not None:
            raise ValueError("the batch has packed sequences; accepted is one document in each")
        ids, answer, chosen, real = (x.t() for x in (batch.ids, batch.answer, *anchors))
        size, length = ids.shape
        tokens = torch.arange(length, device=ids.device)
        blocks = torch.arange(chosen.shape[1], device=ids.device)
        return cls(
            ids, answer,
            last=torch.cat([tokens.expand(size, -1), chosen.repeat_interleave(k, 1)], 1),
            block=torch.cat([torch.full_like(tokens, -1), blocks.repeat_interleave(k)]),
            slot=torch.cat([torch.zeros_like(tokens), torch.arange(1, k + 1, device=ids.device).repeat(len(blocks))]),
            real=torch.cat([torch.ones_like(answer), real.repeat_interleave(k, 1)], 1),
        )  # fmt: skip

    @cached_property
    def positions(self) -> Tensor:
        return self.last + self.slot

    def rule(self) -> Callable[..., Tensor]:
        """Whether a row may attend a column, as FlexAttention asks: a token up to the row's last, or a mask of its block up to itself."""
        last, block, slot = self.last, self.block, self.slot

        def allowed(b: Tensor, h: Tensor | None, row: Tensor, column: Tensor) -> Tensor:
            own = (slot[column] > 0) & (block[column] == block[row]) & (slot[column] <= slot[row])
            return own | (slot[column] == 0) & (column <= last[b, row])

        return allowed


def dense(rows: Sequences) -> Attend:
    """scaled_dot_product_attention with the rule as a boolean (B, 1, T, T)."""
    size, t = rows.last.shape
    at = torch.arange(t, device=rows.last.device)
    mask = rows.rule()(torch.arange(size, device=at.device).view(-1, 1, 1), None, at.view(-1, 1), at).unsqueeze(1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Repeated heads and not enable_gqa: with a mask that falls back to PyTorch's slowest way, which keeps all scores.
        groups = q.shape[1] // k.shape[1]
        return F.scaled_dot_product_attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), attn_mask=mask)

    return attend


@lru_cache(maxsize=1)
def _compiled_flex(size: int, t: int):
    """For one shape at a time: with dynamic ones TorchInductor may give up, and many would pass its limit, past which it is eager."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def flex(rows: Sequences) -> Attend:
    """FlexAttention with a BlockMask made once for all layers, both compiled; on a CPU eager, for tests."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size, t = rows.last.shape
    if rows.last.is_cuda:
        flex_attention, create_block_mask = _compiled_flex(size, t)
    mask = create_block_mask(rows.rule(), size, None, t, t, device=rows.last.device)
    return lambda q, k, v: flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _gated(module, x: Tensor, gate: Tensor) -> list[Tensor]:
    """Each projection of x (B, T, in): x W^T + gate * (x A^T) B^T on every row; gate (T, 1) holds the scale."""
    splits, a, b = module.splits, module.lora_A.to(x.dtype), module.lora_B.to(x.dtype)
    base = F.linear(x, module.weight, module.bias)
    shrunk = F.linear(x, a)
    parts = zip(base.split(splits, -1), shrunk.chunk(len(splits), -1), b.split(splits), strict=True)
    return [torch.addcmul(y, gate, F.linear(s, expand)) for y, s, expand in parts]


def _sampled(head, previous: Tensor, z: Tensor) -> Tensor:
    h = torch.cat([previous, z], -1)
    for linear, norm in ((head.linear1, head.norm1), (head.linear2, head.norm2)):
        h = F.silu(F.linear(h, linear.weight.to(h.dtype), linear.bias.to(h.dtype)))
        h = F.layer_norm(h, norm.weight.shape, norm.weight.to(h.dtype), norm.bias.to(h.dtype))
    return h


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def states(model: MTPModel, rows: Sequences, attend: Attend) -> Tensor:
    """(B, T, d) hidden states of all rows after the final norm."""
    (size, t), length, dtype = rows.last.shape, rows.ids.shape[1], model.dtype
    masks = F.embedding(rows.slot[length:] - 1, model.masks.to(dtype)).expand(size, -1, -1)
    x = torch.cat([F.embedding(rows.ids, model.embed), masks], 1)
    gate = (rows.slot > 0).to(dtype).unsqueeze(1)
    angles = (rows.positions.unsqueeze(-1) * model.frequencies).repeat(1, 1, 2).unsqueeze(1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def norm(x: Tensor, module) -> Tensor:
        return F.rms_norm(x, module.weight.shape, module.weight, module.eps)

    for layer in model.layers:
        scaled = {name: gate * module.scale for name, module in layer.adapted().items()}
        parts = _gated(layer.qkv_proj, norm(x, layer.input_norm), scaled["qkv_proj"])
        q, k, v = (part.view(size, t, -1, layer.head_dim).transpose(1, 2) for part in parts)
        if layer.qk_norm is not None:
            q, k = (F.rms_norm(x, (layer.head_dim,), w, layer.eps) for x, w in ((q, layer.qk_norm[0]), (k, layer.qk_norm[-1])))
        attended = attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v).transpose(1, 2).flatten(2)
        x = x + _gated(layer.o_proj, attended, scaled["o_proj"])[0]
        left, right = _gated(layer.gate_up_proj, norm(x, layer.post_norm), scaled["gate_up_proj"])
        x = x + _gated(layer.down_proj, F.silu(left) * right, scaled["down_proj"])[0]
    return norm(x, model.norm)


def plain_loss(
    model: MTPModel, batch: Batch, anchors: tuple[Tensor, Tensor], *, lcm_weight: float = 1.0, mask_decay: float = 1.0, attention=dense
) -> tuple[Tensor, dict[str, float]]:
    """(total, {"loss", "ntp", "base", "sampler", "lcm"}): the numbers that `mtp_model.loss.mtp_loss` reports, computed the plain way.

    model: with a sampler, adapters on all projections and gated. anchors: of `choose_anchors`. attention: `dense` or `flex`.
    """
    rows = Sequences.of(batch, anchors, model.mtp.num_masks)
    z = states(model, rows, attention(rows))
    length, positions = rows.ids.shape[1], rows.positions
    target = (positions + 1).clamp(max=length - 1)
    labelled = (positions + 1 < length) & rows.answer.gather(1, target) & rows.real
    labels, previous = rows.ids.gather(1, target)[labelled], rows.ids.gather(1, positions.clamp(max=length - 1))[labelled]
    hidden, slot = z[labelled], rows.slot.expand_as(labelled)[labelled]
    sampled = _sampled(model.sampler, F.embedding(previous, model.embed), hidden)

    base_ce = F.cross_entropy((hidden @ model.lm_head.t()).float(), labels, reduction="none")
    sampler_ce = F.cross_entropy((sampled @ model.lm_head.t()).float(), labels, reduction="none")
    mask = slot > 0
    weight = torch.where(mask, mask_decay ** (slot - 1).float(), 1.0)
    total = ((base_ce + sampler_ce) * weight).sum() / weight.sum()

    b, t = labelled[:, length:].nonzero(as_tuple=True)
    at = b * length + positions[b, length + t]  # the token at each labelled mask's position
    errors = (z[b, length + t] - z[:, :length].reshape(-1, z.shape[-1])[at].detach()).float().pow(2).mean(-1)
    count = torch.bincount(at, minlength=len(rows.ids) * length)
    lcm = (errors / count[at]).sum() / (count > 0).sum().clamp(min=1)
    total = total + lcm_weight * lcm
    means = total, base_ce[~mask].mean(), base_ce[mask].mean(), sampler_ce[mask].mean(), lcm
    return total, dict(zip(("loss", "ntp", "base", "sampler", "lcm"), torch.stack([m.detach() for m in means]).tolist(), strict=True))
