"""The specification: every function of `ops`, with its signature, in plain PyTorch.

It is the oracle of the tests, the path taken on a CPU, and the eager baseline of the benchmarks. Arguments are taken as
valid; `ops` checks them.

Row independence. On a CPU under torch.inference_mode a row's result has the same bits however many rows stand beside it. Matrix products are
those of `packed`. Attention is PyTorch's fused one, which takes keys in blocks of `KEY_BLOCK` columns, here by absolute index, to whole `KEY_CHUNK`s, and
rows in tiles, here of the first of `HEAD_ROWS` with which rows are seen to be independent on this machine (with AVX-512 any number from 6; MKL's
kernels with AVX2 take 6 rows at a time, and sum what is left over otherwise). Tests hold it, with AVX2 and AVX-512.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtp_kernels import packed
from mtp_kernels._block_attention import BlockAttention, Part
from mtp_kernels._gradients import AdaptedLinear, RMSNorm, Rotary, SwiGLU, reciprocal_rms, rotate
from mtp_kernels._sampling import gumbel, least_kept
from mtp_kernels.types import AttentionRule, SamplerWeights, Sampling

KEY_CHUNK, KEY_BLOCK = 256, 512
HEAD_ROWS = ((6, 24), (24, 24), (12, 12), (6, 6), (1, 1))  # rows of heads in a tile, at least and at most; the last is right by itself
TRIED_ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 17, 18, 24, 25, 34, 48, 81)
ROW_TILE = 128
KEPT_SCORES = 2**25  # rows x keys x heads of a long pass up to which its tiles are kept for all layers
PART_SCORES = 2**19  # of mask rows alone, at a time on a CPU: 2 MiB, which its caches hold


def _sizes(x: Tensor) -> tuple[int, ...]:
    """The shape as numbers: a tracer (see `mtp_model.static`) would record what is computed from its own."""
    return tuple(map(int, x.shape)) if torch.jit.is_tracing() else tuple(x.shape)


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
    (*leading, width), (n, _) = _sizes(x), _sizes(weight)
    flat = len(leading) == 1
    rows = x if flat else x.reshape(-1, width)
    residual = residual if flat or residual is None else residual.reshape(-1, n)
    if isinstance(gate, Tensor) and gate.dtype is not torch.bool:
        gate = int(gate)
    if gate is None or isinstance(gate, int) and gate >= rows.shape[0]:
        y = packed.linear(rows, weight, bias, residual)
    elif isinstance(gate, int) and torch.is_grad_enabled():
        y = AdaptedLinear.apply(rows, weight, lora_a, lora_b, bias, residual, gate, scale, splits or (n,))
    else:
        y = packed.linear(rows, weight, bias, residual)
        if splits is not None and len(splits) > 1:  # one product instead of one per projection
            lora_b = torch.block_diag(*lora_b.split(splits))
        if isinstance(gate, int):
            packed.add_adapter_(y[gate:], rows[gate:], lora_a, lora_b, scale)
        else:
            on = gate.reshape(-1).nonzero().squeeze(1)
            y = y.index_add(0, on, F.linear(F.linear(rows[on], lora_a), lora_b), alpha=scale)
    return y if flat else y.view(*leading, n)


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
        y = RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else (x * reciprocal_rms(x, eps)).mul_(weight)
    else:  # normalised in float32, rounded, then weighted: the order of transformers' Llama
        y = x.float()
        y = (F.rms_norm(y, y.shape[-1:], eps=eps) if torch.is_grad_enabled() else y * reciprocal_rms(y, eps)).to(x.dtype) * weight
    return y if residual is None else (y, x)


def rotary_frequencies(head_dim: int, theta: float = 10000.0, scaling: dict | None = None) -> Tensor:
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    kind = rope_type(scaling)
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelength = 2 * math.pi / frequencies
        smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 0: long waves, slowed; 1: short, kept
        return (1 - smooth) * frequencies / factor + smooth * frequencies
    if kind == "yarn":
        factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
        turns = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1  # that a pair makes within the original length
        first, last = (head_dim * math.log(original / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in turns)
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        slowed = ((torch.arange(head_dim // 2).float() - first) / ((last - first) or 0.001)).clamp(0, 1)
        return slowed * frequencies / factor + (1 - slowed) * frequencies
    return frequencies


def rope_type(scaling: dict | None) -> str:
    return "default" if scaling is None else scaling.get("rope_type", scaling.get("type", "default"))


def rotary_scale(scaling: dict | None = None) -> float:
    if rope_type(scaling) != "yarn":
        return 1.0

    def larger(by: float = 1.0) -> float:
        return 0.1 * by * math.log(max(scaling["factor"], 1)) + 1

    given, one, other = (scaling.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    return float(given) if given is not None else larger(one) / larger(other) if one and other else larger()


def rotary_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    angles = positions.unsqueeze(-1) * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    if norm is not None:
        x = rms_norm(x, norm, eps)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return Rotary.apply(x, cos, sin) if torch.is_grad_enabled() else rotate(x, cos, sin)


def rotary_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, start: Tensor, norm: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    (t, b, heads, _), kv_heads = _sizes(qkv), int(keys.shape[2])
    qk, v = qkv.split([heads - kv_heads, kv_heads], dim=2)
    q, k = rotary_embedding(qk, cos, sin, norm, eps).split([heads - 2 * kv_heads, kv_heads], dim=2)
    k, v = (torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in (k, v))
    column = start + torch.arange(t, device=qkv.device).unsqueeze(1)  # (T, B)
    if b == 1:
        keys.index_copy_(0, column.flatten(), k), values.index_copy_(0, column.flatten(), v)
    else:
        at = column, torch.arange(b, device=qkv.device)
        keys[at], values[at] = k, v
    return q.contiguous()


def swiglu(x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return SwiGLU.apply(x)
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)


def _additive(allowed: Tensor) -> Tensor:
    return torch.where(allowed, 0.0, -math.inf).float()  # which it is already by torch's usual default dtype


def allowed_keys(rule: AttentionRule, num_columns: int | None = None) -> Tensor:
    """The rule as a dense boolean (B, T, num_columns): the oracle that layouts and kernels are held against.

    num_columns: default the rule's num_keys; no row may attend a column past it.
    """
    columns = torch.arange(rule.num_keys if num_columns is None else num_columns, device=rule.visible.device)
    allowed = columns < rule.visible.t().unsqueeze(-1)
    if rule.first is not None:
        allowed = allowed & (columns >= rule.first.t().unsqueeze(-1))
    if rule.num_masks:
        start = int(rule.visible.shape[0]) - rule.num_masks
        own = (rule.block.unsqueeze(1) == rule.block[start:]) & (rule.slot[start:] <= rule.slot.unsqueeze(1))
        index = columns - rule.mask_start.unsqueeze(1)  # (B, num_columns): which mask a column holds
        inside = (index >= 0) & (index < rule.num_masks)
        picked = own[:, index.clamp(0, rule.num_masks - 1)]  # (T, B, num_columns)
        allowed = allowed | (picked.transpose(0, 1) & inside.unsqueeze(1))
    return allowed


def attention(
    q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, *, scale: float | None = None, ntp_key_gradients: bool = True
) -> Tensor:
    scale = int(q.shape[-1]) ** -0.5 if scale is None else scale
    if q.dtype != torch.float32:
        return attention(q.float(), k[:, :, : rule.num_keys].float(), v[:, :, : rule.num_keys].float(), rule,
                         scale=scale, ntp_key_gradients=ntp_key_gradients).to(q.dtype)  # fmt: skip
    if q.shape[0] == rule.num_masks > 0 and rule.block_size and not rule.num_masks % rule.block_size:
        if bool((rule.mask_start == rule.mask_start[0]).all()):
            return _block_attention(q, k, v, rule, scale, ntp_key_gradients)
    differentiable = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if differentiable and not ntp_key_gradients:
        k, v = (_detached_but_masks(x, rule) for x in (k, v))
    if rule.causal:
        t, grouped = q.shape[0], q.shape[2] != k.shape[1]
        q, k, v = q.permute(1, 2, 0, 3), k[:, :, :t], v[:, :, :t]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).permute(2, 0, 1, 3)
    if not differentiable and q.shape[0] - rule.num_masks > ROW_TILE:
        return _tiled_attention(q, k, v, rule, scale)
    return _dense_attention(q, k, v, rule, scale)


def _detached_but_masks(x: Tensor, rule: AttentionRule) -> Tensor:
    """K or V, through which a gradient reaches the columns of the pass's mask keys and no others."""
    index = torch.arange(x.shape[2], device=x.device) - rule.mask_start.unsqueeze(1)
    masks = (index >= 0) & (index < rule.num_masks)
    return torch.where(masks[:, None, :, None], x, x.detach())


