"""Decoding writes what the model alone would write, counts honestly, and accepts only prefixes."""

import json
import time
import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import mtp_model.decode
from mtp_kernels import Sampling, linear_sample, sampler_draft, sampling_keys
from mtp_kernels._sampling import gumbel
from mtp_model import Decoding, ModelConfig, MTPConfig, MTPModel, generate, load_model
from mtp_model.decode import DecodeStats
from mtp_model.layout import MODES

PROMPTS = [[1, 2, 3, 4, 5], [0], [5, 5, 1], [2, 0, 4, 1, 3, 3, 2, 5, 0]]
NEW = 24
MULTI = [mode for mode in MODES if mode != "autoregressive"]


def texts_of(hf):
    """Greedy decoding by whole forward passes of transformers' model on the growing sequence."""
    texts = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(NEW):
                ids.append(int(hf(torch.tensor([ids])).logits[0, -1].argmax()))
            texts.append(ids[len(prompt) :])
    assert all(len(set(text)) > 1 for text in texts)
    return texts


@pytest.fixture(scope="module")
def oracle(shared):
    return texts_of(shared.hf)


def cut(tokens, eos):
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_torch_defaults_change_nothing(toy_adapter_model, dtype, static):
    def texts(model):
        ways = ({"mode": "autoregressive"}, {"mode": "linear", "lookup": 3}, {"mode": "quadratic", "temperature": 0.8, "seed": 3, "top_p": 0.9})
        return [generate(model, PROMPTS, max_new_tokens=NEW, static=static, **way).tokens for way in ways]

    expected = texts(toy_adapter_model(k=3))
    before, model = torch.get_default_dtype(), toy_adapter_model(k=3, name="again")
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert texts(model) == expected
    finally:
        torch.set_default_dtype(before)


def test_numbers_of_numpy(shared):
    expected = generate(shared.model, PROMPTS, mode="linear", k=2, max_new_tokens=9, temperature=0.5, seed=1, top_k=3, lookup=2).tokens
    found = generate(
        shared.model, PROMPTS, mode="linear", k=np.int64(2), max_new_tokens=np.int32(9), temperature=np.float32(0.5), seed=np.int64(1),
        top_k=np.int64(3), lookup=np.int8(2),
    )  # fmt: skip
    assert found.tokens == expected


def test_a_model_of_transformers_is_refused_by_name(shared):
    with pytest.raises(ValueError, match="the model is a LlamaForCausalLM; accepted is what load_model or from_transformers gives"):
        generate(shared.hf, PROMPTS)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_token_that_overflows_is_nothing_to_other_texts(toy_adapter_model, mode, static):
    """Neither as a draft nor in a text decoded before."""
    model = toy_adapter_model(k=4, vocab_size=64).half()
    with torch.no_grad():
        model.embed[63] = 65000
        model.layers[0].down_proj.weight.mul_(300)
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 63, (8,), generator=rng).tolist() for _ in range(16)]
    expected = [generate(model, [p], mode="autoregressive", max_new_tokens=NEW, static=False).tokens for p in prompts]
    poison = generate(model, [[1, 2] + [63] * 20], mode=mode, max_new_tokens=NEW, static=static)
    assert [generate(model, [p], mode=mode, max_new_tokens=NEW, static=static).tokens for p in prompts] == expected
    assert generate(model, [[1, 2] + [63] * 20], mode=mode, max_new_tokens=NEW, static=static).tokens == poison.tokens
    assert sum(63 not in text for (text,) in expected) > 2


