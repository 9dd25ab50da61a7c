"""Copied drafts: which tokens are copied, against a loop; what they change, the number of steps, and what not, the text."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mtp_model.decode
from mtp_kernels import lookup_drafts
from mtp_model import Decoding, generate
from mtp_model.layout import MODES
from mtp_model.lookup import Lookup
from mtp_model.static import StaticStep, StepOptions

PROMPTS = [[1, 2, 3, 4, 5], [0], [5, 5, 1], [2, 0, 4, 1, 3, 3, 2, 5, 0]]
NEW = 40


def copied(text, tokens, match):
    """What followed the last place before the end where the last `match` tokens stood, begun again where it comes to the end; None without one."""
    for place in range(len(text) - 2, match - 2, -1):
        if text[place - match + 1 : place + 1] == text[len(text) - match :]:
            again = text[place + 1 :]
            return [again[i % len(again)] for i in range(tokens)]
    return None


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_against_a_loop(data):
    lookup = Lookup(data.draw(st.integers(1, 16)), data.draw(st.integers(1, 4)))
    texts = data.draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=20), min_size=1, max_size=4))
    width = max(map(len, texts)) + data.draw(st.integers(0, 3))
    padded = torch.tensor([text + data.draw(st.lists(st.integers(0, 2), min_size=width - len(text), max_size=width - len(text))) for text in texts])
    newest = torch.tensor([len(text) - 1 for text in texts])
    drafts, found = lookup_drafts(padded, newest, lookup.tokens, lookup.match)
    assert drafts.shape == (len(texts), lookup.tokens) and drafts.dtype == torch.int64
    expected = [copied(text, lookup.tokens, lookup.match) for text in texts]
    assert found.tolist() == [each is not None for each in expected]
    assert [row for row, has in zip(drafts.tolist(), found, strict=True) if has] == [each for each in expected if each is not None]


def steps_of(text, prompt, tokens, match):
    """Passes and acceptance by position of a decoding without masks, from the text that it is to write."""
    passes, done, offered, accepted = 1, 1, [0] * tokens, [0] * tokens  # the prefill writes a token
    while done < len(text):
        drafts, right = copied(prompt + text[:done], tokens, match) or [], 0
        while right < len(drafts) and done + right < len(text) and drafts[right] == text[done + right]:
            right += 1
        for i in range(len(drafts)):
            offered[i] += 1
            accepted[i] += i < right
        passes, done = passes + 1, min(done + right + 1, len(text))
    return passes, offered, accepted


@pytest.fixture(scope="module")
def oracle(shared):
    return generate(shared.model, PROMPTS, mode="autoregressive", max_new_tokens=NEW, eos=(), static=False).tokens


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("tokens, match", [(1, 1), (5, 2), (16, 3)])
def test_without_masks_steps_follow_from_the_text(shared, oracle, tokens, match, static):
    options = dict(mode="autoregressive", lookup=tokens, lookup_match=match, max_new_tokens=NEW, eos=(), static=static)
    result = generate(shared.model, PROMPTS, **options)
    assert result.tokens == oracle
    each = [steps_of(text, prompt, tokens, match) for text, prompt in zip(oracle, PROMPTS, strict=True)]
    assert result.stats.passes == [passes for passes, _, _ in each]
    assert result.stats.offered == [sum(column) for column in zip(*(offered for _, offered, _ in each), strict=True)]
    assert result.stats.accepted == [sum(column) for column in zip(*(accepted for _, _, accepted in each), strict=True)]
    assert 0 < result.stats.accepted[0] < result.stats.offered[0] or match == 3
    assert [generate(shared.model, [p], **options).stats.passes[0] for p in PROMPTS] == result.stats.passes


@pytest.mark.parametrize("k, tokens, match, batch", [(1, 4, 2, 4), (3, 2, 1, 1), (2, 9, None, 4), (4, 4, 1, 1)])
@pytest.mark.parametrize("mode", MODES[1:])
def test_with_masks_the_text_is_the_same(shared, oracle, mode, k, tokens, match, batch):
    options = dict(mode=mode, k=k, lookup=tokens, lookup_match=match, max_new_tokens=NEW, eos=())
    fixed, host = (generate(shared.model, PROMPTS[-batch:], static=static, **options) for static in (True, False))
    assert fixed.tokens == host.tokens == oracle[-batch:]
    for name in ("passes", "tokens", "offered", "accepted"):
        assert getattr(fixed.stats, name) == getattr(host.stats, name), name
    assert len(host.stats.offered) == max(k, tokens) and host.stats.accepted[0] > 0


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("k, tokens, match", [(2, 2, 2), (1, 1, 3)])
@pytest.mark.parametrize("mode", ["linear", "quadratic"])
def test_a_batch_is_its_texts_one_by_one(shared, mode, k, tokens, match, static):
    """Some copy while others have masks, whose block none of the former may draft from in linear mode."""
    options = dict(mode=mode, k=k, lookup=tokens, lookup_match=match, max_new_tokens=NEW, eos=(), static=static)
    together = generate(shared.model, PROMPTS, **options).stats
    alone = [generate(shared.model, [p], **options).stats for p in PROMPTS]
    assert together.passes == [stats.passes[0] for stats in alone]
    for name in ("offered", "accepted"):
        assert getattr(together, name) == [sum(column) for column in zip(*(getattr(stats, name) for stats in alone), strict=True)]


@pytest.mark.parametrize("mode", ["linear", "quadratic"])
def test_the_masks_draft_where_nothing_can_be_copied(shared, monkeypatch, mode):
    """And behind a linear step's copied drafts there are no masks, so that behind them copies alone follow."""
    seen, drafted, masks = [], [], []
    accept, draft, forward = mtp_model.decode.accept, shared.model.draft, shared.model.forward
    monkeypatch.setattr(shared.model, "forward", lambda rows, cache: masks.append(rows.num_masks) or forward(rows, cache))
    monkeypatch.setattr(mtp_model.decode, "accept", lambda drafts, *rest: seen.append(drafts[0].tolist()) or accept(drafts, *rest))
    monkeypatch.setattr(shared.model, "draft", lambda *args: drafted.append(draft(*args)) or drafted[-1])
    decoding = Decoding(shared.model, PROMPTS[3:], mode=mode, k=2, lookup=5, max_new_tokens=NEW, eos=(), static=False)
    texts = []
    for _ in decoding:
        texts.append(PROMPTS[3] + decoding.tokens[0])
    drafted = [each[0].tolist() for each in drafted]
    kinds = []
    for text, drafts, count in zip(texts, seen, masks[1:], strict=False):
        expected = copied(text, 5, 2)
        assert drafts == expected if expected else drafts in (drafted if mode == "quadratic" else [*drafted, []])
        assert count == (6 * 2 if expected else 3 * 2) if mode == "quadratic" else count == (0 if expected else 2)
        kinds.append("copied" if expected else "masks" if drafts else "none")
    assert {"copied", "masks"} <= set(kinds) and ("none" in kinds) == (mode == "linear")
    assert mode == "quadratic" or all(pair != ("copied", "masks") for pair in itertools.pairwise(kinds))


