"""Every operation against its formula in double precision."""

import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from mtp_kernels import (
    AttentionRule,
    SamplerWeights,
    accept,
    argmax,
    attention,
    gated_lora_linear,
    latent_consistency,
    linear_argmax,
    linear_cross_entropy,
    packed,
    reference,
    rms_norm,
    rotary_embedding,
    rotary_frequencies,
    rotary_scale,
    rotary_tables,
    rotary_write,
    sampler_draft,
    sampler_hidden,
    swiglu,
)
from mtp_kernels.reference import allowed_keys
from mtp_kernels.testing import assert_within_budget

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = DTYPES[1:]


def randn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def lora_formula(x, weight, a, b, on, scale, splits, bias, residual):
    """on: one boolean per flattened row."""
    y = x @ weight.T
    y = y if bias is None else y + bias
    y = y if residual is None else y + residual
    if a is None:
        return y
    rank, parts, start = b.shape[1], [], 0
    for g, size in enumerate(splits):
        parts.append((x @ a[g * rank : (g + 1) * rank].T) @ b[start : start + size].T)
        start += size
    delta = torch.cat(parts, dim=-1)
    return y + scale * delta * on.view(*x.shape[:-1], 1).to(x.dtype)


def lora_case(leading, k, splits, rank, dtype=torch.float32, bias=True, residual=True):
    n = sum(splits)
    return dict(
        x=randn(*leading, k, dtype=dtype), weight=randn(n, k, seed=1, dtype=dtype, scale=k**-0.5),
        a=randn(len(splits) * rank, k, seed=2, dtype=dtype, scale=k**-0.5),
        b=randn(n, rank, seed=3, dtype=dtype, scale=rank**-0.5),
        bias=randn(n, seed=4, dtype=dtype) if bias else None,
        residual=randn(*leading, n, seed=5, dtype=dtype) if residual else None,
    )  # fmt: skip


