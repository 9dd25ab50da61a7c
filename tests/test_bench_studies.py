"""`python -m bench.studies` at toy size: each study runs, its numbers hold when they are worked out in another way, and what was done is not done again."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise_adapter, save_hf
from safetensors import safe_open
from safetensors.torch import load_file

from bench import decode
from bench.decode import acceptance, load_tokenizer, measure
from bench.studies import __main__ as studies
from bench.studies import common, domains, drawn, gating, options, probe
from mtp_model import MTPConfig, generate, load_adapter, load_model, save_adapter
from mtp_model.cache import KVCache
from mtp_model.demo import BASE
from mtp_model.demo.answers import held_out_prompts
from mtp_model.demo.corpus import is_held_out
from mtp_model.layout import prefill_layout
from mtp_model.records import read_prompts

K = 2
TEXTS = ["import os\nfrom typing import Any\n", "def main(argv):\n    for i in range(3):\n", "class Empty:\n    pass\n"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A random model under the demo's tokenizer, adapters, training data and prompts, and the flags that name them."""
    root = tmp_path_factory.mktemp("studies")
    save_hf(root / "model", vocab_size=1024, seed=5)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, root / "model")
    for seed, (name, weight) in enumerate((("with-lcm", 1.0), ("without-lcm", 0.0))):
        model = load_model(root / "model")
        model.add_adapter(MTPConfig(K, 3))
        save_adapter(randomise_adapter(model, seed), root / name, {"training": {"lcm_weight": weight, "steps": 9}})
    random = np.random.default_rng(0)
    for name in ("answers", "source"):
        lines = [{"prompt_ids": random.integers(0, 1024, 4).tolist(), "response_ids": random.integers(0, 1024, 9).tolist()} for _ in range(6)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "heldout.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    return root


def first_prompts(toy):
    return read_prompts([toy / "heldout.jsonl"], load_tokenizer(BASE), vocab_size=1024, limit=3)


def flags(toy, out, training=True, held_out=True, seconds=False):
    """out has the results and the work directory."""
    named = ["--model", toy / "model", "--device", "cpu", "--new-tokens", 8, "--prompts", 3, "--work", out / "work", "--out", out]
    if held_out:
        named += ["--held-out", toy / "heldout.jsonl"]
    if training:
        named += ["--data", toy / "answers.jsonl", "--batch-size", 2, "--anchors", 3, "--masks", K, "--rounds", 1, "--max-length", 16]
        named += [] if seconds else ["--steps", 2]
    return [str(flag) for flag in named]


def study(name, *arguments, code=0):
    out = arguments[arguments.index("--out") + 1]
    assert studies.main([name, *map(str, arguments)]) == code
    with open(f"{out}/{name}.json") as file:
        values = json.load(file)
    assert values["study"] == name and values["settings"]["new_tokens"] == 8 and values["environment"]["versions"]["torch"]
    assert str(out) not in json.dumps(values)  # nothing of this machine's directories
    return values


def tensor_sizes(path):
    return {name: math.prod(tensor.shape) for name, tensor in load_file(path).items()}


def test_probe_ranks_stand_where_sorting_puts_them(toy, tmp_path):
    values = study("probe", *flags(toy, tmp_path, training=False), "--adapter", toy / "with-lcm")
    model, prompts = load_model(toy / "model"), first_prompts(toy)
    counts = np.bincount(sum(prompts, []), minlength=1024)
    texts = [p + generate(model, [p], mode="autoregressive", max_new_tokens=8).tokens[0] for p in prompts]
    expected = {}
    for reading in ("untouched", "trained"):
        model.remove_adapter()
        if reading == "trained":
            load_adapter(toy / "with-lcm").apply(model)
        else:
            model.add_adapter(MTPConfig(K, 3), seed=0)
        for prompt, text in zip(prompts, texts, strict=True):
            for p in range(len(prompt) - 1, len(text) - K - 1):  # as if the text up to p were a prompt
                rows = prefill_layout([p + 1], K).at(torch.tensor(text[: p + 1]).unsqueeze(1), [0])
                with torch.no_grad():
                    z = model(rows, KVCache(model.config, 1, 100))[-K:, 0]
                    heads = {reading: z}
                    if reading == "trained":
                        heads["sampler"] = model.sampler(F.embedding(torch.tensor(text[p + 1 : p + 1 + K]), model.embed), z)
                    orders = {head: (-model.logits(states).double()).argsort(dim=1, stable=True).tolist() for head, states in heads.items()}
                for j in range(1, K + 1):
                    for head, order in orders.items():
                        expected.setdefault((head, j), []).append(1 + order[j - 1].index(text[p + j + 1]))
                    if reading == "trained":
                        order = np.argsort(-counts, kind="stable").tolist()
                        expected.setdefault(("frequency", j), []).append(1 + order.index(text[p + j + 1]))
    rows = {(row["reading"], row["mask"]): row for row in values["rows"]}
    assert rows.keys() == expected.keys()
    for key, ranks in expected.items():
        assert rows[key]["positions"] == len(ranks) == 3 * (8 - K)
        assert rows[key]["median"] == np.median(ranks)
        assert rows[key]["quartiles"] == [np.quantile(ranks, 0.25), np.quantile(ranks, 0.75)]
        assert list(rows[key]["shares"].values()) == [np.mean(np.array(ranks) <= top) for top in (1, 10, 51, 200)]
    assert values["vocabulary"] == 1024 and "1,024" in values["notes"][0]


def test_rank_counts_ties_by_id():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]] * 4)
    assert probe.rank(logits, torch.arange(4)).tolist() == [4, 1, 2, 3]
    assert logits.argmax(1)[0] == 1


