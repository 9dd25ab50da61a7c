"""`python -m bench.decode --shape`: a prescribed acceptance is met exactly, changes no text, and the numbers hang together."""

import json
from dataclasses import replace

import pytest
import torch
from test_static import _NoWaiting

from bench import decode, decode_baselines, decode_shape
from bench.decode_rows import Row, Setting, Step, record, report, speedup
from bench.prescribed import AUTOREGRESSIVE, PARTS, Parts, PrescribedStep, prefill, random_model, shape_config, step_bytes, write
from bench.timing import CPUClock
from mtp_model import generate
from mtp_model.cache import KVCache
from mtp_model.config import ModelConfig
from mtp_model.layout import MODES

TINY = ModelConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
)  # fmt: skip
BATCH, CONTEXT, LENGTH = 2, 9, 33


class Recorded:
    """A tiny model, prompts in a cache, and its text behind them."""

    def __init__(self, qk_norm=False):
        self.model = random_model(replace(TINY, qk_norm=qk_norm), torch.device("cpu"), torch.float32, 4, 8)
        if qk_norm:
            for layer in self.model.layers:  # two weights, of q's two heads and of k's one
                layer.qk_norm.data.copy_(torch.stack([torch.linspace(0.5, 2, 16), torch.linspace(3, 1, 16)])[[0, 0, 1]])
        self.prompts = torch.randint(0, TINY.vocab_size, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(0))
        self.cache = KVCache(TINY, BATCH, CONTEXT + LENGTH + 81)
        text = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
        text[:, 0] = prefill(self.model, self.prompts, self.cache)
        self.tokens, self.passes, _ = write(PrescribedStep(self.model, self.cache, AUTOREGRESSIVE, 0, text, CONTEXT))
        self.text = torch.tensor(self.tokens)

    def step(self, mode, k, **options):
        return PrescribedStep(self.model, self.cache, mode, k, self.text, CONTEXT, **options)


@pytest.fixture(scope="module")
def recorded():
    return Recorded()


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(decode_shape, "shape_config", lambda shape: TINY)
    return ["--shape", "demo", "--device", "cpu", "--context", "9", "--new-tokens", "10", "--repeats", "2", "--rounds", "2", "--rank", "4"]


def passes_of(mode: str, k: int, wrong: list[bool]) -> int:
    """How many passes a text of LENGTH tokens takes behind its first, token by token."""
    at, passes, drafted = 0, 0, True
    while at < LENGTH - 1:
        accepted = 0
        while drafted and accepted < k and not wrong[at + accepted + 1]:
            accepted += 1
        drafted = not drafted or {"linear": accepted == k, "quadratic": True, "quadratic-printed": accepted > 0}[mode]
        at, passes = at + accepted + 1, passes + 1
    return passes