def gates(rows, leading):
    yield torch.zeros(rows, dtype=torch.bool), None
    for m in sorted({0, rows // 3, rows}):
        yield torch.arange(rows) >= m, m
    pattern = torch.tensor([i % 3 != 1 for i in range(rows)], dtype=torch.bool)
    yield pattern, pattern.view(leading)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits, rank", [((24,), 1), ((24,), 7), ((10, 6, 8), 4), ((96,), 512), ((5, 11, 3), 64)])
@pytest.mark.parametrize("leading", [(), (1,), (9,), (4, 3), (2, 3, 5), (0,), (3, 0)])
@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
def test_gated_lora_linear(leading, splits, rank, dtype, inference):
    rows = torch.Size(leading).numel()
    for bias, residual in itertools.product((False, True), repeat=2):
        case = lora_case(leading, 20, splits, rank, dtype, bias, residual)
        with torch.inference_mode(inference):
            plain = gated_lora_linear(case["x"], case["weight"], bias=case["bias"], residual=case["residual"])
        wide = {name: None if t is None else t.double() for name, t in case.items()}
        for on, gate in gates(rows, leading):
            with torch.inference_mode(inference):
                got = gated_lora_linear(
                    case["x"], case["weight"], case["a"], case["b"], gate, scale=0.7,
                    splits=splits if len(splits) > 1 else None, bias=case["bias"], residual=case["residual"],
                )  # fmt: skip
            exact = lora_formula(**wide, on=on, scale=0.7, splits=splits)
            eager = lora_formula(**case, on=on, scale=0.7, splits=splits)
            assert_within_budget(got, exact, eager)
            off = ~on.view(leading)
            assert torch.equal(got[off], plain[off])


@pytest.mark.parametrize("gate", [None, 0, 5, 12, "mixed"])
@pytest.mark.parametrize("splits", [(10,), (4, 1, 5)])
@pytest.mark.parametrize("bias, residual", [(False, False), (True, True)])
def test_gated_lora_linear_gradients(gate, splits, bias, residual):
    case = lora_case((4, 3), 8, splits, 3, bias=bias, residual=residual)
    on = torch.arange(12) >= (12 if gate is None else gate) if gate != "mixed" else torch.arange(12) % 5 < 2
    gate = on.view(4, 3) if gate == "mixed" else gate
    given_, wide = ({n: t for n, t in case.items() if t is not None} for _ in range(2))
    given_ = {n: t.clone().requires_grad_() for n, t in given_.items()}
    wide = {n: t.double().requires_grad_() for n, t in wide.items()}
    y = gated_lora_linear(
        given_["x"], given_["weight"], given_["a"], given_["b"], gate, scale=1.5, splits=splits,
        bias=given_.get("bias"), residual=given_.get("residual"),
    )  # fmt: skip
    exact = lora_formula(**{"bias": None, "residual": None} | wide, on=on, scale=1.5, splits=splits)
    upstream = randn(4, 3, 10, seed=9)
    got = torch.autograd.grad(y, list(given_.values()), upstream, allow_unused=True)
    wanted = torch.autograd.grad(exact, list(wide.values()), upstream.double())
    for name, g, w in zip(given_, got, wanted, strict=True):
        g = torch.zeros_like(w) if g is None else g.double()
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_keep_a_small_adapter(dtype):
    """Many rows in training may have it merged into the weight, but not where it would be rounded away."""
    weight = torch.tensor([1.0, -1.0] * 4, dtype=dtype).expand(6, 8)
    a, b = torch.ones(1, 8, dtype=dtype), torch.full((6, 1), 2.0**-12, dtype=dtype)
    y = gated_lora_linear(torch.ones(50, 8, dtype=dtype), weight, a.requires_grad_(), b, 0)
    assert torch.equal(y, torch.full_like(y, 2.0**-9))


def test_gated_lora_linear_leaves_its_arguments_alone():
    case = lora_case((6,), 8, (10,), 3)
    copies = {n: t.clone() for n, t in case.items()}
    gated_lora_linear(case["x"], case["weight"], case["a"], case["b"], 2, bias=case["bias"], residual=case["residual"])
    assert all(torch.equal(case[n], copies[n]) for n in case)


def random_rule(t_ntp, blocks, k, starts, extra=0, block_size=0, seed=0):
    """NTP rows behind starts[b] tokens, blocks of masks after random anchors."""
    generator = torch.Generator().manual_seed(seed)
    batch, masks = len(starts), blocks * k
    start = torch.tensor(starts)
    anchors = torch.randint(0, max(t_ntp, 1), (blocks, batch), generator=generator).repeat_interleave(k, 0)
    visible = torch.cat([torch.arange(t_ntp).unsqueeze(1).expand(-1, batch), anchors]) + 1 + start
    block = torch.cat([torch.full((t_ntp,), -1), torch.arange(blocks).repeat_interleave(k)])
    slot = torch.cat([torch.zeros(t_ntp, dtype=torch.int64), torch.arange(1, k + 1).repeat(blocks)])
    mask_start = start + t_ntp
    return AttentionRule(visible, block, slot, mask_start, masks, int(mask_start.max()) + masks + extra, block_size)


def attend_by_rows(q, k, v, rule, scale=None):
    t_rows, batch, heads, d = q.shape
    scale = d**-0.5 if scale is None else scale
    out, first = [], t_rows - rule.num_masks
    for t, b in itertools.product(range(t_rows), range(batch)):
        columns = list(range(int(rule.visible[t, b])))
        for j in range(rule.num_masks):
            if rule.block[first + j] == rule.block[t] and rule.slot[first + j] <= rule.slot[t]:
                columns.append(int(rule.mask_start[b]) + j)
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            p = (k[b, kv, columns] @ q[t, b, h] * scale).softmax(0)
            out.append(p @ v[b, kv, columns])
    return torch.stack(out).view(q.shape)


def qkv(t, batch, heads, kv_heads, d, columns, dtype=torch.float32):
    """Columns beyond the rule's hold large values, which would show."""
    q, (k, v) = randn(t, batch, heads, d), (randn(batch, kv_heads, columns + 7, d, seed=s) for s in (1, 2))
    k[:, :, columns:], v[:, :, columns:] = 30.0, 1000.0
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, kv_heads, d, starts, t_ntp, blocks, k",
    [
        (2, 2, 64, [0], 5, 0, 1),
        (4, 2, 64, [3, 9], 4, 4, 3),
        (4, 1, 80, [11, 11, 2], 3, 1, 2),
        (3, 3, 96, [6, 1], 1, 1, 8),
        (6, 2, 128, [0, 0], 9, 3, 2),
        (2, 1, 16, [300, 260], 3, 3, 2),
        (2, 2, 64, [530], 1, 0, 1),
        (2, 2, 128, [20, 4], 1, 0, 1),
    ],
)
def test_attention(heads, kv_heads, d, starts, t_ntp, blocks, k, dtype):
    rule = random_rule(t_ntp, blocks, k, starts)
    q, keys, v = qkv(t_ntp + blocks * k, len(starts), heads, kv_heads, d, rule.num_keys, dtype)
    exact = attend_by_rows(q.double(), keys.double(), v.double(), rule)
    got = attention(q, keys, v, rule)
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    else:
        assert_within_budget(got, exact, attend_by_rows(q.float(), keys.float(), v.float(), rule).to(dtype))


def test_attention_scale_and_wider_num_keys():
    rule, wider = random_rule(4, 2, 3, [5, 2]), random_rule(4, 2, 3, [5, 2], extra=30)
    q, k, v = qkv(10, 2, 4, 2, 32, wider.num_keys)
    exact = attend_by_rows(q.double(), k.double(), v.double(), rule, 0.3)
    torch.testing.assert_close(attention(q, k, v, rule, scale=0.3).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(attention(q, k, v, wider, scale=0.3).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "heads, kv_heads, starts", [(4, 2, [12, 12]), (4, 4, [12, 12]), (4, 4, [9]), (2, 1, [9]), (4, 2, [12, 7]), (4, 2, [0, 0])]
)
@pytest.mark.parametrize("blocks, k", [(1, 3), (4, 1), (5, 3)])
@pytest.mark.parametrize("together", ["all", "some", "none"])
def test_mask_rows_alone(heads, kv_heads, starts, blocks, k, together, monkeypatch):
    """The path that skips other blocks' keys gives what the dense one gives, gradients included; in any number of parts."""
    if together != "all":
        monkeypatch.setattr(reference, "PART_SCORES", len(starts) * heads * k * 2 * 14 if together == "some" else 0)
    rules = [random_rule(0, blocks, k, starts, block_size=size, seed=2) for size in (k, 0)]
    for rule in rules:
        rule.visible.sub_(torch.arange(blocks).repeat_interleave(k).unsqueeze(1) + 1).clamp_(min=0)  # different anchors
    q, keys, v = qkv(blocks * k, len(starts), heads, kv_heads, 16, rules[0].num_keys)
    upstream = randn(*q.shape, seed=7)
    results = []
    for rule, dtype in [(rules[0], torch.float32), (rules[1], torch.float32), (rules[1], torch.float64)]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, keys, v)]
        y = attention(*leaves, rule) if dtype == torch.float32 else attend_by_rows(*leaves, rule)
        results.append([y, *torch.autograd.grad(y, leaves, upstream.to(dtype))])
    for fast, dense, exact in zip(*results, strict=True):
        torch.testing.assert_close(fast, dense, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dense.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scores, sizes", [(2**19, [6]), (2 * 4 * 2 * 30, [2, 1, 3]), (0, [1] * 6)])
def test_parts_of_mask_rows_alone(scores, sizes, monkeypatch):
    """Blocks come together up to a number of scores, and with the keys that they see, no others, maybe none; results are the dense path's."""
    monkeypatch.setattr(reference, "PART_SCORES", scores)
    visible = torch.tensor([[3, 2], [9, 9], [40, 0], [4, 4], [12, 8], [11, 10]]).repeat_interleave(2, 0)
    first = torch.tensor([[0, 1], [4, 2], [30, 0], [9, 9], [6, 6], [7, 5]]).repeat_interleave(2, 0)
    block, slot = torch.arange(6).repeat_interleave(2), torch.tensor([1, 2] * 6)
    rules = [AttentionRule(visible, block, slot, torch.tensor([40, 40]), 12, 52, size, first=first) for size in (2, 0)]
    for fast, dense in zip(*(values_and_gradients(qkv(12, 2, 4, 2, 8, 52), rule, scale=0.5) for rule in rules), strict=True):
        torch.testing.assert_close(fast, dense, rtol=1e-5, atol=1e-5)
    parts = rules[0]._cache["parts", 4]
    assert [part.last - part.first for part in parts] == sizes and [part.first for part in parts[1:]] == [part.last for part in parts[:-1]]
    for part in parts:
        rows = slice(2 * part.first, 2 * part.last)
        assert part.end == int(visible[rows].max()) and part.begin == min(int(first[rows].min()), part.end)


def test_mask_rows_alone_keep_no_scores():
    rule = random_rule(0, 5, 2, [60, 60], block_size=2)
    kept = []

    def keep(x):
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attention(*(x.requires_grad_() for x in qkv(10, 2, 8, 2, 4, rule.num_keys)), rule)
    assert max(kept) < 2 * 8 * 10 * 60  # of every head; the rule's own bias is one head's, for all layers


def test_first_keeps_packed_documents_apart():
    """The example of AttentionRule's docstring."""
    table = AttentionRule.__doc__.split("row    first")[1].splitlines()[1:8]
    first, visible, drawn = [], [], []
    for line in table:
        numbers, *fields = line.split("|")
        name, *pair = numbers.split()
        first.append(int(pair[0]))
        visible.append(int(pair[1]))
        shown = [fields[0][1 + 3 * i] == "0" for i in range(5)] + ["0" in field for field in fields[1:]]
        drawn.append(shown)
    column = torch.tensor([first, visible]).unsqueeze(-1)
    block, slot = torch.tensor([-1] * 5 + [0, 1]), torch.tensor([0] * 5 + [1, 1])
    rule = AttentionRule(column[1], block, slot, torch.tensor([5]), 2, 7, first=column[0])
    assert allowed_keys(rule)[0].tolist() == drawn


def with_first(rule, seed=0):
    """The rule with a random `first` for each row, no later than its own token."""
    generator = torch.Generator().manual_seed(seed)
    return dataclasses.replace(rule, first=(torch.rand(rule.visible.shape, generator=generator) * rule.visible).long())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 5), st.integers(0, 3), st.integers(1, 3), st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(0, 99)
)  # fmt: skip
def test_allowed_keys_with_first(t_ntp, blocks, k, starts, seed):
    rule = random_rule(t_ntp, blocks, k, [s + 1 for s in starts], seed=seed)
    rule = with_first(rule, seed)
    allowed, start = allowed_keys(rule), rule.visible.shape[0] - rule.num_masks
    for b, t, column in itertools.product(*map(range, allowed.shape)):
        j = column - int(rule.mask_start[b])
        mask = 0 <= j < rule.num_masks and rule.block[start + j] == rule.block[t] and rule.slot[start + j] <= rule.slot[t]
        assert bool(allowed[b, t, column]) == bool(rule.first[t, b] <= column < rule.visible[t, b] or mask)