@pytest.mark.parametrize("use_sampler", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_equal_autoregressive(shared, oracle, mode, k, batch, use_sampler):
    prompts = PROMPTS[-batch:]
    options = dict(mode=mode, k=k, max_new_tokens=NEW, use_sampler=use_sampler)
    result = generate(shared.model, prompts, **options)
    assert result.tokens == oracle[-batch:]
    stats = result.stats
    assert stats.tokens == [NEW] * batch
    if mode == "autoregressive":
        assert stats.tokens_per_step == stats.mean_tokens_per_step == 1.0
        assert stats.offered == stats.accepted == []
        return
    assert 1 <= stats.tokens_per_step <= k + 1
    assert len(stats.offered) == len(stats.accepted) == k
    assert len(set(stats.offered)) == 1 and stats.offered[0] > 0
    assert all(o >= a for o, a in zip(stats.offered, stats.accepted, strict=True))
    assert stats.accepted == sorted(stats.accepted, reverse=True)


@pytest.mark.parametrize("family, window", [
    ("mistral", dict(sliding_window=None)), ("mistral", dict(sliding_window=6)), ("qwen2", {}), ("qwen3", {}),
    ("qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
], ids=str)  # fmt: skip
def test_other_families_write_transformers_text(toy_adapter_model, tmp_path, family, window):
    model = toy_adapter_model(k=3, family=family, seed=3, **window)
    expected = texts_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32))
    for mode in MODES:
        for static in (False, True):
            result = generate(model, PROMPTS, mode=mode, max_new_tokens=NEW, static=static)
            assert result.tokens == expected and (mode == "autoregressive" or result.stats.accepted[0] > 0)


def model_list(model, z, candidates):
    with torch.inference_mode():
        return (z @ model.lm_head.t()).topk(candidates).indices.sort(-1).values


@pytest.mark.parametrize("candidates", [1, 2, 6])
@pytest.mark.parametrize("mode", MULTI)
def test_candidates_change_drafts_and_never_the_text(shared, oracle, monkeypatch, mode, candidates):
    seen = []
    original = shared.model.sampler.draft
    monkeypatch.setattr(shared.model.sampler, "draft", lambda *args: seen.append((args, original(*args))) or seen[-1][1])
    result = generate(shared.model, PROMPTS, mode=mode, k=3, max_new_tokens=NEW, draft_candidates=candidates, static=False)
    assert result.tokens == oracle
    assert result.stats.accepted[0] > 0
    with torch.inference_mode():
        exact = [original(*args[:4]) for args, _ in seen]
    for (z, *_, asked), _ in seen:  # a number, or from the logits of verification the list that this number gives
        if isinstance(asked, torch.Tensor):
            wanted = model_list(shared.model, z, candidates)
            assert mode == "linear" and asked.shape == (*z.shape[:2], candidates) and torch.equal(asked.sort(-1).values, wanted)
        else:
            assert asked == candidates
    assert any(isinstance(args[4], torch.Tensor) for args, _ in seen) == (mode == "linear" and candidates < 6)
    same = all(torch.equal(drafts, wanted) for (_, drafts), wanted in zip(seen, exact, strict=True))
    assert same == (candidates == 6)


@pytest.mark.parametrize("vocab, expected", [(8192, None), (8193, 64)])
def test_a_large_vocabulary_has_a_shortlist(vocab, expected):
    model = MTPModel(ModelConfig(vocab, 8, 8, 1, 1, 1, 8, tie_word_embeddings=True)).eval()
    model.add_adapter(MTPConfig(2, 1))
    assert Decoding(model, [[1]], mode="linear").options.draft_candidates == expected
    assert Decoding(model, [[1]], mode="linear", draft_candidates=vocab).options.draft_candidates == vocab  # all of them, if that is asked for


DRAWN = dict(temperature=0.8, seed=[7, 2**63 - 1, 0, 3])