@pytest.mark.parametrize("mode", ["autoregressive", "quadratic"])
def test_drawn_text_and_end_of_text(shared, oracle, mode):
    drawn = dict(temperature=0.5, seed=[7, 1, 0, 3], max_new_tokens=NEW, eos=())
    expected = generate(shared.model, PROMPTS, mode="autoregressive", **drawn).tokens
    eos = oracle[0][9]
    cut = [text[: text.index(eos) + 1] if eos in text else text for text in oracle]
    for static in (False, True):
        assert generate(shared.model, PROMPTS, mode=mode, lookup=6, static=static, **drawn).tokens == expected != oracle
        assert generate(shared.model, PROMPTS, mode=mode, lookup=6, static=static, max_new_tokens=NEW, eos=[eos]).tokens == cut


def test_a_kept_step_forgets_the_text_before(toy_model):
    long, short = [[1, 2, 3, 4, 5, 0] * 9], [[3, 4]]
    options = dict(lookup=8, lookup_match=2, max_new_tokens=30, eos=())
    for prompts in (long, short, long):
        fixed, host = (generate(toy_model, prompts, static=static, **options) for static in (True, False))
        assert fixed.tokens == host.tokens and fixed.stats.passes == host.stats.passes and fixed.stats.accepted == host.stats.accepted
    assert len(toy_model.kept_steps) == 1


