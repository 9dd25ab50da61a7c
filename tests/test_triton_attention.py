"""Attention's kernels against the rule in dense form, in float64; in Triton's interpreter, or on a GPU where there is one."""

import dataclasses
import random

import pytest
import torch

pytest.importorskip("triton")

from mtp_kernels import AttentionRule, attention, reference  # noqa: E402
from mtp_kernels.testing import assert_within_budget  # noqa: E402
from mtp_kernels.triton import _device, _tiles  # noqa: E402
from mtp_kernels.triton import attention as fused  # noqa: E402
from mtp_kernels.triton._device import INTERPRETED  # noqa: E402
from mtp_model.layout import decoding_layout, prefill_layout, training_layout  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """Interpreted, an operation costs the same on a large tile as on a small one; pieces stay short, that there are several."""
    if not INTERPRETED:
        return
    forward, backward = _tiles.attention_tiles, _tiles.attention_backward_tiles

    def larger(*shape):
        return dataclasses.replace(forward(*shape), block_m=128, block_s=64, piece=128)

    def larger_backward(*shape):
        return dataclasses.replace(backward(*shape), block_m=128, block_s=64, keys_block_m=128, keys_block_s=64, scan=128)

    monkeypatch.setattr(_tiles, "attention_tiles", larger)
    monkeypatch.setattr(_tiles, "attention_backward_tiles", larger_backward)
    monkeypatch.setattr(_tiles, "attention_merge_tiles", lambda: (64, 4))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def dense(q, k, v, rule, scale=None):
    """The formula with the dense oracle, in the dtype of its arguments."""
    groups, n = q.shape[2] // k.shape[1], rule.num_keys
    k, v = (x[:, :, :n].repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("tbhd,bhsd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~reference.allowed_keys(rule).unsqueeze(1), -torch.inf)
    return torch.einsum("bhts,bhsd->tbhd", scores.softmax(-1), v)


def rows_of(kind, k, starts):
    """The rows of a pass of that kind behind starts[b] tokens."""
    generator, batch = torch.Generator().manual_seed(len(kind) + k), len(starts)
    if kind == "prefill":
        layout, starts = prefill_layout([s % 40 + 3 for s in starts], k), [0] * batch
    elif kind in ("training", "masks"):
        length = max(starts) + 1
        anchors = torch.randint(0, length, (7, batch), generator=generator).sort(0).values
        layout, starts = training_layout(length, anchors, k), [0] * batch
    else:
        layout = decoding_layout(kind, k, tuple(k * (s % 3 != 1) for s in starts))
    rows = layout.at(torch.zeros(layout.num_ntp, batch, dtype=torch.int64), starts)
    return rows.mask_rows() if kind == "masks" else rows


def case(kind, k, starts, heads, d, dtype=torch.float32, block_size=None):
    """q, k, v and the rule. q is a part of a fused projection's result; no row may attend the columns that hold NaN."""
    rows = rows_of(kind, k, starts)
    fields = {f.name: getattr(rows.rule, f.name) for f in dataclasses.fields(AttentionRule) if f.init}
    rule = AttentionRule(**{n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in fields.items()})
    if block_size is not None:
        rule = dataclasses.replace(rule, block_size=block_size)
    t, batch, (h, kv) = rule.visible.shape[0], len(starts), heads
    q = randn(t, batch, h + 2 * kv, d, seed=1, dtype=dtype)[:, :, :h]
    keys, values = (randn(batch, kv, rule.num_keys + 9, d, seed=s, dtype=dtype) for s in (2, 3))
    attended = reference.allowed_keys(rule, rule.num_keys + 9).any(1)
    return q, keys, values, rule, ~attended


def poisoned(x, nowhere):
    x = x.detach().clone()
    x.masked_fill_(nowhere[:, None, :, None], torch.nan)
    return x


F32, F16, BF16 = DTYPES
CASES = [
    ("autoregressive", 1, [0], (4, 2), 16, F32),
    ("autoregressive", 1, [300, 5, 127], (6, 1), 64, F16),
    ("linear", 2, [130, 64, 3], (2, 2), 80, F32),
    ("linear", 8, [255], (4, 2), 128, BF16),
    ("quadratic", 1, [1, 128], (6, 1), 96, F16),
    ("quadratic", 3, [200, 31], (4, 2), 40, BF16),
    ("quadratic", 8, [140], (4, 2), 64, F32),
    ("quadratic", 8, [20], (2, 1), 80, F16),
    ("quadratic-printed", 4, [63, 129], (2, 2), 16, F32),
    ("prefill", 3, [37, 9], (4, 2), 24, BF16),
    ("training", 4, [20, 12], (6, 1), 16, F32),
    ("masks", 4, [140, 140], (2, 1), 64, BF16),
]


@pytest.mark.parametrize("kind, k, starts, heads, d, dtype", CASES)
@torch.no_grad()
def test_attention(kind, k, starts, heads, d, dtype):
    q, keys, values, rule, nowhere = case(kind, k, starts, heads, d, dtype)
    exact, eager = dense(q.double(), keys.double(), values.double(), rule), dense(q, keys, values, rule)
    got = attention(q, poisoned(keys, nowhere), poisoned(values, nowhere), rule, implementation="triton")
    assert got.is_contiguous()
    assert_within_budget(got, exact, eager)
    again = attention(q, keys, values, dataclasses.replace(rule, block_size=0), implementation="triton")
    assert torch.equal(again, got)  # block_size is a hint; another run; what nobody attends does not show


@pytest.mark.parametrize("scale", [0.3, -1.0, 0.0, 40.0])
@torch.no_grad()
def test_scale(scale):
    q, keys, values, rule, _ = case("linear", 3, [30, 9], (4, 2), 16)
    exact, eager = (dense(*(x.to(t) for x in (q, keys, values)), rule, scale) for t in (torch.float64, torch.float32))
    assert_within_budget(attention(q, keys, values, rule, scale=scale, implementation="triton"), exact, eager)


@torch.no_grad()
def test_layouts_of_memory_and_integers():
    """Any strides, and 32-bit rules; empty passes."""
    q, keys, values, rule, _ = case("quadratic", 2, [130, 40], (4, 2), 16)
    expected = fused(q, keys, values, rule)
    narrow = {n: getattr(rule, n).int() for n in ("visible", "block", "slot", "mask_start")}
    narrow["visible"] = narrow["visible"].t().contiguous().t()
    other_q = q.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    other_k, other_v = (x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in (keys, values))
    assert torch.equal(fused(other_q, other_k, other_v, dataclasses.replace(rule, **narrow)), expected)
    none = dataclasses.replace(rule, visible=rule.visible[:0], block=rule.block[:0], slot=rule.slot[:0], num_masks=0)
    assert fused(q[:0], keys, values, none).shape == (0, 2, 4, 16)


@torch.no_grad()
def test_padding_rows_may_say_anything():
    q, keys, values, rule, nowhere = case("linear", 2, [130, 64], (4, 2), 16)
    expected = fused(q, keys, values, rule)
    visible = rule.visible.clone()
    visible[1, 0], visible[2, 1], visible[0, 1] = 10**6, 0, -5
    got = fused(q, poisoned(keys, nowhere), poisoned(values, nowhere), dataclasses.replace(rule, visible=visible))
    assert torch.equal(got[3:], expected[3:]) and torch.equal(got[0, 0], expected[0, 0]) and not got[2, 1].isnan().any()


def steps(n, k):
    """The same nine tokens behind n, in steps of other shapes: their first NTP row, and their rows."""
    yield 0, rows_of_step("quadratic", n, k)
    yield 0, rows_of_step("linear", n, k)
    for first in (0, 4, k):
        yield first, rows_of_step("autoregressive", n + first, k)
    yield 3, rows_of_step("linear", n + 3, k, drafted=False)


def rows_of_step(mode, n, k, drafted=True):
    layout = decoding_layout(mode, k, (k * drafted,))
    return layout.at(torch.zeros(layout.num_ntp, 1, dtype=torch.int64), [n])


@pytest.mark.parametrize("n, heads, d, dtype", [(0, (2, 1), 16, F16), (123, (4, 2), 80, BF16), (250, (6, 1), 128, F32)])
@torch.no_grad()
def test_an_ntp_row_has_the_same_bits_in_every_step(n, heads, d, dtype):
    """1, 17 and 81 rows; predecessors in the cache or in the step; masks behind it or none; other masks' keys."""
    k, (h, kv) = 8, heads
    queries = randn(k + 1, 1, h, d, seed=1, dtype=dtype)
    keys, values = (randn(1, kv, n + k + 1, d, seed=s, dtype=dtype) for s in (2, 3))
    whole = None
    for seed, (first, rows) in enumerate(steps(n, k)):
        ntp, masks = rows.num_ntp, rows.num_masks
        q = torch.cat([queries[first : first + ntp], randn(masks, 1, h, d, seed=10 + seed, dtype=dtype)])
        behind = n + first + ntp  # the masks' keys, other ones in every step
        step_keys, step_values = (torch.cat([x[:, :, :behind], 9 * randn(1, kv, masks, d, seed=seed, dtype=dtype)], 2) for x in (keys, values))
        got = fused(q, step_keys, step_values, to_device(rows.rule))[:ntp]
        whole = got if whole is None else whole
        assert torch.equal(got, whole[first : first + ntp]), seed


def to_device(rule):
    return dataclasses.replace(rule, **{n: getattr(rule, n).to(DEVICE) for n in ("visible", "block", "slot", "mask_start")})


@torch.no_grad()
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch():
    starts = [200, 7, 129]
    layout = decoding_layout("quadratic", 3, (3,) * 3)
    q, keys, values = randn(16, 3, 4, 40, seed=1), *(randn(3, 2, 300, 40, seed=s) for s in (2, 3))
    together = fused(q, keys, values, to_device(layout.at(torch.zeros(4, 3, dtype=torch.int64), starts).rule))
    for b, start in enumerate(starts):
        alone = decoding_layout("quadratic", 3, (3,)).at(torch.zeros(4, 1, dtype=torch.int64), [start])
        assert torch.equal(fused(q[:, b : b + 1], keys[b : b + 1], values[b : b + 1], to_device(alone.rule)), together[:, b : b + 1])


@torch.no_grad()
def test_rounds_of_pieces_change_no_bit(monkeypatch):
    q, keys, values, rule, _ = case("quadratic", 2, [300, 130], (2, 1), 16)
    expected = fused(q, keys, values, rule)
    for at_once in (1, 2):
        monkeypatch.setattr(_tiles, "attention_pieces_at_once", lambda *_, n=at_once: n)
        assert torch.equal(fused(q, keys, values, rule), expected)


GRADIENT_CASES = [
    ("masks", 4, [140, 140], (2, 1), 16, None),
    ("masks", 3, [50, 50], (6, 1), 80, None),
    ("masks", 12, [20, 20], (2, 1), 16, None),  # a block across two tiles of keys
    ("masks", 4, [70, 70], (2, 2), 128, 0),
    ("training", 3, [20, 12], (4, 2), 64, None),
    ("quadratic", 3, [130, 5], (4, 2), 96, None),
    ("autoregressive", 1, [70, 3], (2, 2), 16, None),
]


@pytest.mark.parametrize("kind, k, starts, heads, d, block_size", GRADIENT_CASES)
def test_gradients(kind, k, starts, heads, d, block_size):
    q, keys, values, rule, nowhere = case(kind, k, starts, heads, d, block_size=block_size)
    upstream = randn(*q.shape, seed=9)
    wide = [x.detach().double().requires_grad_() for x in (q, keys, values)]
    exact = torch.autograd.grad(dense(*wide, rule), wide, upstream.double())
    leaves = [x.requires_grad_() for x in (q.detach().clone(), poisoned(keys, nowhere), poisoned(values, nowhere))]
    got = torch.autograd.grad(attention(*leaves, rule, implementation="triton"), leaves, upstream)
    for g, x in zip(got, exact, strict=True):  # no budget here: a row with one key has ds = 0 exactly in eager, and o do - do v in kernels
        torch.testing.assert_close(g.double(), x, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("kind, block_size", [("masks", None), ("masks", 0), ("training", None)])
def test_gradients_again_and_without_the_ntp_keys(kind, block_size):
    q, keys, values, rule, _ = case(kind, 3, [20, 20], (2, 1), 16, block_size=block_size)
    leaves, upstream = [x.detach().clone().requires_grad_() for x in (q, keys, values)], randn(*q.shape, seed=9)
    whole, again = (torch.autograd.grad(fused(*leaves, rule), leaves, upstream) for _ in range(2))
    part = torch.autograd.grad(fused(*leaves, rule, ntp_key_gradients=False), leaves, upstream)
    masks = torch.arange(keys.shape[2], device=DEVICE) - rule.mask_start.unsqueeze(1)
    masks = ((masks >= 0) & (masks < rule.num_masks))[:, None, :, None]
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True)) and torch.equal(part[0], whole[0])
    assert all(torch.equal(a, torch.where(masks, b, 0)) for a, b in zip(part[1:], whole[1:], strict=True))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_in_half_precision(dtype):
    q, keys, values, rule, _ = case("masks", 4, [70, 70], (4, 2), 80, dtype)
    upstream = randn(*q.shape, seed=9, dtype=dtype)
    results = []
    for t, function in ((torch.float64, dense), (dtype, dense), (dtype, fused)):
        leaves = [x.detach().to(t).requires_grad_() for x in (q, keys, values)]
        results.append(torch.autograd.grad(function(*leaves, rule), leaves, upstream.to(t)))
    for exact, eager, got in zip(*results, strict=True):
        assert_within_budget(got, exact, eager)


def test_only_the_gradients_asked_for():
    q, keys, values, rule, _ = case("masks", 2, [20, 20], (2, 1), 16)
    upstream = randn(*q.shape, seed=9)
    leaves = [x.detach().clone().requires_grad_() for x in (q, keys, values)]
    whole = torch.autograd.grad(fused(*leaves, rule), leaves, upstream)
    for wanted in ((0,), (2,), (0, 1)):
        arguments = [x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate((q, keys, values))]
        got = torch.autograd.grad(fused(*arguments, rule), [arguments[i] for i in wanted], upstream)
        assert all(torch.equal(g, whole[i]) for g, i in zip(got, wanted, strict=True))


def test_compiled_without_a_graph_break():
    q, keys, values, rule, _ = case("masks", 2, [9], (2, 1), 16)
    leaves = [x.detach().clone().requires_grad_() for x in (q, keys, values)]
    expected = fused(*leaves, rule)
    compiled = torch.compile(lambda q, k, v: fused(q, k, v, rule) * 2, fullgraph=True, backend="aot_eager")
    y = compiled(*leaves)
    assert torch.equal(y, expected * 2)
    for got, whole in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(2 * expected.sum(), leaves), strict=True):
        assert torch.equal(got, whole)
    with torch.no_grad():
        assert torch.equal(compiled(q, keys, values), expected * 2)


