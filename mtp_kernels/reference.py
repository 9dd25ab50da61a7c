"""The specification: every function of `ops`, with its signature, in plain PyTorch.

It is the oracle of the tests, the path taken on a CPU, and the eager baseline of the benchmarks. Arguments are taken as
valid; `ops` checks them.

Row independence. On a CPU in float32 with MKL, a row's result has the same bits however many rows stand beside it:
a matrix product's order of summation must depend on the weight's shape alone. MKL's does if weights are stored
input-major (`weight.t()` contiguous; `mtp_model` stores them so) and there are two rows or more, so a single row is
computed as two. In attention it does from `MIN_ROWS` rows up if the number of keys is fixed, so keys are taken in pieces of
exactly `KEY_CHUNK` columns by absolute index, the pieces' sums added in order. These are observations of MKL 2024.2, held
by tests; on another CPU library results may differ in the last bit.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mtp_kernels.types import AttentionRule, SamplerWeights

KEY_CHUNK = 256
MIN_ROWS = 8


def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x W^T (+ b) (+ residual) for x of shape (M, K)."""
    single = x.shape[0] == 1 and x.device.type == "cpu"
    if single:  # one row would take a matrix-vector routine, which sums in another order
        x = x.expand(2, -1)
    if residual is None:
        y = F.linear(x, weight, bias)
    else:
        y = torch.addmm(residual, x, weight.t())  # a single residual row broadcasts
        y = y if bias is None else y + bias
    return y[:1] if single else y


def gated_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    gate: int | Tensor | None = None,
    *,
    scale: float = 1.0,
    splits: tuple[int, ...] | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    n = weight.shape[0]
    rows = x.view(-1, x.shape[-1]) if x.is_contiguous() else x.reshape(-1, x.shape[-1])
    y = _matmul(rows, weight, bias, None if residual is None else residual.reshape(-1, n))
    if isinstance(gate, Tensor) and gate.dtype is not torch.bool:
        gate = int(gate)
    if gate is not None and rows.shape[0]:
        if splits is not None and len(splits) > 1:  # one product instead of one per projection
            lora_b = torch.block_diag(*lora_b.split(splits))
        if isinstance(gate, Tensor):
            on = gate.reshape(-1).nonzero().squeeze(1)
            y = y.index_add(0, on, F.linear(F.linear(rows[on], lora_a), lora_b), alpha=scale)
        elif gate < rows.shape[0]:
            shrunk = F.linear(rows[gate:], lora_a)
            if torch.is_grad_enabled() and (y.requires_grad or shrunk.requires_grad):
                delta = torch.addmm(y[gate:], shrunk, lora_b.t(), alpha=scale)
                y = torch.cat([y[:gate], delta]) if gate else delta
            else:
                y[gate:].addmm_(shrunk, lora_b.t(), alpha=scale)
    return y.view(*x.shape[:-1], n)


def gated_lora_swiglu(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    gate: int | Tensor | None = None,
    *,
    scale: float = 1.0,
    splits: tuple[int, ...] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    splits = (weight.shape[0] // 2,) * 2 if splits is None else splits
    return swiglu(gated_lora_linear(x, weight, lora_a, lora_b, gate, scale=scale, splits=splits, bias=bias))


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None):
    if residual is not None:
        x = x + residual
    if x.dtype is torch.float32:
        y = torch.rms_norm(x, weight.shape, weight, eps)
    else:  # normalised in float32, rounded, then weighted: the order of transformers' Llama
        y = F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype) * weight
    return y if residual is None else (y, x)


def rotary_frequencies(head_dim: int, theta: float = 10000.0, scaling: dict | None = None) -> Tensor:
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    kind = "default" if scaling is None else scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelength = 2 * math.pi / frequencies
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 0: long waves, slowed; 1: short, kept
        return (1 - smooth) * frequencies / factor + smooth * frequencies
    return frequencies