def test_rank_study_and_its_memory(toy, tmp_path, monkeypatch):
    arguments = (*flags(toy, tmp_path), "--ranks", "1", "4", "--seeds", "2")
    values = study("rank", *arguments)
    assert [(r["rank"], r["seed"]) for r in values["rows"]] == [(1, 0), (1, 1), (4, 0), (4, 1)]
    base = sum(tensor_sizes(toy / "model" / "model.safetensors").values())
    for row in values["rows"]:
        (directory,) = (tmp_path / "work" / "rank").glob(f"rank-{row['rank']}-seed-{row['seed']}-*")
        sizes = tensor_sizes(directory / "adapter_model.safetensors")
        keys = {"lora": "lora_", "sampler": "sampler.", "masks": "masks"}
        parts = {part: sum(size for name, size in sizes.items() if key in name) for part, key in keys.items()}
        assert sum(parts.values()) == sum(sizes.values())
        assert row["memory_percent"] == pytest.approx({part: 100 * size / base for part, size in parts.items()})
        assert load_adapter(directory).notes["training"]["steps_done"] == row["steps"] == 2
        assert row["with_sampler"]["sampler"] and not row["without_sampler"]["sampler"]
        assert row["without_sampler"]["per_prompt"] and 1 <= row["without_sampler"]["pooled"] <= K + 1

    monkeypatch.setattr(common, "Trainer", lambda *args, **options: pytest.fail("what was trained is trained again"))
    assert study("rank", *arguments)["rows"] == values["rows"]
    monkeypatch.undo()
    assert study("rank", *arguments, "--ranks", "1", "--seeds", "1", "--lr", "1e-4")["rows"][0]["steps"] == 2
    assert len(list((tmp_path / "work" / "rank").glob("rank-1-seed-0-*"))) == 2  # other settings are another run