def values_and_gradients(tensors, rule, **options):
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = attention(*leaves, rule, **options)
    return y, *torch.autograd.grad(y, leaves, randn(*y.shape, seed=3))


@pytest.mark.parametrize("kind", ["whole", "masks", "masks, dense"])
def test_packed_documents_are_the_documents_alone(kind):
    """Three documents in each of two sequences; the reference in both its forms, gradients included."""
    lengths, k, size = (4, 1, 5), 2, 0 if kind == "masks, dense" else 2
    first = torch.tensor([[0] * 4 + [4] + [5] * 5] * 2).t()
    tokens = torch.arange(10).unsqueeze(1).expand(-1, 2)
    after = torch.tensor([[1, 3], [4, 4], [7, 5], [9, 9]]).repeat_interleave(k, 0)
    ntp = 10 if kind == "whole" else 0
    block = torch.cat([torch.full((10,), -1), torch.arange(4).repeat_interleave(k)])[10 - ntp :]
    slot = torch.cat([torch.zeros(10, dtype=torch.int64), torch.tensor([1, 2] * 4)])[10 - ntp :]
    visible = torch.cat([tokens, after])[10 - ntp :] + 1
    mask_start = torch.tensor([10, 10])
    rule = AttentionRule(visible, block, slot, mask_start, 8, 18, size, first=torch.cat([first, first.gather(0, after)])[10 - ntp :])
    tensors = qkv(8 + ntp, 2, 4, 2, 16, 18)
    whole = values_and_gradients(tensors, rule)
    start = 0
    for n in lengths:
        own = [t for t in range(8 + ntp) if int(rule.first[t, 0]) == start]
        masks = [t - ntp for t in own if t >= ntp]
        columns = [*range(start, start + n), *(10 + j for j in masks)]
        alone = AttentionRule(visible[own] - start, block[own], slot[own], mask_start * 0 + n, len(masks), n + len(masks), size)
        q, keys, v = tensors[0][own], tensors[1][:, :, columns], tensors[2][:, :, columns]
        upstream = randn(*whole[0].shape, seed=3)[own]
        leaves = [x.detach().requires_grad_() for x in (q, keys, v)]
        y = attention(*leaves, alone)
        together = (whole[0][own], whole[1][own], whole[2][:, :, columns], whole[3][:, :, columns])
        for x, single in zip(together, (y, *torch.autograd.grad(y, leaves, upstream)), strict=True):
            torch.testing.assert_close(x, single, rtol=1e-5, atol=1e-6)
        start += n


