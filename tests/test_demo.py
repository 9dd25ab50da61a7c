"""The shipped demo: an ordinary Hugging Face directory, a held-out split, and an adapter that does what the README says."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtp_model.demo
from mtp_kernels import packed
from mtp_model import generate, load_adapter, load_model
from mtp_model.demo import ABLATION, ADAPTER, BASE, HELD_OUT
from mtp_model.demo.base import train_tokenizer, windows
from mtp_model.demo.corpus import is_held_out, read_corpus
from mtp_model.layout import MODES


@pytest.fixture(scope="module")
def demo():
    model = load_adapter(ADAPTER).apply(load_model(BASE, dtype=torch.float32))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    prompts = [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in HELD_OUT.read_text().splitlines()]
    return model, tokenizer, prompts


def test_files_are_small_enough_and_real():
    files = [p for p in Path(mtp_model.demo.__file__).parent.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    assert sum(p.stat().st_size for p in files) < 32 * 2**20
    assert not [p for p in files if p.suffix in (".pt", ".bin", ".pkl")]
    for directory in (ADAPTER, *ABLATION):
        config = load_adapter(directory).config
        assert config.num_masks == 8 and config.sampler


def test_transformers_opens_it_and_writes_the_same(demo):
    model, tokenizer, prompts = demo
    peer = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    ids = torch.tensor([prompts[0]])
    expected = peer.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
    assert generate(model, [prompts[0]], mode="quadratic", k=4, max_new_tokens=40).tokens[0] == expected


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("k", [2, 8])
def test_exact_on_held_out_prompts(demo, mode, k):
    model, _, prompts = demo
    some = prompts[:4]
    expected = generate(model, some, mode="autoregressive", max_new_tokens=60).tokens
    result = generate(model, some, mode=mode, k=k, max_new_tokens=60)
    assert result.tokens == expected
    assert result.stats.tokens_per_step > 1.2


@pytest.mark.parametrize("dtype, packs", [(torch.bfloat16, True), (torch.float16, True), (torch.bfloat16, False), (torch.float32, False)], ids=str)
def test_exact_on_a_cpu(demo, dtype, packs, monkeypatch):
    """In 16 bits as well, and with PyTorch's ordinary products."""
    if not packs:
        monkeypatch.setattr(packed, "_tiling", lambda dtype, threads: None)
    model, some = load_adapter(ADAPTER).apply(load_model(BASE, dtype=dtype)), demo[2][:3]
    expected = [generate(model, [prompt], mode="autoregressive", max_new_tokens=50).tokens[0] for prompt in some]
    for options in ({"mode": "linear", "k": 2}, {"mode": "quadratic", "k": 8}, {"mode": "quadratic", "k": 3, "static": False}):
        result = generate(model, some, max_new_tokens=50, **options)
        assert result.tokens == expected and result.stats.tokens_per_step > 1.2


@pytest.mark.skipif(not (torch.cuda.is_available() or os.environ.get("TEST_PTX")), reason="for a GPU, or minutes on the machine for PTX")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_kernels_write_autoregressive_text(demo, device, dtype):
    """Two prompts of different length; the rows that only pad are many."""
    _, _, prompts = demo
    model = load_adapter(ADAPTER).apply(load_model(BASE, device=device, dtype=dtype, implementation="triton"))
    some = [prompts[0][:24], prompts[1][:11]]
    expected = generate(model, some, mode="autoregressive", max_new_tokens=9).tokens
    for mode, k in (("linear", 2), ("quadratic", 4)):
        result = generate(model, some, mode=mode, k=k, max_new_tokens=9)
        assert result.tokens == expected and result.stats.tokens_per_step > 1.2


def test_acceptance_of_the_shipped_adapter(demo):
    model, _, prompts = demo
    result = generate(model, prompts[:8], mode="quadratic", k=8, max_new_tokens=60)
    assert result.stats.tokens_per_step >= 2  # the README states the figure over 64 prompts; this guards the files


def test_prompts_are_held_out_and_quoted_from_their_files(demo):
    _, tokenizer, prompts = demo
    records = [json.loads(line) for line in HELD_OUT.read_text().splitlines()]
    assert len(records) >= 64 and all(is_held_out(r["file"]) for r in records)
    assert len({r["prompt"] for r in records}) == len(records)
    for record, ids in zip(records, prompts, strict=True):
        assert tokenizer.decode(ids) == record["prompt"]


def test_corpus_split_is_by_file_and_stable(tmp_path):
    for i in range(300):
        (tmp_path / f"module{i}.py").write_text(f"x = {i}\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "encodings").mkdir()
    (tmp_path / "encodings" / "table.py").write_text("x = 1\n")
    train, held_out = read_corpus(tmp_path)
    assert not set(train) & set(held_out) and len(train) + len(held_out) == 300
    assert 2 <= len(held_out) <= 30 and all(map(is_held_out, held_out))
    with pytest.raises(ValueError, match="no Python source"):
        read_corpus(tmp_path / "encodings" / "nothing")


def test_recipe_pieces(tmp_path):
    tokenizer = train_tokenizer(["def f(x):\n    return x\n" * 20], 300, tmp_path)
    text = "def f(x):\n    return x\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]
    import numpy as np

    data = np.arange(1000, dtype=np.uint16)
    batch = windows(data, 3, 17, np.random.default_rng(0))
    assert batch.shape == (3, 17) and bool((batch[:, 1:] - batch[:, :-1] == 1).all())


def test_the_readme_example_runs(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme.split("## Use")[1], re.S).group(1)
    assert code.count("max_new_tokens=100") == 1
    space = {}
    exec(code.replace("max_new_tokens=100", "max_new_tokens=9"), space)
    text, _, tokens_per_step = capsys.readouterr().out.rstrip().rpartition(" ")
    assert text == space["tokenizer"].decode(space["result"].tokens[0]) and 1 <= float(tokens_per_step) <= 5