def test_gating_holds_the_gated_model_still(toy, tmp_path, monkeypatch):
    arguments = (*flags(toy, tmp_path), "--rank", "3", "--lr", "0.5")
    values = study("gating", *arguments)
    gated, ordinary = values["rows"]["gated"], values["rows"]["ordinary"]
    assert values["constant"] and values["as_base"]
    assert [r["step"] for r in gated] == [r["step"] for r in ordinary] == [0, 1, 2]
    assert {r["logits"] for r in gated} == {values["base"]["logits"]} and {r["next_token_loss"] for r in gated} == {values["base"]["next_token_loss"]}
    assert len({r["logits"] for r in ordinary}) == 3
    # The base model's loss, worked out by transformers.
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(toy / "model")
    prompts = [torch.tensor([p]) for p in first_prompts(toy)]
    with torch.no_grad():
        total = sum(float(hf(p, labels=p).loss) * (p.shape[1] - 1) for p in prompts)
        right = sum(int((hf(p).logits[0, :-1].argmax(-1) == p[0, 1:]).sum()) for p in prompts)
    count = sum(p.shape[1] - 1 for p in prompts)
    assert values["base"]["next_token_loss"] == pytest.approx(total / count, rel=1e-5)
    assert values["base"]["next_token_right"] == right / count

    seen = []
    plain = gating.next_token
    monkeypatch.setattr(gating, "next_token", lambda model, texts: seen.append(0) or plain(model, texts) | {"logits": str(len(seen))})
    shutil.rmtree(tmp_path / "work")
    assert not study("gating", *arguments, code=1)["constant"]


def test_ladder_goes_up_the_papers_rungs(toy, tmp_path, monkeypatch):
    def marked(model, prompts, new_tokens, mode, k, use_sampler, batch=1):
        """A random adapter's drafts are never right: figures that tell one way of decoding from another."""
        record = acceptance(model, prompts, new_tokens, mode, k, use_sampler, batch)
        shift = abs(float(model.masks[0, 0])) + 10 * (mode == "linear") + 20 * use_sampler
        return record | {"per_prompt": [value + (i + 1) ** 2 * shift for i, value in enumerate(record["per_prompt"])]}

    monkeypatch.setattr(common, "acceptance", marked)
    arguments = flags(toy, tmp_path, training=False)
    values = study("ladder", *arguments, "--pair", toy / "with-lcm", toy / "without-lcm")
    ways = [("without-lcm", "linear", False), ("without-lcm", "quadratic", False), ("without-lcm", "quadratic", True), ("with-lcm", "quadratic", True)]
    prompts, before = first_prompts(toy), None
    for row, (adapter, mode, sampler) in zip(values["rows"], ways, strict=True):
        model = load_adapter(toy / adapter).apply(load_model(toy / "model"))
        alone = marked(model, prompts, 8, mode, K, sampler)  # prompt by prompt
        assert {key: row[key] for key in alone} == alone
        if before is not None:
            assert row["gain"] == pytest.approx(np.mean(np.subtract(alone["per_prompt"], before)))
            assert row["gain_error"] == pytest.approx(np.std(np.subtract(alone["per_prompt"], before), ddof=1) / 3**0.5)
        before = alone["per_prompt"]
    assert values["differences"] == [] and [row["paper"] for row in values["rows"]] == [2.21, 2.75, 3.05, 3.375]
    assert studies.main(["ladder", *arguments, "--pair", str(toy / "with-lcm"), str(toy / "with-lcm")]) == 2


def test_drawn_text(toy, tmp_path, monkeypatch):
    arguments = [*flags(toy, tmp_path, training=False), "--adapter", toy / "with-lcm", "--temperatures", 2]
    values = study("drawn", *arguments)
    assert [(r["temperature"], r["noise"], r["same"]) for r in values["rows"]] == [(0, False, 3), (2, True, 3), (2, False, 3)]
    model = load_adapter(toy / "with-lcm").apply(load_model(toy / "model"))
    for row in values["rows"]:
        options = dict(temperature=row["temperature"], seed=[0, 1, 2], eos=()) if row["temperature"] else {}
        if row["noise"] or not row["temperature"]:
            stats = generate(model, first_prompts(toy), mode="quadratic", max_new_tokens=8, **options).stats
            assert row["pooled"] == stats.tokens_per_step
    prompts, seen = first_prompts(toy), []
    original = model.draft
    monkeypatch.setattr(type(model), "draft", lambda self, *args: seen.append(args[4:]) or original(*args))
    with drawn.most_likely_drafts(model):
        generate(model, prompts, mode="quadratic", max_new_tokens=4, temperature=1.0, seed=0)
    assert seen and not any(seen)
    generate(model, prompts, mode="quadratic", max_new_tokens=4, temperature=1.0, seed=0)
    assert seen[-1][0].temperature == 1.0
    monkeypatch.undo()
    monkeypatch.setattr(drawn, "measure", lambda row, *args, **options: [[t[0] ^ 1, *t[1:]] for t in measure(row, *args, **options)])
    assert studies.main(["drawn", *map(str, arguments)]) == 1
    assert studies.main(["drawn", *map(str, arguments[:-1]), "0"]) == 2


