"""Training data: which tokens are answers, how sequences are cut, what is refused, and where the tokens are kept."""

import itertools
import json
import mmap
import os
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mtp_model import data
from mtp_model import records as files
from mtp_model.data import Example, Examples, collate, has_anchor, read_examples
from mtp_model.loss import choose_anchors
from mtp_model.records import encode_prompt, present, records

WORDS = ["<unk>", "<s>", "</s>", "<user>", "<bot>", "a", "b", "c", "d", "e"]
ID = {word: i for i, word in enumerate(WORDS)}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} "
    "{% else %}<bot> {{ m['content'] }} </s> {% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)
REFUSING = "{% for m in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}"
THINKING = TEMPLATE.replace("<bot> {{ m['content'] }}", "<bot> {{ 'e ' if loop.last else '' }}{{ m['content'] }}")  # in the last answer alone
REWRITING = "{% for m in messages %}{{ messages | length }} {{ m['content'] }} {% endfor %}"


def make_tokenizer(template=TEMPLATE, vocabulary=WORDS):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", chat_template=template)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def read(tmp_path, tokenizer):
    def read(*records, tokenizer=tokenizer, **options):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records))
        return read_examples([path], tokenizer, **dict(max_length=50, vocab_size=10, eos=2) | options)

    return read


def marked(example):
    """The example as text, answers in capitals."""
    return " ".join(WORDS[i].upper() if a else WORDS[i] for i, a in zip(example.ids, example.answer, strict=True))