@pytest.fixture(scope="module")
def drawn(shared):
    """Text drawn by whole forward passes of transformers' model on the growing sequence, with `linear_sample`'s noise."""
    texts = []
    with torch.no_grad():
        for prompt, seed in zip(PROMPTS, DRAWN["seed"], strict=True):
            ids = list(prompt)
            for _ in range(NEW):
                logits = shared.hf(torch.tensor([ids])).logits[0, -1]
                noise = gumbel(sampling_keys(torch.tensor([seed]), torch.tensor([len(ids)]), 6), torch.arange(6))
                ids.append(int((logits + 0.8 * noise).argmax()))
            texts.append(ids[len(prompt) :])
    return texts


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("use_sampler", [True, False])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_drawn_text_equals_autoregressive(shared, oracle, drawn, mode, k, use_sampler, static):
    options = dict(mode=mode, k=k, max_new_tokens=NEW, use_sampler=use_sampler, static=static, **DRAWN)
    result = generate(shared.model, PROMPTS, **options)
    assert result.tokens == drawn != oracle
    if mode != "autoregressive":
        assert 0 < result.stats.accepted[0] < result.stats.offered[0]
    alone = generate(shared.model, PROMPTS[2:3], **options | {"seed": DRAWN["seed"][2]})
    assert alone.tokens == drawn[2:3]


@pytest.mark.parametrize("filters", [dict(top_k=2), dict(top_p=0.7), dict(min_p=0.4), dict(top_k=4, top_p=0.9)], ids=str)
@pytest.mark.parametrize("mode", MULTI)
def test_top_k_top_p_and_min_p(shared, drawn, mode, filters):
    options = dict(max_new_tokens=NEW, **DRAWN, **filters)
    expected = generate(shared.model, PROMPTS, mode="autoregressive", **options).tokens
    assert expected != drawn
    for static in (False, True):
        assert generate(shared.model, PROMPTS, mode=mode, k=3, static=static, draft_candidates=3, **options).tokens == expected


@pytest.mark.parametrize("mode", ["linear", "quadratic"])
def test_drawn_pairs_have_the_models_distribution(shared, mode):
    """Of the first two tokens after a prompt, over many seeds: chi-square against the product of the model's own probabilities."""
    prompt, count = [3, 1, 2], 2000
    result = generate(shared.model, [prompt] * count, mode=mode, k=2, max_new_tokens=2, temperature=1.5, seed=1000)
    assert sum(result.stats.accepted) > 0  # the second token was drafted
    with torch.no_grad():
        texts = torch.tensor([[*prompt, token] for token in range(6)])
        logits = shared.hf(texts).logits[:, -2:] / 1.5
    expected = count * (logits[0, 0].softmax(-1).unsqueeze(1) * logits[:, 1].softmax(-1)).view(-1)
    found = torch.tensor([a * 6 + b for a, b in result.tokens]).bincount(minlength=36)
    common = expected > 5
    assert common.sum() > 15
    deviation = ((found - expected) ** 2 / expected)[common].sum() - common.sum()
    assert abs(deviation / (2 * common.sum()) ** 0.5) < 4


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("use_sampler", [True, False])
@pytest.mark.parametrize("mode", MULTI)
def test_drafts_have_the_noise_of_their_positions(toy_adapter_model, mode, use_sampler, static):
    """Where the model knows nothing, text and drafts are the noise alone, and every draft is accepted."""
    model = toy_adapter_model(k=3)
    model.lm_head.data.zero_()
    result = generate(model, PROMPTS, mode=mode, max_new_tokens=21, eos=(), use_sampler=use_sampler, static=static, **DRAWN)
    assert result.stats.passes == [6] * 4 and result.stats.accepted == result.stats.offered


