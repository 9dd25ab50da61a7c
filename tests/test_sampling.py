"""Tokens drawn by seed and position: the noise, its distribution, which tokens are left, and drafts for drawn text."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mtp_kernels import SamplerWeights, Sampling, linear_argmax, linear_sample, sampler_draft, sampling_keys
from mtp_kernels._sampling import gumbel, least_kept, signed

WORD = 2**64 - 1
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def splitmix64(seed, number):
    """Output `number` of the generator begun at `seed`, in Python's integers."""
    z = (seed + (number + 1) * GOLDEN) & WORD
    z = ((z ^ (z >> 30)) * FIRST) & WORD
    z = ((z ^ (z >> 27)) * SECOND) & WORD
    return z ^ (z >> 31)


def seed_whose_first_output_is(wanted):
    def unshifted(z, shift):
        x = z
        for _ in range(64 // shift + 1):
            x = z ^ (x >> shift)
        return x

    z = unshifted(wanted, 31) * pow(SECOND, -1, 2**64) & WORD
    z = unshifted(z, 27) * pow(FIRST, -1, 2**64) & WORD
    seed = (unshifted(z, 30) - GOLDEN) & WORD
    assert splitmix64(seed, 0) == wanted
    return seed - 2**64 if seed >= 2**63 else seed


def draws(logits, keys, sampling):
    """Tokens drawn from logits (V,), one for each key."""
    return linear_sample(torch.ones(*keys.shape, 1), logits.unsqueeze(1), keys, sampling)


def deviation(counts, probabilities):
    """Chi-square statistic in standard deviations from its mean."""
    expected = counts.sum() * probabilities
    assert expected.min() > 5
    freedom = counts.numel() - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("seed, position, vocab", [(0, 0, 3), (5, 7, 1000), (2**63 - 1, 131_072, 151_936), (2**62, 1, 17)])
def test_noise_is_splitmix64s(seed, position, vocab):
    keys = sampling_keys(torch.tensor([seed]), torch.tensor([position]), vocab)
    ids = torch.tensor([0, 1, vocab // 2, vocab - 1])
    for id, got in zip(ids.tolist(), gumbel(keys, ids).tolist(), strict=True):
        u = (splitmix64(seed, position * vocab + id) >> 1) / 2**63
        assert got == pytest.approx(-math.log(-math.log1p(-u)), abs=1e-5)


@pytest.mark.parametrize("bits", [2**20, 2**39 + 12_345, 2**45, 2**55])
def test_the_largest_noise_is_fine(bits):
    """Of uniform numbers far below float32's distance from 1 to the next number too."""
    key, u = torch.tensor([[seed_whose_first_output_is(bits)]]), (bits >> 1) / 2**63
    assert gumbel(key, torch.zeros(1, dtype=torch.int64)).item() == pytest.approx(-math.log(-math.log1p(-u)), abs=1e-5)


def test_keys_broadcast():
    keys = sampling_keys(torch.tensor([3, 4]), torch.arange(5).unsqueeze(1), 10)
    assert keys.shape == (5, 2) and keys.unique().numel() == 10
    assert keys[2, 1] == sampling_keys(torch.tensor(4), torch.tensor(2), 10)


def test_the_ends_of_the_noise():
    """The largest uniform number would round to 1, and that token's noise is finite still; the smallest's is infinite. Never NaN."""
    last, first = (torch.tensor([[seed_whose_first_output_is(bits)]]) for bits in (WORD, 0))
    assert gumbel(last, torch.zeros(1, dtype=torch.int64)).item() == pytest.approx(-math.log(24 * math.log(2)))
    assert gumbel(first, torch.zeros(1, dtype=torch.int64)).item() == math.inf
    assert draws(torch.tensor([1.0, 0.0]), last[0], Sampling()).tolist() == [1]
    assert draws(torch.tensor([-9.0, 0.0]), first[0], Sampling()).tolist() == [0]


@pytest.mark.parametrize("sampling", [Sampling(1.0, 1), Sampling(1.0, None, 0.5), Sampling(1e-300)], ids=str)
def test_the_only_token_is_drawn_with_the_smallest_noise(sampling):
    key = torch.tensor([signed(seed_whose_first_output_is(WORD) - GOLDEN)])  # token 1's
    assert draws(torch.tensor([0.0, 9.0, 1.0]), key, sampling).tolist() == [1]


@pytest.mark.parametrize("over", ["seeds", "positions"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_distribution_is_softmaxs(over, temperature):
    logits = torch.tensor([0.0, 1.0, -1.0, 0.3, 2.0, -1.5, 0.0, 0.7])
    numbers, one = torch.arange(40_000), torch.tensor(11)
    keys = sampling_keys(numbers, one, 8) if over == "seeds" else sampling_keys(one, numbers, 8)
    counts = draws(logits, keys, Sampling(temperature)).bincount(minlength=8)
    assert abs(deviation(counts, (logits / temperature).softmax(0))) < 4


@pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (1, -1)])
def test_neighbours_are_independent(step):
    """What is drawn at the next position, or with the next seed, says nothing about what is drawn here."""
    seeds, positions = torch.arange(1, 201), torch.arange(1, 201).unsqueeze(1)
    logits = torch.zeros(6)
    here, there = (draws(logits, sampling_keys(seeds + step[0] * i, positions + step[1] * i, 6).view(-1), Sampling()) for i in (0, 1))
    counts = (here * 6 + there).bincount(minlength=36)
    assert abs(deviation(counts, torch.full((36,), 1 / 36))) < 4


@pytest.mark.parametrize("sampling", [
    Sampling(1.0, 1), Sampling(1.0, 5), Sampling(0.7, None, 0.9), Sampling(1.3, 20, 0.8), Sampling(1.0, None, 0.05), Sampling(0.3, 40, 0.999),
    Sampling(1.0, 100, 1.0), Sampling(2.0, 500), Sampling(1.0, min_p=0.1), Sampling(0.4, min_p=1e-9), Sampling(1.5, 20, 0.97, 0.02),
    Sampling(1.5, 3, 0.5, 0.02), Sampling(0.7, min_p=1.0), Sampling(1.0, min_p=1e-30),
], ids=str)  # fmt: skip
def test_transformers_leaves_the_same_tokens(sampling):
    logits = torch.randn(50, 101, generator=torch.Generator().manual_seed(0)) * 3
    scores = TemperatureLogitsWarper(float(sampling.temperature))(None, logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p not in (None, 1.0):
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p is not None:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    least = least_kept(logits, sampling)
    kept = logits >= (-torch.inf if least is None else least)
    assert torch.equal(kept, scores > -torch.inf)
    assert (least is None) == (sampling.min_p is None and bool(kept.all()))


def test_equal_logits_stay_or_go_together():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for sampling, least in ((Sampling(1.0, 2), 1.0), (Sampling(1.0, 1), 2.0), (Sampling(1.0, None, 0.6), 1.0), (Sampling(1.0, 3, 0.7), 1.0)):
        assert least_kept(logits, sampling).item() == least
    assert least_kept(torch.zeros(1, 7), Sampling(1.0, None, 0.5)).item() == 0.0
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])  # 0.475 and three of 0.175 among the top two: as in transformers, all of them are added up
    for sampling, least in ((Sampling(1.0, 2, 0.47), 2.0), (Sampling(1.0, 2, 0.48), 1.0), (Sampling(1.0, 2, 0.7), 1.0)):
        assert least_kept(logits, sampling).item() == least
        warped = TopPLogitsWarper(sampling.top_p)(None, TopKLogitsWarper(2)(None, logits))
        assert warped[warped > -torch.inf].min() == least


def test_the_edge_of_min_p():
    """Equal logits have the largest's probability; what is as likely as asked for stays, the next float below it does not."""
    edge = torch.tensor(2.0) + 0.5 * math.log(0.25)
    logits = torch.stack([torch.tensor(2.0), edge, torch.nextafter(edge, torch.tensor(-9.0)), torch.tensor(2.0), torch.tensor(-torch.inf)]).unsqueeze(0)
    assert (logits >= least_kept(logits, Sampling(0.5, min_p=0.25))).tolist() == [[True, True, False, True, False]]
    assert (logits >= least_kept(logits, Sampling(0.5, min_p=1))).tolist() == [[True, False, False, True, False]]
    assert least_kept(logits, Sampling(1e30, min_p=0.25)).item() > -torch.inf


def test_the_edge_of_top_p():
    """Exactly half of what there is is enough; parts that float32 would round away count; a whole vocabulary is added up without overflow."""
    quarters = torch.tensor([[0.0, -1e-20, -2e-20, -3e-20]])
    assert least_kept(quarters, Sampling(1.0, None, 0.5)).item() == quarters[0, 1]
    assert least_kept(torch.tensor([[0.0, -(2.0**-30)]]), Sampling(1.0, None, 0.5 + 1e-10)).item() == 0
    many = torch.arange(0, -200_000, -1).unsqueeze(0) * 2.0**-40
    assert least_kept(many, Sampling(1.0, None, 0.25)).item() == many[0, 50_000 - 1]


@pytest.mark.parametrize("top_p", [None, 0.5])
def test_what_is_not_a_number(top_p):
    for size in (1, 2, 69):
        assert 0 <= draws(torch.full((size,), torch.nan), torch.tensor([5]), Sampling(1.0, None, top_p)).item() < size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_filtered_and_drawn_in_32(dtype):
    """The first token has 0.98222 of the whole; by a difference of logits that is rounded to 16 bits it would have less than top_p."""
    keys = sampling_keys(torch.arange(3000), torch.tensor(3), 2)
    small = {torch.bfloat16: (4.0, -0.01171875, 0.9821), torch.float16: (4.0, -0.0018, 0.98203)}[dtype]
    weight = torch.tensor(small[:2]).unsqueeze(1).to(dtype)
    assert not linear_sample(torch.ones(3000, 1, dtype=dtype), weight, keys, Sampling(1.0, None, small[2])).any()
    z, embedding, nothing = torch.randn(64, 3, 16).to(dtype), torch.randn(3000, 16).to(dtype), torch.zeros(3000, 16).to(dtype)
    keys = sampling_keys(torch.arange(64).unsqueeze(1), torch.arange(3), 3000)
    drafts = sampler_draft(z, torch.arange(64), embedding, SamplerWeights(*(x.to(dtype) for x in sampler(16))), nothing, keys=keys)
    assert torch.equal(drafts, gumbel(keys.unsqueeze(-1), torch.arange(3000)).argmax(-1))


def test_order_does_not_matter_to_what_is_left():
    """At the very edge too, where float sums in another order would differ: each probability a quarter of the whole, and top_p a half."""
    quarter = torch.tensor([[0.0, 0.0, 0.0, 0.0, -80.0]])
    assert least_kept(quarter - torch.tensor([0, 1e-6, 2e-6, 3e-6, 0]), Sampling(1.0, None, 0.5)).item() == pytest.approx(-1e-6)
    logits = torch.randn(1, 4000)
    least = least_kept(logits, Sampling(1.0, None, 0.73))
    for _ in range(3):
        assert torch.equal(least_kept(logits[:, torch.randperm(4000)], Sampling(1.0, None, 0.73)), least)


@pytest.mark.parametrize("sampling", [Sampling(0.8, 3), Sampling(1.0, None, 0.7), Sampling(1.5, 5, 0.6)], ids=str)
def test_the_distribution_of_what_is_left(sampling):
    logits = torch.tensor([0.0, 1.0, -1.0, 0.3, 2.0, -1.5, 0.1, 0.7])
    counts = draws(logits, sampling_keys(torch.arange(40_000), torch.tensor(3), 8), sampling).bincount(minlength=8)
    kept = logits >= least_kept(logits.unsqueeze(0), sampling)[0]
    assert counts[~kept].sum() == 0 and 1 < kept.sum() < 8
    assert abs(deviation(counts[kept], (logits[kept] / sampling.temperature).softmax(0))) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_little_temperature_is_greedy(dtype):
    hidden, weight = torch.randn(4, 5, 16).to(dtype), torch.randn(70, 16).to(dtype)
    keys = sampling_keys(torch.arange(5), torch.arange(4).unsqueeze(1), 70)
    assert torch.equal(linear_sample(hidden, weight, keys, Sampling(1e-9)), linear_argmax(hidden, weight))
    if dtype == torch.float32:  # in 16 bits several logits are the largest
        assert torch.equal(linear_sample(hidden, weight, keys, Sampling(5.0, 1)), linear_argmax(hidden, weight))
    assert not torch.equal(linear_sample(hidden, weight, keys, Sampling(50.0)), linear_argmax(hidden, weight))


@pytest.mark.parametrize("temperature", [10**30, 1e30])
def test_great_temperature_is_uniform(temperature):
    logits = torch.tensor([9.0, 0.0, -9.0, 3.0])
    keys = sampling_keys(torch.arange(4000), torch.tensor(3), 4)
    for sampling in (Sampling(temperature), Sampling(temperature, None, 0.99)):
        assert abs(deviation(draws(logits, keys, sampling).bincount(minlength=4), torch.full((4,), 0.25))) < 4
    z, embedding = torch.randn(50, 3, 16), torch.randn(40, 16)
    options = dict(keys=sampling_keys(torch.arange(50).unsqueeze(1), torch.arange(3), 40), temperature=temperature)
    assert sampler_draft(z, torch.arange(50) % 40, embedding, sampler(16), embedding, **options).unique().numel() > 30


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, 30, 0.9), Sampling(1.0, None, 0.5)], ids=str)
@pytest.mark.parametrize("vocab", [7, 1001])
def test_rows_are_independent(sampling, vocab):
    hidden, weight = torch.randn(81, 24), torch.randn(24, vocab).t()
    keys = sampling_keys(torch.arange(81), torch.arange(81) * 1000, vocab)
    whole = linear_sample(hidden, weight, keys, sampling)
    noise, ids = gumbel(keys.unsqueeze(1), torch.arange(vocab)), torch.arange(vocab)
    for m in (1, 2, 17):
        for first in (0, 3):
            at = slice(first, first + m)
            assert torch.equal(gumbel(keys[at].unsqueeze(1), ids), noise[at])
            assert torch.equal(linear_sample(hidden[at], weight, keys[at], sampling), whole[at])