def test_forms(read):
    chat = [
        {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"},
        {"role": "user", "content": "e"}, {"role": "assistant", "content": "a"},
    ]  # fmt: skip
    examples = read(
        {"prompt": "a b", "response": "c d"},
        {"text": "a b c"},
        b"  ",
        {"prompt_ids": [5, 6], "response_ids": [7, 8, 9]},
        {"messages": chat},
        {"messages": [*chat[:2], {"role": "user", "content": "b"}]},
    )
    assert [marked(e) for e in examples] == [
        "<s> a b C D </S>",
        "<S> A B C </S>",
        "a b C D E",
        "<user> a b <bot> C D </S> <user> e <bot> A </S>",
        "<user> a b <bot> C D </S>",
    ]
    assert all(e.ids.dtype == np.int32 and e.answer.dtype == bool for e in examples)


def test_the_first_form_of_a_record_counts_everywhere(read, tokenizer):
    """As training data and as a prompt."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    forms = {"prompt_ids": [5, 6], "response_ids": [7, 8]}, {"prompt": "d e", "response": "c c"}, {"text": "e d c"}, {"messages": chat}
    expected = [("a b C D", "a b"), ("<s> d e C C </S>", "<s> d e"), ("<S> E D C </S>", "<s> e d"), ("<user> a <bot> B C </S>", "<user> a <bot>")]
    for first, (whole, prompt) in enumerate(expected):
        record = {key: value for form in forms[first:] for key, value in form.items()}
        for bare in ({}, {"prompt": "e e"} if first > 1 else {}, {"prompt_ids": [9]} if first > 0 else {}, {"text": None} if first == 3 else {}):
            assert [marked(e) for e in read(bare | record)] == [whole]
            assert [WORDS[i] for i in encode_prompt(present(bare | record), tokenizer, 3)] == prompt.split()


def test_an_answer_that_has_its_end_is_not_ended_twice(read):
    examples = read({"prompt": "a", "response": "b c </s>"}, {"text": "d e </s>"})
    assert [marked(e) for e in examples] == ["<s> a B C </S>", "<S> D E </S>"]


def test_a_greeting_is_no_answer(read):
    chat = [{"role": "assistant", "content": "e"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    assert [marked(e) for e in read({"messages": chat})] == ["<bot> e </s> <user> a <bot> B C </S>"]
    with pytest.raises(ValueError, match="no assistant turn that answers another"):
        read({"messages": chat[:2]})


def test_a_byte_order_mark_is_none_of_the_text(read):
    assert [marked(e) for e in read(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), GOOD)] == ["<S> A B C </S>"] * 2


SPACES = ["<unk>", "<s>", "</s>", "\u2581the", "\u2581", "the", "text", "\u2581text", ":", "(", "(the", ")", "\n", "<|", "|>", "\u2581<|", "\u2581("]


def sentencepiece(prepend_scheme):
    """A tokenizer with a mark for spaces, one of which it puts before what it is given."""
    model = models.Unigram([(word, -1.0 - 0.01 * i) for i, word in enumerate(SPACES)], unk_id=0)
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    template = "{% for m in messages %}<|{{ m['content'] }}|>{% endfor %}{% if add_generation_prompt %}<|{% endif %}"
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", chat_template=template)


@pytest.mark.parametrize("prepend_scheme", ["always", "first", "never"])
@pytest.mark.parametrize("prompt, response", [("the text:", " the text"), ("the text\n", "text the"), ("the(", "the)"), ("the", "text")])
def test_tokens_are_those_of_the_whole(read, prepend_scheme, prompt, response):
    """And the prompt's are those of it alone, by which `generate` is prompted."""
    tokenizer = sentencepiece(prepend_scheme)
    prompted = encode_prompt({"prompt": prompt}, tokenizer, 9)
    (example,) = read({"prompt": prompt, "response": response}, tokenizer=tokenizer, vocab_size=len(SPACES))
    ids, n = example.ids.tolist(), len(prompted)
    assert ids[:n] == prompted and example.answer.tolist() == [False] * n + [True] * (len(ids) - n) and ids[-1] == 2
    joined = "".join(SPACES[i] for i in ids[1:-1]).replace("\u2581", " ")
    assert joined.removeprefix("" if prepend_scheme == "never" else " ") == prompt + response
    if prompt != "the(":  # there the whole has a token of both
        assert ids[:-1] == tokenizer(prompt + response)["input_ids"]


@pytest.mark.parametrize("prepend_scheme", ["always", "first", "never"])
def test_a_chats_tokens_are_those_of_the_whole(read, prepend_scheme):
    tokenizer = sentencepiece(prepend_scheme)
    chat = [{"role": role, "content": content} for role, content in (("user", "the"), ("assistant", "the text"), ("user", "text"), ("assistant", "text the"))]
    (example,) = read({"messages": chat}, tokenizer=tokenizer, vocab_size=len(SPACES))
    whole = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
    assert example.ids.tolist() == whole
    answers = "".join(SPACES[i] for i in example.ids[example.answer]).replace("\u2581", " ")
    assert answers == "the text|>text the|>"
    for i in (1, 3):
        prompt = encode_prompt({"messages": chat[: i + 1]}, tokenizer, 9)
        assert whole[: len(prompt)] == prompt


def test_without_end_of_text(read):
    examples = read({"prompt": "a", "response": "b c"}, {"text": "d e"}, eos=None)
    assert [marked(e) for e in examples] == ["<s> a B C", "<S> D E"]


def test_long_sequences_are_cut(read, capsys):
    ids = list(range(5, 10)) * 4
    examples = read({"prompt_ids": ids[:7], "response_ids": ids[7:]}, max_length=6)
    # The first piece is prompt alone, and the last one too short for a mask to have a label.
    assert [e.ids.tolist() for e in examples] == [ids[6:12], ids[12:18]]
    assert [e.answer.tolist() for e in examples] == [[False] + [True] * 5, [True] * 6]
    assert "1 sequences of more than 6 tokens (max_length) cut" in capsys.readouterr().err
    whole = read({"prompt_ids": ids[:7], "response_ids": ids[7:]}, max_length=20)
    assert [e.ids.tolist() for e in whole] == [ids]


def test_several_files(tmp_path, tokenizer):
    for name, text in (("x", "a b"), ("y", "c d")):
        (tmp_path / name).write_text(json.dumps({"text": text}) + "\n")
    examples = read_examples([tmp_path / "y", tmp_path / "x"], tokenizer, max_length=9, vocab_size=10)
    assert [marked(e) for e in examples] == ["<S> C D", "<S> A B"]


GOOD = {"text": "a b c"}


@pytest.mark.parametrize(
    "record, word",
    [
        (b"{", "Expecting"),
        (b'{"text": "\xff"}', "can't decode byte 0xff"),
        (b"[" * 100_000, "recursion"),
        (b"[1, 2]", "found a list"),
        ({"prompt": "a"}, "found keys"),
        ({"prompt_ids": [5]}, "found keys"),
        ({"text": 5}, "found a int where text"),
        (b'{"text": "\\ud800"}', "not Unicode"),
        ({"prompt": "a", "response": None}, "found keys"),
        ({"prompt_ids": [5], "response_ids": [6, 10]}, "vocabulary has 10"),
        ({"prompt_ids": [5, -1], "response_ids": [6, 7]}, "token ids are -1 to 7; .*vocabulary has 10"),
        ({"prompt_ids": [5], "response_ids": [2**40]}, ""),
        ({"prompt_ids": 5, "response_ids": [6]}, "prompt_ids is not a list of token ids"),
        ({"prompt_ids": ["5"], "response_ids": [6]}, "prompt_ids is not a list of token ids"),
        ({"prompt_ids": [5], "response_ids": [6, 7.5]}, "response_ids is not a list of token ids"),
        ({"prompt_ids": [True], "response_ids": [6]}, "prompt_ids is not a list of token ids"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": [{"role": "user"}]}, "must be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, {"role": "assistant", "content": "a"}]}, "a list as"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text"}]}]}, "a list as"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ["a"]}]}, "a list as"),
    ],
)
def test_errors_name_file_and_line(read, record, word):
    with pytest.raises(ValueError, match=f"data.jsonl, line 3: .*{word}"):
        read(GOOD, b"", record, GOOD)


