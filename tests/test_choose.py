"""Choosing mode and k by measurement: every way is measured, on the same text, and what is slow comes last."""

import statistics
import time

import pytest

from mtp_model import __main__, choose, generate, static
from mtp_model.choose import Measured, measure

PROMPTS = [[1, 2, 3, 4, 5], [0], [5, 5, 1]]


def test_every_way_is_measured(shared):
    ranking = measure(shared.model, PROMPTS, batch=2, max_new_tokens=8, rounds=2, eos=())
    assert len(ranking) == 1 + 2 * 6 == len({(way.mode, way.k) for way in ranking})
    assert {way.k for way in ranking if way.mode == "quadratic"} == {1, 2, 3, 4, 6, 8}
    speeds = [way.tokens_per_second for way in ranking]
    assert speeds == sorted(speeds, reverse=True)
    for way in ranking:
        assert way.tokens == 24 and len(way.seconds) == 2
        results = [generate(shared.model, batch, max_new_tokens=8, eos=(), **way.options).stats for batch in (PROMPTS[:2], PROMPTS[2:])]
        assert way.passes == sum(sum(stats.passes) for stats in results)
        assert way.tokens_per_step == 24 / way.passes and way.tokens_per_second == 24 / statistics.median(way.seconds)
    (plain,) = [way for way in ranking if way.mode == "autoregressive"]
    assert plain.tokens_per_step == 1 and plain.k is None


def test_drawn_text_is_one_text(shared, monkeypatch):
    texts = []
    monkeypatch.setattr(choose, "generate", lambda *args, **options: texts.append(generate(*args, **options)) or texts[-1])
    ranking = measure(shared.model, PROMPTS, modes=["linear"], ks=[2], max_new_tokens=8, rounds=1, eos=(), temperature=1.0)
    plain, multi = ([r.tokens for r in texts[i : i + 3]] for i in (0, 3))
    assert plain == multi != [[generate(shared.model, [p], max_new_tokens=8, eos=()).tokens[0]] for p in PROMPTS] and len(ranking) == 2
    texts.clear()
    measure(shared.model, PROMPTS[:1], modes=["linear"], ks=[2], max_new_tokens=8, rounds=1, eos=(), temperature=1.0, seed=7)
    measure(shared.model, PROMPTS, modes=["linear"], ks=[2], batch=2, max_new_tokens=8, rounds=1, eos=(), temperature=1.0, seed=[0, 1, 2])
    assert [t for r in texts[2:4] for t in r.tokens] == [t for r in plain for t in r] == [t for r in texts[4:] for t in r.tokens]  # in batches too
    assert texts[0].tokens == texts[1].tokens == generate(shared.model, PROMPTS[:1], max_new_tokens=8, eos=(), temperature=1.0, seed=7).tokens != plain[0]


def test_lookup_doubles_the_ways(shared):
    ranking = measure(shared.model, PROMPTS, modes=["linear"], ks=[2], batch=3, max_new_tokens=30, rounds=1, eos=(), lookup=5, lookup_match=1)
    copies = {"lookup": 5, "lookup_match": 1}
    ways = {(way.mode, bool(way.lookup)): way for way in ranking}
    assert len(ranking) == len(ways) == 4
    for (mode, has), way in ways.items():
        assert way.lookup == (copies if has else {})
        result = generate(shared.model, PROMPTS, max_new_tokens=30, eos=(), **way.options)
        assert way.passes == sum(result.stats.passes) and way.options == {"mode": mode, "k": way.k} | way.lookup
    assert ways["autoregressive", True].tokens_per_step > 1 == ways["autoregressive", False].tokens_per_step
    assert ways["linear", True].flags == "--mode linear --k 2 --lookup 5 --lookup-match 1" and ways["autoregressive", False].flags == "--mode autoregressive"
    with pytest.raises(ValueError, match="lookup is 40"):
        measure(shared.model, PROMPTS, lookup=40)


def test_the_slow_way_comes_last(shared, monkeypatch):
    original = choose.generate

    def slow(model, prompts, **options):
        time.sleep(0.3 * (options["k"] == 2))
        return original(model, prompts, **options)

    monkeypatch.setattr(choose, "generate", slow)
    ranking = measure(shared.model, PROMPTS[:1], modes=["linear"], ks=[1, 2, 3], max_new_tokens=8, rounds=1)
    assert len(ranking) == 4 and ranking[-1].options == {"mode": "linear", "k": 2}