@pytest.mark.parametrize("starts, t_ntp, size", [([9, 9], 0, 2), ([9, 9], 0, 0), ([9, 4], 0, 2), ([3, 1], 4, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_without_the_ntp_keys_gradients(starts, t_ntp, size, packed):
    rule = random_rule(t_ntp, 3, 2, starts, block_size=size)
    if not t_ntp:
        rule.visible.sub_(1)
    rule = with_first(rule) if packed else rule
    tensors = qkv(t_ntp + 6, 2, 4, 2, 16, rule.num_keys)
    whole, part = (values_and_gradients(tensors, rule, ntp_key_gradients=wanted) for wanted in (True, False))
    masks = torch.arange(tensors[1].shape[2]) - rule.mask_start.unsqueeze(1)
    masks = ((masks >= 0) & (masks < 6))[:, None, :, None]
    assert torch.equal(part[0], whole[0]) and torch.equal(part[1], whole[1])
    assert all(torch.equal(a, torch.where(masks, b, 0)) and b[~masks.expand_as(b)].any() for a, b in zip(part[2:], whole[2:], strict=True))


@pytest.mark.parametrize("packed, masks", [(False, 0), (True, 0), (False, 3), (True, 3)])
@torch.no_grad()
def test_a_long_pass_in_tiles_has_the_same_bits(packed, masks, monkeypatch):
    rule = random_rule(600, 1, masks, [0, 0]) if masks else random_rule(600, 0, 1, [0, 0])
    if packed:
        first = torch.tensor([0] * 70 + [70] * 300 + [370] * 230)
        rule = dataclasses.replace(rule, first=first[rule.visible - 1])
    q, keys, v = qkv(600 + masks, 2, 4, 2, 16, rule.num_keys)
    tiled = attention(q, keys, v, rule)
    assert torch.equal(attention(q, keys, v, rule), tiled) and len(rule._cache["tiles"]) == 5  # kept for the next layer
    monkeypatch.setattr(reference, "KEPT_SCORES", 0)
    fresh = dataclasses.replace(rule)
    assert torch.equal(attention(q, keys, v, fresh), tiled) and "tiles" not in fresh._cache
    seen = []
    monkeypatch.setattr(reference, "_tiled_attention", lambda *args: seen.append(1) or reference._dense_attention(*args))
    assert torch.equal(attention(q, keys, v, rule), tiled) and seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("t, heads, kv_heads", [(1, 4, 4), (7, 4, 2), (300, 4, 1)])
def test_a_text_from_its_beginning(t, heads, kv_heads, dtype):
    """A rule that says so gives what it gives without, gradients included."""
    rule = random_rule(t, 0, 1, [0, 0])
    tensors = qkv(t, 2, heads, kv_heads, 16, rule.num_keys, dtype)
    tensors = [tensors[0], *(x.nan_to_num(0).clamp(-3, 3) for x in tensors[1:])]
    causal = dataclasses.replace(rule, causal=True)
    for plain, fast in zip(*(values_and_gradients(tensors, r, scale=0.4) for r in (rule, causal)), strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5 if dtype is torch.float32 else 1e-2, atol=1e-5 if dtype is torch.float32 else 1e-2)
    _, dq, dk, dv = values_and_gradients(tensors, causal, ntp_key_gradients=False)
    assert torch.equal(dq, values_and_gradients(tensors, causal)[1]) and not dk.any() and not dv.any()


def test_attention_gradients_of_a_whole_pass():
    rule = random_rule(4, 2, 2, [3, 1])
    tensors = qkv(8, 2, 4, 2, 16, rule.num_keys)
    upstream = randn(8, 2, 4, 16, seed=3)
    got = [x.requires_grad_() for x in tensors]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    grads = torch.autograd.grad(attention(*got, rule), got, upstream)
    for g, w in zip(grads, torch.autograd.grad(attend_by_rows(*wide, rule), wide, upstream.double()), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (5, 33), (2, 3, 128), (0, 16)])
def test_rms_norm(shape, dtype):
    x, residual = randn(*shape, dtype=dtype, scale=3), randn(*shape, seed=1, dtype=dtype)
    weight = randn(shape[-1], dtype=dtype)

    def formula(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    assert_within_budget(rms_norm(x, weight, 1e-3), formula(x.double(), weight.double()), formula(x, weight))
    y, total = rms_norm(x, weight, 1e-3, residual)
    assert torch.equal(total, x + residual)
    assert_within_budget(y, formula(total.double(), weight.double()), formula(total, weight))
    with torch.no_grad():
        x = x * 0.02  # of which eps makes something else
        assert_within_budget(rms_norm(x, weight, 1e-3), formula(x.double(), weight.double()), formula(x, weight))


def test_rms_norm_gradients():
    leaves = [randn(4, 12), randn(12, seed=1), randn(4, 12, seed=2)]
    narrow, wide = [x.clone().requires_grad_() for x in leaves], [x.double().requires_grad_() for x in leaves]
    y, total = rms_norm(narrow[0], narrow[1], 1e-5, narrow[2])
    x = wide[0] + wide[2]
    exact = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * wide[1]
    upstream = randn(4, 12, seed=3)
    got = torch.autograd.grad((y * upstream + total).sum(), narrow)
    for g, w in zip(got, torch.autograd.grad((exact * upstream + x).sum(), wide), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=1024)
YARNS = [
    YARN, YARN | dict(type="yarn", beta_fast=16, beta_slow=2), YARN | dict(truncate=False), YARN | dict(attention_factor=0.7),
    YARN | dict(mscale=0.8, mscale_all_dim=1.2), YARN | dict(factor=0.5), YARN | dict(original_max_position_embeddings=4),
]  # fmt: skip


@pytest.mark.parametrize("d", [16, 64, 80, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", [None, dict(rope_type="default"), dict(type="linear", factor=3.0), LLAMA3, *YARNS])
def test_rotary_equals_transformers(d, theta, scaling):
    parameters = {"rope_type": "default"} | (scaling or {}) | {"rope_theta": theta}
    parameters["rope_type"] = parameters.pop("type", parameters["rope_type"])
    config = LlamaConfig(
        hidden_size=2 * d, num_attention_heads=2, head_dim=d, rope_parameters=parameters, max_position_embeddings=4096
    )
    theirs = LlamaRotaryEmbedding(config)
    frequencies = rotary_frequencies(d, theta, scaling)
    torch.testing.assert_close(frequencies, theirs.inv_freq, rtol=1e-6, atol=0)
    positions = torch.tensor([[0, 1, 5], [64, 700, 3]])
    x = randn(2, 3, 4, d)
    cos, sin = rotary_tables(positions, frequencies, scale=rotary_scale(scaling))
    assert rotary_scale(scaling) == theirs.attention_scaling
    expected, _ = apply_rotary_pos_emb(x, x, *theirs(x, positions), unsqueeze_dim=2)
    torch.testing.assert_close(rotary_embedding(x, cos, sin), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (5,), (3, 2), (0,)])
def test_rotary_embedding(leading, dtype):
    x, frequencies = randn(*leading, 3, 16, dtype=dtype), rotary_frequencies(16)
    positions = torch.arange(torch.Size(leading).numel()).mul(37).view(leading)
    cos, sin = rotary_tables(positions, frequencies, dtype)
    assert cos.shape == sin.shape == (*leading, 16) and cos.dtype == sin.dtype == dtype
    angle = (positions.unsqueeze(-1) * frequencies).double()
    torch.testing.assert_close(cos[..., :8].double(), angle.cos(), rtol=2e-2, atol=4e-3)
    torch.testing.assert_close(sin[..., 8:].double(), angle.sin(), rtol=2e-2, atol=4e-3)

    def formula(x, cos, sin):
        a, b = x[..., :8], x[..., 8:]
        cos, sin = cos[..., :8].unsqueeze(-2), sin[..., 8:].unsqueeze(-2)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    got = rotary_embedding(x, cos, sin)
    assert_within_budget(got, formula(x.double(), cos.double(), sin.double()), formula(x, cos, sin))
    leaf = x.clone().requires_grad_()
    upstream = randn(*x.shape, seed=4, dtype=dtype)
    (gradient,) = torch.autograd.grad(rotary_embedding(leaf, cos, sin), leaf, upstream)
    inverse = formula(upstream, cos, -sin)  # the transposed rotation
    assert_within_budget(gradient, formula(upstream.double(), cos.double(), -sin.double()), inverse)

    cos, sin = (randn(*leading, 16, seed=s, dtype=dtype) for s in (6, 7))  # any, not of angles
    leaves = [x.to(kind).requires_grad_() for kind in (dtype, torch.float64, dtype)]
    ys = rotary_embedding(leaves[0], cos, sin), *(x * cos.unsqueeze(-2) + x.roll(8, -1) * sin.unsqueeze(-2) for x in leaves[1:])
    assert_within_budget(*(torch.autograd.grad(y, leaf, upstream.to(y.dtype))[0] for y, leaf in zip(ys, leaves, strict=True)))
    sin[..., :8] = -sin[..., 8:]
    cos[..., :8] = cos[..., 8:]

    norm, results = randn(3, 16, seed=5, dtype=dtype), []
    for kind, function in ((dtype, lambda *a: rotary_embedding(*a, norm, 0.5)), (torch.float64, None), (dtype, None)):
        leaf, (c, s, w) = x.to(kind).requires_grad_(), (tensor.to(kind) for tensor in (cos, sin, norm))
        y = function(leaf, c, s) if function else formula(leaf / (leaf.square().mean(-1, keepdim=True) + 0.5).sqrt() * w, c, s)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, upstream.to(kind))))
    for ours, exact, eager in zip(*results, strict=True):
        assert_within_budget(ours, exact, eager)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t, heads, kv_heads, start", [(1, 1, 1, [0]), (3, 4, 2, [4, 0]), (2, 3, 3, [5, 1, 6]), (0, 2, 1, [3])])
def test_rotary_write(t, heads, kv_heads, start, dtype):
    b, norm = len(start), randn(heads + kv_heads, 8, seed=3, dtype=dtype) if kv_heads == 2 else None
    qkv, keys, values = randn(t, b, heads + 2 * kv_heads, 8, dtype=dtype), randn(8, b, kv_heads, 8, dtype=dtype), randn(8, b, kv_heads, 8, dtype=dtype)
    cos, sin = (randn(t, b, 8, seed=seed, dtype=dtype) for seed in (1, 2))
    wanted_keys, wanted_values, q = keys.clone(), values.clone(), []
    for i in range(t):
        for j in range(b):
            rotated = rotary_embedding(qkv[i, j, : heads + kv_heads], cos[i, j], sin[i, j], norm)
            q.append(rotated[:heads])
            wanted_keys[start[j] + i, j] = rotated[heads:]
            wanted_values[start[j] + i, j] = qkv[i, j, heads + kv_heads :]
    for integer in (torch.int32, torch.int64):
        into = keys.clone(), values.clone()
        got = rotary_write(qkv, cos, sin, *into, torch.tensor(start, dtype=integer), norm)
        assert torch.equal(into[0], wanted_keys) and torch.equal(into[1], wanted_values)
        assert got.is_contiguous() and torch.equal(got, torch.stack(q).view(got.shape) if q else got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (1,), (4, 3), (0,)])