def test_chat_templates_that_cannot_serve(read):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match="line 1: .*no chat template"):
        read(chat, tokenizer=make_tokenizer(None))
    with pytest.raises(ValueError, match="line 1: .*cannot be told apart"):
        read(chat, tokenizer=make_tokenizer(REWRITING))
    with pytest.raises(ValueError, match="data.jsonl, line 1: .*roles must alternate"):
        read(chat, tokenizer=make_tokenizer(REFUSING))


def test_answers_that_a_template_writes_otherwise_later_are_sequences_of_their_own(read, capsys):
    """Each as the model would have written it, behind the conversation as the model would have read it."""
    chat = [{"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    first, second = "<user> a <bot> E B </S>", "<user> a <bot> b </s> <user> c <bot> E D </S>"
    third = "<user> a <bot> b </s> <user> c <bot> d </s> <user> a <bot> E B </S>"
    options = dict(tokenizer=make_tokenizer(THINKING))
    examples = read({"messages": chat[:2]}, {"messages": chat}, {"messages": [*chat, *chat[:2]]}, **options)
    assert [marked(e) for e in examples] == [first, first, second, first, second, third]
    short = read({"messages": chat}, max_length=8, **options)  # the second's prompt fills a sequence
    assert [marked(e) for e in short] == [first, "E D </S>"] and "1 prompts fill the 8 tokens" in capsys.readouterr().err
    with pytest.raises(ValueError, match="line 1: token ids are .*vocabulary has 8"):
        read({"messages": chat}, vocab_size=8, **options)


def test_places_for_masks_are_those_of_the_loss(read, capsys):
    """What is kept has an anchor, what is dropped has none, for every pattern of answers; and how many were dropped is said."""
    for pattern in itertools.product([False, True], repeat=7):
        batch = collate([Example(np.ones(7, np.int32), np.array(pattern))])
        if has_anchor(batch.answer[:, 0].numpy()):
            assert choose_anchors(batch)[1].any()
        else:
            with pytest.raises(ValueError, match="no position to put masks after"):
                choose_anchors(batch)
    one_token, two_tokens = {"prompt_ids": [5, 6, 7], "response_ids": [2]}, {"prompt_ids": [5, 6, 7], "response_ids": [3, 2]}
    assert [len(e.ids) for e in read(one_token, two_tokens, one_token)] == [5]
    assert "2 pieces left out, with no answer of two tokens or more" in capsys.readouterr().err


def test_a_prompt_that_fills_a_sequence_is_reported(read, capsys):
    assert len(read({"prompt_ids": [5] * 20, "response_ids": [3] * 6}, GOOD, max_length=16)) == 2
    assert "1 prompts fill the 16 tokens of a sequence" in capsys.readouterr().err


def test_nothing_to_read(read, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no sequence with an answer"):
        read({"prompt": "a b c", "response": ""}, eos=None)
    with pytest.raises(ValueError, match="no sequence with an answer"):
        read()
    with pytest.raises(ValueError, match="is not a file"):
        read_examples([tmp_path / "nowhere"], tokenizer, max_length=9, vocab_size=10)
    with pytest.raises(ValueError, match="max_length is 2"):
        read(GOOD, max_length=2)


def test_parts_and_other_keys(read):
    """Tulu-3's form: more keys beside the messages and in them; contents in parts are those of their text."""
    parts = [{"type": "text", "text": "c "}, {"type": "text", "text": "d"}]
    (example,) = read({
        "id": "x/1", "source": "x",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a b"}], "name": "n"}, {"role": "assistant", "content": parts}],
    })  # fmt: skip
    assert marked(example) == "<user> a b <bot> C D </S>"


def test_records(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"b": 1, "c": [2]}')
    assert list(records(path)) == [(f"{path}, line 1", {"text": "a"}), (f"{path}, line 3", {"b": 1, "c": [2]})]
    for line, why in ((b"{", "Expecting"), (b"3", "found a int"), (b"\xff", "0xff"), (b"[" * 100_000, "recursion")):
        path.write_bytes(b"{}\n" + line)
        with pytest.raises(ValueError, match=f"data.jsonl, line 2: .*{why}"):
            list(records(path))


CHAT = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]


@pytest.mark.parametrize(
    "record, text",
    [({"prompt": "a b", "response": "c"}, "<s> a b"), ({"prompt": "a"}, "<s> a"), ({"text": "a b c d"}, "<s> a b"),
     ({"prompt_ids": [5, 6, 7, 8], "response_ids": [9]}, "a b c d"),
     ({"messages": CHAT}, "<user> a b <bot>"), ({"messages": CHAT[:1]}, "<user> a b <bot>"),
     ({"messages": [*CHAT, CHAT[0], CHAT[1], CHAT[0]]}, "<user> a b <bot> c d </s> <user> a b <bot> c d </s> <user> a b <bot>")],
)  # fmt: skip
def test_prompts(record, text, tokenizer):
    assert " ".join(WORDS[i] for i in encode_prompt(record, tokenizer, 3)) == text


@pytest.mark.parametrize(
    "record, word",
    [({"prompt": 3}, "found a int"), ({"prompt_ids": ["5"]}, "not a list of token ids"), ({"response": "a"}, "found keys"),
     ({"messages": [{}]}, "must be a list"), ({"text": "\ud800"}, "not Unicode")],
)  # fmt: skip
def test_prompts_that_are_none(record, word, tokenizer):
    with pytest.raises(ValueError, match=word):
        encode_prompt(record, tokenizer, 3)


BROKEN = [b"{", b'{"text": "\xff"}', {"text": 5}, {"messages": []}]


def test_broken_lines_are_left_out_and_reported(read, capsys):
    examples = read(GOOD, *BROKEN, {"text": "d e"}, skip_broken=True)
    assert [marked(e) for e in examples] == ["<S> A B C </S>", "<S> D E </S>"]
    reported = capsys.readouterr().err.splitlines()
    assert reported == [f"left out: {line}" for line in examples.skipped] + ["4 broken lines left out"]
    for number, (line, why) in enumerate(zip(examples.skipped, ["Expecting", "0xff", "found a int", "no assistant"], strict=True), 2):
        assert f"data.jsonl, line {number}: " in line and why in line
    assert read(GOOD).skipped == [] and capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="no sequence with an answer"):
        read(*BROKEN, skip_broken=True)


def test_many_broken_lines_are_counted(read, capsys):
    examples = read(GOOD, *[b"{"] * 30, skip_broken=True)
    reported = capsys.readouterr().err.splitlines()
    assert len(reported) == 11 and reported[-1] == "30 broken lines left out" and len(examples.skipped) == 30


def test_progress_ends_at_the_last_byte(read, tmp_path, capsys):
    read(GOOD, b"", GOOD, progress=True)
    size = (tmp_path / "data.jsonl").stat().st_size
    assert f"{size}.0/{size}.0" in capsys.readouterr().err.splitlines()[-1].split("|")[-1]
    read(GOOD)
    assert capsys.readouterr().err == ""


def listed(examples):
    return [(e.ids.tolist(), e.answer.tolist()) for e in examples]


def test_examples_are_a_sequence():
    given = [Example(np.arange(n, dtype=np.int32), np.arange(n) % 2 == 1) for n in (3, 7, 4)]
    examples = Examples.of(iter(given))
    assert listed(examples) == listed(given) and len(examples) == 3 and examples.skipped == []
    assert examples[-1].ids.tolist() == examples[np.int64(2)].ids.tolist() == [0, 1, 2, 3]
    assert examples.lengths.tolist() == [3, 7, 4] and examples.lengths.dtype == np.int64 and examples.answers == 1 + 3 + 2
    assert examples[1].ids.dtype == np.int32 and examples[1].answer.dtype == bool and not examples[1].ids.flags.writeable
    for i in (3, -4):
        with pytest.raises(IndexError, match="of 3"):
            examples[i]
    assert len(Examples.of([])) == 0
    with pytest.raises(ValueError, match=r"\(2,\), answer \(3,\)"):
        Examples.of([Example(np.zeros(2, np.int32), np.zeros(3, bool))])


def test_fingerprint_is_of_tokens_flags_and_lengths():
    def fingerprint(*examples):
        return Examples.of(Example(np.array(ids, np.int32), np.array(answer, bool)) for ids, answer in examples).fingerprint

    plain = ([1, 2, 3, 4], [0, 1, 1, 1])
    assert fingerprint(plain) == fingerprint(plain) and len(fingerprint(plain)) == 16 and int(fingerprint(plain), 16)
    others = [[plain, plain], [([1, 2, 3, 5], plain[1])], [(plain[0], [0, 0, 1, 1])], [([1, 2], [0, 1]), ([3, 4], [1, 1])]]
    assert len({fingerprint(plain), *(fingerprint(*other) for other in others)}) == 5


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self, inner):
        self.inner, self.calls = inner, 0

    def __call__(self, *args, **options):
        self.calls += 1
        return self.inner(*args, **options)

    def __getattr__(self, name):
        return getattr(self.inner, name)