def sampler(d):
    modules = [torch.nn.Linear(2 * d, d), torch.nn.LayerNorm(d), torch.nn.Linear(d, d), torch.nn.LayerNorm(d)]
    return SamplerWeights(*(p.detach() for module in modules for p in (module.weight, module.bias)))


@pytest.mark.parametrize("candidates", [None, 9, 40])
def test_drafts_have_the_texts_noise(candidates):
    """Each draft is the best of the sampler's logits with the noise that `linear_sample` gives to its position."""
    weights, temperature = sampler(16), 1.7
    z, first, embedding, lm_head = torch.randn(5, 3, 16), torch.arange(5), torch.randn(40, 16), torch.randn(40, 16)
    keys = sampling_keys(torch.arange(5).unsqueeze(1), torch.arange(10, 13), 40)
    drafts = sampler_draft(z, first, embedding, weights, lm_head, candidates=candidates, keys=keys, temperature=temperature)
    noise, previous = gumbel(keys.unsqueeze(-1), torch.arange(40)), first
    for i in range(3):
        h = F.layer_norm(F.silu(F.linear(torch.cat([embedding[previous], z[:, i]], -1), weights.w1, weights.b1)), (16,), *weights[2:4])
        h = F.layer_norm(F.silu(F.linear(h, weights.w2, weights.b2)), (16,), *weights[6:])
        scores = h @ lm_head.t() + temperature * noise[:, i]
        if candidates is not None:
            own = z[:, i] @ lm_head.t()
            scores = scores.masked_fill(own < own.topk(candidates).values[:, -1:], -torch.inf)
        previous = scores.argmax(-1)
        assert torch.equal(drafts[:, i], previous)
    greedy = sampler_draft(z, first, embedding, weights, lm_head, candidates=candidates)
    assert not torch.equal(drafts, greedy)
    little = sampler_draft(z, first, embedding, weights, lm_head, candidates=candidates, keys=keys, temperature=1e-9)
    assert torch.equal(little, greedy)


