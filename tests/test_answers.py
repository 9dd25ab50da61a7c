"""A model's own answers: what generate() writes, resumable, and the prompts they are to."""

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mtp_model import __main__, answers, generate, load_model
from mtp_model.answers import AnswerOptions, write_answers
from mtp_model.data import read_examples
from mtp_model.demo import ADAPTER
from mtp_model.records import read_prompts

PROMPTS = [[1, 2, 3], [4], [5, 0, 2, 2], [3, 3], [1]]
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"


@pytest.fixture
def tokenizer():
    letters = Tokenizer(models.BPE({c: i for i, c in enumerate("uxyzab")}, []))
    return PreTrainedTokenizerFast(tokenizer_object=letters, chat_template=TEMPLATE)


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("options", [AnswerOptions(2, max_new_tokens=9), AnswerOptions(4, "linear", 3, 9), AnswerOptions(3, "quadratic", max_new_tokens=9)])
def test_answers_are_greedy_text(shared, tmp_path, options):
    counts = list(write_answers(shared.model, PROMPTS, tmp_path / "new" / "answers.jsonl", options))
    assert counts[0] == 0 and counts[-1] == 5
    expected = generate(shared.model, PROMPTS, mode="autoregressive", max_new_tokens=9).tokens
    assert written(tmp_path / "new" / "answers.jsonl") == [
        {"prompt_ids": p, "response_ids": t, "by": [shared.model.fingerprint, "float32", 9]} for p, t in zip(PROMPTS, expected, strict=True)
    ]


DRAWN = dict(temperature=1.3, top_k=4, top_p=0.9, seed=2**63 - 2)


@pytest.mark.parametrize("min_p", [{}, {"min_p": 0.3}])
@pytest.mark.parametrize("way", [dict(batch=2), dict(batch=3, mode="quadratic", k=4)])
def test_drawn_answers_have_a_seed_each(shared, tmp_path, way, min_p):
    drawn = DRAWN | min_p
    options = AnswerOptions(**way, max_new_tokens=9, **drawn)
    list(write_answers(shared.model, PROMPTS, tmp_path / "answers", options))
    seeds = [2**63 - 2, 2**63 - 1, 0, 1, 2]
    plain = drawn | dict(mode="autoregressive", max_new_tokens=9)
    expected = [generate(shared.model, [p], **plain | {"seed": s}).tokens[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert [line["response_ids"] for line in written(tmp_path / "answers")] == expected
    assert written(tmp_path / "answers")[0]["by"] == [shared.model.fingerprint, "float32", 9, *drawn.values()]


@pytest.mark.parametrize("drawn", [{}, DRAWN])
@pytest.mark.parametrize("cut", [0, 1, 40, 75, 100000])
def test_interrupted_anywhere(shared, tmp_path, cut, drawn):
    options = AnswerOptions(2, max_new_tokens=6, **drawn)
    list(write_answers(shared.model, PROMPTS, tmp_path / "whole", options))
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:cut])
    counts = list(write_answers(shared.model, PROMPTS, tmp_path / "cut", options))
    assert counts[0] == whole[:cut].count(b"\n") and counts[-1] == 5
    assert written(tmp_path / "cut") == written(tmp_path / "whole")


def test_a_file_of_other_prompts_is_refused(shared, tmp_path):
    path = tmp_path / "answers"
    for text in ('{"prompt_ids": [9], "response_ids": [1]}\n', "{}\n", "no json\n", "a single line without its end", '{"prompt_ids": [9'):
        path.write_text(text)
        with pytest.raises(ValueError, match="line 1 is not this model's answer to prompt 1"):
            list(write_answers(shared.model, PROMPTS, path, AnswerOptions()))
        assert path.read_text() == text