@pytest.mark.parametrize(
    "mode, batch, shapes",
    [("autoregressive", 1, {(0, False), (6, False)}), ("linear", 1, {(2, True), (6, False)}), ("linear", 4, {(2, True), (6, False), (6, True)}),
     ("quadratic", 1, {(2, True), (6, True)})],
)  # fmt: skip
def test_a_cpu_has_rows_for_copies_and_for_masks_only_where_there_are_some(shared, mode, batch, shapes):
    shared.model.kept_steps.clear()
    generate(shared.model, PROMPTS[-batch:], mode=mode, k=2, lookup=6, max_new_tokens=NEW, eos=(), static=True)
    (step,) = shared.model.kept_steps.values()
    assert {key[1:] for key in step._recorded} == shapes


@pytest.mark.parametrize("static", [False, True])
def test_a_finished_text_has_no_rows_for_copies(shared, oracle, monkeypatch, static):
    """A text that repeats itself ends, and the one beside it, in which no sixteen tokens stood before, goes on."""
    options = dict(mode="autoregressive", lookup=6, lookup_match=16, eos=(), static=static)
    monkeypatch.setattr(mtp_model.static, "TRACES", False)
    rows, forward = [], shared.model.forward
    monkeypatch.setattr(shared.model, "forward", lambda each, cache: rows.append(each.num_ntp) or forward(each, cache))
    decoding = Decoding(shared.model, [[5] * 30, PROMPTS[0]], max_new_tokens=9, **options)
    decoding.finished[0] = True
    assert len(list(decoding)) == 9 and decoding.tokens == [[], oracle[0][:9]]
    assert rows[1:] == [1] * 8


def test_a_finished_text_has_no_say_in_a_linear_steps_masks(shared, monkeypatch):
    monkeypatch.setattr(mtp_model.static, "TRACES", False)
    step = StaticStep(shared.model, 2, 100, StepOptions("linear", 2, lookup=Lookup(6)))
    for finished, copied, shape in (
        ([False, True], [True, False], (6, False)), ([False, True], [False, True], (2, True)), ([False, False], [True, False], (6, True)),
    ):  # fmt: skip
        with torch.inference_mode():
            step.begin([3, 3], torch.tensor([1, 2]), None, [6 * c for c in copied], [9, 9], finished, [0, 0], copied, PROMPTS[:2])
            step.run()
        assert (step.offered, step.masked) == shape
    rows, forward = [], shared.model.forward
    monkeypatch.setattr(shared.model, "forward", lambda each, cache: rows.append((each.num_ntp, each.num_masks)) or forward(each, cache))
    decoding = Decoding(shared.model, [PROMPTS[3], [0]], mode="linear", k=2, lookup=6, lookup_match=1, max_new_tokens=9, eos=(), static=False)
    decoding.finished[1] = True
    assert len(list(decoding)) > 1 and decoding.tokens[1] == []
    assert (7, 0) in rows and (7, 2) not in rows


@pytest.mark.parametrize(
    "options, word",
    [
        (dict(lookup=0), "lookup is 0; accepted are 1 to 16"),
        (dict(lookup=17), "lookup is 17"),
        (dict(lookup=True), "lookup is True"),
        (dict(lookup=4, lookup_match=0), "lookup_match is 0"),
        (dict(lookup=4, lookup_match=2.0), "lookup_match is 2.0"),
        (dict(lookup_match=3), "lookup_match is 3 and lookup None"),
    ],
)
def test_errors(shared, options, word):
    with pytest.raises(ValueError, match=word):
        Decoding(shared.model, PROMPTS, **options)