@pytest.mark.parametrize("values, word", [
    (dict(temperature=0), "temperature is 0"), (dict(temperature=-1.0), "temperature is -1.0"), (dict(temperature=math.inf), "temperature is inf"),
    (dict(temperature=math.nan), "temperature is nan"), (dict(temperature=True), "temperature is True"), (dict(temperature="1"), "temperature is '1'"),
    (dict(temperature=1e31), r"temperature is 1e\+31; accepted is a number above 0 and at most 1e\+30"), (dict(temperature=10**400), "temperature is 1000"),
    (dict(temperature=None), "temperature is None"), (dict(top_k=0), "top_k is 0"), (dict(top_k=2.0), "top_k is 2.0"), (dict(top_k=True), "top_k is True"),
    (dict(top_p=0.0), "top_p is 0.0"), (dict(top_p=1.1), "top_p is 1.1"), (dict(top_p=math.nan), "top_p is nan"), (dict(top_p="0.9"), "top_p is '0.9'"),
    (dict(top_p=True), "top_p is True"), (dict(min_p=0), "min_p is 0"), (dict(min_p=1.5), "min_p is 1.5"), (dict(min_p=math.nan), "min_p is nan"),
    (dict(min_p="0.1"), "min_p is '0.1'"),
], ids=str)  # fmt: skip
def test_refused(values, word):
    with pytest.raises(ValueError, match=word):
        Sampling(**values)


def test_accepted():
    assert Sampling() == Sampling(1.0, None, None) == Sampling(temperature=1)
    assert Sampling(1e-3, 1, 1) and len({Sampling(0.5, 2, 0.9), Sampling(0.5, 2, 0.9)}) == 1