def test_a_file_of_other_settings_is_refused(shared, make_hf_dir, tmp_path):
    path = tmp_path / "answers"
    list(write_answers(shared.model, PROMPTS[:2], path, AnswerOptions(max_new_tokens=3)))
    before = path.read_bytes()
    for model, longest in ((shared.model, 4), (load_model(make_hf_dir(seed=9)), 3)):
        with pytest.raises(ValueError, match="line 1 is not this model's answer to prompt 1 in float32 with [34] new tokens at most"):
            list(write_answers(model, PROMPTS, path, AnswerOptions(max_new_tokens=longest)))
        assert path.read_bytes() == before
    path.write_bytes(before.replace(b'"float32"', b'"bfloat16"'))
    with pytest.raises(ValueError, match="line 1 is not this model's answer to prompt 1 in float32 with 3"):
        list(write_answers(shared.model, PROMPTS, path, AnswerOptions(max_new_tokens=3)))
    path.write_bytes(before)
    with pytest.raises(ValueError, match=r"and temperature, top_k, top_p, seed \[1.0, None, None, 5\]; accepted is a new file"):
        list(write_answers(shared.model, PROMPTS, path, AnswerOptions(max_new_tokens=3, temperature=1.0, seed=5)))
    with pytest.raises(ValueError, match=r"and temperature, top_k, top_p, seed, min_p \[1.0, None, None, 5, 0.1\]; accepted is a new file"):
        list(write_answers(shared.model, PROMPTS, path, AnswerOptions(max_new_tokens=3, temperature=1.0, seed=5, min_p=0.1)))
    assert list(write_answers(shared.model, PROMPTS, path, AnswerOptions(max_new_tokens=3)))[-1] == len(PROMPTS)


def test_options_out_of_range():
    with pytest.raises(ValueError, match="batch is 0"):
        AnswerOptions(0)
    with pytest.raises(ValueError, match="mode is 'fast'"):
        AnswerOptions(mode="fast")
    with pytest.raises(ValueError, match="top_k is 3 and temperature 0"):
        AnswerOptions(top_k=3)
    with pytest.raises(ValueError, match="temperature is -1"):
        AnswerOptions(temperature=-1)
    with pytest.raises(ValueError, match="seed is 9 and temperature 0"):
        AnswerOptions(seed=9)
    assert AnswerOptions(temperature=1).text == [512, 1, None, None, 0] and AnswerOptions().text == [512]
    with pytest.raises(ValueError, match="seed is -1"):
        AnswerOptions(temperature=1, seed=-1)
    with pytest.raises(ValueError, match="seed is 9223372036854775808"):
        AnswerOptions(temperature=1, seed=2**63)
    with pytest.raises(ValueError, match="lookup_match is 3 and lookup None"):
        AnswerOptions(lookup_match=3)


def test_an_ungated_adapter_is_refused(shared, toy_adapter_model, tmp_path):
    """Its text is not the frozen model's."""
    model = toy_adapter_model(k=2, adapter={"gated": False})
    with pytest.raises(ValueError, match="the adapter is not gated"):
        next(write_answers(model, PROMPTS, tmp_path / "a.jsonl", AnswerOptions(max_new_tokens=6)))
    assert not (tmp_path / "a.jsonl").exists()


def test_answers_are_training_data(shared, tmp_path, tokenizer):
    list(write_answers(shared.model, PROMPTS, tmp_path / "a.jsonl", AnswerOptions(max_new_tokens=6)))
    examples = read_examples([tmp_path / "a.jsonl"], tokenizer, max_length=50, vocab_size=6)
    assert [len(e.ids) for e in examples] == [len(p) + 6 for p in PROMPTS] and examples.answers == 30