def test_drafts_are_drawn_as_the_text_is(shared):
    model, sampling = shared.model, Sampling(3.0, 2)
    z, first = torch.randn(5, 8, 32, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    keys = model.keys(first, first, 8).t()
    with torch.no_grad():
        expected = sampler_draft(z, first, model.embed, model.sampler.weights(z.dtype), model.lm_head, candidates=4, keys=keys, temperature=3.0)
        assert torch.equal(model.draft(z, first, candidates=4, sampling=sampling, keys=keys), expected)
        assert torch.equal(model.draft(z, first, False, sampling=sampling, keys=keys), linear_sample(z, model.lm_head, keys, sampling))


def test_a_seed_for_each_prompt(shared):
    options = dict(mode="linear", k=2, max_new_tokens=NEW, temperature=1.5)

    def texts(**more):
        return generate(shared.model, [PROMPTS[0]] * 3, **options, **more).tokens

    several = texts(seed=5)
    assert len(set(map(tuple, several))) == 3 and texts(seed=[5, 6, 7]) == texts(seed=torch.tensor([5, 6, 7])) == several
    assert texts(seed=6)[:2] == several[1:]
    assert texts(seed=[5, 5, 5]) == [several[0]] * 3
    assert Decoding(shared.model, PROMPTS[:2], **options, seed=2**63 - 1).seeds == [2**63 - 1, 0]
    torch.manual_seed(1)
    first = texts()
    assert texts() != first
    torch.manual_seed(1)
    assert texts() == first
    decoding = Decoding(shared.model, [PROMPTS[0]] * 3, **options)
    list(decoding)
    assert texts(seed=decoding.seeds) == decoding.tokens


def test_the_toy_accepts_and_rejects(shared):
    """The comparison above says something only if drafts are sometimes right and sometimes wrong, in every mode."""
    for mode in MULTI:
        stats = generate(shared.model, PROMPTS, mode=mode, k=3, max_new_tokens=NEW).stats
        assert 0 < stats.accepted[0] < stats.offered[0], mode
        assert stats.accepted[1] > 0, mode
        surplus = sum(stats.passes) + sum(stats.accepted) - sum(stats.tokens)
        assert 0 <= surplus <= len(PROMPTS)  # a pass writes a token and its accepted drafts; the last one may be cut


@pytest.mark.parametrize("mode", MODES)
def test_batch_equals_one_by_one(shared, mode):
    together = generate(shared.model, PROMPTS, mode=mode, k=2, max_new_tokens=17)
    alone = [generate(shared.model, [p], mode=mode, k=2, max_new_tokens=17) for p in PROMPTS]
    assert together.tokens == [r.tokens[0] for r in alone]
    assert together.stats.tokens == [r.stats.tokens[0] for r in alone]
    assert together.stats.passes == [r.stats.passes[0] for r in alone]
    assert together.stats.accepted == [sum(c) for c in zip(*(r.stats.accepted for r in alone), strict=True)]
    assert together.stats.offered == [sum(c) for c in zip(*(r.stats.offered for r in alone), strict=True)]


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("mode", MODES)
def test_end_of_text_ends_a_sequence(shared, oracle, mode, k):
    eos = oracle[0][4]
    expected = [cut(text, eos) for text in oracle]
    assert len({len(text) for text in expected}) > 1
    result = generate(shared.model, PROMPTS, mode=mode, k=k, max_new_tokens=NEW, eos=[eos])
    assert result.tokens == expected
    assert result.stats.tokens == [len(text) for text in expected]
    assert all(p <= t for p, t in zip(result.stats.passes, result.stats.tokens, strict=True))


def test_nothing_is_committed_behind_an_end_of_text(shared, oracle, monkeypatch):
    committed, original = [], mtp_model.decode.KVCache.commit
    monkeypatch.setattr(mtp_model.decode.KVCache, "commit", lambda self, counts: committed.append(counts) or original(self, counts))
    result = generate(shared.model, PROMPTS, mode="quadratic", k=4, max_new_tokens=NEW, eos=[oracle[0][4]], static=False)
    lengths = [sum(counts) for counts in zip(*committed, strict=True)]
    assert all(n <= len(p) + len(t) for n, p, t in zip(lengths, PROMPTS, result.tokens, strict=True))


def test_end_of_text_defaults_to_the_models(make_hf_dir, oracle, shared, tmp_path):
    eos = oracle[0][4]
    model = load_model(make_hf_dir(seed=3, eos_token_id=[eos]))
    plain = dict(mode="autoregressive", max_new_tokens=NEW)
    assert generate(model, PROMPTS[:1], **plain).tokens == [cut(oracle[0], eos)]
    assert generate(model, PROMPTS[:1], eos=(), **plain).tokens == [oracle[0]]


def test_end_of_text_of_the_generation_config(make_hf_dir, oracle):
    """Which transformers' generate heeds, and where chat models have the id that ends a turn; config.json's where it has none."""
    directory, later = make_hf_dir(seed=3, eos_token_id=[oracle[0][8]]), oracle[0][4]
    plain = dict(mode="autoregressive", max_new_tokens=NEW)
    for ids, expected in (([later], cut(oracle[0], later)), (later, cut(oracle[0], later)), (None, cut(oracle[0], oracle[0][8]))):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert generate(load_model(directory), PROMPTS[:1], **plain).tokens == [expected]


@pytest.mark.parametrize("maximum", [1, 2, 5, 11])
@pytest.mark.parametrize("mode", MODES)
def test_maximum_is_exact(shared, oracle, mode, maximum):
    result = generate(shared.model, PROMPTS, mode=mode, k=8, max_new_tokens=maximum)
    assert result.tokens == [text[:maximum] for text in oracle]
    assert result.stats.tokens == [maximum] * len(PROMPTS)


def test_drafts_behind_the_maximum_are_not_counted(shared, oracle, monkeypatch):
    """Eight right drafts, of which two are still wanted."""
    monkeypatch.setattr(shared.model, "draft", lambda *_: torch.tensor([oracle[0][1:9]]))
    stats = generate(shared.model, PROMPTS[:1], mode="quadratic", k=8, max_new_tokens=3, eos=(), static=False).stats
    assert (stats.passes, stats.offered, stats.accepted) == ([2], [1] * 8, [1, 1] + [0] * 6)


@pytest.mark.parametrize("mode", MODES)
def test_passes_are_the_models_calls(shared, mode):
    calls = []
    handle = shared.model.register_forward_hook(lambda module, args, output: calls.append(output.shape[0]))
    try:
        stats = generate(shared.model, PROMPTS[:1], mode=mode, k=3, max_new_tokens=NEW, static=False).stats
    finally:
        handle.remove()
    assert stats.passes == [len(calls)]
    assert stats.tokens_per_step == NEW / len(calls)
    drafted = {"autoregressive": 1, "linear": 7, "quadratic": 16, "quadratic-printed": 13}[mode]
    undrafted = 1 if mode == "autoregressive" else 4
    assert calls[0] == len(PROMPTS[0]) + (3 if mode != "autoregressive" else 0)
    assert set(calls[1:]) == ({drafted, undrafted} if mode in ("linear", "quadratic-printed") else {drafted})


@pytest.mark.parametrize("k", [1, 3, 8])
def test_acceptance_replayed(shared, monkeypatch, k):
    """A step of a quadratic decoding emits y_0..y_a, a counted here by a loop over what was drafted and predicted."""
    seen = []

    def recording(drafts, predictions, counts=None):
        seen.append((drafts[0].tolist(), predictions[0].tolist()))
        return original(drafts, predictions, counts)

    original = mtp_model.decode.accept
    monkeypatch.setattr(mtp_model.decode, "accept", recording)
    decoding = Decoding(shared.model, PROMPTS[:1], mode="quadratic", k=k, max_new_tokens=60, eos=(), static=False)
    steps = [new[0] for new in decoding]
    assert len(seen) == len(steps) - 1 and len(steps[0]) == 1
    counts, by_position = [], [0] * k
    for (drafts, predictions), emitted in zip(seen, steps[1:], strict=True):
        a = 0
        while a < k and drafts[a] == predictions[a]:
            a += 1
        left = 60 - sum(counts) - len(steps[0])
        assert emitted == predictions[: a + 1][:left]
        counts.append(len(emitted))
        for i in range(min(a, len(emitted))):  # a draft cut off at the maximum is not counted
            by_position[i] += 1
    assert sum(counts) + 1 == 60
    assert max(counts) > 1 and min(counts[:-1]) == 1
    assert decoding.stats.offered == [len(seen)] * k
    assert decoding.stats.accepted == by_position


def test_drafts_come_from_the_block_behind_the_last_accepted_token(shared, monkeypatch):
    """A step's drafts equal those of a fresh decoding that starts with everything written so far as its prompt."""
    seen = []

    def recording(drafts, predictions, counts=None):
        seen.append(drafts[0].tolist())
        return original(drafts, predictions, counts)

    original = mtp_model.decode.accept
    monkeypatch.setattr(mtp_model.decode, "accept", recording)
    decoding = Decoding(shared.model, PROMPTS[:1], mode="quadratic", k=3, max_new_tokens=30, eos=(), static=False)
    written, contexts = list(PROMPTS[0]), []
    for new in decoding:
        written += new[0]
        contexts.append(written[:-1])  # the block stands behind the token before the newest
    from_long_run = list(seen)
    assert len({tuple(drafts) for drafts in from_long_run}) > 2
    for context, drafts in zip(contexts, from_long_run, strict=False):
        seen.clear()
        generate(shared.model, [context], mode="quadratic", k=3, max_new_tokens=2, eos=(), static=False)
        assert seen[0] == drafts


def test_streams_and_callback(shared):
    decoding = Decoding(shared.model, PROMPTS, mode="linear", k=3, max_new_tokens=13, eos=[4])
    steps = list(decoding)
    joined = [[token for step in steps for token in step[b]] for b in range(len(PROMPTS))]
    assert joined == decoding.tokens
    assert len(steps) == max(decoding.stats.passes)
    called = []
    options = dict(mode="linear", k=3, max_new_tokens=13, eos=[4])
    assert generate(shared.model, PROMPTS, on_tokens=called.append, **options).tokens == decoding.tokens
    assert called == steps


def test_gradients_stay_on_for_the_caller(shared):
    for _ in Decoding(shared.model, PROMPTS[:1], k=2, max_new_tokens=4):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_seconds(shared):
    seconds = generate(shared.model, PROMPTS[:1], mode="quadratic", k=2, max_new_tokens=9).stats.seconds
    assert set(seconds) == {"verify", "draft", "other"}
    assert min(seconds.values()) > 0
    assert generate(shared.model, PROMPTS[:1], mode="autoregressive", max_new_tokens=3).stats.seconds["draft"] == 0


@pytest.mark.parametrize("static", [False, True])
def test_the_callers_time_is_not_decodings(shared, static):
    options = dict(mode="autoregressive", max_new_tokens=4, eos=(), static=static)
    generate(shared.model, PROMPTS[:1], **options)  # recording a step takes long
    decoding = Decoding(shared.model, PROMPTS[:1], **options)
    for _ in decoding:
        time.sleep(0.2)
    assert max(decoding.stats.seconds.values()) < 0.4


def test_pooled_and_mean_tokens_per_step():
    stats = DecodeStats(passes=[1, 8], tokens=[4, 8], offered=[], accepted=[])
    assert stats.tokens_per_step == 12 / 9 and stats.mean_tokens_per_step == 2.5


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(mode="cubic"), "mode"),
        (dict(k=9), "adapter's 8"),
        (dict(k=0), "k is 0"),
        (dict(k=2.0), "k is 2.0"),
        (dict(prompts=[]), "at least one token"),
        (dict(prompts=[[1], []]), "at least one token"),
        (dict(prompts=[[1], [6]]), "prompt 1"),
        (dict(prompts=[[-1]]), "outside 0 to 5"),
        (dict(prompts=[1, 2]), r"prompts are '\[1, 2\]'; accepted are lists"),
        (dict(prompts="abc"), "prompts are 'abc'"),
        (dict(prompts=[[1.0, 2.0]]), "accepted are lists of token ids, integers"),
        (dict(eos=3), "eos is 3"),
        (dict(eos=["a"]), "eos are"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(max_new_tokens=3.5), "max_new_tokens is 3.5"),
        (dict(draft_candidates=0), "draft_candidates is 0; accepted .* 1 to the vocabulary's 6"),
        (dict(draft_candidates=7), "draft_candidates is 7"),
        (dict(draft_candidates=True), "draft_candidates is True"),
        (dict(temperature=-0.5), "temperature is -0.5"),
        (dict(temperature="hot"), "temperature is 'hot'"),
        (dict(temperature=True), "temperature is True"),
        (dict(temperature=None), "temperature is None"),
        (dict(temperature=torch.tensor([0.5, 0.7])), "temperature is tensor"),
        (dict(top_k=5), "top_k is 5 and temperature 0, which is greedy"),
        (dict(top_p=0.9, seed=3), "top_p is 0.9 and seed is 3 and temperature 0"),
        (dict(min_p=0.1), "min_p is 0.1 and temperature 0"),
        (dict(temperature=1.0, min_p=0), "min_p is 0"),
        (dict(temperature=1.0, top_k=0), "top_k is 0"),
        (dict(temperature=1.0, top_p=2), "top_p is 2"),
        (dict(temperature=1.0, seed=[1, 2]), "a list of 4"),
        (dict(temperature=1.0, seed=-1), "seed is -1"),
        (dict(temperature=1.0, seed=1.5), "seed is 1.5"),
        (dict(temperature=1.0, seed=True), "seed is True"),
        (dict(temperature=1.0, seed=2**63), "from 0 to 2.63 - 1"),
        (dict(temperature=1.0, seed=[1, 2, 3, 2**63]), "2.63 - 1, a list of 4"),
        (dict(temperature=1.0, seed="abcd"), "seed is 'abcd'"),
    ],
)
def test_errors(shared, options, word):
    with pytest.raises(ValueError, match=word):
        Decoding(shared.model, options.pop("prompts", PROMPTS), **options)