def test_linear_argmax(leading, dtype):
    hidden, weight = randn(*leading, 16, dtype=dtype), randn(30, 16, seed=1, dtype=dtype)
    got = linear_argmax(hidden, torch.cat([weight, weight]))  # each logit twice
    rows = hidden.view(-1, 16)
    logits = gated_lora_linear(rows, weight)
    assert got.shape == leading and got.dtype == torch.int64
    assert got.view(-1).tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert [int(linear_argmax(row, weight)) for row in rows] == got.view(-1).tolist()
    assert torch.equal(argmax(gated_lora_linear(hidden, torch.cat([weight, weight]))), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(10,), (3, 8), (2, 3, 64), (0, 4)])
def test_swiglu(shape, dtype):
    x = randn(*shape, dtype=dtype, scale=2)
    half = shape[-1] // 2

    def formula(x):
        return x[..., :half] / (1 + (-x[..., :half]).exp()) * x[..., half:]

    assert_within_budget(swiglu(x), formula(x.double()), formula(x))
    leaf, wide = x.float().requires_grad_(), x.double().requires_grad_()
    upstream = randn(*shape[:-1], half, seed=1)
    (got,), (wanted,) = (torch.autograd.grad(f(y), y, u) for f, y, u in
                         ((swiglu, leaf, upstream), (formula, wide, upstream.double())))  # fmt: skip
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def sampler(d, dtype=torch.float32):
    torch.manual_seed(d)
    modules = [torch.nn.Linear(2 * d, d), torch.nn.LayerNorm(d), torch.nn.Linear(d, d), torch.nn.LayerNorm(d)]
    for norm in modules[1::2]:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    modules = [m.to(dtype) for m in modules]
    weights = SamplerWeights(*(t.detach() for m in modules for t in (m.weight, m.bias)))
    l1, n1, l2, n2 = modules
    return weights, torch.nn.Sequential(l1, torch.nn.SiLU(), n1, l2, torch.nn.SiLU(), n2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (4,), (2, 5)])
def test_sampler_hidden(leading, dtype):
    weights, modules = sampler(24, dtype)
    previous, z = randn(*leading, 24, dtype=dtype), randn(*leading, 24, seed=1, dtype=dtype)
    with torch.no_grad():
        eager = modules(torch.cat([previous, z], dim=-1))
        exact = modules.double()(torch.cat([previous, z], dim=-1).double())
        assert_within_budget(sampler_hidden(previous, z, weights), exact, eager)


def test_sampler_hidden_gradients():
    weights, modules = sampler(12)
    leaves = [randn(3, 12), randn(3, 12, seed=1), *weights]
    leaves = [x.clone().requires_grad_() for x in leaves]
    y = sampler_hidden(leaves[0], leaves[1], SamplerWeights(*leaves[2:]))
    upstream = randn(3, 12, seed=2)
    got = torch.autograd.grad(y, leaves, upstream)
    modules.double()
    inputs = [x.detach().double().requires_grad_() for x in leaves[:2]]
    exact = modules(torch.cat(inputs, dim=-1))
    wanted = torch.autograd.grad(exact, [*inputs, *modules.parameters()], upstream.double())
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch, k", [(1, 1), (3, 4), (2, 8)])
@torch.no_grad()
def test_sampler_draft(batch, k):
    weights, modules = sampler(16)
    z, embedding, lm_head = randn(batch, k, 16), randn(11, 16, seed=1, scale=3), randn(11, 16, seed=2)
    first = torch.arange(batch) % 11
    drafts = sampler_draft(z, first, embedding, weights, lm_head)
    assert drafts.dtype == torch.int64
    modules.double()
    for b in range(batch):
        token = int(first[b])
        for i in range(k):
            hidden = modules(torch.cat([embedding[token], z[b, i]]).double())
            token = int((lm_head.double() @ hidden).argmax())
            assert int(drafts[b, i]) == token
    other = sampler_draft(z, (first + 1) % 11, embedding, weights, lm_head)
    assert batch == 1 or not torch.equal(other, drafts)


def test_sampler_draft_takes_the_lowest_id_on_a_tie():
    weights, _ = sampler(8)
    drafts = sampler_draft(randn(2, 3, 8), torch.tensor([1, 2]), randn(5, 8), weights, torch.zeros(5, 8))
    assert drafts.tolist() == [[0, 0, 0]] * 2


def test_sampler_draft_takes_the_lowest_id_of_a_shortlist_on_a_tie():
    """Whichever the mask itself would rather have."""
    weights, _ = sampler(8)
    for parameter in (weights.norm2_weight, weights.norm2_bias):
        parameter.data[-1] = 0  # what the sampler says is nothing in the last place, in which alone the tokens differ
    lm_head = randn(1, 8).repeat(40, 1)
    lm_head[:, -1] = torch.arange(40)
    z = torch.cat([torch.zeros(2, 3, 7), torch.ones(2, 3, 1)], dim=-1)
    drafts = sampler_draft(z, torch.tensor([1, 2]), randn(40, 8), weights, lm_head, candidates=9)
    assert drafts.tolist() == [[31, 31, 31]] * 2