def test_prompts_of_every_form(tmp_path, tokenizer):
    rows = [
        {"prompt": "xyz", "response": "zz"}, {"prompt": "x"}, {"prompt_ids": [5, 1]}, {"text": "xyzzyx"},
        {"messages": [{"role": "user", "content": "xy"}, {"role": "assistant", "content": "zz"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "b", "content": "y"}]},
    ]  # fmt: skip
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts([path], tokenizer, vocab_size=6, text_tokens=4)
    assert prompts[:4] == [[1, 2, 3], [1], [5, 1], [1, 2, 3, 3]]
    assert prompts[4:] == [[0, 1, 2, 4], [0, 1, 4, 2, 0, 3, 4], [0, 1, 5, 2, 4]]  # u, a and b stand for the roles
    assert read_prompts([path], tokenizer, vocab_size=6, limit=2) == read_prompts([path, path], tokenizer, vocab_size=6, limit=2) == prompts[:2]
    assert len(read_prompts([path, path], tokenizer, vocab_size=6, limit=8)) == 8


@pytest.mark.parametrize(
    "text, message",
    [('{"prompt": ""}', "line 1"), ('{"prompt_ids": [6]}', "accepted are one or more from 0 to 5"), ('{"other": 1}', "line 1"), ("nonsense", "line 1")],
)
def test_broken_prompts(tmp_path, tokenizer, text, message):
    (tmp_path / "p.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read_prompts([tmp_path / "p.jsonl"], tokenizer, vocab_size=6)
    with pytest.raises(ValueError, match="is not a file"):
        read_prompts([tmp_path / "none"], tokenizer, vocab_size=6)
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no prompt"):
        read_prompts([tmp_path / "p.jsonl"], tokenizer, vocab_size=6)


@pytest.mark.parametrize(
    "flags, mode, k",
    [([], "autoregressive", None), (["--adapter", str(ADAPTER)], "linear", None),
     (["--adapter", str(ADAPTER), "--mode", "quadratic", "--k", "2"], "quadratic", 2)],
)  # fmt: skip
def test_command_line(tmp_path, monkeypatch, capsys, flags, mode, k):
    asked, out = [], tmp_path / "out.jsonl"
    monkeypatch.setattr(answers, "generate", lambda model, prompts, **options: asked.append(options) or generate(model, prompts, **options))
    (tmp_path / "p.jsonl").write_text('{"prompt_ids": [5, 6], "response_ids": [7]}\n{"text": "import os"}\n{"prompt": "def"}\n')
    arguments = ["answers", "--data", str(tmp_path / "p.jsonl"), "--out", str(out), "--limit", "2", "--prompt-tokens", "1", "--batch", "1"]
    assert __main__.main([*arguments, "--max-new-tokens", "3", "--device", "cpu", *flags]) == 0
    assert [(o["mode"], o["k"], o["max_new_tokens"]) for o in asked] == [(mode, k, 3)] * 2
    assert [(len(r["prompt_ids"]), len(r["response_ids"])) for r in written(out)] == [(2, 3), (1, 3)]
    assert "2 answers in" in capsys.readouterr().out


def test_command_line_draws(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(answers, "generate", lambda model, prompts, **options: asked.append(options) or generate(model, prompts, **options))
    (tmp_path / "p.jsonl").write_text('{"prompt_ids": [5, 6]}\n{"prompt_ids": [7]}\n')
    arguments = ["answers", "--data", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "drawn"), "--batch", "1", "--max-new-tokens", "3", "--device", "cpu"]
    assert __main__.main([*arguments, "--temperature", "0.5", "--top-k", "7", "--min-p", "0.2", "--seed", "9", "--lookup", "4", "--lookup-match", "1"]) == 0
    assert [(o["temperature"], o["top_k"], o["top_p"], o["min_p"], o["seed"]) for o in asked] == [(0.5, 7, None, 0.2, 9), (0.5, 7, None, 0.2, 10)]
    assert [(o["lookup"], o["lookup_match"]) for o in asked] == [(4, 1)] * 2
    wrong = (("--top-k", "7"), "top_k is 7 and temperature 0"), (("--seed", "3"), "seed is 3 and temperature 0"), (("--lookup", "0"), "lookup is 0")
    for flag, word in wrong:
        assert __main__.main([*arguments, "--out", str(tmp_path / "none"), *flag]) == 2
        assert word in capsys.readouterr().err