def rotary_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = positions.unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos.unsqueeze(-2), x.roll(x.shape[-1] // 2, -1), sin.unsqueeze(-2))


def swiglu(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return F.silu(x[..., :half]) * x[..., half:]


def _additive(allowed: Tensor) -> Tensor:
    return torch.where(allowed, 0.0, -math.inf)


def allowed_keys(rule: AttentionRule, num_columns: int | None = None) -> Tensor:
    """The rule as a dense boolean (B, T, num_columns): the oracle that layouts and kernels are held against.

    num_columns: default the rule's num_keys; no row may attend a column past it.
    """
    columns = torch.arange(num_columns or rule.num_keys, device=rule.visible.device)
    allowed = columns < rule.visible.t().unsqueeze(-1)
    if rule.num_masks:
        first = rule.visible.shape[0] - rule.num_masks
        own = (rule.block.unsqueeze(1) == rule.block[first:]) & (rule.slot[first:] <= rule.slot.unsqueeze(1))
        index = columns - rule.mask_start.unsqueeze(1)  # (B, num_columns): which mask a column holds
        inside = (index >= 0) & (index < rule.num_masks)
        picked = own[:, index.clamp(0, rule.num_masks - 1)]  # (T, B, num_columns)
        allowed = allowed | (picked.transpose(0, 1) & inside.unsqueeze(1))
    return allowed


def attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, *, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.dtype != torch.float32:
        return attention(q.float(), k[:, :, : rule.num_keys].float(), v[:, :, : rule.num_keys].float(), rule,
                         scale=scale).to(q.dtype)  # fmt: skip
    if q.shape[0] == rule.num_masks > 0 and rule.block_size and not rule.num_masks % rule.block_size:
        return _block_attention(q, k, v, rule, scale)
    return _dense_attention(q, k, v, rule, scale)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, scale: float) -> Tensor:
    t, b, h, d = q.shape
    kv_heads = k.shape[1]
    groups = h // kv_heads
    rows = max(groups * t, MIN_ROWS)
    columns = -(-rule.num_keys // KEY_CHUNK) * KEY_CHUNK
    pieces = [slice(start, start + KEY_CHUNK) for start in range(0, columns, KEY_CHUNK)]
    key = (rows, groups, kv_heads)
    if key not in rule._cache:  # once per pass, for all layers
        bias = F.pad(_additive(allowed_keys(rule, columns)).repeat(1, groups, 1), (0, 0, 0, rows - groups * t))
        bias = bias if b == 1 else bias.repeat_interleave(kv_heads, dim=0)
        rule._cache[key] = [bias[..., piece] for piece in pieces]
    if columns > k.shape[2]:
        k, v = (F.pad(x, (0, 0, 0, columns - x.shape[2])) for x in (k, v))
    keys = k[:, :, :columns].reshape(b * kv_heads, columns, d)
    values = v[:, :, :columns].reshape(b * kv_heads, columns, d)
    packed = q.view(t, b, kv_heads, groups, d).permute(1, 2, 3, 0, 4).reshape(b * kv_heads, groups * t, d)
    if rows > groups * t:
        packed = F.pad(packed, (0, 0, 0, rows - groups * t))
    if len(pieces) == 1:
        out = torch.bmm(torch.baddbmm(rule._cache[key][0], packed, keys.transpose(1, 2), alpha=scale).softmax(-1), values)
    else:
        scores = [
            torch.baddbmm(bias, packed, keys[:, piece].transpose(1, 2), alpha=scale)
            for bias, piece in zip(rule._cache[key], pieces, strict=True)
        ]
        probabilities = torch.cat(scores, dim=-1).softmax(-1)
        out = torch.bmm(probabilities[..., pieces[0]], values[:, pieces[0]])
        for piece in pieces[1:]:
            out = out + torch.bmm(probabilities[..., piece], values[:, piece])
    out = out[:, : groups * t].view(b, kv_heads, groups, t, d)
    return out.permute(3, 0, 1, 2, 4).reshape(t, b, h, d)


def _block_attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, scale: float) -> Tensor:
    """Mask rows alone, in whole blocks: scores against the NTP keys and the own block's k keys, never other blocks'."""
    t, b, h, d = q.shape
    size, kv_heads = rule.block_size, k.shape[1]
    blocks, groups = t // size, h // k.shape[1]
    start = int(rule.mask_start[0])
    if not bool((rule.mask_start == start).all()):
        return _dense_attention(q, k, v, rule, scale)
    key = ("blocks", groups, kv_heads)
    if key not in rule._cache:
        past = torch.arange(start, device=q.device) < rule.visible.t().unsqueeze(-1)  # (B, T, start)
        past = past.view(b, blocks, 1, size, start).expand(-1, -1, groups, -1, -1).reshape(b, blocks * groups * size, start)
        own = torch.ones(size, size, dtype=torch.bool, device=q.device).tril().repeat(groups, 1)
        rule._cache[key] = _additive(past).repeat_interleave(kv_heads, dim=0), _additive(own)
    past_bias, own_bias = rule._cache[key]
    packed = q.view(blocks, size, b, kv_heads, groups, d).permute(2, 3, 0, 4, 1, 5)  # (B, H_kv, blocks, groups, k, D)
    rows = packed.reshape(b * kv_heads, blocks * groups * size, d)
    past_keys, past_values = (x[:, :, :start].reshape(b * kv_heads, start, d) for x in (k, v))
    own_keys, own_values = (x[:, :, start : start + t].reshape(b * kv_heads * blocks, size, d) for x in (k, v))
    past_scores = torch.baddbmm(past_bias, rows, past_keys.transpose(1, 2), alpha=scale)
    own_scores = torch.baddbmm(own_bias, rows.reshape(-1, groups * size, d), own_keys.transpose(1, 2), alpha=scale)
    scores = torch.cat([past_scores, own_scores.view(b * kv_heads, -1, size)], dim=-1)
    past_p, own_p = scores.softmax(-1).split([start, size], dim=-1)
    out = torch.bmm(past_p, past_values)
    out = out + torch.bmm(own_p.reshape(-1, groups * size, size), own_values).view_as(out)
    return out.view(b, kv_heads, blocks, groups, size, d).permute(2, 4, 0, 1, 3, 5).reshape(t, b, h, d)


def _sampler_tail(first: Tensor, w: SamplerWeights) -> Tensor:
    """Everything of the sampler after its first matrix product."""
    d = (w.w2.shape[0],)
    h = F.layer_norm(F.silu(first), d, w.norm1_weight, w.norm1_bias)
    return F.layer_norm(F.silu(F.linear(h, w.w2, w.b2)), d, w.norm2_weight, w.norm2_bias)


def sampler_hidden(previous: Tensor, z: Tensor, weights: SamplerWeights) -> Tensor:
    return _sampler_tail(F.linear(torch.cat([previous, z], dim=-1), weights.w1, weights.b1), weights)


def sampler_draft(
    z: Tensor, first: Tensor, embedding: Tensor, weights: SamplerWeights, lm_head: Tensor, *, candidates: int | None = None
) -> Tensor:
    d, ids = z.shape[-1], None
    if candidates is not None and candidates < lm_head.shape[0]:  # a list of everything would only be slower
        # (B, k, C), by id, so that the first of equal logits is the lowest id
        ids = F.linear(z, lm_head).topk(candidates, dim=-1, sorted=False).indices.sort(-1).values
    from_mask = F.linear(z, weights.w1[:, d:], weights.b1)  # all k masks at once; only the token's half is sequential
    drafts, token = [], first
    for i in range(z.shape[1]):
        h = torch.addmm(from_mask[:, i], F.embedding(token, embedding), weights.w1[:, :d].t())
        h = _sampler_tail(h, weights)
        if ids is None:
            token = F.linear(h, lm_head).argmax(-1)
        else:
            best = torch.bmm(F.embedding(ids[:, i], lm_head), h.unsqueeze(-1)).squeeze(-1).argmax(-1, keepdim=True)
            token = ids[:, i].gather(1, best).squeeze(1)
        drafts.append(token)
    return torch.stack(drafts, dim=1)


def linear_cross_entropy(
    hidden: Tensor, lm_head: Tensor, labels: Tensor, *, ignore_index: int = -100, chunk: int = 2048
) -> tuple[Tensor, Tensor]:
    def piece(h: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(h, w).float()
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none"), logits.argmax(-1)

    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    recompute = torch.is_grad_enabled() and (hidden.requires_grad or lm_head.requires_grad)
    losses, guesses = [], []
    for h, target in zip(rows.split(chunk), targets.split(chunk), strict=True):
        if recompute:  # the chunk's logits are made again in the backward pass
            loss, guess = checkpoint(piece, h, lm_head, target, use_reentrant=False, preserve_rng_state=False)
        else:
            loss, guess = piece(h, lm_head, target)
        losses.append(loss)
        guesses.append(guess)
    return torch.cat(losses).view(labels.shape), torch.cat(guesses).view(labels.shape)


def accept(drafts: Tensor, predictions: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    matches = drafts == predictions[:, :-1]
    if counts is not None:
        matches = matches & (torch.arange(drafts.shape[1], device=drafts.device) < counts.unsqueeze(1))
    accepted = matches.to(torch.int64).cumprod(1).sum(1)
    return accepted, predictions.gather(1, accepted.unsqueeze(1)).squeeze(1)
