"""Drafting's kernels against the formula in float64, step by step; interpreted where there is no GPU."""

import dataclasses
import functools
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from mtp_kernels import SamplerWeights, sampler_draft  # noqa: E402
from mtp_kernels.testing import guarded_outputs, guarded_randn  # noqa: E402
from mtp_kernels.triton import _sampler_kernels as device_code  # noqa: E402
from mtp_kernels.triton import _tiles  # noqa: E402
from mtp_kernels.triton._device import INTERPRETED  # noqa: E402

KERNELS = sys.modules["mtp_kernels.triton.sampler"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
fused = functools.partial(sampler_draft, implementation="triton")
OWN_TILES = _tiles.sampler_tiles


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """Interpreted, time goes by the number of Triton operations: two tiles of features, the second ragged, and a whole row per step."""
    if INTERPRETED:

        def larger(b, n, *others):
            tiles = OWN_TILES(b, n, *others)
            return dataclasses.replace(tiles, block_n=max(tiles.block_n, _tiles.next_power_of_2(n) // 2), block_k=128)

        monkeypatch.setattr(_tiles, "sampler_tiles", larger)


def make(b, k, d, vocab, dtype, device, seed=0):
    """Arguments with NaN around each of them."""

    def part(*shape, scale=1.0, around=0.0, seed):
        return guarded_randn(shape, dtype, device, seed, scale).add_(around)

    weights = SamplerWeights(
        part(d, 2 * d, scale=(2 * d) ** -0.5, seed=1), part(d, scale=0.2, seed=2), part(d, scale=0.3, around=1.0, seed=3), part(d, scale=0.2, seed=4),
        part(d, d, scale=d**-0.5, seed=5), part(d, scale=0.2, seed=6), part(d, scale=0.3, around=1.0, seed=7), part(d, scale=0.2, seed=8),
    )  # fmt: skip
    z, embedding, lm_head = part(b, k, d, seed=seed + 9), part(vocab, d, seed=10), part(vocab, d, seed=11)
    return z, torch.arange(b, device=device) % vocab, embedding, weights, lm_head


def check(drafts, z, first, embedding, weights, lm_head, candidates=None):
    """Each draft is, within the budget, the best of those allowed after the draft before it, and allowed within the budget."""

    def logits(previous, z, w1, b1, g1, c1, w2, b2, g2, c2, lm_head):
        h = F.layer_norm(F.silu(F.linear(torch.cat([previous, z], -1), w1, b1)), b1.shape, g1, c1)
        return F.linear(F.layer_norm(F.silu(F.linear(h, w2, b2)), b2.shape, g2, c2), lm_head)

    def with_error(function, *tensors):
        """What the function gives in float64, and what a fused computation may err."""
        exact, eager = function(*(x.double() for x in tensors)), function(*tensors)
        return exact, 2 * (eager.double() - exact).abs().max() + torch.finfo(eager.dtype).eps * exact.abs().max()

    assert drafts.dtype == torch.int64 and drafts.shape == z.shape[:2]
    previous = embedding[torch.cat([first.unsqueeze(1), drafts[:, :-1]], 1)]
    exact, error = with_error(logits, previous, z, *weights, lm_head)
    chosen = exact.gather(2, drafts.unsqueeze(-1)).squeeze(-1)
    if candidates is not None:
        own, own_error = with_error(F.linear, z, lm_head)
        least = own.topk(candidates).values[..., -1:]
        assert (own.gather(2, drafts.unsqueeze(-1)) >= least - 2 * own_error).all()
        exact = exact.masked_fill(own < least + 2 * own_error, -torch.inf)  # leaves those that are in the list for certain
    assert (chosen >= exact.amax(-1) - 2 * error).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b, k, d, vocab, candidates", [
    (1, 1, 1, 1, None), (1, 3, 16, 40, 7), (3, 4, 48, 50, None), (2, 2, 200, 70, 5), (17, 2, 33, 90, None), (35, 1, 24, 40, 3), (2, 2, 200, 70, None),
])  # fmt: skip
def test_each_step_takes_the_best(b, k, d, vocab, candidates, dtype, device):
    arguments = make(b, k, d, vocab, dtype, device)
    with guarded_outputs(KERNELS):
        drafts = fused(*arguments, candidates=candidates)
    check(drafts, *arguments, candidates)


@pytest.mark.parametrize("candidates", [None, 6, 40])
def test_the_references_drafts_in_float32(candidates, device):
    arguments = make(4, 3, 32, 40, torch.float32, device, seed=3)
    drafts = fused(*arguments, candidates=candidates)
    assert torch.equal(drafts, sampler_draft(*arguments, candidates=candidates, implementation="reference"))
    assert drafts.unique().numel() > 6
    other = fused(arguments[0], arguments[1] + 5, *arguments[2:], candidates=candidates)
    assert not torch.equal(drafts, other)  # the first token counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_own_tiles(dtype, device, monkeypatch):
    monkeypatch.setattr(_tiles, "sampler_tiles", OWN_TILES)
    monkeypatch.setattr(_tiles, "shortlist_tiles", lambda c, k: (2, 32, 1))
    for candidates in (None, 5):
        arguments = make(2, 2, 40, 30, dtype, device)
        check(fused(*arguments, candidates=candidates), *arguments, candidates)


@pytest.mark.parametrize("shift, features", [(3000.0, 96), (6.0, 50)])
def test_statistics_of_a_row_far_from_zero(shift, features, device):
    """Moments of tiles, not sums of squares: a mean that is large beside the deviation takes nothing from it; and tiles of different means."""
    z, first, embedding, weights, lm_head = make(16, 2, 96, 40, torch.float32, device)
    weights.b1[:features] += shift
    weights.b2[:features] += shift
    check(fused(z, first, embedding, weights, lm_head), z, first, embedding, weights, lm_head)


@pytest.mark.parametrize("candidates", [None, 6])
def test_ties_go_to_the_lowest_id(candidates, device):
    z, first, embedding, weights, lm_head = make(2, 2, 16, 40, torch.float32, device)
    lm_head[5:] = lm_head[:5].repeat(7, 1)  # each row in both tiles, and several times in a list
    drafts = fused(z, first, embedding, weights, lm_head, candidates=candidates)
    check(drafts, z, first, embedding, weights, lm_head, candidates)
    if candidates is None:
        assert drafts.max() < 5
    zeros = torch.zeros_like(lm_head)
    assert fused(z, first, embedding, weights, zeros).tolist() == [[0] * 2] * 2
    everything_equal = fused(z, first, embedding, weights, zeros, candidates=39)  # any 39 of 40: 0 or 1 is the lowest
    assert everything_equal.max() <= 1


def test_lists_that_are_given(device):
    """In any order and with any strides; and no product with lm_head is left."""
    arguments = make(3, 2, 24, 40, torch.float32, device)
    z, lm_head = arguments[0], arguments[-1]
    listed = (z @ lm_head.t()).topk(5).indices
    expected = fused(*arguments, candidates=5)
    spread = torch.stack([listed, listed + 1], -1)[..., 0]
    for given in (listed, listed.flip(-1), spread):
        assert torch.equal(fused(*arguments, candidates=given), expected)
    assert torch.equal(fused(*arguments, candidates=listed[..., 3:4]), listed[..., 3])


@pytest.mark.parametrize("candidates", [None, 4])
def test_strides(candidates, device):
    """Weights stored input-major, states and tokens with others between them."""
    z, first, embedding, weights, lm_head = make(3, 2, 24, 30, torch.float32, device)
    expected = fused(z, first, embedding, weights, lm_head, candidates=candidates)
    embedding, lm_head, w1, w2 = (x.t().contiguous().t() for x in (embedding, lm_head, weights.w1, weights.w2))
    z, first = torch.stack([z, z + 1], 1)[:, 0], torch.stack([first, first + 1], 1)[:, 0].int()
    weights = weights._replace(w1=w1, w2=w2, b2=weights.b2.repeat_interleave(2)[::2], norm1_bias=weights.norm1_bias.repeat_interleave(2)[::2])
    assert torch.equal(fused(z, first, embedding, weights, lm_head, candidates=candidates), expected)


@pytest.mark.parametrize("b, k", [(0, 2), (2, 0)])
def test_nothing(b, k, device):
    for candidates in (None, 2):
        drafts = fused(*make(b, k, 8, 5, torch.float32, device), candidates=candidates)
        assert drafts.shape == (b, k) and drafts.dtype == torch.int64


@pytest.mark.parametrize("candidates", [None, 4])
def test_four_launches_a_step_without_waiting(candidates, device, monkeypatch):
    arguments = make(2, 2, 24, 30, torch.float32, device)
    fused(*arguments, candidates=candidates)  # compiled
    launches, launch = [], KERNELS._device.launch
    monkeypatch.setattr(KERNELS._device, "launch", lambda kernel, *args, **options: launches.append(kernel) or launch(kernel, *args, **options))
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        fused(*arguments, candidates=candidates)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    step = [device_code.block_kernel] * 2 + [device_code.vocabulary_kernel if candidates is None else device_code.shortlist_kernel, device_code.pick_kernel]
    assert [kernel for kernel in launches if kernel in step] == step * 2 and len(launches) - 8 <= 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("candidates", [None, 64])
def test_a_graph_holds_it(candidates, device):
    z, first, *rest = make(2, 4, 256, 4000, torch.bfloat16, device)
    others = make(2, 4, 256, 4000, torch.bfloat16, device, seed=50)[0]
    expected = [fused(x, first, *rest, candidates=candidates) for x in (z, others)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drafts = fused(z, first, *rest, candidates=candidates)
    graph.replay()
    assert torch.equal(drafts, expected[0])
    z.copy_(others)
    graph.replay()
    assert torch.equal(drafts, expected[1])


def test_operator(device):
    z, first, embedding, weights, lm_head = make(2, 1, 16, 20, torch.float32, device)
    for candidates in (0, 3):
        arguments = (z, first, embedding, list(weights), lm_head, candidates, None, None, 1.0)
        torch.library.opcheck(torch.ops.mtp_kernels.sampler_draft.default, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(lambda z, first: fused(z, first, embedding, weights, lm_head), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z, first), fused(z, first, embedding, weights, lm_head))
    weights.w1.requires_grad_()
    assert torch.equal(fused(z.requires_grad_(), first, embedding, weights, lm_head), compiled(z.detach(), first))


def test_a_model_drafts_with_the_implementation_that_it_uses(toy_adapter_model, monkeypatch):
    if not INTERPRETED:
        pytest.skip("the model is on the CPU, where there is a kernel only in the interpreter")
    model = toy_adapter_model(k=2, num_hidden_layers=1)
    z, first = torch.randn(2, 2, 32), torch.tensor([1, 2])
    launches, launch = [], KERNELS._device.launch
    monkeypatch.setattr(KERNELS._device, "launch", lambda *args, **options: launches.append(args) or launch(*args, **options))
    drafts = model.use("reference").draft(z, first)
    assert not launches and torch.equal(model.use("triton").draft(z, first), drafts) and len(launches) >= 8