def test_domains_take_only_what_was_not_trained_on(tmp_path):
    held = [f"m{i}.py" for i in range(99) if is_held_out(f"m{i}.py")][0]
    tested = [f"test/test_{i}.py" for i in range(99) if is_held_out(f"test/test_{i}.py")][0]
    trained = [f"m{i}.py" for i in range(99) if not is_held_out(f"m{i}.py")][0]
    for name in (f"lib/{held}", f"lib/{tested}", f"lib/{trained}", "torch/nn.py", "lib/idlelib/help.html"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "torch" / "latin.py").write_bytes(b"\xe9")
    found = domains.find_domains(tmp_path / "lib", tmp_path / "torch")
    assert list(found["Python, library"]) == [held] and list(found["Python, tests"]) == [tested]
    assert found["Python, PyTorch"] == {"nn.py": "text of torch/nn.py"} and list(found["HTML"]) == ["idlelib/help.html"]
    assert found["C++ headers, PyTorch"] == found["number tables"] == {}
    assert domains.find_domains(tmp_path / "nowhere", tmp_path / "torch")["Python, library"] == {}


def test_domains_of_this_installation():
    found = domains.find_domains()
    assert sum(len([text for text in texts.values() if len(text) > 2000]) > 0 for texts in found.values()) >= 4


def test_domains_study_says_what_is_missing(toy, tmp_path, monkeypatch):
    source = "".join(f"value_{i} = call({i}, 'name')\n" for i in range(200))
    monkeypatch.setattr(domains, "find_domains", lambda: {"code": {"a.py": source}, "nothing": {}, "short": {"b": "x"}})
    arguments = (*flags(toy, tmp_path, training=False, held_out=False), "--adapter", toy / "with-lcm")
    values = study("domains", *arguments)
    (row,) = values["rows"]
    assert row["domain"] == "code" and len(row["prompts"]) == 3 and list(row["by_masks"]) == ["1", "2"]
    assert all(1 <= record["pooled"] <= int(k) + 1 for k, record in row["by_masks"].items())
    assert values["absent"] == ["nothing", "short"] and "nothing, short" in values["notes"][0]
    assert studies.main(["domains", *map(str, arguments), "--k", "3"]) == 2


def test_copies_study(toy, tmp_path, monkeypatch):
    source = "".join(f"value_{i} = call({i}, 'name')\n" for i in range(200))
    monkeypatch.setattr(domains, "find_domains", lambda: {"code": {"a.py": source}, "nothing": {}})
    arguments = (*flags(toy, tmp_path, training=False, held_out=False), "--adapter", toy / "with-lcm", "--temperatures", 2)
    values = study("copies", *arguments)
    assert [(r["domain"], r["temperature"]) for r in values["rows"]] == [("code", 0), ("code", 2)] and values["absent"] == ["nothing"]
    model, tokenizer = load_adapter(toy / "with-lcm").apply(load_model(toy / "model")), load_tokenizer(toy / "model")
    prompts = [tokenizer(record["prompt"])["input_ids"] for record in held_out_prompts(tokenizer, {"a.py": source}, 3, domains.PROMPT_LENGTH, 0)]
    for row in values["rows"]:
        seeds = dict(temperature=2.0, seed=[0, 1, 2], eos=()) if row["temperature"] else {}
        ways = {"masks": dict(mode="quadratic"), "copies": dict(mode="autoregressive", lookup=10), "both": dict(mode="quadratic", lookup=10)}
        found = {way: generate(model, prompts, max_new_tokens=8, **each, **seeds).stats.tokens_per_step for way, each in ways.items()}
        assert {way: record["pooled"] for way, record in row["by_way"].items()} == found
    assert studies.main(["copies", *map(str, arguments), "--lookup", "17"]) == 2