def test_the_recorded_text_is_the_models_own(recorded):
    expected = generate(recorded.model, recorded.prompts.tolist(), mode=AUTOREGRESSIVE, max_new_tokens=LENGTH, eos=(), static=False).tokens
    assert recorded.tokens == expected and recorded.passes == BATCH * (LENGTH - 1)
    assert all(len(set(text)) > 5 for text in expected)  # not one token again and again, which any order would equal


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("mode", MODES[1:])
def test_a_prescribed_acceptance_is_met_and_changes_no_text(recorded, mode, k):
    step, coins = recorded.step(mode, k), torch.rand(BATCH, LENGTH + 9, generator=torch.Generator().manual_seed(1))
    found = {}
    for chance in (0.0, 0.3, 1.0, 0.7):  # the same step again and again
        wrong = coins < chance
        step.prescribe(wrong)
        tokens, found[chance], _ = write(step)
        assert tokens == recorded.tokens, chance
        assert found[chance] == sum(passes_of(mode, k, row) for row in wrong.tolist()), chance
    assert found[0.0] == BATCH * -(-(LENGTH - 1) // (k + 1)) and found[1.0] == BATCH * (LENGTH - 1)
    assert found[0.0] < found[0.3] < found[1.0]


def test_the_models_own_drafting_is_paid_for(recorded, monkeypatch):
    monkeypatch.setattr("mtp_model.static.TRACES", False)  # a recorded step calls nothing of the model again
    drafts, asked = [], []
    original = recorded.model.draft
    monkeypatch.setattr(recorded.model, "draft", lambda *args: asked.append(args) or drafts.append(original(*args)) or drafts[-1])
    write(recorded.step("quadratic", 2, draft_candidates=5))
    assert len(asked) >= -(-(LENGTH - 1) // 3) and all(args[2:4] == (True, 5) for args in asked)
    assert all(d.shape == (BATCH, 2) for d in drafts)


def test_a_prescribed_step_waits_for_nothing(monkeypatch):
    """As in test_static: a step on tensors without values, so that a graph can hold it."""
    pytest.importorskip("triton")
    from mtp_kernels.triton import _device

    model = random_model(TINY, torch.device("cpu"), torch.float32, 4, 2)
    model.implementation = "triton"
    model.to("meta")
    monkeypatch.setattr(_device, "launch", lambda *args, **options: None)
    cache = KVCache(TINY, BATCH, 300, "meta")
    step = PrescribedStep(model, cache, "quadratic", 2, torch.zeros(BATCH, LENGTH, dtype=torch.int64, device="meta"), CONTEXT)
    with torch.inference_mode():
        step._step()  # what is made once
        with _NoWaiting():
            step._step()
            step._step()


@pytest.mark.parametrize("mode, k", [(AUTOREGRESSIVE, 0), ("linear", 2), ("quadratic", 2)])
def test_parts_add_up_to_a_step(recorded, mode, k):
    step = recorded.step(mode, k)
    parts = Parts(step)
    for _ in range(2):
        seconds = parts.run(CPUClock())
        assert sum(seconds[part] for part in PARTS) == pytest.approx(seconds["step"])
        assert seconds["verify"] > 0 and seconds["accept"] > 0 and (seconds["draft"] > 0) == bool(k)
        assert step.lengths.tolist() == [CONTEXT + k + 1] * BATCH  # one step from the beginning, with all of its drafts right
        assert step.newest.tolist() == recorded.text[:, k + 1].tolist()


def test_bytes_of_a_step_counted_by_hand(recorded):
    # float32; a layer: q, k, v 64 x 32, o 32 x 32, gate and up 96 x 32, down 32 x 48, two norms of 32
    base = 4 * (2 * (64 * 32 + 32 * 32 + 96 * 32 + 32 * 48 + 64) + 32)
    adapter = 4 * 2 * 4 * ((3 + 1 + 2) * 32 + 48 + (64 + 32 + 96 + 32))  # A's rows of inputs, B's rows of outputs, rank 4
    head, square, kv = 4 * 61 * 32, 4 * 32 * 32, 4 * 2 * 2 * 3 * 10 * 16
    assert step_bytes(recorded.model, 0, 3, 10) == {"base": base, "adapter": 0, "sampler": 0, "lm_head": head, "kv": kv}
    assert step_bytes(recorded.model, 4, 3, 10) == {"base": base, "adapter": adapter, "sampler": 9 * square, "lm_head": 5 * head, "kv": kv}
    assert step_bytes(recorded.model, 4, 3, 10, candidates=5)["lm_head"] == 2 * head + 4 * 3 * 5 * 32 * 4
    assert step_bytes(recorded.model, 4, 3, 10, candidates=61)["lm_head"] == 5 * head
    assert step_bytes(recorded.model, 4, 3, 10, candidates=5, shared=True)["lm_head"] == head + 4 * 3 * 5 * 32 * 4


def test_the_shapes():
    config = shape_config("Llama-3.1-8B")
    assert (config.vocab_size, config.num_hidden_layers, config.tie_word_embeddings) == (128256, 32, False)
    assert shape_config("demo").vocab_size == 1024


@pytest.mark.parametrize("qk_norm", [False, True])
def test_baselines_write_the_same_text(recorded, qk_norm):
    recorded = Recorded(True) if qk_norm else recorded
    for name in (decode_baselines.UNCAPTURED, decode_baselines.EAGER):
        tokens, seconds = decode_baselines.baseline(name, recorded.model)(recorded.prompts, LENGTH)
        assert tokens == recorded.tokens and seconds > 0, name


def test_the_command(tiny, tmp_path, capsys):
    path = tmp_path / "shape.json"
    arguments = [*tiny, "--k", "2", "3", "--wrong", "0", "1", "--batch", "1", "3", "--draft-candidates", "7", "--json", str(path)]
    assert decode.main([*arguments, "--baselines", "uncaptured", "transformers-compiled"]) == 0
    values, text = json.loads(path.read_text()), capsys.readouterr().out
    assert values["same_text"] and values["prescribed"] and values["settings"]["wrong"] == [0, 1] and "commit" in values["environment"]
    assert [(r["batch"], r["context"]) for r in values["results"]] == [(1, 9), (3, 9)]
    for result in values["results"]:
        ways = [(AUTOREGRESSIVE, 0), ("linear", 2), ("linear", 3), ("quadratic", 2), ("quadratic", 3)]
        assert [(s["name"], s["k"]) for s in result["steps"]] == ways
        assert all(len(s["seconds"]["step"]) == 2 and s["share_of_memory_roof"] is None for s in result["steps"])
        heads = [s["bytes"]["lm_head"] - s["k"] * result["batch"] * 7 * 32 * 4 for s in result["steps"]]  # but for the candidates' rows
        # steps of few rows, and linear ones, list candidates in the pass that verifies
        assert [h // heads[0] for h in heads] == [1, 1, 1, 1, 1 if result["batch"] == 1 else 2]
        rows = result["rows"]
        assert [(r["name"], r["k"]) for r in rows if r["prescribed_wrong"] == 0] == ways[1:]
        assert all(r["same"] == r["compared"] == 2 * result["batch"] and r["tokens"] == 18 * result["batch"] for r in rows)
        assert {r["tokens_per_step"] for r in rows if r["prescribed_wrong"] == 1} == {1.0}
        assert [r["tokens_per_step"] for r in rows if r["prescribed_wrong"] == 0] == [3.0, 3.0, 3.0, 3.0]  # 9 tokens: 4 + 4 + 1 at k = 3
        assert rows[0]["speedup"] == [1, 1, 1]
    assert "Left out: transformers generate, eager: not asked for." in text and "torch.compile: it is a GPU's" in text
    assert "Acceptance is prescribed, not the model's" in text and "2 of 2 |" in text


def test_a_large_vocabulary_is_drafted_from_a_shortlist(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(decode_shape, "measure_all", lambda args, *_: seen.append(args.draft_candidates))
    for vocab in (8192, 8193):
        monkeypatch.setattr(decode_shape, "shape_config", lambda shape, vocab=vocab: replace(TINY, vocab_size=vocab))
        decode.main([*tiny, "--k", "2"])
    assert seen == [None, 64]


def test_a_wrong_text_fails(tiny, monkeypatch, capsys):
    def wrong(step):
        texts, passes, seconds = write(step)
        return [[text[0] ^ 1, *text[1:]] for text in texts] if step.k else texts, passes, seconds

    monkeypatch.setattr(decode_shape, "write", wrong)
    assert decode.main([*tiny, "--k", "2", "--wrong", "0", "--modes", "linear"]) == 1
    found = capsys.readouterr()
    assert "0 of 2" in found.out and "differs" in found.err


def test_an_interrupted_run_prints_what_is_done(tiny, monkeypatch, capsys, tmp_path):
    def stop(self, row, way):
        if row.k:
            raise KeyboardInterrupt
        return write_text(self, row, way)

    write_text = decode_shape.Bench.write_text
    monkeypatch.setattr(decode_shape.Bench, "write_text", stop)
    assert decode.main([*tiny, "--k", "2", "--json", str(tmp_path / "x.json")]) == 130
    assert "autoregressive" in capsys.readouterr().out and json.loads((tmp_path / "x.json").read_text())["interrupted"]


def test_what_is_late_is_named(tiny, capsys):
    assert decode.main([*tiny, "--k", "2", "--minutes", "1e-9", "--context", "9", "12"]) == 0
    assert capsys.readouterr().out.count("all of it: the time was over") == 2


def test_shares_and_ratios():
    setting = Setting("demo", 1, 4, [Step("linear", 2, {"base": 300, "kv": 100})], [Row("autoregressive", seconds=[1.0, 3.0]), Row("linear", 2, 0.5)])
    setting.steps[0].seconds["step"] = [0.5, 0.5, 0.5]
    setting.rows[1].seconds = [0.5]  # interrupted
    values = record(setting, 1600.0)
    assert values["steps"][0]["share_of_memory_roof"] == 0.5 and speedup(*setting.rows)[0] == 2.0
    setting.rows[0].tokens, setting.rows[0].passes = 12, 8
    assert [record(setting, None)["rows"][0][name] for name in ("tokens_per_second", "tokens_per_step")] == [3.0, 1.5]
    assert "50%" in report(values) and "50%" not in report(record(Setting("demo", 1, 4, setting.steps), None))


@pytest.mark.parametrize(
    "arguments, word",
    [(["--k", "9"], "--k"), (["--batch", "0"], "--batch"), (["--wrong", "1.5"], "--wrong"), (["--draft-candidates", "5000"], "--draft-candidates"),
     (["--new-tokens", "1"], "--new-tokens"), (["--minutes", "0"], "--minutes"), (["--rank", "0"], "rank")],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        decode.main(["--shape", "demo", *arguments])
