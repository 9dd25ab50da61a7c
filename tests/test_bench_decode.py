"""`python -m bench.decode` at toy size: it runs, it writes what it says, and its numbers hang together."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from bench import decode, report
from bench.report import PeakMemory, quartiles, table
from mtp_model import generate, load_model, save_adapter
from mtp_model.demo import ADAPTER, BASE
from mtp_model.layout import MODES


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    code = decode.main(["--num-prompts", "2", "--new-tokens", "12", "--repeats", "1", "--k", "3", "--device", "cpu", "--out", str(out)])
    return code, json.loads((out / "decode.json").read_text()), out


def test_main_job_runs_and_is_exact(result):
    code, values, _ = result
    assert code == 0
    ours = [r for r in values["rows"] if r["passes"]]
    ways = [("autoregressive", 0), ("linear", 3), ("quadratic", 3)]
    assert [(r["name"], r["k"], r["lookup"].get("lookup", 0)) for r in ours] == [(*way, copied) for copied in (0, 10) for way in ways]
    for row in ours:
        assert row["identical"] == row["compared"] == 2
        assert 1 <= row["tokens_per_step"] <= max(row["k"], row["lookup"].get("lookup", 0)) + 1
        assert row["tokens_per_step"] == row["tokens"] / row["passes"]
    assert ours[0]["tokens_per_step"] == 1 and ours[0]["speedup"] == [1, 1, 1]


def test_json_names_settings_versions_and_commit(result):
    _, values, _ = result
    assert values["settings"]["new_tokens"] == 12 and values["settings"]["dtype"] == "float32"
    assert values["settings"]["model"] == "mtp_model/demo/base"
    assert values["environment"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"date", "device", "commit", "cpu_threads"} <= set(values["environment"])
    assert any(r["name"] == "transformers generate" for r in values["rows"])


def test_drawn_text(tmp_path, capsys):
    """Ours is one text in every way, to its full length; transformers draws another, which is not compared."""
    arguments = ["--num-prompts", "2", "--new-tokens", "12", "--repeats", "1", "--k", "3", "--device", "cpu", "--out", str(tmp_path)]
    assert decode.main([*arguments, "--temperature", "0.9", "--top-k", "40", "--modes", "quadratic", "--lookup", "5"]) == 0
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [(r["identical"], r["compared"]) for r in rows] == [(2, 2)] * 4 + [(0, 0)] * 2
    assert {r["tokens"] for r in rows} == {24} and [r["lookup"].get("lookup") for r in rows] == [None, None, 5, 5, None, None]
    assert "top_k=40" in capsys.readouterr().out
    model, prompts = decode.load_adapter(ADAPTER).apply(load_model(BASE)), [[1, 2], [3]]
    greedy, drawn = (decode.acceptance(model, prompts, 12, "quadratic", 3, drawn=each) for each in (None, decode.Drawn(3.0)))
    assert drawn["pooled"] < greedy["pooled"]


def test_drawn_prompts_have_a_seed_each_and_their_full_length(make_hf_dir, monkeypatch):
    seen = []
    monkeypatch.setattr(decode, "measure", lambda row, model, peer, batch, *_, **options: seen.append((batch, options["seed"])) or [[0]] * len(batch))
    batches = [[[1], [2, 2]], [[1], [2]], [[3]]]
    decode.compare([decode.Row("autoregressive")], None, None, batches, 4, 1, decode.Drawn(1.0))
    assert seen[2:] == list(zip(batches, ([0, 1], [2, 3], [4]), strict=True))
    assert {len(batch): batch for batch, _ in seen[:2]} == {2: batches[0], 1: batches[2]}  # to warm up, the longest of each size
    peer = decode.Peer(make_hf_dir(seed=3, eos_token_id=[0, 1, 2]), "cpu", torch.float32, decode.Drawn(2.0))
    assert len(peer.run([[1, 2, 3]], 12, False)[0]) == 12


def test_flags_of_drawn_and_copied_text_reach_every_job(tmp_path, monkeypatch):
    seen, flags = [], ["--num-prompts", "1", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(decode, "check", lambda *arguments: seen.append(arguments[-2:]) or ("", True))
    monkeypatch.setattr(decode, "ablation", lambda *arguments: seen.append(arguments[-2:]) or ("", []))
    for job in ("--check", "--ablation"):
        assert decode.main([*flags, job, "--temperature", "0.9", "--top-p", "0.5", "--min-p", "0.1"]) == decode.main([*flags, job, "--lookup", "7"]) == 0
    none, some = ({"lookup": tokens, "lookup_match": None} for tokens in (None, 7))
    assert seen == [(decode.Drawn(0.9, None, 0.5, 0.1), none), (None, some)] * 2
    monkeypatch.undo()
    model = decode.load_adapter(ADAPTER).apply(load_model(BASE, dtype=torch.float32))
    text, good = decode.check(model, [[1, 2], [3], [4]], 5, MODES[1:], [2], decode.Drawn(1.0))
    assert good and text.count("3 of 3") == 2 * 4
    seen.clear()
    measure = decode.measure
    monkeypatch.setattr(decode, "measure", lambda row, *args, **options: seen.append(row.options) or measure(row, *args, **options))
    record = decode.acceptance(model, [[1, 2]], 3, "linear", 1, lookup=some)
    assert seen == [{"mode": "linear", "k": 1, **some}]
    assert decode.check(model, [[1, 2]], 3, MODES[1:], [2], lookup=some)[1]
    assert seen[1:] == [{"mode": mode, "k": None if mode == "autoregressive" else 2, **some} for mode in MODES for _ in range(2)]
    seen.clear()
    monkeypatch.setattr(decode, "acceptance", lambda *_, **options: seen.append(options) or record)
    decode.ablation(model, [[1]], 5, 2, [ADAPTER], decode.Drawn(1.0), some)
    assert seen == [{"drawn": decode.Drawn(1.0), "lookup": some}] * 4
    for wrong, word in (
        (["--top-k", "40"], "top_k is 40 and temperature 0"), (["--lookup", "0"], "lookup is 0"), (["--lookup-match", "3"], "lookup_match is 3 and lookup None")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            decode.main([*flags, *wrong])


def test_rows_are_warmed_up_as_they_are_measured_and_copies_are_not_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows, seen = [decode.Row("autoregressive"), decode.Row("linear", 2), decode.Row("linear", 2, lookup={"lookup": 4})], []
    monkeypatch.setattr(decode, "measure", lambda row, *_, **__: seen.append(row.options) or [[0]])
    decode.compare(rows, None, None, [[[1]]], 3, 1)
    assert seen == [row.options for row in rows] * 2
    for row in rows:
        row.tokens = row.passes = 1
    monkeypatch.setattr(decode, "ratio", lambda base, row: seen.append(row) or (1.0, 1.0, 1.0))
    assert decode.plot(rows, tmp_path / "decode.png", "") and seen[6:] == rows[1:2]  # against k, which copies have nothing to do with


def test_sample_brackets_hold_only_drafts():
    model = decode.load_adapter(ADAPTER).apply(load_model(BASE, dtype=torch.float32))
    tokenizer = decode.load_tokenizer(BASE)
    prompt = tokenizer("def main():\n    for i in range(")["input_ids"]
    text = decode.sample(model, tokenizer, prompt, decode.Row("quadratic", 4), 30, colour=False)
    plain = decode.generate(model, [prompt], mode="autoregressive", max_new_tokens=30).tokens[0]
    body = text.split("\n\n(in brackets")[0]
    assert body != tokenizer.decode(prompt) + tokenizer.decode(plain)  # something was drafted and marked
    coloured = decode.sample(model, tokenizer, prompt, decode.Row("quadratic", 4), 30, colour=True).split("\n\n(green")[0]
    for code in ("\033[2m", "\033[32m", "\033[0m"):
        coloured = coloured.replace(code, "")
    assert coloured == tokenizer.decode(prompt) + tokenizer.decode(plain)


def test_check_counts_a_wrong_text(monkeypatch):
    model = decode.load_adapter(ADAPTER).apply(load_model(BASE, dtype=torch.float32))
    prompts = [decode.load_tokenizer(BASE)("import os\n")["input_ids"]]
    assert decode.check(model, prompts, 8, MODES[1:], [2])[1]
    measure = decode.measure

    def wrong(row, *args, **options):
        tokens = measure(row, *args, **options)
        return [[t[0] ^ 1, *t[1:]] for t in tokens] if row.name == "linear" else tokens

    monkeypatch.setattr(decode, "measure", wrong)
    text, good = decode.check(model, prompts, 8, MODES[1:], [2])
    assert not good and "0 of 1" in text


def test_defaults_follow_the_adapter(tmp_path, toy_adapter_model, monkeypatch):
    """An adapter of 3 masks: no job asks for more, and each gets the modes it is for."""
    model, seen = toy_adapter_model(k=3), []
    save_adapter(model, tmp_path / "adapter")
    flags = ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path), "--prompts", str(tmp_path / "p.jsonl")]
    (tmp_path / "p.jsonl").write_text('{"prompt_ids": [1, 2, 3], "response_ids": [4]}\n')
    monkeypatch.setattr(decode, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(decode, "check", lambda model, prompts, new, *ways: seen.append(ways[:2]) or ("", True))
    monkeypatch.setattr(decode, "ablation", lambda model, prompts, new, k, *_: seen.append(k) or ("", []))
    monkeypatch.setattr(decode, "compare", lambda rows, *arguments: seen.append(([(r.name, r.k) for r in rows if not r.lookup], arguments[4])) or 1 / 0)
    assert decode.main([*flags, "--check"]) == decode.main([*flags, "--ablation"]) == 0
    with pytest.raises(ZeroDivisionError):
        decode.main([*flags, "--no-transformers"])
    ways = [("linear", 1), ("linear", 2), ("quadratic", 1), ("quadratic", 2), ("quadratic", 3)]
    assert seen == [(MODES[1:], [1, 2]), 3, ([("autoregressive", 0), *ways], 2)]
    assert json.loads((tmp_path / "decode_check.json").read_text())["settings"]["repeats"] is None


def test_check_of_some_modes(tmp_path, capsys):
    arguments = ["--check", "--modes", "quadratic", "--k", "3", "--num-prompts", "2", "--new-tokens", "5", "--device", "cpu", "--out", str(tmp_path)]
    assert decode.main(arguments) == 0
    table = json.loads((tmp_path / "decode_check.json").read_text())["table"]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["autoregressive", "quadratic"] and all("2 of 2" in line for line in table[2:])


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--check", "--batch", "2"], "--check decodes in batches of 1 and 4, once, and shows no sample, whatever --batch may say"),
        (["--check", "--batch", "2", "--repeats", "1"], "whatever --batch and --repeats may say"),
        (["--check", "--no-transformers", "--seed", "3"], "whatever --seed and --no-transformers may say"),
        (["--ablation", "--modes", "linear"], "--ablation decodes in both modes, one by one, once, and shows no sample, whatever --modes may say"),
        (["--ablation", "--batch", "1"], "whatever --batch may say"),
        (["--ablation", "--repeats", "2"], "whatever --repeats may say"),
        (["--ablation", "--k", "2", "4"], r"--k has \[2, 4\]; accepted is one with --ablation"),
    ],
)
def test_flags_that_would_go_unheeded(tmp_path, monkeypatch, flags, word):
    monkeypatch.setattr(decode, "load_asked_model", lambda _: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=word):
        decode.main([*flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [False, True])
def test_ablation(tmp_path, own):
    """Four rows for an adapter; behind the demo's own stand those of the pair with and without LCM."""
    adapter = shutil.copytree(ADAPTER, tmp_path / "own") if own else ADAPTER
    arguments = ["--ablation", "--num-prompts", "2", "--new-tokens", "10", "--k", "2", "--adapter", str(adapter), "--device", "cpu", "--out", str(tmp_path)]
    assert decode.main(arguments) == 0
    rows = json.loads((tmp_path / "decode_ablation.json").read_text())["rows"]
    ways = [(mode, sampler) for mode in ("linear", "quadratic") for sampler in (False, True)]
    assert [(r["mode"], r["sampler"], r["lcm"]) for r in rows] == [(*way, lcm) for lcm in ([True] if own else [True, True, False]) for way in ways]
    assert all(len(r["per_prompt"]) == 2 and 1 <= r["pooled"] <= 3 for r in rows)
    notes = json.loads((ADAPTER / "adapter_config.json").read_text())["notes"]
    trained = notes["training"]["steps_done"], notes["before"]["training"]["steps_done"]  # the demo's was trained further
    assert [r["steps"] for r in rows[::4]] == [sum(trained), 800, 800][: 1 if own else 3]