RECORDS = [GOOD, {"prompt": "a b", "response": "c d e a b c d"}, {"prompt_ids": [5, 6], "response_ids": [7, 8, 9]}]


def test_store_is_what_memory_holds(read, tmp_path):
    inside, mapped = (read(*RECORDS, max_length=6, store=store) for store in (None, tmp_path / "a" / "store"))
    assert listed(mapped) == listed(inside) and len(inside) == 4
    assert (mapped.answers, mapped.fingerprint, mapped.skipped) == (inside.answers, inside.fingerprint, [])
    assert mapped.lengths.tolist() == inside.lengths.tolist() and mapped.lengths.dtype == np.int64

    def owner(values):
        while isinstance(values, np.ndarray):
            values = values.base
        return values

    assert isinstance(owner(mapped[1].ids), mmap.mmap) and isinstance(owner(mapped[1].answer), mmap.mmap)
    assert not isinstance(owner(inside[1].ids), mmap.mmap)
    assert sorted(p.name for p in (tmp_path / "a" / "store").iterdir()) == ["answers.bin", "offsets.npy", "store.json", "tokens.bin"]


def test_store_is_opened_without_reading(read, tmp_path, monkeypatch):
    tokenizer, store = Counting(make_tokenizer()), tmp_path / "store"
    path = tmp_path / "data.jsonl"

    def again(tokenizer=tokenizer, **options):
        return read_examples([path], tokenizer, **dict(max_length=50, vocab_size=10, eos=2, store=store) | options)

    first = read(*RECORDS, tokenizer=tokenizer, store=store)
    calls = tokenizer.calls
    assert calls == 5
    tokenizer.inner("a b c", truncation=True, max_length=2)  # a call's own settings are none of the tokenizer's identity
    second = again()
    assert tokenizer.calls == calls and listed(second) == listed(first) and second.fingerprint == first.fingerprint
    rules = {"max_length": 7, "vocab_size": 11, "eos": None, "skip_broken": True}
    for name, value in rules.items():
        again()
        calls = tokenizer.calls
        assert listed(again(**{name: value})) == listed(again(**{name: value, "store": None}))
        assert tokenizer.calls == calls + 10, name
    again()
    for changed in (make_tokenizer(TEMPLATE + " "), make_tokenizer(vocabulary=WORDS[::-1])):
        changed = Counting(changed)
        again(changed)
        assert changed.calls == 5
    again()
    assert listed(first) == listed(again())  # what was mapped before is not written over
    path.write_text(json.dumps({"text": "e e e"}) + "\n")
    assert [marked(e) for e in again()] == ["<S> E E E </S>"]
    stat = path.stat()
    path.write_text(json.dumps({"text": "d d d"}) + "\n")  # of the same size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert [marked(e) for e in again()] == ["<S> D D D </S>"]


