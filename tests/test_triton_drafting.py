"""What drafts come from, masks' states and the text itself, against loops; interpreted where there is no GPU."""

import contextlib
import functools

import pytest
import torch
from test_lookup import copied

pytest.importorskip("triton")

from mtp_kernels import drafting_states, lookup_drafts  # noqa: E402
from mtp_kernels.testing import guarded, guarded_outputs, guarded_randn  # noqa: E402
from mtp_kernels.triton import drafting as kernels  # noqa: E402
from mtp_kernels.triton._tiles import lookup_tiles  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IMPLEMENTATIONS = ["reference", "triton"]
fused = {name: functools.partial(function, implementation="triton") for name, function in (("states", drafting_states), ("lookup", lookup_drafts))}


def guards(implementation):
    return guarded_outputs(kernels) if implementation == "triton" else contextlib.nullcontext()


def integers(values, dtype, device):
    """A copy in memory of its own, behind and before which a reader would find other numbers."""
    values = torch.as_tensor(values, dtype=dtype)
    return guarded(tuple(values.shape), dtype, device)[0].copy_(values)


def states_by_loop(z, anchors, accepted, k, without):
    states, counts = [], []
    first = z.shape[0] - anchors.shape[0] * k
    for b in range(z.shape[1]):
        blocks = [a for a in range(anchors.shape[0]) if anchors[a, b] == accepted[b] and not (without is not None and without[b])]
        at = first + (blocks or [0])[0] * k
        states.append(z[at : at + k, b])
        counts.append(k if blocks else 0)
    return torch.stack(states), counts


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocks, k, batch, d, without", [(1, 1, 1, 1, False), (1, 3, 4, 40, True), (3, 2, 5, 33, False), (17, 16, 2, 1100, True)])
def test_states_against_a_loop(blocks, k, batch, d, without, dtype, implementation, device):
    generator = torch.Generator().manual_seed(0)
    for seed in range(4):
        z = guarded_randn((blocks + blocks * k, batch, d), dtype, device, seed)
        anchors = integers(torch.randint(blocks + 1, (blocks, batch), generator=generator), torch.int64, device)  # several of one row, too
        accepted = integers(torch.randint(blocks + 1, (batch,), generator=generator), torch.int64, device)
        off = integers(torch.rand(batch, generator=generator) < 0.5, torch.bool, device) if without else None
        states, counts = states_by_loop(z, anchors, accepted, k, off)
        with guards(implementation):
            got, drafted = drafting_states(z, anchors, accepted, k, off, implementation=implementation)
        assert drafted.dtype == torch.int64 and drafted.tolist() == counts
        has = torch.tensor([count > 0 for count in counts], device=device)
        assert torch.equal(got[has], states[has])
        assert bool(torch.isfinite(got).all())  # those of a block, where there is none behind the row


def test_states_and_strides(device):
    z, anchors, accepted = guarded_randn((8, 3, 24), torch.float32, device), torch.tensor([[0, 1, 1], [1, 1, 0]], device=device), torch.tensor([1, 0, 0])
    accepted, without = accepted.to(device), torch.tensor([False, False, True, False], device=device)[1:]
    expected = drafting_states(z, anchors, accepted, 3, without)
    assert expected[1].tolist() == [3, 0, 3]
    for view in (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x.repeat_interleave(2, -1)[..., ::2]):
        arguments = view(z), view(anchors), accepted.repeat_interleave(2)[::2], 3, without.repeat_interleave(2)[::2]
        assert all(map(torch.equal, fused["states"](*arguments), expected))


def check_lookup(texts, tokens, match, width, implementation, device):
    """Behind the texts the rest of memory goes on with their first token."""
    padded = integers([text + text[:1] * (width - len(text)) for text in texts], torch.int64, device)
    newest = integers([len(text) - 1 for text in texts], torch.int64, device)
    with guards(implementation):
        drafts, found = lookup_drafts(padded, newest, tokens, match, implementation=implementation)
    expected = [copied(text, tokens, match) for text in texts]
    assert found.dtype == torch.bool and found.tolist() == [each is not None for each in expected]
    assert [row for row, has in zip(drafts.tolist(), found, strict=True) if has] == [each for each in expected if each is not None]
    assert all(set(row) <= set(text) for row, text in zip(drafts.tolist(), texts, strict=True))
    return expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens, match, width", [(1, 1, 3), (5, 2, 20), (16, 3, 70), (10, 16, 90)])
def test_lookup_against_a_loop(tokens, match, width, implementation, device):
    generator, seen = torch.Generator().manual_seed(0), []
    for vocabulary in (1, 2, 3):
        lengths = torch.randint(1, width + 1, (12,), generator=generator).tolist() + [1, width]
        texts = [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]
        seen += check_lookup(texts, tokens, match, width, implementation, device)
    assert any(each is None for each in seen) and any(each is not None for each in seen)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lookup_in_a_long_text(implementation, device):
    """Places on either side of where one block of the search ends and the next begins, far from the newest token, and none."""
    large, (block, _) = 2**40, lookup_tiles(10**6)
    texts = []
    for place in (3, 200, block - 1, block, block + 1, block + 2, 2 * block):
        text = list(range(large, large + 2 * block + 100))
        text[len(text) - 1 - place : len(text) + 1 - place] = text[-2:] = [7, 8]
        texts.append(text)
    texts += [texts[0][:-2] + [5, 6], texts[4][:block], [7, 8] + list(range(large, large + 2 * block)) + [7, 8]]
    expected = check_lookup(texts, 3, 2, 2 * block + 104, implementation, device)
    assert [each is None for each in expected] == [False] * 7 + [True, True, False]


def test_lookup_and_strides(device):
    text, newest = torch.tensor([[1, 2, 3, 1, 2, 9], [4, 4, 4, 4, 5, 5]], device=device), torch.tensor([4, 3], device=device)
    drafts, found = lookup_drafts(text, newest, 4)
    assert found.tolist() == [True, True] and drafts.tolist() == [[3, 1, 2, 3], [4, 4, 4, 4]]
    for view in (lambda x: x.t().contiguous().t(), lambda x: x.repeat_interleave(2, -1)[..., ::2]):
        assert all(map(torch.equal, fused["lookup"](view(text), newest.repeat_interleave(2)[::2], 4), (drafts, found)))


def test_no_sequence(device):
    text, newest = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((0, 5), (0,)))
    for implementation in IMPLEMENTATIONS:
        drafts, found = lookup_drafts(text, newest, 3, implementation=implementation)
        assert drafts.shape == (0, 3) and found.shape == (0,)


def test_operators(device):
    z, (anchors, accepted) = torch.randn(8, 3, 24, device=device), (torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((2, 3), (3,)))
    text = torch.randint(3, (3, 20), device=device)
    checks = ("test_schema", "test_faketensor")
    for without in (None, accepted > 0):
        torch.library.opcheck(torch.ops.mtp_kernels.drafting_states.default, (z, anchors, accepted, 3, without), test_utils=checks)
    torch.library.opcheck(torch.ops.mtp_kernels.lookup_drafts.default, (text, accepted + 9, 4, 2), test_utils=checks)
    compiled = torch.compile(lambda *args: fused["lookup"](*args), fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(text, accepted + 9, 4), lookup_drafts(text, accepted + 9, 4)))