@pytest.mark.parametrize("candidates", [1, 2, 5, 10, 11])
@pytest.mark.parametrize("batch, k", [(1, 1), (3, 4), (2, 8)])
@torch.no_grad()
def test_sampler_draft_from_a_shortlist(batch, k, candidates):
    weights, modules = sampler(16)
    z, embedding, lm_head = randn(batch, k, 16), randn(11, 16, seed=1, scale=3), randn(11, 16, seed=2)
    first = torch.arange(batch) % 11
    drafts = sampler_draft(z, first, embedding, weights, lm_head, candidates=candidates)
    assert drafts.shape == (batch, k) and drafts.dtype == torch.int64
    modules.double()
    for b in range(batch):
        token = int(first[b])
        for i in range(k):
            own = (lm_head @ z[b, i]).tolist()
            allowed = sorted(sorted(range(11), key=own.__getitem__)[-candidates:])
            logits = lm_head.double() @ modules(torch.cat([embedding[token], z[b, i]]).double())
            token = max(allowed, key=logits.tolist().__getitem__)
            assert int(drafts[b, i]) == token
    exact = sampler_draft(z, first, embedding, weights, lm_head)
    if candidates == 11:
        assert torch.equal(drafts, exact)
    elif candidates == 1:
        assert torch.equal(drafts, (z @ lm_head.t()).argmax(-1))


@pytest.mark.parametrize("candidates", [4, 10, 20])
def test_a_shortlist_that_has_the_exact_drafts_gives_them(candidates):
    weights, _ = sampler(16)
    z, embedding, lm_head = randn(64, 4, 16), randn(40, 16, seed=1), randn(40, 16, seed=2)
    first = torch.arange(64) % 40
    exact, short = (sampler_draft(z, first, embedding, weights, lm_head, candidates=c) for c in (None, candidates))
    listed = (z @ lm_head.t()).topk(candidates).indices
    inside = (listed == exact.unsqueeze(-1)).any(-1).to(torch.int64).cumprod(1).bool()  # up to the first draft that is not listed
    assert torch.equal(exact[inside], short[inside]) and 0 < inside.sum() < inside.numel()
    assert not torch.equal(exact, short)


def test_sampler_draft_from_lists_that_are_given():
    weights, _ = sampler(16)
    z, embedding, lm_head = randn(5, 4, 16), randn(40, 16, seed=1), randn(40, 16, seed=2)
    listed, keys = (z @ lm_head.t()).topk(6).indices, torch.arange(20).view(5, 4)
    for options in ({}, dict(keys=keys, temperature=2.0)):
        expected = sampler_draft(z, torch.arange(5), embedding, weights, lm_head, candidates=6, **options)
        assert torch.equal(sampler_draft(z, torch.arange(5), embedding, weights, lm_head, candidates=listed.flip(-1), **options), expected)
    only = torch.randint(40, (5, 4, 1))
    assert torch.equal(sampler_draft(z, torch.arange(5), embedding, weights, lm_head, candidates=only), only.squeeze(-1))


@pytest.mark.parametrize("dtype", HALVES)
def test_sampler_draft_from_a_shortlist_in_half_precision(dtype):
    weights, _ = sampler(16, dtype)
    z, embedding, lm_head = (randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(4, 5, 16), (40, 16), (40, 16)]))
    drafts = sampler_draft(z, torch.arange(4), embedding, weights, lm_head, candidates=3)
    own = F.linear(z, lm_head).float()
    assert drafts.shape == (4, 5) and (own.gather(2, drafts.unsqueeze(-1)).squeeze(-1) >= own.topk(3).values[..., -1]).all()
    assert torch.equal(sampler_draft(z, torch.arange(4), embedding, weights, lm_head, candidates=40),
                       sampler_draft(z, torch.arange(4), embedding, weights, lm_head))  # fmt: skip


def test_sampler_draft_from_a_shortlist_takes_the_lowest_id_on_a_tie():
    """Tokens 2, 4 and 5 have the same row, which is also the states' direction: they are the list, in whatever order topk gives them."""
    weights, _ = sampler(8)
    lm_head = randn(6, 8, seed=3)
    lm_head[4] = lm_head[5] = lm_head[2]
    z = lm_head[2].expand(2, 3, 8) * 10
    assert sampler_draft(z, torch.tensor([1, 3]), randn(6, 8), weights, lm_head, candidates=3).tolist() == [[2, 2, 2]] * 2


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_linear_cross_entropy(shape, ignore_index, chunk):
    hidden, head = randn(*shape, 12), randn(9, 12, seed=1)
    labels = torch.arange(torch.Size(shape).numel()).remainder(9).view(shape)
    labels[..., 1] = ignore_index
    narrow, wide = [[t.to(d).requires_grad_() for t in (hidden, head)] for d in (torch.float32, torch.float64)]
    loss, guess = linear_cross_entropy(*narrow, labels, ignore_index=ignore_index, chunk=chunk)
    logits = wide[0] @ wide[1].T
    options = dict(ignore_index=ignore_index, reduction="none")
    exact = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), **options).view(shape)
    assert loss.dtype == torch.float32 and guess.dtype == torch.int64
    assert not loss[labels == ignore_index].any() and (labels == ignore_index).any()
    assert torch.equal(guess, logits.argmax(-1))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)
    upstream = randn(*shape, seed=5)
    for g, w in zip(
        torch.autograd.grad(loss, narrow, upstream), torch.autograd.grad(exact, wide, upstream.double()), strict=True
    ):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        again, _ = linear_cross_entropy(hidden, head, labels, ignore_index=ignore_index, chunk=chunk)
    assert torch.equal(again, loss)


@pytest.mark.parametrize("dtype", HALVES)
def test_linear_cross_entropy_in_half_precision(dtype):
    hidden, head, labels = randn(6, 12, dtype=dtype), randn(9, 12, seed=1, dtype=dtype), torch.arange(6)
    exact = F.cross_entropy(hidden.double() @ head.double().T, labels, reduction="none")
    eager = F.cross_entropy((hidden @ head.T).float(), labels, reduction="none")
    loss, _ = linear_cross_entropy(hidden, head, labels, chunk=4)
    assert_within_budget(loss, exact, eager)


def naive_losses(hidden, head, labels, teacher, soft):
    """Row by row, from the definition; PyTorch's own gradients."""
    losses = []
    for i, label in enumerate(labels.tolist()):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        target = soft * (head.detach() @ teacher[i]).to(wide).softmax(-1)
        target[max(label, 0)] += 1 - soft
        losses.append(-(target * (head @ hidden[i]).to(wide).log_softmax(-1)).sum() * (label != -100))
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("soft", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("v, chunk", [(1, 2), (40, 2), (40, 100)])
def test_linear_cross_entropy_with_soft_targets(v, chunk, soft, dtype):
    hidden, teacher, head = randn(5, 12, dtype=dtype), randn(5, 12, seed=1, dtype=dtype), randn(v, 12, seed=2, dtype=dtype)
    labels, dloss, results = torch.arange(5) % v, randn(5, seed=3), []
    labels[1] = -100
    for function, wide in ((linear_cross_entropy, dtype), (naive_losses, torch.float64), (naive_losses, dtype)):
        leaves = [x.to(wide).requires_grad_() for x in (hidden, head)]
        options = dict(teacher=teacher.to(wide), soft=soft) | (dict(chunk=chunk) if function is linear_cross_entropy else {})
        loss = function(*leaves, labels, **options)
        loss = loss[0] if isinstance(loss, tuple) else loss
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves, dloss.to(loss.dtype))])
    for got, exact, eager in zip(*results, strict=True):
        assert_within_budget(got, exact, eager)
    assert results[0][0][1] == 0 and not results[0][1][1].any()