def test_shortlist_study(toy, tmp_path, monkeypatch):
    asked = []  # a random adapter's drafts are as bad from any list
    monkeypatch.setattr(decode, "generate", lambda *args, **options: asked.append(options["draft_candidates"]) or generate(*args, **options))
    arguments = (*flags(toy, tmp_path, training=False), "--adapter", toy / "with-lcm")
    values = study("shortlist", *arguments, "--candidates", 1, 9, 1)
    assert [row["candidates"] for row in values["rows"]] == [1024, 9, 1] == asked and len(values["table"]) == 5
    model = load_adapter(toy / "with-lcm").apply(load_model(toy / "model"))
    for row in values["rows"]:
        found = generate(model, first_prompts(toy), mode="quadratic", draft_candidates=row["candidates"], max_new_tokens=8)
        assert row["pooled"] == found.stats.tokens_per_step
    for wrong in ("0", "1024"):
        assert studies.main(["shortlist", *map(str, arguments), "--candidates", wrong]) == 2


def test_a_shortlist_needs_a_sampler(toy, tmp_path, capsys):
    model = load_model(toy / "model")
    model.add_adapter(MTPConfig(K, 3, sampler=False))
    save_adapter(model, tmp_path / "bare")
    assert studies.main(["shortlist", *flags(toy, tmp_path, training=False), "--adapter", str(tmp_path / "bare")]) == 2
    assert "no sampler" in capsys.readouterr().err


