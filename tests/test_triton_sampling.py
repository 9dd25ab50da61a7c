"""Drawn tokens on the Triton kernels: the reference's noise, on logits of their own; interpreted where there is no GPU."""

import functools
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from test_sampling import GOLDEN, WORD, seed_whose_first_output_is  # noqa: E402
from test_triton_sampler import make  # noqa: E402

from mtp_kernels import Sampling, gated_lora_linear, linear_sample, sample, sampler_draft, sampling_keys  # noqa: E402
from mtp_kernels._sampling import gumbel, least_kept, signed  # noqa: E402
from mtp_kernels.testing import guarded_outputs, guarded_randn  # noqa: E402
from mtp_kernels.triton import _device, _noise, _tiles  # noqa: E402

KERNELS = sys.modules["mtp_kernels.triton.linear_argmax"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SAMPLINGS = [Sampling(1.0), Sampling(0.6, 20, 0.9), Sampling(1.3, None, 0.6), Sampling(2.0, 3), Sampling(0.9, None, 0.97, 0.05)]
fused = functools.partial(linear_sample, implementation="triton")


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(_tiles, "argmax_tiles", lambda n: (32, 1))


@triton.jit
def noise_kernel(keys_ptr, out_ptr, N, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    tl.store(out_ptr + row * N + n, _noise.gumbel(tl.load(keys_ptr + row), n), mask=n < N)


@pytest.mark.filterwarnings("ignore:divide by zero")  # where the noise is infinite, which it is here
def test_the_noise_is_the_references(device):
    ends = [seed_whose_first_output_is(bits) for bits in (2**64 - 1, 0, 2**64 - 2**40, 2**20, 2**55, 2**56, 2**56 + 2**40)]
    keys = torch.cat([torch.tensor(ends, device=device), sampling_keys(torch.arange(40, device=device), torch.tensor(9, device=device), 1000)])
    out = torch.empty(len(keys), 1000, device=device)
    _device.launch(noise_kernel, (len(keys),), keys, out, 1000, BLOCK=1024)
    expected = gumbel(keys.unsqueeze(1), torch.arange(1000, device=device))
    assert -2.82 < out[0, 0] < -2.8 and out[1, 0] == torch.inf and not out.isnan().any()
    torch.testing.assert_close(out, expected, atol=2e-4 if device == "cuda" else 2e-5, rtol=1e-6)  # 1 - u is rounded, a GPU's logarithm is too


@pytest.mark.parametrize("sampling", [Sampling(1.0, 1), Sampling(1.0, None, 0.5), Sampling(1e-300)], ids=str)
def test_the_only_token_is_drawn_with_the_smallest_noise(sampling, device):
    key = torch.tensor([signed(seed_whose_first_output_is(WORD) - GOLDEN)], device=device)  # token 1's
    weight = torch.tensor([[0.0], [9.0], [1.0]], device=device)
    assert fused(torch.ones(1, 1, device=device), weight, key, sampling).tolist() == [1]


def check(got, logits, keys, sampling):
    """The best of the kernels' own logits with noise, of those that are left, but for what rounding can turn over."""
    logits = logits.float()
    least = least_kept(logits, sampling)
    scores = logits.double() + sampling.temperature * gumbel(keys.unsqueeze(-1), torch.arange(logits.shape[-1], device=logits.device)).double()
    if least is not None:
        scores = scores.masked_fill(logits < least, -torch.inf)
    chosen = scores.gather(-1, got.unsqueeze(-1)).squeeze(-1)
    assert got.dtype == torch.int64 and (chosen >= scores.amax(-1) - 1e-3).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("leading, d, vocab", [((), 16, 1), ((1,), 40, 200), ((3, 4), 33, 70)])
def test_the_best_with_noise(leading, d, vocab, dtype, device):
    hidden, weight = guarded_randn((*leading, d), dtype, device), guarded_randn((vocab, d), dtype, device, 1, 0.3)
    keys = torch.randint(-(2**62), 2**62, leading, generator=torch.Generator().manual_seed(5)).to(device)
    logits = gated_lora_linear(hidden, weight, implementation="triton")
    for sampling in SAMPLINGS:
        with guarded_outputs(KERNELS):
            got = fused(hidden, weight, keys, sampling)
        assert got.shape == leading
        check(got, logits, keys, sampling)


def test_the_references_tokens(device):
    hidden, weight = torch.randn(30, 16, device=device), torch.randn(90, 16, device=device)
    keys = sampling_keys(torch.arange(30, device=device), torch.tensor(7, device=device), 90)
    for sampling in SAMPLINGS:
        got, expected = (linear_sample(hidden, weight, keys, sampling, implementation=name) for name in ("triton", "reference"))
        assert (got == expected).float().mean() > 0.95 if device == "cuda" else torch.equal(got, expected)  # its logarithm may turn a near-tie over


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_independent(dtype, device, monkeypatch):
    hidden, weight = torch.randn(19, 40, device=device).to(dtype), torch.randn(70, 40, device=device).to(dtype)
    keys = sampling_keys(torch.arange(19, device=device), torch.tensor(2, device=device), 70)
    whole = {sampling: fused(hidden, weight, keys, sampling) for sampling in SAMPLINGS[:2]}
    for sampling, tokens in whole.items():
        for first, m in ((2, 1), (4, 9)):
            assert torch.equal(fused(hidden[first : first + m], weight, keys[first : first + m], sampling), tokens[first : first + m])
    monkeypatch.setattr(KERNELS, "ROWS", 16)
    for sampling, tokens in whole.items():
        assert torch.equal(fused(hidden, weight, keys, sampling), tokens)


def test_what_is_not_a_number(device):
    logits = torch.randn(3, 70, device=device)
    logits[0], logits[1, 40:], logits[2] = torch.nan, torch.nan, -torch.inf
    for sampling in SAMPLINGS:
        for row in logits:
            id = int(fused(torch.ones(1, 1, device=device), row.unsqueeze(1), torch.tensor([5], device=device), sampling))
            assert 0 <= id < 70


def test_strides_and_nothing(device):
    hidden, weight = torch.randn(4, 3, 24, device=device), torch.randn(16, 50, device=device).t()
    keys = sampling_keys(torch.arange(4, device=device), torch.arange(3, device=device).unsqueeze(1), 50).t()
    dense = fused(hidden[..., 3:19].contiguous(), weight.contiguous(), keys.contiguous(), SAMPLINGS[0])
    assert torch.equal(fused(hidden[..., 3:19], weight, keys, SAMPLINGS[0]), dense) and dense.unique().numel() > 6
    apart = keys.flatten().repeat_interleave(2)[::2]  # of one dimension, where reshape copies nothing
    flat, one = hidden[..., 3:19].flatten(0, 1), keys[0, :1].expand(12)
    assert torch.equal(fused(flat, weight, apart, SAMPLINGS[0]), dense.flatten())
    assert torch.equal(fused(flat, weight, one, SAMPLINGS[0]), fused(flat, weight, one.clone(), SAMPLINGS[0]))
    assert fused(hidden[:0, :, :16], weight, keys[:0], SAMPLINGS[1]).shape == (0, 3)


@pytest.mark.parametrize("candidates", [None, 6, 40])
@pytest.mark.parametrize("b, k, d, vocab", [(4, 3, 32, 40), (1, 2, 16, 41)])
def test_drafts(b, k, d, vocab, candidates, device):
    """The last tile of the vocabulary is ragged: what lies past its end has noise of no token."""
    arguments = make(b, k, d, vocab, torch.float32, device, seed=3)
    keys = sampling_keys(torch.arange(b, device=device).unsqueeze(1), torch.arange(k, device=device) + 5, vocab)
    for temperature in (0.5, 20.0):
        options = dict(candidates=candidates, keys=keys, temperature=temperature)
        drafts = sampler_draft(*arguments, **options, implementation="triton")
        assert torch.equal(drafts, sampler_draft(*arguments, **options, implementation="reference"))
    assert not torch.equal(drafts, sampler_draft(*arguments, candidates=candidates, implementation="triton"))
    transposed = keys.t().contiguous().t()
    assert torch.equal(sampler_draft(*arguments, **options | {"keys": transposed}, implementation="triton"), drafts)


def test_past_the_vocabularys_end_nothing_is_drawn(device):
    """One token and noise alone: every draft is that token, though a tile has places for more."""
    arguments = make(3, 4, 16, 1, torch.float32, device)
    keys = torch.arange(12, device=device).view(3, 4)
    assert sampler_draft(*arguments, keys=keys, temperature=100.0, implementation="triton").tolist() == [[0] * 4] * 3


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_of_logits_that_are_known(sampling, device):
    logits, keys = guarded_randn((6, 2, 70), torch.float32, device), torch.arange(12, device=device).view(6, 2)
    with guarded_outputs(KERNELS):
        got = sample(logits[1:5], keys[1:5], sampling, implementation="triton")
    assert torch.equal(got, sample(logits, keys, sampling, implementation="reference")[1:5])
    assert sample(logits[:0], keys[:0], sampling, implementation="triton").shape == (0, 2)


def test_operator(device):
    hidden, weight, keys = torch.randn(5, 16, device=device), torch.randn(40, 16, device=device), torch.arange(5, device=device)
    for options in ((0.5, None, None, None), (1.0, 7, 0.9, 0.1)):
        torch.library.opcheck(torch.ops.mtp_kernels.sample.default, (hidden @ weight.t(), keys, *options), test_utils=("test_schema", "test_faketensor"))
        compiled = torch.compile(lambda *x, options=options: fused(*x, Sampling(*options)), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(hidden, weight, keys), fused(hidden, weight, keys, Sampling(*options)))
    z, first, embedding, weights, lm_head = make(2, 1, 16, 20, torch.float32, device)
    arguments = (z, first, embedding, list(weights), lm_head, 0, None, torch.arange(2, device=device).unsqueeze(1), 0.7)
    torch.library.opcheck(torch.ops.mtp_kernels.sampler_draft.default, arguments, test_utils=("test_schema", "test_faketensor"))