@pytest.mark.parametrize("soft", [None, 0.0, 0.3, 1.0])
def test_linear_cross_entropy_gradients_by_differences(soft):
    hidden, head, teacher = (randn(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate([(5, 3), (7, 3), (5, 3)]))
    labels, options = torch.tensor([0, -100, 6, 2, 2]), dict(chunk=2) if soft is None else dict(teacher=teacher, soft=soft, chunk=2)
    leaves = [hidden.requires_grad_()] if soft else [hidden.requires_grad_(), head.requires_grad_()]  # a head's differences move the targets too

    def losses(h, w=head):
        return reference.linear_cross_entropy(h, w, labels, **options)[0]

    assert torch.autograd.gradcheck(losses, leaves)
    teacher.requires_grad_()
    loss = losses(*leaves)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(loss.pow(2).sum(), hidden, create_graph=True)[0].sum().backward()
    assert torch.autograd.grad(loss.sum(), [hidden, teacher], allow_unused=True)[1] is None


@pytest.mark.parametrize("gradients", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("teacher", [False, True])
def test_linear_cross_entropy_never_has_all_logits(teacher, gradients):
    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    hidden, head = (randn(*shape).requires_grad_(needed) for shape, needed in zip([(20, 2), (50, 2)], gradients, strict=True))
    with Record():
        loss, _ = linear_cross_entropy(hidden, head, torch.arange(20), teacher=randn(20, 2, seed=1) if teacher else None, soft=0.5, chunk=3)
        if any(gradients):
            loss.sum().backward()
    assert max(sizes) == 3 * 50


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n, d", [(0, 3, 4), (1, 1, 1), (9, 4, 33)])
def test_latent_consistency(m, n, d, dtype):
    z, target, weight = randn(m, d, dtype=dtype), randn(n, d, seed=1, dtype=dtype), randn(m, seed=2).abs()
    index, results = torch.arange(m) * 3 % n, []
    weight[4:6] = 0
    for function, wide in ((latent_consistency, dtype), ("rows", torch.float64), ("rows", torch.float32)):
        leaf = z.detach().to(wide).requires_grad_()
        if function == "rows":
            parts = [w * (leaf[i] - target[j].to(wide)).pow(2).mean() for i, (j, w) in enumerate(zip(index.tolist(), weight.to(wide), strict=True))]
            loss = sum(parts, leaf.sum() * 0)
        else:
            loss = function(leaf, target.requires_grad_(), index, weight.requires_grad_())
            assert loss.dtype == torch.float32 and loss.shape == ()
            assert torch.autograd.grad(loss, [leaf, target, weight], allow_unused=True, retain_graph=True)[1:] == (None, None)
            target, weight = target.detach(), weight.detach()
        results.append([loss.detach(), torch.autograd.grad(loss, leaf, torch.tensor(0.3, dtype=loss.dtype))[0]])
    (loss, dz), exact, (eager, eager_dz) = results
    assert_within_budget(loss, exact[0], eager)
    assert_within_budget(dz, exact[1], eager_dz.to(dtype))
    assert not dz[4:6].any()


@st.composite
def draft_batches(draw):
    batch, k = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    token = st.integers(0, 2)
    drafts = draw(st.lists(st.lists(token, min_size=k, max_size=k), min_size=batch, max_size=batch))
    predictions = draw(st.lists(st.lists(token, min_size=k + 1, max_size=k + 1), min_size=batch, max_size=batch))
    counts = draw(st.none() | st.lists(st.integers(0, k), min_size=batch, max_size=batch))
    return drafts, predictions, counts


@settings(max_examples=300, deadline=None)
@given(draft_batches(), st.sampled_from([torch.int32, torch.int64]))
def test_accept(case, dtype):
    drafts, predictions, counts = case
    accepted, following = accept(
        torch.tensor(drafts, dtype=dtype), torch.tensor(predictions), None if counts is None else torch.tensor(counts)
    )
    for b, (d, y) in enumerate(zip(drafts, predictions, strict=True)):
        a = 0
        while a < (len(d) if counts is None else counts[b]) and d[a] == y[a]:
            a += 1
        assert (int(accepted[b]), int(following[b])) == (a, y[a])


def test_accept_a_match_after_a_mismatch_counts_for_nothing():
    drafts, predictions = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 0, 7, 8, 9]])
    accepted, following = accept(drafts, predictions)
    assert accepted.tolist() == [1] and following.tolist() == [0]
    accepted, following = accept(drafts, torch.tensor([[0, 6, 7, 8, 9]]))
    assert accepted.tolist() == [0] and following.tolist() == [0]
    accepted, following = accept(drafts, torch.tensor([[5, 6, 7, 8, 9]]))
    assert accepted.tolist() == [4] and following.tolist() == [9]
    accepted, following = accept(drafts, torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([2]))
    assert accepted.tolist() == [2] and following.tolist() == [7]