@pytest.mark.parametrize(
    "arguments, word",
    [(["--k", "9"], "--k"), (["--batch", "0"], "--batch"), (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"), (["--adapter", "nowhere"], "nowhere")],
)
def test_bad_arguments_are_named(arguments, word, capsys, tmp_path):
    with pytest.raises((ValueError, SystemExit)) as error:
        decode.main([*arguments, "--out", str(tmp_path)])
    assert word in str(error.value) + capsys.readouterr().err


def test_peak_memory_sees_an_allocation():
    with PeakMemory(torch.device("cpu")) as small:
        torch.ones(1)
    with PeakMemory(torch.device("cpu")) as large:
        torch.ones(64 * 2**20 // 4)
    assert large.mib >= small.mib + 50


def test_labels():
    ways = ("autoregressive", 0, {}), ("linear", 2, {}), ("autoregressive", 0, {"lookup": 10}), ("quadratic", 8, {"lookup": 4, "lookup_match": 3})
    labels = [decode.Row(name, k, lookup=lookup).label for name, k, lookup in ways]
    assert labels == ["autoregressive", "linear, k = 2", "lookup 10, no masks", "quadratic, k = 8, lookup 4"]


def test_speedups_and_rates():
    """A row of half the time is twice as fast; tokens per second are of all the time."""
    rows = [decode.Row("autoregressive", 0, [4.0, 2.0], 12, 12), decode.Row("linear", 2, [2.0, 1.0], 12, 8), decode.Row("quadratic", 2, [8.0, 4.0], 12, 6)]
    assert decode.ratio(rows[0], rows[1]) == (2, 2, 2)
    text, best = decode.main_table(rows)
    assert best is rows[1]
    cells = [[cell.strip() for cell in line.split("|")[2:5]] for line in text.splitlines()[2:]]
    assert cells == [["1.00", "2", "1.00x (1.00 to 1.00)"], ["1.50", "4", "2.00x (2.00 to 2.00)"], ["2.00", "1", "0.50x (0.50 to 0.50)"]]


def test_a_text_that_differs_is_an_exit_status(monkeypatch, tmp_path):
    measure = decode.measure

    def wrong(row, *args, **options):
        tokens = measure(row, *args, **options)
        return [[t[0] ^ 1, *t[1:]] for t in tokens] if row.name == "linear" else tokens

    monkeypatch.setattr(decode, "measure", wrong)
    arguments = ["--num-prompts", "1", "--new-tokens", "3", "--repeats", "1", "--k", "2", "--device", "cpu", "--no-transformers", "--out", str(tmp_path)]
    assert decode.main([*arguments, "--modes", "linear"]) == 1


def test_without_the_sampler_none_is_asked(toy_adapter_model, monkeypatch):
    model, asked = toy_adapter_model(k=2), []
    monkeypatch.setattr(decode, "generate", lambda *args, **options: asked.append(options["use_sampler"]) or generate(*args, **options))
    for use_sampler in (True, False):
        decode.acceptance(model, [[1, 2], [3]], 4, "linear", 2, use_sampler)
    assert asked == [True, True, False, False]


def test_texts_of_transformers_end_where_ours_do(make_hf_dir):
    directory, prompts = make_hf_dir(seed=3), [[1, 2, 3, 4, 5], [0], [5, 5, 1]]
    plain = generate(load_model(directory), prompts, mode="autoregressive", max_new_tokens=12).tokens
    directory = make_hf_dir("ends", seed=3, eos_token_id=[plain[0][4]])
    expected = generate(load_model(directory), prompts, mode="autoregressive", max_new_tokens=12).tokens
    assert len({len(tokens) for tokens in expected}) > 1
    assert decode.Peer(directory, "cpu", torch.float32).run(prompts, 12, False) == expected


@pytest.mark.parametrize("status, shown", [("", "abc1234"), (" M bench/report.py\n", "abc1234+changes")])
def test_a_changed_checkout_is_named(monkeypatch, status, shown):
    answers = {"rev-parse": "abc1234\n", "status": status}
    monkeypatch.setattr(report.subprocess, "run", lambda command, **_: SimpleNamespace(returncode=0, stdout=answers[command[1]]))
    assert report.environment(torch.device("cpu"))["commit"] == shown


def test_report_helpers():
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    lines = table(["a", "b"], [["x", "10"], ["long", "1"]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1].endswith(":|")