def test_store_remembers_what_it_left_out(read, tmp_path, capsys):
    options = dict(skip_broken=True, store=tmp_path / "store")
    skipped = read(GOOD, b"{", {"prompt": "a", "response": ""}, {"text": "a b c " * 20}, **options).skipped
    said = capsys.readouterr().err
    again = read_examples([tmp_path / "data.jsonl"], make_tokenizer(), max_length=50, vocab_size=10, eos=2, **options)
    assert again.skipped == skipped and len(skipped) == 1
    again = capsys.readouterr().err
    assert skipped[0] in again
    for note in ("1 broken lines left out", "1 pieces left out", "1 sequences of more than 50 tokens (max_length) cut"):
        assert note in said and note in again


class Killed(BaseException):
    pass


@pytest.mark.parametrize("renamed", range(4))
def test_interrupted_write_leaves_no_store(read, tmp_path, monkeypatch, renamed):
    """Killed after so many of the four files got their names, over an older store: the next call writes it anew."""
    store, replace, done = tmp_path / "store", os.replace, []

    def dying(*names):
        if len(done) == renamed:
            raise Killed
        done.append(replace(*names))

    read({"text": "e e e"}, store=store)
    monkeypatch.setattr(data.os, "replace", dying)
    with pytest.raises(Killed):
        read(*RECORDS, store=store)
    monkeypatch.undo()
    assert not (store / "store.json").exists()
    tokenizer = Counting(make_tokenizer())
    assert listed(read(*RECORDS, tokenizer=tokenizer, store=store)) == listed(read(*RECORDS))
    assert tokenizer.calls == 5