@pytest.fixture(params=[1, 2, 3, 8], ids="{}-threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


needs_packed = pytest.mark.skipif(packed.pack(torch.zeros(16, 16)) is None, reason="PyTorch without oneDNN")
PACKED_DTYPES = [dtype for dtype in (torch.float32, torch.float16, torch.bfloat16) if packed.pack(torch.zeros(16, 16, dtype=dtype)) is not None]


def parameter(values):
    """One that is no inference tensor, whose products are PyTorch's ordinary ones."""
    with torch.inference_mode(False):
        return torch.nn.Parameter(torch.empty(values.shape, dtype=values.dtype).copy_(values))


LINEAR_SHAPES = [(64, 192), (256, 768), (768, 256), (48, 32), (64, 7), (2048, 256), (576, 3072), (1536, 576), (3000, 1001), (2048, 2048)]


def check_linear(k, n, residual, dtype):
    weight, bias = parameter(randn(n, k).to(dtype)), randn(n, seed=5).to(dtype)
    x, r = randn(300, k, seed=1).to(dtype), randn(300, n, seed=2).to(dtype)
    whole = gated_lora_linear(x, weight, bias=bias, residual=r if residual else None)
    exact, size = (
        u @ w.t() + c + s * residual
        for u, w, c, s in ([form(t.double()) for t in (x, weight, bias, r)] for form in (torch.Tensor.clone, torch.Tensor.abs))
    )
    allowed = k**0.5 * torch.finfo(torch.float32).eps * size + 4 * torch.finfo(dtype).eps * (exact.abs() + bias.abs() + r.abs())
    assert ((whole.double() - exact).abs() <= allowed).all()
    for rows in (1, 2, 3, 9, 17, 32, 33, 80, 129):
        some = slice(300 - rows, 300) if rows % 2 else slice(rows)
        assert torch.equal(gated_lora_linear(x[some], weight, bias=bias, residual=r[some] if residual else None), whole[some]), rows
    a, b = randn(4, k, seed=3).to(dtype), randn(n, 4, seed=4).to(dtype)
    gated = gated_lora_linear(x, weight, a, b, 17, bias=bias, residual=r if residual else None)
    assert torch.equal(gated[:17], whole[:17]) and not torch.equal(gated[17:], whole[17:])


@needs_packed
@pytest.mark.parametrize("k, n", LINEAR_SHAPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@torch.inference_mode()
def test_linear_rows_are_independent(threads, k, n, residual, dtype):
    check_linear(k, n, residual, dtype)


@pytest.mark.parametrize("k, n", [(64, 192), (64, 7), (2048, 256), (576, 3072)])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_linear_rows_are_independent_without_packed_products(threads, k, n, dtype, monkeypatch):
    monkeypatch.setattr(packed, "_tiling", lambda dtype, threads: None)
    assert packed.pack(parameter(torch.zeros(16, 16, dtype=dtype))) is None
    check_linear(k, n, n % 2 == 0, dtype)


@needs_packed
@torch.inference_mode()
def test_packed_weights_follow_their_parameter(monkeypatch):
    monkeypatch.setattr(packed, "_packs", packs := type(packed._packs)())
    weight, x = parameter(randn(8, 16)), randn(3, 16, seed=1)
    first = gated_lora_linear(x, weight)
    assert packed.kept([weight]) == [packed.pack(weight)] and len(packs) == 1
    with torch.inference_mode(False), torch.no_grad():
        weight.mul_(2)
    torch.testing.assert_close(gated_lora_linear(x, weight), 2 * first)
    with torch.inference_mode(False), torch.no_grad():
        weight.data = weight.data.clone().mul_(2)  # other memory
    torch.testing.assert_close(gated_lora_linear(x, weight), 4 * first)
    packed.forget([weight])
    assert not packs and torch.equal(gated_lora_linear(x[:0], weight), torch.zeros(0, 8))
    made = randn(8, 16)  # under inference_mode: torch does not count what is written to it
    before = gated_lora_linear(x, made)
    made.mul_(2)
    torch.testing.assert_close(gated_lora_linear(x, made), 2 * before)
    gated_lora_linear(x, weight)
    del weight
    assert not packs


@needs_packed
def test_what_the_machine_is_tried_for_follows_from_nothing_else():
    """Not from torch's defaults or autocast, where it is first needed."""
    cached, threads, dtype = (packed._tiling, packed._rows_alike, reference._head_rows), torch.get_num_threads(), torch.get_default_dtype()

    def tried():
        for results in cached:
            results.cache_clear()
        return packed._tiling(torch.float32, threads), packed._rows_alike(576, 1536, threads), reference._head_rows(64, torch.float32, threads)

    found = tried()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            assert tried() == found
    finally:
        torch.set_default_dtype(dtype)
    assert found[0] in packed.TILINGS and found[2] in reference.HEAD_ROWS


def test_products_with_gradients_pack_nothing(monkeypatch):
    monkeypatch.setattr(packed, "_packs", packs := type(packed._packs)())
    weight = torch.nn.Parameter(randn(8, 16))
    gated_lora_linear(randn(3, 16), weight).sum().backward()
    with torch.no_grad():
        gated_lora_linear(randn(3, 16), weight)
    assert weight.grad is not None and not packs


@torch.inference_mode()
@pytest.mark.parametrize(
    "tiling, of_three, of_one, of_nine",
    [
        ((1, 2**31), [3], [2], [9]),
        ((6, 48), [6], [6], [12]),
        ((8, 8), [8], [8], [8, 8]),
        ((4, 4), [4], [4], [4, 4, 4]),
        ((1, 1), [1, 1, 1], [1], [1] * 9),
    ],
)
def test_numbers_of_rows(tiling, of_three, of_one, of_nine, monkeypatch):
    matmul = packed.matmul
    monkeypatch.setattr(packed, "_plain_tiling", lambda dtype, threads: tiling)
    weight, bias, x, residual = randn(8, 16), randn(8, seed=3), randn(9, 16, seed=1), randn(9, 8, seed=2)  # inference tensors, which are not packed
    for rows, expected in ((3, of_three), (1, of_one), (9, of_nine)):
        taken = []
        monkeypatch.setattr(packed, "matmul", lambda x, *rest, taken=taken: taken.append(len(x)) or matmul(x, *rest))
        y = gated_lora_linear(x[:rows], weight, bias=bias, residual=residual[:rows])
        torch.testing.assert_close(y, torch.addmm(residual, x, weight.t())[:rows] + bias)
        assert taken == expected


@pytest.mark.parametrize("d", [16, 64, 80, 96, 128])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 2), (8, 2)])
@pytest.mark.parametrize("visible", [1, 16, 41, 256, 570])
@torch.inference_mode()
def test_attention_rows_are_independent(threads, d, heads, kv_heads, visible):
    q, k, v = qkv(81, 1, heads, kv_heads, d, 600)

    def run(rows, num_keys):
        rule = AttentionRule(
            torch.full((rows, 1), visible), torch.full((rows,), -1), torch.zeros(rows, dtype=torch.int64),
            torch.tensor([num_keys]), 0, num_keys,
        )  # fmt: skip
        return attention(q[:rows], k, v, rule)

    whole = run(81, 600)
    for rows, num_keys in itertools.product((1, 2, 3, 9, 17, 81), (visible, visible + 1, visible + 30, 600)):
        assert torch.equal(run(rows, num_keys), whole[:rows]), (rows, num_keys)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="a CPU without AVX2")
def test_rows_are_independent_on_older_processors():
    """The tests of it once more, with the libraries' instructions limited to AVX2."""
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
    those = "(rows_are_independent or gated_lora_linear) and not (older or 2-threads or 8-threads)"
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", those, __file__]
    done = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr


def test_a_rule_serves_models_of_other_heads():
    rule = AttentionRule(torch.full((3, 1), 5), torch.full((3,), -1), torch.zeros(3, dtype=torch.int64), torch.tensor([5]), 0, 5)
    for heads, kv_heads in ((4, 2), (4, 4), (2, 1)):
        q, k, v = qkv(3, 1, heads, kv_heads, 16, 8)
        fresh = AttentionRule(rule.visible, rule.block, rule.slot, rule.mask_start, 0, 5)
        assert torch.equal(attention(q, k, v, rule), attention(q, k, v, fresh))