def test_tiles_follow_from_head_size_and_dtype():
    for d in range(1, 257):
        first, tail = _tiles.attention_head_parts(d)
        assert first + tail >= d and first >= 16 and (tail == 0 or first < d) and first & first - 1 == tail & tail - 1 == 0
    generator = random.Random(0)
    for _ in range(100):
        pieces, numbers = generator.randint(1, 300), generator.randint(0, 2**30)
        assert 1 <= _tiles.attention_pieces_at_once(pieces, numbers) <= pieces


def packed(documents, k, anchors, seed=0, part="whole"):
    """The rule of documents[b], lengths of equal sum, packed into sequence b, and a block of k masks after each of `anchors` random tokens.

    part: "whole", or "masks" for the mask rows alone, block_size known.
    """
    length, batch = sum(documents[0]), len(documents)
    first = torch.tensor([[c for i, n in enumerate(lengths) for c in [sum(lengths[:i])] * n] for lengths in documents]).t()
    after = torch.randint(0, length, (anchors, batch), generator=torch.Generator().manual_seed(seed)).sort(0).values
    layout = training_layout(length, after, k)
    rows = layout.at(torch.zeros(length, batch, dtype=torch.int64), [0] * batch)
    first = torch.cat([first, first.gather(0, after).repeat_interleave(k, 0)])
    if part == "masks":
        rows, first = rows.mask_rows(), first[length:]
    return dataclasses.replace(to_device(rows.rule), first=first.to(DEVICE))