def _tiled_attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, scale: float) -> Tensor:
    """A long pass, ROW_TILE NTP rows at a time (masks with the last) over the pieces of keys that they see: the same bits."""
    tiles = rule._cache.get("tiles")
    if tiles is None:
        tiles = _tiles(rule)
        if q.shape[2] * rule.visible.numel() * rule.num_keys <= KEPT_SCORES:  # each keeps what it adds to its scores
            rule._cache["tiles"] = tiles = list(tiles)
    return torch.cat([_dense_attention(q[rows], k[:, :, before:], v[:, :, before:], tile, scale) for rows, before, tile in tiles])


def _tiles(rule: AttentionRule) -> Iterator[tuple[slice, int, AttentionRule]]:
    """Rows, the column of their first key, and their rule from there on."""
    ntp = rule.visible.shape[0] - rule.num_masks
    for start in range(0, ntp, ROW_TILE):
        last = start + ROW_TILE >= ntp
        rows = slice(start, None if last else start + ROW_TILE)
        visible, first = rule.visible[rows], None if rule.first is None else rule.first[rows]
        before = 0 if first is None else min(max(int(first.min()), 0), rule.num_keys - 1) // KEY_BLOCK * KEY_BLOCK
        end = rule.num_keys if last else min(max(int(visible.max()), before + 1), rule.num_keys)
        yield rows, before, AttentionRule(
            visible - before, rule.block[rows], rule.slot[rows], rule.mask_start - before,
            rule.num_masks if last else 0, end - before, first=None if first is None else first - before,
        )  # fmt: skip