def test_a_recording_is_not_measured(toy_adapter_model, monkeypatch):
    """A way's step is recorded before its turn is timed, even if the ways are too many for all of their steps to be kept."""
    monkeypatch.setattr(static, "KEPT", 2)
    recorded, timed = [], []
    trace = static.StaticStep._trace
    monkeypatch.setattr(static.StaticStep, "_trace", lambda self: recorded.append(bool(timed)) or trace(self))

    def timing(*args, **options):
        timed.append(True)
        try:
            return generate(*args, **options)
        finally:
            timed.clear()

    monkeypatch.setattr(choose, "generate", timing)
    model = toy_adapter_model(k=2)
    measure(model, PROMPTS[:1], max_new_tokens=20, rounds=2)
    assert len(recorded) == 2 * 5 and not any(recorded)
    recorded.clear()
    measure(model, PROMPTS, modes=["linear"], ks=[2], batch=2, max_new_tokens=9, rounds=1)  # the last batch is smaller
    assert recorded and not any(recorded)
    recorded.clear()
    model.kept_steps.clear()
    measure(model, PROMPTS[:1], modes=["linear"], ks=[2], max_new_tokens=40, rounds=2, lookup=6, lookup_match=4)  # its first copy comes late
    assert len(recorded) == 2 * (2 + 2 * 2) and not any(recorded)
    monkeypatch.setattr(static, "KEPT", 32)
    recorded.clear()
    measure(model, PROMPTS[:1], modes=["linear"], max_new_tokens=260, rounds=1)  # a text that outgrows its first 256 columns
    assert len(recorded) == 2 * 3 and not any(recorded)


def test_bad_arguments(shared, toy_model):
    with pytest.raises(ValueError, match="no adapter"):
        measure(toy_model, PROMPTS)
    for options in (dict(batch=0), dict(rounds=0), dict(ks=[9]), dict(ks=[]), dict(ks=[True]), dict(modes=["fast"]), dict(modes=["autoregressive"])):
        with pytest.raises(ValueError, match="accepted are"):
            measure(shared.model, PROMPTS, **options)
    with pytest.raises(ValueError, match="prompts"):
        measure(shared.model, [])
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        measure(shared.model, PROMPTS, max_new_tokens=0)


def test_command_line(capsys):
    arguments = ["choose", "--limit", "1", "--max-new-tokens", "6", "--rounds", "1", "--k", "1", "2", "--modes", "quadratic", "--device", "cpu"]
    assert __main__.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split("  ")[0] for line in lines[1:4]} == {"autoregressive", "quadratic, k = 1", "quadratic, k = 2"}
    assert lines[-1].startswith("fastest here, with 1 side by side: --mode ") and "1.00x" in "".join(lines)
    assert __main__.main([*arguments, "--temperature", "0.8", "--top-p", "0.9", "--lookup", "3", "--k", "2"]) == 0
    assert {"autoregressive, lookup 3", "quadratic, k = 2, lookup 3"} <= {line.split("  ")[0] for line in capsys.readouterr().out.splitlines()}
    assert __main__.main([*arguments, "--top-p", "0.9"]) == 2
    assert "top_p is 0.9 and temperature 0" in capsys.readouterr().err
    assert __main__.main([*arguments, "--k", "9"]) == 2
    assert "accepted are 1 to the adapter's 8" in capsys.readouterr().err


def test_speedups_are_over_autoregressive(monkeypatch, capsys):
    copies = Measured("autoregressive", None, [1.0], 40, 16, {"lookup": 4})
    ranking = [copies, Measured("quadratic", 2, [2.0], 40, 20), Measured("autoregressive", None, [4.0], 40, 40), Measured("linear", 3, [8.0], 40, 10)]
    monkeypatch.setattr(choose, "measure", lambda *args, **options: ranking)
    assert __main__.main(["choose", "--limit", "1", "--device", "cpu"]) == 0
    lines = [line.split()[-3:] for line in capsys.readouterr().out.splitlines()[1:5]]
    assert lines == [["40", "4.00x", "2.50"], ["20", "2.00x", "2.00"], ["10", "1.00x", "1.00"], ["5", "0.50x", "4.00"]]