def operands(rule, heads, d, dtype=F32):
    (t, batch), (h, kv) = rule.visible.shape, heads
    return randn(t, batch, h, d, seed=1, dtype=dtype), *(randn(batch, kv, rule.num_keys, d, seed=s, dtype=dtype) for s in (2, 3))


def results(function, tensors, rule, dtype, upstream, **options):
    """The output and the gradients of q, k, v."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    y = function(*leaves, rule, **options)
    return y, *torch.autograd.grad(y, leaves, upstream.to(dtype))


def random_documents(seed):
    """One to three sequences of several documents, some of one token."""
    generator = random.Random(seed)
    length, documents = generator.choice([20, 140]), []
    for _ in range(generator.randint(1, 3 if length < 100 else 2)):
        cuts = {0, length, *generator.sample(range(1, length), generator.randint(0, 4))}
        cuts = sorted(cuts | {min(c + 1, length) for c in cuts if generator.random() < 0.4})
        documents.append([b - a for a, b in zip(cuts, cuts[1:], strict=False)])
    return documents


@pytest.mark.parametrize("seed", range(6))
def test_packed_documents(seed):
    heads, d, k = [((4, 2), 16, 3), ((2, 2), 40, 1), ((3, 1), 24, 8)][seed % 3]
    dtype = DTYPES[seed % 3] if seed > 2 else F32
    rule = packed(random_documents(seed), k, [0, 9, 5][seed % 3], seed, "masks" if seed in (1, 4) else "whole")
    tensors = operands(rule, heads, d, dtype)
    upstream = randn(*tensors[0].shape, seed=9, dtype=dtype)
    exact, eager = (results(dense, tensors, rule, t, upstream) for t in (torch.float64, dtype))
    got = results(attention, tensors, rule, dtype, upstream, implementation="triton")
    assert_within_budget(got[0], exact[0], eager[0])
    for g, x, e in zip(got[1:], exact[1:], eager[1:], strict=True):
        if dtype is F32:
            torch.testing.assert_close(g.double(), x, rtol=1e-5, atol=3e-6)
        else:
            assert_within_budget(g, x, e)
    with torch.no_grad():
        assert torch.equal(fused(*tensors, dataclasses.replace(rule, block_size=0)), got[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, k, starts, heads, d", [
    ("prefill", 2, [200, 33], (4, 2), 128), ("training", 3, [150, 20], (2, 1), 80),
    ("masks", 4, [300, 7], (4, 1), 64), ("quadratic", 3, [290, 0, 128], (2, 2), 96),
    ("packed", 2, [130, 60], (2, 1), 16), ("packed masks", 2, [140, 1, 120], (4, 2), 128),
])  # fmt: skip
def test_a_program_may_take_all_pieces(kind, k, starts, heads, d, dtype, monkeypatch):
    """Or they may be shared out, and come in rounds: the same bits, and the same gradients."""
    if kind.startswith("packed"):
        rule = packed([starts], k, 9, part="masks" if "masks" in kind else "whole")
        tensors = operands(rule, heads, d)
    else:
        *tensors, rule, _ = case(kind, k, starts, heads, d)
    tensors = [x.to(dtype) for x in tensors]
    upstream = randn(*tensors[0].shape, seed=9, dtype=dtype)
    monkeypatch.setattr(_tiles, "attention_is_whole", lambda *_: False)
    expected = results(fused, tensors, rule, dtype, upstream)
    monkeypatch.setattr(_tiles, "attention_is_whole", lambda *_: True)
    launches, launch = [], _device.launch
    monkeypatch.setattr(_device, "launch", lambda kernel, *args, **options: launches.append(kernel.fn.__name__) or launch(kernel, *args, **options))
    got = results(fused, tensors, rule, dtype, upstream)
    assert "attend_whole_kernel" in launches and "merge_kernel" not in launches
    for whole, split in zip(got, expected, strict=True):
        assert torch.equal(whole, split)


@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_a_piece_that_a_row_does_not_see_cannot_spoil_it(whole, monkeypatch):
    """Though rows of its tile see it, and it holds infinities."""
    q, keys, values, rule, _ = case("masks", 4, [1000], (4, 1), 64)
    rows = rule.visible[:, 0] <= 512
    assert rows.any() and not rows.all()
    monkeypatch.setattr(_tiles, "attention_is_whole", lambda *_: whole)
    expected = fused(q, keys, values, rule)
    values[:, :, 512 : int(rule.mask_start)] = torch.inf
    assert torch.equal(fused(q, keys, values, rule)[rows], expected[rows])


@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_masks_that_see_no_tokens(whole, monkeypatch):
    """They attend their block alone, in tiles of such rows as beside rows that see tokens."""
    rule = packed([[140, 140]], 3, 60, part="masks")
    visible = rule.visible.clone()
    visible[: len(visible) * 3 // 4] = 0
    rule = dataclasses.replace(rule, visible=visible, first=torch.where(visible == 0, 200, rule.first))
    tensors = operands(rule, (4, 2), 16)
    monkeypatch.setattr(_tiles, "attention_is_whole", lambda *_: whole)
    exact, eager = (dense(*(x.to(dtype) for x in tensors), rule) for dtype in (torch.float64, F32))
    assert_within_budget(fused(*tensors, rule), exact, eager)


def test_programs_take_all_pieces_where_they_are_many():
    hopper, blackwell = ("cuda", 90), ("cuda", 100)
    assert not _tiles.attention_is_whole(511, 128, 2, hopper) and _tiles.attention_is_whole(512, 128, 2, hopper)
    assert not _tiles.attention_is_whole(512, 128, 2, blackwell) and _tiles.attention_is_whole(512, 64, 2, blackwell)
    assert not _tiles.attention_is_whole(512, 256, 2, hopper) and not _tiles.attention_is_whole(512, 64, 2, ("hip", "gfx942"))


@pytest.mark.parametrize("lengths", [(128, 40), (100, 1, 50)])
def test_packed_documents_are_the_documents_alone(lengths, monkeypatch):
    """A document that starts at a piece has its bits, too; and so have all rows if pieces are taken one by one."""
    rule = packed([lengths], 2, 0)
    tensors = operands(rule, (2, 1), 16)
    upstream = randn(*tensors[0].shape, seed=9)
    whole = results(fused, tensors, rule, F32, upstream)
    start = 0
    for n in lengths:
        own = slice(start, start + n)
        q, k, v = tensors[0][own], tensors[1][:, :, own], tensors[2][:, :, own]
        alone = results(fused, (q, k, v), dataclasses.replace(packed([[n]], 2, 0), first=None), F32, upstream[own])
        for together, single in zip((whole[0][own], whole[1][own], whole[2][:, :, own], whole[3][:, :, own]), alone, strict=True):
            torch.testing.assert_close(together, single, rtol=1e-5, atol=3e-6)
        assert start % 128 or not INTERPRETED or torch.equal(whole[0][own], alone[0])
        start += n
    monkeypatch.setattr(_tiles, "attention_pieces_at_once", lambda *_: 1)
    with torch.no_grad():
        assert torch.equal(fused(*tensors, rule), whole[0])


@pytest.mark.parametrize("first", [128, 200])
def test_keys_before_every_first_are_not_read(first):
    rule = packed([[140, 140]], 3, 4, part="masks")
    rule = dataclasses.replace(rule, first=torch.full_like(rule.first, first), visible=rule.visible.clamp(min=first + 1))
    tensors = operands(rule, (4, 2), 16)
    upstream = randn(*tensors[0].shape, seed=9)
    expected = results(fused, tensors, rule, F32, upstream)
    for x in tensors[1:]:
        x[:, :, :first] = torch.nan
    got = results(fused, tensors, rule, F32, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)) and not expected[2][:, :, :first].any()


def test_first_may_be_narrow_strided_and_anything_in_padding_rows():
    rule = packed([[20, 30], [40, 10]], 2, 3)
    tensors = operands(rule, (2, 1), 16)
    upstream = randn(*tensors[0].shape, seed=9)
    upstream[[5, 25, 48], 0] = 0  # padding: no loss comes from there
    expected = results(fused, tensors, rule, F32, upstream)
    first, visible = rule.first.int().t().contiguous().t(), rule.visible.clone()
    got = results(fused, tensors, dataclasses.replace(rule, first=first), F32, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    first = first.clone()
    first[5, 0], visible[5, 0] = 10**6, -5
    first[25, 0], visible[25, 0] = 49, 30
    first[48, 0], visible[48, 0] = -500, 10**6
    got = results(fused, tensors, dataclasses.replace(rule, first=first, visible=visible), F32, upstream)
    others = torch.tensor([t not in (5, 25, 48) for t in range(rule.visible.shape[0])])
    assert torch.equal(got[0][others], expected[0][others]) and not got[0].isnan().any() and not got[0][[5, 25], 0].any()
    assert torch.equal(got[1][others], expected[1][others])
    for g, x in zip(got[2:], expected[2:], strict=True):
        torch.testing.assert_close(g, x, rtol=1e-5, atol=3e-6)


def test_packed_and_compiled_without_a_graph_break():
    rule = packed([[9, 4]], 2, 3)
    leaves = [x.requires_grad_() for x in operands(rule, (2, 1), 16)]
    expected = fused(*leaves, rule)
    y = torch.compile(lambda q, k, v: fused(q, k, v, rule), fullgraph=True, backend="aot_eager")(*leaves)
    for got, whole in zip((y, *torch.autograd.grad(y.sum(), leaves)), (expected, *torch.autograd.grad(expected.sum(), leaves)), strict=True):
        assert torch.equal(got, whole)