def test_options_get_equal_time_and_survive_interruptions(toy, tmp_path, monkeypatch):
    arguments = (*flags(toy, tmp_path), "--source", str(toy / "source.jsonl"), "--rank", "3", "--seeds", "1", "--variants", "all", "source")
    calls = []

    def stopped(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return acceptance(*args, **options)

    monkeypatch.setattr(common, "acceptance", stopped)
    monkeypatch.setattr(common.Study, "_calibrate", lambda self, kinds: {name: 1.0 if name == "plain" else 0.4 for name in kinds})
    assert studies.main(["options", *arguments]) == 130
    monkeypatch.setattr(common.Study, "_calibrate", lambda self, kinds: pytest.fail("told before"))
    values = study("options", *arguments)
    assert len(calls) == 4  # the decoding that was done is not done again
    assert [(r["variant"], r["steps"]) for r in values["rows"]] == [("plain", 2), ("all", 5), ("source", 5)] and values["budget_seconds"] == 2
    changed = values["rows"][1]["settings"]
    assert [r["data"] for r in values["rows"]] == ["own", "own", "source"]
    expected = {"soft_targets": 1, "mask_decay": 0.9, "train_masks": True, "anchors_per_sequence": 3}
    assert {key: changed[key] for key in expected} == expected
    assert not values["rows"][0]["settings"]["train_masks"]
    for row, summary in zip(values["rows"], values["summary"], strict=True):
        assert summary["mean"] == row["decoding"]["pooled"] and not summary["told_apart"]
        assert summary["gain_percent"] == pytest.approx(100 * (summary["mean"] / values["summary"][0]["mean"] - 1))
        (directory,) = (tmp_path / "work" / "options").glob(f"{row['variant']}-seed-0-*")
        with safe_open(directory / "checkpoint.safetensors", "pt") as file:
            assert json.loads(file.metadata()["state"])["step"] == row["steps"]
    assert study("options", *arguments)["summary"] == values["summary"]  # the lengths stay, or all would be trained again
    assert len(calls) == 7  # the decodings are measured anew


def test_a_stopped_training_goes_on(toy, tmp_path, monkeypatch):
    arguments, steps = (*flags(toy, tmp_path), "--ranks", "1"), []
    plain = common.Trainer.train_step

    def step(self):
        steps.append(self.step)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return plain(self)

    monkeypatch.setattr(common.Trainer, "_stopping", lambda self, stop: len(steps) == 1)
    monkeypatch.setattr(common.Trainer, "train_step", step)
    assert studies.main(["rank", *arguments]) == 130  # stopped after the first step, saved
    monkeypatch.undo()
    monkeypatch.setattr(common.Trainer, "train_step", lambda self: steps.append(self.step) or plain(self))
    study("rank", *arguments)
    assert steps == [0, 1]


def test_a_step_is_timed_and_seconds_become_steps(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(common.Study, "clock", lambda self: clock.pop(0))
    clock = [10.0, 18.0, 20.0, 24.0, 30.0, 36.0]  # three rounds of four steps: 2, 1 and 1.5 seconds a step
    arguments = (*flags(toy, tmp_path, seconds=True), "--seconds", "3.2", "--ranks", "1", "--rounds", "3")
    assert study("rank", *arguments)["rows"][0]["steps"] == 2 and not clock


@pytest.mark.parametrize(
    "values, plain, apart",
    [([2.0, 2.1], [1.0, 1.2], True), ([1.1, 1.3], [1.0, 1.2], False), ([1.3, 1.3], [1.0, 1.2], False), ([9.0], [1.0], False), ([0.5, 0.6], [1.0, 1.2], True)],
)
def test_differences_within_the_spread_are_not_told_apart(values, plain, apart):
    assert options.told_apart(values, plain) is apart


@pytest.mark.parametrize("name", studies.STUDIES)
def test_sizes_are_what_was_named_else_the_studys_own(name):
    parser = studies.build_parser()[1][name]
    usual = studies.settle(name, studies.build_parser()[1][name], [])
    quick = studies.settle(name, parser, ["--quick"])
    named = studies.settle(name, studies.build_parser()[1][name], ["--quick", "--prompts", "7"])
    assert quick.prompts < usual.prompts and named.prompts == 7 and quick.new_tokens < usual.new_tokens == 100
    if hasattr(usual, "data"):
        assert (usual.steps is None) != (usual.seconds is None) and quick.seconds is None and quick.steps <= 2
        both = studies.settle(name, studies.build_parser()[1][name], ["--seconds", "5"])
        assert both.steps is None and both.seconds == 5


@pytest.mark.parametrize(
    "arguments, word",
    [(["--prompts", "0"], "--prompts is 0"), (["--data", "nowhere.jsonl"], "nowhere.jsonl"), (["--seconds", "0"], "--seconds is 0"),
     (["--variants", "best"], "best"), (["--model", "nowhere"], "nowhere")],
)  # fmt: skip
def test_bad_arguments_are_named(toy, tmp_path, capsys, arguments, word):
    given = [*flags(toy, tmp_path, seconds=True), "--source", str(toy / "source.jsonl"), "--variants", "plain", "all-anchors"]
    assert studies.main(["options", *given, *arguments]) == 2
    assert word in capsys.readouterr().err


def test_a_flag_for_all_is_no_abbreviation_of_another():
    parser, own = studies.build_parser()
    named = ["--rank", "8", "--seed", "4", "--k", "1", "2"]
    assert parser.parse_args(["all", *named]).study == "all"
    args = {name: studies.settle(name, own[name], named) for name in studies.STUDIES}
    assert args["rank"].ranks == [1, 4, 16, 64, 128] and args["rank"].seeds == 1 and args["options"].rank == 8 and args["domains"].k == [1, 2]
    with pytest.raises(SystemExit):
        parser.parse_args(["rank", "--rank", "8"])
