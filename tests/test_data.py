"""Training data: which tokens are answers, how sequences are cut, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mtp_model.data import Example, batch_indices, collate, read_examples

WORDS = ["<unk>", "<s>", "</s>", "<user>", "<bot>", "a", "b", "c", "d", "e"]
ID = {word: i for i, word in enumerate(WORDS)}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<user> {{ m['content'] }} "
    "{% else %}<bot> {{ m['content'] }} </s> {% endif %}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)
REWRITING = "{% for m in messages %}{{ messages | length }} {{ m['content'] }} {% endfor %}"


def make_tokenizer(template=TEMPLATE):
    words = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", chat_template=template)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def read(tmp_path, tokenizer):
    def read(*records, tokenizer=tokenizer, eos=2, max_length=50, vocab_size=10):
        path = tmp_path / "data.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return read_examples([path], tokenizer, max_length=max_length, vocab_size=vocab_size, eos=eos)

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
        "",
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


def test_without_end_of_text(read):
    examples = read({"prompt": "a", "response": "b c"}, {"text": "d e"}, eos=None)
    assert [marked(e) for e in examples] == ["<s> a B C", "<S> D E"]


def test_long_sequences_are_cut(read):
    ids = list(range(5, 10)) * 4
    examples = read({"prompt_ids": ids[:7], "response_ids": ids[7:]}, max_length=6)
    # The first piece is prompt alone, and the last one too short for a mask to have a label.
    assert [e.ids.tolist() for e in examples] == [ids[6:12], ids[12:18]]
    assert [e.answer.tolist() for e in examples] == [[False] + [True] * 5, [True] * 6]
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
        ("{", "Expecting"),
        ("[1, 2]", "found a list"),
        ({"prompt": "a"}, "found keys"),
        ({"prompt_ids": [5]}, "found keys"),
        ({"text": 5}, "found a int where text"),
        ({"prompt": "a", "response": None}, "found a NoneType"),
        ({"prompt_ids": [5], "response_ids": [6, 10]}, "vocabulary has 10"),
        ({"prompt_ids": [5, -1], "response_ids": [6, 7]}, "vocabulary has 10"),
        ({"prompt_ids": [5], "response_ids": [2**40]}, ""),
        ({"prompt_ids": 5, "response_ids": [6]}, "prompt_ids is not a list of integers"),
        ({"prompt_ids": ["5"], "response_ids": [6]}, "prompt_ids is not a list of integers"),
        ({"prompt_ids": [5], "response_ids": [6, 7.5]}, "response_ids is not a list of integers"),
        ({"prompt_ids": [True], "response_ids": [6]}, "prompt_ids is not a list of integers"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": [{"role": "user"}]}, "must be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
    ],
)
def test_errors_name_file_and_line(read, record, word):
    with pytest.raises(ValueError, match=f"data.jsonl, line 3: .*{word}"):
        read(GOOD, "", record, GOOD)


def test_chat_templates_that_cannot_serve(read):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match="line 1: .*no chat template"):
        read(chat, tokenizer=make_tokenizer(None))
    with pytest.raises(ValueError, match="line 1: .*rewrites"):
        read(chat, tokenizer=make_tokenizer(REWRITING))


def test_nothing_to_read(read, tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no sequence with an answer"):
        read({"prompt": "a b c", "response": ""}, eos=None)
    with pytest.raises(ValueError, match="no sequence with an answer"):
        read()
    with pytest.raises(ValueError, match="is not a file"):
        read_examples([tmp_path / "nowhere"], tokenizer, max_length=9, vocab_size=10)
    with pytest.raises(ValueError, match="max_length is 2"):
        read(GOOD, max_length=2)


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 12), batch=st.integers(1, 9), seed=st.integers(0, 5))
def test_batches_are_shuffled_epochs(n, batch, seed):
    steps = -(-3 * n // batch)
    stream = [i for step in range(steps) for i in batch_indices(n, batch, step, seed)]
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert batch_indices(n, batch, steps - 1, seed) == stream[-batch:]


def test_epochs_and_seeds_differ():
    epochs = {tuple(batch_indices(20, 20, step, seed)) for step in range(4) for seed in range(4)}
    assert len(epochs) == 16 and tuple(range(20)) not in epochs


def test_collate():
    examples = [Example(np.array([4, 5, 6], dtype=np.int32), np.array([False, True, True])),
                Example(np.array([7], dtype=np.int32), np.array([True]))]  # fmt: skip
    batch = collate(examples)
    assert batch.ids.t().tolist() == [[4, 5, 6], [7, 0, 0]]
    assert batch.answer.t().tolist() == [[False, True, True], [True, False, False]]
    assert batch.lengths.tolist() == [3, 1] and "int64" in str(batch.ids.dtype)