def test_store_stays_when_reading_fails(read, tmp_path):
    """A broken line in new data: nothing of it stays, and the older store, put beside its source, still opens."""
    store, path, tokenizer = tmp_path / "store", tmp_path / "data.jsonl", Counting(make_tokenizer())
    whole, source, stat = listed(read(*RECORDS, tokenizer=tokenizer, store=store)), path.read_bytes(), path.stat()
    files = sorted(p.name for p in store.iterdir())
    with pytest.raises(ValueError, match="line 2"):
        read(GOOD, b"{", store=store)
    assert sorted(p.name for p in store.iterdir()) == files
    path.write_bytes(source)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert listed(read_examples([path], tokenizer, max_length=50, vocab_size=10, eos=2, store=store)) == whole and tokenizer.calls == 5


@pytest.mark.parametrize("name, content", [("tokens.bin", b""), ("tokens.bin", b"1234"), ("answers.bin", b"1"), ("offsets.npy", b"x"), ("store.json", b"{")])
def test_damaged_store_is_written_anew(read, tmp_path, name, content):
    store = tmp_path / "store"
    whole = listed(read(*RECORDS, store=store))
    (store / name).write_bytes(content)
    assert listed(read_examples([tmp_path / "data.jsonl"], make_tokenizer(), max_length=50, vocab_size=10, eos=2, store=store)) == whole