def test_no_adapter(toy_model):
    with pytest.raises(ValueError, match="adapter"):
        Decoding(toy_model, PROMPTS, mode="quadratic")
    assert len(generate(toy_model, [[1]], mode="autoregressive", max_new_tokens=3).tokens[0]) == 3


def test_the_default_way(toy_model, toy_adapter_model):
    """On a CPU few rows; k alone, or a mode alone, is taken as it is."""
    model = toy_adapter_model(k=4)
    ways = [(d.mode, d.k) for d in (Decoding(model, [[1]], **o) for o in ({}, {"k": 3}, {"mode": "quadratic"}, {"mode": "autoregressive"}))]
    assert ways == [("linear", 2), ("linear", 3), ("quadratic", 4), ("autoregressive", 0)]
    assert Decoding(toy_adapter_model(k=1, name="one"), [[1]]).k == 1
    assert Decoding(toy_model, [[1]]).mode == "autoregressive"


def test_prompts_may_be_tensors(shared, oracle):
    for prompts in (torch.tensor(PROMPTS[0]).unsqueeze(0), [torch.tensor(PROMPTS[0])], [tuple(PROMPTS[0])]):
        assert generate(shared.model, prompts, mode="linear", k=2, max_new_tokens=NEW).tokens == [oracle[0]]


def test_longer_than_the_model_was_made_for(toy_model):
    with pytest.warns(UserWarning, match="may become 2049 tokens long; the model was made for 2048"):
        Decoding(toy_model, [[1] * 2000], max_new_tokens=49)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Decoding(toy_model, [[1] * 2000], max_new_tokens=48)


def test_a_loop_that_was_left_goes_on(shared):
    expected = generate(shared.model, PROMPTS[:2], mode="quadratic", k=2, max_new_tokens=9).tokens
    decoding = Decoding(shared.model, PROMPTS[:2], mode="quadratic", k=2, max_new_tokens=9)
    first = next(iter(decoding))
    assert decoding.tokens == first != expected
    rest = list(decoding)
    assert decoding.tokens == expected
    assert [a + [t for new in rest for t in new[b]] for b, a in enumerate(first)] == expected
    assert list(decoding) == []