@cache
@packed.quietly
def _head_rows(d: int, dtype: torch.dtype, threads: int) -> tuple[int, int]:
    """The first of HEAD_ROWS with which rows are seen to be independent on this machine, or the last."""
    most = 2 * KEY_BLOCK
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, d, generator=generator, dtype=dtype) for n in (TRIED_ROWS[-1], most, most))

    def attend(rows: int, visible: int, columns: int, way: tuple[int, int]) -> Tensor:
        height, tiles = _head_tiles(rows, *way)
        bias = _additive((torch.arange(columns) < visible).expand(2, tiles, height, columns))
        return _heads_in_tiles(q[:, -rows:], k[:, None, :columns], v[:, None, :columns], bias.to(dtype), 1.0)

    def independent(way: tuple[int, int]) -> bool:
        for visible, *capacities in ((KEY_CHUNK - 50, KEY_CHUNK, KEY_BLOCK, most), (KEY_BLOCK + 150, KEY_BLOCK + KEY_CHUNK, most)):
            whole = attend(TRIED_ROWS[-1], visible, most, way)
            alike = (torch.equal(attend(rows, visible, columns, way), whole[:, -rows:]) for columns in capacities for rows in TRIED_ROWS)
            if not all(alike):
                return False
        return True

    return next(filter(independent, HEAD_ROWS), HEAD_ROWS[-1])