def test_store_must_be_a_directory(read, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="store is .*file, which is not a directory"):
        read(GOOD, store=tmp_path / "file")


def test_memory_does_not_grow_with_a_store(tmp_path):
    """1.2 MB of tokens and 0.3 MB of flags are read in a tenth of that."""
    import tracemalloc

    path, used = tmp_path / "data.jsonl", []
    path.write_text((json.dumps({"prompt_ids": [5, 6], "response_ids": [7] * 998}) + "\n") * 300)
    for store in (tmp_path / "first", tmp_path / "store", None):  # the first to import what is needed
        tracemalloc.start()
        examples = read_examples([path], None, max_length=1000, vocab_size=10, store=store)
        used.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(examples) == 300 and examples.lengths.sum() == 300_000
    assert used[1] < 150_000 and 1_500_000 < used[2] < 4_500_000, used


def test_parquet_without_pyarrow(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"x.parquet is read with pyarrow.* pip install pyarrow"):
        read_examples([tmp_path / "x.parquet"], tokenizer, max_length=9, vocab_size=10)


PARTS = [{"role": "user", "content": [{"type": "text", "text": "a b"}]}, {"role": "assistant", "content": [{"type": "text", "text": "c d"}]}]


@pytest.fixture
def read_rows(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def read(rows, **options):
        path = tmp_path / "data.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
        return read_examples([path], tokenizer, **dict(max_length=50, vocab_size=10, eos=2) | options)

    return read


def test_parquet_holds_the_same_forms(read_rows, read, tmp_path):
    """Columns of several forms and keys that only some messages have: absent is null there."""
    rows = [
        {"id": 1, "prompt": "a b", "response": "c d", "text": None, "prompt_ids": None, "response_ids": None, "messages": None},
        {"id": 2, "text": "a b c"},
        {"id": 3, "prompt_ids": [5, 6], "response_ids": [7, 8, 9]},
        {"id": 4, "messages": [CHAT[0] | {"name": "x"}, CHAT[1]]},
        {"id": 5, "prompt_ids": [5, 6], "response_ids": [8, 9]},
        {"id": 6, "messages": [CHAT[0] | {"content": None}, CHAT[1]]},
    ]
    expected = read(*({k: v for k, v in row.items() if v is not None} for row in rows))
    assert listed(read_rows(rows)) == listed(expected) and len(expected) == 6
    assert listed(read_rows(rows, store=tmp_path / "store")) == listed(expected)
    assert [marked(e) for e in read_rows([{"messages": PARTS}])] == ["<user> a b <bot> C D </S>"]


def test_null_is_absent():
    """So that a template's `'tools' in message` says of one what it says of the other."""
    message = {"role": "user", "content": None, "tools": None}
    assert present({"text": None, "messages": [message, 5]}) == {"messages": [{"role": "user", "content": None}, 5]}


def test_parquet_rows_are_counted(read_rows, capsys):
    rows = [{"text": "a b c"}] * 700
    assert len(read_rows(rows, progress=True)) == 700
    rows[612] = {"text": None}
    with pytest.raises(ValueError, match="data.parquet, row 613: found keys"):
        read_rows(rows)
    capsys.readouterr()
    examples = read_rows(rows, skip_broken=True)
    assert len(examples) == 699 and len(examples.skipped) == 1 and "row 613: " in examples.skipped[0]
    assert "row 613: " in capsys.readouterr().err


def test_parquet_is_read_in_parts(tmp_path):
    """Of one row group of 32 MB (and 16 in a column of no use), the first row needs a part."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    ids = pyarrow.ListArray.from_arrays(np.arange(0, 2_000_001, 1000, dtype=np.int32), np.arange(2_000_000) % 1000)
    table = pyarrow.table({"prompt_ids": ids, "response_ids": ids, "other": ids})
    parquet.write_table(table, tmp_path / "x.PARQUET", compression="none", use_dictionary=False)
    del table, ids
    before, rows = pyarrow.total_allocated_bytes(), files.read_rows(tmp_path / "x.PARQUET")
    where, row, _ = next(rows)
    assert where.endswith("row 1") and row == {"prompt_ids": list(range(1000)), "response_ids": list(range(1000))}
    assert pyarrow.total_allocated_bytes() - before < 16_000_000
    rows.close()


def test_parquet_files_that_cannot_be_read(read_rows, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"data.parquet has columns \['a', 'b'\]; accepted are"):
        read_rows([{"b": 1, "a": 2}])
    with pytest.raises(ValueError, match="row 1: found a int where text"):
        read_rows([{"text": 1}])
    (tmp_path / "x.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(ValueError, match="x.parquet, after row 0: "):
        read_examples([tmp_path / "x.parquet"], tokenizer, max_length=9, vocab_size=10)
    rng = np.random.default_rng(0)
    words = [" ".join(rng.choice(WORDS, 40)) for _ in range(2000)]
    read_rows([{"text": text} for text in words], max_length=100)
    path = tmp_path / "data.parquet"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data.parquet, (after )?row \d+: "):
        read_examples([path], tokenizer, max_length=100, vocab_size=10)


def test_collate():
    examples = [Example(np.array([4, 5, 6], dtype=np.int32), np.array([False, True, True])),
                Example(np.array([7], dtype=np.int32), np.array([True]))]  # fmt: skip
    batch = collate(examples)
    assert batch.ids.t().tolist() == [[4, 5, 6], [7, 0, 0]]
    assert batch.answer.t().tolist() == [[False, True, True], [True, False, False]]
    assert batch.lengths.tolist() == [3, 1] and batch.first is None
    assert batch.ids.dtype == batch.lengths.dtype == torch.int64 and batch.answer.dtype == torch.bool
    same = collate([[example] for example in examples])
    assert same.first is None and all(torch.equal(getattr(same, n), getattr(batch, n)) for n in ("ids", "answer", "lengths"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 99))
def test_collate_packed(sizes, seed):
    """Against the definition, row by row."""
    rng = np.random.default_rng(seed)
    sequences = [[Example(rng.integers(1, 50, n).astype(np.int32), rng.random(n) < 0.7) for n in documents] for documents in sizes]
    batch = collate([[*map(Examples.of(sequence).__getitem__, range(len(sequence)))] for sequence in sequences])
    assert batch.ids.shape == batch.answer.shape == (max(map(sum, sizes)), len(sizes))
    assert batch.lengths.tolist() == [sum(documents) for documents in sizes]
    if all(len(documents) == 1 for documents in sizes):
        assert batch.first is None
    else:
        assert batch.first.dtype == torch.int64
    for b, sequence in enumerate(sequences):
        rows = [(t, int(e.ids[i]), bool(e.answer[i]) and not (i == 0 and d > 0), t - i)
                for t, (d, e, i) in enumerate((d, e, i) for d, e in enumerate(sequence) for i in range(len(e.ids)))]  # fmt: skip
        rows += [(t, 0, False, t) for t in range(len(rows), len(batch.ids))]
        for t, token, answer, first in rows:
            assert (batch.ids[t, b], batch.answer[t, b]) == (token, answer)
            assert batch.first is None or batch.first[t, b] == first


@pytest.mark.parametrize("sequences", [[], [[]], [[Example(np.ones(3, np.int32), np.ones(3, bool))], []]])
def test_collate_refuses_nothing(sequences):
    with pytest.raises(ValueError, match="sequences are empty"):
        collate(sequences)