def _head_tiles(rows: int, least: int, most: int) -> tuple[int, int]:
    """How high the tiles are, and how many."""
    height = min(max(rows, least), most)
    return height, -(-rows // height)


def _heads_in_tiles(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """q (N, rows, D), k, v (N, 1, S, D), bias (N, tiles, height, S)."""
    (n, rows, d), tiles, height = q.shape, *bias.shape[1:3]
    if missing := tiles * height - rows:
        q = F.pad(q, (0, 0, 0, missing))
    k, v = (x.expand(-1, tiles, -1, -1) for x in (k, v))
    out = F.scaled_dot_product_attention(q.view(n, tiles, height, d), k, v, bias, scale=scale).reshape(n, tiles * height, d)
    return out.narrow(1, 0, rows) if missing else out


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, scale: float) -> Tensor:
    (t, b, h, d), (_, kv_heads, stored, _) = _sizes(q), _sizes(k)
    groups = h // kv_heads
    tried = q.device.type == "cpu" and not torch.compiler.is_compiling()
    height, tiles = _head_tiles(groups * t, *(_head_rows(d, q.dtype, torch.get_num_threads()) if tried else HEAD_ROWS[0]))
    columns = -(-rule.num_keys // KEY_CHUNK) * KEY_CHUNK
    key = height, groups, kv_heads
    if key not in rule._cache:  # once per pass, for all layers
        bias = _additive(allowed_keys(rule, columns)).repeat(1, groups, 1)
        bias = F.pad(bias, (0, 0, 0, tiles * height - groups * t)).view(b, 1, tiles, height, columns)
        rule._cache[key] = bias.expand(-1, kv_heads, -1, -1, -1).reshape(b * kv_heads, tiles, height, columns)
    if columns > stored:
        k, v = (F.pad(x, (0, 0, 0, columns - stored)) for x in (k, v))
    elif columns < stored:
        k, v = k[:, :, :columns], v[:, :, :columns]
    k, v = (x.reshape(b * kv_heads, 1, columns, d) for x in (k, v))
    grouped = q.view(t, b, kv_heads, groups, d).permute(1, 2, 3, 0, 4).reshape(b * kv_heads, groups * t, d)
    out = _heads_in_tiles(grouped, k, v, rule._cache[key], scale)
    return out.view(b, kv_heads, groups, t, d).permute(3, 0, 1, 2, 4).reshape(t, b, h, d)


def _block_attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, scale: float, ntp_key_gradients: bool) -> Tensor:
    """Mask rows alone, in whole blocks, behind equally many NTP keys: scores against those and the own block's k keys."""
    start, heads = int(rule.mask_start[0]), int(q.shape[2])
    if ("parts", heads) not in rule._cache:
        rule._cache["parts", heads] = _parts(rule, start, heads)
    return BlockAttention.apply(q, k, v, rule._cache["parts", heads], start, scale, ntp_key_gradients)


def _parts(rule: AttentionRule, start: int, heads: int) -> list[Part]:
    """The blocks of a pass, together where they are small, each part with the NTP keys that any of its rows sees."""
    visible, first, (size, batch) = rule.visible, rule.first, (rule.block_size, rule.visible.shape[1])
    ends = visible.reshape(-1, size * batch).amax(1).clamp(0, start).tolist()
    begins = [0] * len(ends) if first is None else first.reshape(-1, size * batch).amin(1).clamp(0, start).tolist()
    most = (PART_SCORES if visible.device.type == "cpu" else 2**28) // (batch * heads * size)
    own = _additive(torch.ones(size, size, dtype=torch.bool, device=visible.device).tril())
    parts, block = [], 0
    while block < len(ends):
        stop, begin, end = block + 1, begins[block], ends[block]
        while stop < len(ends):
            wider = min(begin, begins[stop]), max(end, ends[stop])
            if (stop + 1 - block) * (wider[1] - wider[0] + size) > most:
                break
            stop, (begin, end) = stop + 1, wider
        begin, rows = min(begin, end), slice(block * size, stop * size)
        these = replace(rule, visible=visible[rows], first=None if first is None else first[rows], num_masks=0)
        past = _additive(allowed_keys(these, end)[..., begin:]).view(batch, 1, stop - block, 1, size, end - begin)
        parts.append(Part(block, stop, begin, end, torch.cat([past, own.expand(*past.shape[:-1], size)], -1)))
        block = stop
    return parts


def _sampler_tail(first: Tensor, w: SamplerWeights) -> Tensor:
    """Everything of the sampler after its first matrix product."""
    d = (w.w2.shape[0],)
    h = F.layer_norm(F.silu(first), d, w.norm1_weight, w.norm1_bias)
    return F.layer_norm(F.silu(F.linear(h, w.w2, w.b2)), d, w.norm2_weight, w.norm2_bias)


def sampler_hidden(previous: Tensor, z: Tensor, weights: SamplerWeights) -> Tensor:
    d = z.shape[-1]  # in two products, for the previous token's embedding mostly needs no gradient
    return _sampler_tail(F.linear(previous, weights.w1[:, :d]) + F.linear(z, weights.w1[:, d:], weights.b1), weights)


def sampler_draft(
    z: Tensor,
    first: Tensor,
    embedding: Tensor,
    weights: SamplerWeights,
    lm_head: Tensor,
    *,
    candidates: int | Tensor | None = None,
    keys: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    d, ids = int(z.shape[-1]), None
    if isinstance(candidates, Tensor):
        ids = candidates
    elif candidates is not None and candidates < lm_head.shape[0]:  # a list of everything would only be slower
        ids = packed.linear(z.flatten(0, 1), lm_head).unflatten(0, z.shape[:2]).topk(candidates, dim=-1, sorted=False).indices
    if ids is not None:
        ids = ids.sort(-1).values  # (B, k, C), so that the first of equal logits is the lowest id
    from_mask = F.linear(z, weights.w1[:, d:], weights.b1)  # all k masks at once; only the token's half is sequential
    from_token = weights.w1[:, :d].t()
    noise = None
    if keys is not None:  # (B, k, V or C), all at once, as it depends on no draft
        noise = temperature * gumbel(keys.unsqueeze(-1), torch.arange(int(lm_head.shape[0]), device=z.device) if ids is None else ids)
    drafts, token = [], first
    for i in range(z.shape[1]):
        h = torch.addmm(from_mask[:, i], F.embedding(token, embedding), from_token)
        h = _sampler_tail(h, weights)
        logits = F.linear(h, lm_head) if ids is None else torch.bmm(F.embedding(ids[:, i], lm_head), h.unsqueeze(-1)).squeeze(-1)
        if noise is not None:
            logits = logits.to(torch.float32) + noise[:, i]
        token = logits.argmax(-1)
        if ids is not None:
            token = ids[:, i].gather(1, token.unsqueeze(1)).squeeze(1)
        drafts.append(token)
    return torch.stack(drafts, dim=1)


def _row_losses(
    hidden: Tensor, lm_head: Tensor, labels: Tensor, teacher: Tensor | None, soft: float, ignore_index: int, gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, guess, gradients of the losses with respect to the logits, if asked for) of one chunk of rows."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    soft = 0.0 if teacher is None else soft
    ignored = labels == ignore_index
    label = labels.masked_fill(ignored, 0).unsqueeze(1)
    logits = F.linear(hidden, lm_head).to(wide)
    largest, guess = logits.max(-1, keepdim=True)  # the first of equal ones, as argmax, and faster on a CPU
    logits -= largest
    p = logits.softmax(-1)
    loss = -p.gather(1, guess).log().squeeze(1)  # log sum exp: the largest probability is 1 / V or more, so its logarithm is safe
    if soft < 1:
        loss -= (1 - soft) * logits.gather(1, label).squeeze(1)
    if soft:
        q = F.linear(teacher, lm_head).to(wide).softmax(-1)
        loss -= soft * torch.bmm(q.unsqueeze(1), logits.unsqueeze(2)).flatten()
    loss, guess = loss.masked_fill_(ignored, 0), guess.squeeze(1)
    if not gradient:
        return loss, guess, None
    if soft:
        p.sub_(q, alpha=soft)
    p.scatter_add_(1, label, p.new_full((1, 1), soft - 1).expand_as(label))
    return loss, guess, p.masked_fill_(ignored.unsqueeze(1), 0).to(hidden.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden (M, d), labels (M,). A row's loss depends on that row alone, so that its gradient, but for a factor, is known in the forward."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, lm_head: Tensor, labels: Tensor, teacher: Tensor | None, soft: float, ignore_index: int, chunk: int, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        losses, guesses, rows = [], [], []
        for h, label, t in _chunks(hidden, labels, teacher, chunk):
            loss, guess, dlogits = _row_losses(h, lm_head, label, t, soft, ignore_index, gradient)
            losses.append(loss)
            guesses.append(guess)
            rows += [dlogits @ lm_head] if gradient else []
            del dlogits  # before the next chunk's
        loss, guess = torch.cat(losses), torch.cat(guesses)
        ctx.mark_non_differentiable(guess)
        ctx.options = soft, ignore_index, chunk
        again = (hidden, lm_head, labels, teacher) if ctx.needs_input_grad[1] else (None,) * 4
        ctx.save_for_backward(torch.cat(rows) if gradient else None, *again)
        return loss, guess

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor, _):
        dhidden, hidden, lm_head, labels, teacher = ctx.saved_tensors
        dhead, (soft, ignore_index, chunk) = None, ctx.options
        if dhidden is not None:
            dhidden = (dhidden * dloss.unsqueeze(1)).to(dhidden.dtype)
        if ctx.needs_input_grad[1]:
            dhead = torch.zeros_like(lm_head, dtype=dloss.dtype)
            for (h, label, t), g in zip(_chunks(hidden, labels, teacher, chunk), dloss.split(chunk), strict=True):
                dlogits = _row_losses(h, lm_head, label, t, soft, ignore_index, True)[2]
                dhead += dlogits.t() @ (h * g.unsqueeze(1)).to(h.dtype)
                del dlogits
            dhead = dhead.to(lm_head.dtype)
        return dhidden, dhead, *(None,) * 6


def _chunks(hidden: Tensor, labels: Tensor, teacher: Tensor | None, chunk: int):
    pieces = hidden.split(chunk)
    return zip(pieces, labels.split(chunk), [None] * len(pieces) if teacher is None else teacher.split(chunk), strict=True)


def linear_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    labels: Tensor,
    *,
    teacher: Tensor | None = None,
    soft: float = 1.0,
    ignore_index: int = -100,
    chunk: int = 2048,
) -> tuple[Tensor, Tensor]:
    d = hidden.shape[-1]
    teacher = teacher.detach().reshape(-1, d) if teacher is not None and soft else None
    gradient = torch.is_grad_enabled() and hidden.requires_grad
    loss, guess = _LinearCrossEntropy.apply(hidden.reshape(-1, d), lm_head, labels.reshape(-1), teacher, soft, ignore_index, chunk, gradient)
    return loss.view(labels.shape), guess.view(labels.shape)


def latent_consistency(z: Tensor, target: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    wide, weight = torch.promote_types(z.dtype, torch.float32), weight.detach()
    difference = z.to(wide) - target.detach()[index].to(wide)
    difference = difference.masked_fill((weight == 0).unsqueeze(1), 0)  # whose square may be infinite
    return (difference.pow(2).mean(-1) * weight).sum()


def argmax(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def sample(logits: Tensor, keys: Tensor, sampling: Sampling) -> Tensor:
    logits = logits.to(torch.float32)
    least = least_kept(logits, sampling)
    if least is not None:
        logits = logits.masked_fill(logits < least, -torch.inf)
    noise = gumbel(keys.unsqueeze(-1), torch.arange(int(logits.shape[-1]), device=logits.device))
    return torch.add(logits, noise, alpha=sampling.temperature).argmax(-1)


def linear_argmax(hidden: Tensor, weight: Tensor) -> Tensor:
    return argmax(gated_lora_linear(hidden, weight))


def linear_sample(hidden: Tensor, weight: Tensor, keys: Tensor, sampling: Sampling) -> Tensor:
    return sample(gated_lora_linear(hidden, weight), keys, sampling)


def accept(drafts: Tensor, predictions: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    matches = drafts == predictions[:, :-1]
    if counts is not None:
        matches = matches & (torch.arange(int(drafts.shape[1]), device=drafts.device) < counts.unsqueeze(1))
    accepted = matches.to(torch.int64).cumprod(1).sum(1)
    return accepted, predictions.gather(1, accepted.unsqueeze(1)).squeeze(1)


def accept_and_commit(
    drafts: Tensor, predictions: Tensor, counts: Tensor, lengths: Tensor, room: Tensor, finished: Tensor, eos: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    accepted, following = accept(drafts, predictions, counts)
    columns = int(predictions.shape[1])
    index = torch.arange(columns, device=predictions.device)
    ends = torch.isin(predictions, eos) & (index <= accepted.unsqueeze(1))
    end = torch.where(ends, index, columns).amin(1)  # the first end-of-text, if any
    written = torch.minimum(torch.minimum(accepted, end) + 1, room).masked_fill(finished, 0)
    room.sub_(written)
    finished.logical_or_((end < written) | (room == 0))
    lengths.add_((accepted + 1).masked_fill(finished, 0))
    return accepted, following, written


def drafting_states(z: Tensor, anchors: Tensor, accepted: Tensor, k: int, without: Tensor | None = None) -> tuple[Tensor, Tensor]:
    behind = anchors == accepted  # (A, B)
    if without is not None:
        behind = behind & ~without
    first = int(z.shape[0]) - int(anchors.shape[0]) * k + behind.to(torch.int64).argmax(0) * k
    index = first.unsqueeze(1) + torch.arange(k, device=z.device)  # (B, k)
    return z[index, torch.arange(int(z.shape[1]), device=z.device).unsqueeze(1)], behind.any(0) * k


def lookup_drafts(text: Tensor, newest: Tensor, tokens: int, match: int = 2) -> tuple[Tensor, Tensor]:
    position = torch.arange(int(text.shape[1]), device=text.device)
    same = (position >= match - 1) & (position < newest.unsqueeze(1))  # (B, S): places at which the matching tokens may end
    for i in range(match):
        token = text.gather(1, (newest - i).clamp(min=0).unsqueeze(1))
        same = same & (text == token).roll(i, 1)  # what comes around stands below match - 1
    place = torch.where(same, position, -1).amax(1)
    ahead = torch.arange(tokens, device=text.device) % (newest - place).unsqueeze(1)
    return text.gather(1, place.unsqueeze(1) + 1 + ahead), place >= 0
